"""A ``HunyuanImageTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import HunyuanImageTransformer2DModel


class HunyuanImage(OfDiffusers):
    """A ``HunyuanImageTransformer2DModel`` (2.1) on latents (B, C, H, W) of 32 x 32 pixels each.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens), 0 where a token is
    padding; the same of the letters that an image is to show, ``encoder_hidden_states_2`` and
    ``encoder_attention_mask_2``; ``guidance`` (B,) where the model was distilled to take it; ``image`` (B, C', H, W)
    where it takes more channels than the state has.

    Args:
        size: height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    code, first = "hunyuanimage", "x_embedder.proj"
    model: "HunyuanImageTransformer2DModel"

    def __init__(self, model: "HunyuanImageTransformer2DModel", size: int = 64) -> None:
        super().__init__(model)
        self.size = size

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
    def takes_guidance(self) -> bool:
        return self.model.config["guidance_embeds"]

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        guidance = {"guidance": ()} if self.model.config["guidance_embeds"] else {}
        return {"encoder_hidden_states": (tokens, self.model.config["text_embed_dim"]), **guidance}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return self.channels, self.size, self.size


class TwoTimeHunyuanImage(TwoTimeNetwork, HunyuanImage):
    """Of a ``HunyuanImageTransformer2DModel``."""
