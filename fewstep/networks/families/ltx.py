"""An ``LTXVideoTransformer3DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import LTXVideoTransformer3DModel


class LTX(OfDiffusers):
    """An ``LTXVideoTransformer3DModel`` on latents of videos (B, C, F, H, W). Conditions:
    ``encoder_hidden_states`` (B, tokens, D), and ``encoder_attention_mask`` (B, tokens), 0 where a token is padding;
    ``image`` (B, C', F, H, W) where it takes more channels than the state has.

    Args:
        size: frames, height and width of the latents, which the model's config does not say; for ``shape`` alone.
    """

    code, first = "ltx", "proj_in"
    model: "LTXVideoTransformer3DModel"

    def __init__(self, model: "LTXVideoTransformer3DModel", size: tuple[int, int, int] = (21, 16, 22)) -> None:
        super().__init__(model)
        self.size = size

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
        return {"encoder_hidden_states": (tokens, self.model.config["caption_channels"])}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, F, H, W)."""
        return self.channels, *self.size


class TwoTimeLTX(TwoTimeNetwork, LTX):
    """Of an ``LTXVideoTransformer3DModel``."""
