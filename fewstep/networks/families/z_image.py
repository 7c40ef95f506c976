"""A ``ZImageTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel


class ZImage(Sized):
    """A ``ZImageTransformer2DModel`` on latents (B, C, H, W). Conditions: ``encoder_hidden_states``
    (B, tokens, D), and ``encoder_attention_mask`` (B, tokens), 0 where a token is padding, which it does not see.
    """

    code, first = "z_image", ""
    usual = 128
    model: "ZImageTransformer2DModel"

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


class TwoTimeZImage(TwoTimeNetwork, ZImage):
    """Of a ``ZImageTransformer2DModel``."""
