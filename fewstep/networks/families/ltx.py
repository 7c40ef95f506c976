"""An ``LTXVideoTransformer3DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import LTXVideoTransformer3DModel


class LTX(Sized):
    """An ``LTXVideoTransformer3DModel`` on latents of videos (B, C, F, H, W). Conditions:
    ``encoder_hidden_states`` (B, tokens, D), and ``encoder_attention_mask`` (B, tokens), 0 where a token is padding;
    ``image`` (B, C', F, H, W) where it takes more channels than the state has.
    """

    code, first = "ltx", "proj_in"
    usual = (21, 16, 22)
    model: "LTXVideoTransformer3DModel"

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


class TwoTimeLTX(TwoTimeNetwork, LTX):
    """Of an ``LTXVideoTransformer3DModel``."""
