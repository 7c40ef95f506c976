"""A ``HunyuanImageTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork
from fewstep.networks.families.conditions import own_guidance

if TYPE_CHECKING:
    from diffusers import HunyuanImageTransformer2DModel


class HunyuanImage(Sized):
    """A ``HunyuanImageTransformer2DModel`` (2.1) on latents (B, C, H, W) of 32 x 32 pixels each.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens), 0 where a token is
    padding; the same of the letters that an image is to show, ``encoder_hidden_states_2`` and
    ``encoder_attention_mask_2``; ``guidance`` (B,) where the model was distilled to take it; ``image`` (B, C', H, W)
    where it takes more channels than the state has.

    As it was distilled to few steps, by MeanFlow, it is a flow map by itself, and here the velocity of that.
    """

    code, first = "hunyuanimage", "x_embedder.proj"
    usual = 64
    model: "HunyuanImageTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        guidance: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, guidance=guidance)
        self.check_guidance(guidance)
        text = (encoder_hidden_states, encoder_attention_mask, encoder_hidden_states_2, encoder_attention_mask_2)
        return self.call(self.model, x, timestep, *text, guidance, image)

    @property
    def has_second_time(self) -> bool:
        return bool(self.model.config["use_meanflow"])

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["text_embed_dim"]), **own_guidance(self.model)}


class TwoTimeHunyuanImage(TwoTimeNetwork, HunyuanImage):
    """Of a ``HunyuanImageTransformer2DModel``."""
