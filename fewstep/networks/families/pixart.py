"""A ``PixArtTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel


class PixArt(OfDiffusers):
    """A ``PixArtTransformer2DModel``: PixArt-alpha and sigma.

    Conditions: ``encoder_hidden_states`` (B, tokens, D) and ``encoder_attention_mask`` (B, tokens); ``resolution``
    (B, 2) and ``aspect_ratio`` (B, 1) where the model was trained with them; ``image`` (B, C', H, W) where it takes
    more channels than the state has.
    """

    code, first = "pixart", "pos_embed.proj"
    model: "PixArtTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states, resolution=resolution, aspect_ratio=aspect_ratio)
        told = {"resolution": resolution, "aspect_ratio": aspect_ratio, "image": image}
        return self.call(self.model, x, timestep, encoder_hidden_states, encoder_attention_mask, **told)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.model.config
        width = config["caption_channels"] or config["cross_attention_dim"]
        sizes = {"resolution": (2,), "aspect_ratio": (1,)} if self.model.use_additional_conditions else {}
        return {"encoder_hidden_states": (tokens, width), **sizes}


class TwoTimePixArt(TwoTimeNetwork, PixArt):
    """Of a ``PixArtTransformer2DModel``."""
