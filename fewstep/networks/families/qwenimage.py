"""A ``QwenImageTransformer2DModel`` as the network of a field, and of a flow map."""

from typing import TYPE_CHECKING

from torch import Tensor

from fewstep.networks.families.base import Sized, TwoTimeNetwork

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


class QwenImage(Sized):
    """A ``QwenImageTransformer2DModel`` on latents (B, C, H, W), which it sees as 2 x 2 patches.

    Conditions: ``encoder_hidden_states`` (B, tokens, D), and ``encoder_hidden_states_mask`` (B, tokens), 0 where a
    token is padding; ``image`` (B, C', H, W) where it takes more channels than the state has.
    """

    code, first, patch = "qwenimage", "img_in", 4
    usual = 128
    model: "QwenImageTransformer2DModel"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        self.need(encoder_hidden_states=encoder_hidden_states)
        return self.call(self.model, x, timestep, encoder_hidden_states, encoder_hidden_states_mask, image)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens, self.model.config["joint_attention_dim"])}


class TwoTimeQwenImage(TwoTimeNetwork, QwenImage):
    """Of a ``QwenImageTransformer2DModel``."""
