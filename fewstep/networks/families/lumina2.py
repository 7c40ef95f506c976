"""A ``Lumina2Transformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import Lumina2Transformer2DModel


class Lumina2(OfDiffusers):
    """A ``Lumina2Transformer2DModel`` on latents (B, C, H, W). Conditions: ``encoder_hidden_states``
    (B, tokens, D), and ``encoder_attention_mask`` (B, tokens), 0 where a token is padding.
    """

    code, first = "lumina2", ""
    counts_channels = True
    model: "Lumina2Transformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states)
        return self.call(self.model, x, timestep, encoder_hidden_states, encoder_attention_mask, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["cap_feat_dim"])}


class TwoTimeLumina2(TwoTimeNetwork, Lumina2):
    """Of a ``Lumina2Transformer2DModel``."""
