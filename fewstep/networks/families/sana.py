"""A ``SanaTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.families.conditions import own_guidance

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel


class Sana(OfDiffusers):
    """A ``SanaTransformer2DModel`` on latents (B, C, H, W) of 32 x 32 pixels each. Conditions:
    ``encoder_hidden_states`` (B, tokens, D), ``encoder_attention_mask`` (B, tokens), 0 where a token is padding,
    ``guidance`` (B,) where the model was distilled to take it, as Sana-Sprint, and ``image`` (B, C', H, W) where it
    takes more channels than the state has.
    """

    code, first = "sana", "patch_embed.proj"
    names_sigmas = False
    model: "SanaTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, guidance=guidance)
        self.check_guidance(guidance)
        return self.call(self.model, x, timestep, encoder_hidden_states, encoder_attention_mask, guidance, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["caption_channels"]), **own_guidance(self.model)}


class TwoTimeSana(TwoTimeNetwork, Sana):
    """Of a ``SanaTransformer2DModel``."""
