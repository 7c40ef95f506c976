"""A ``QwenImageTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from ..channels import beside
from .patches import pack, unpack
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``QwenImageTransformer2DModel`` on the state x (B, C, H, W), which it sees as 2 x 2 patches."""
    height, width = x.shape[-2:]
    patches = pack(beside(model, x, image, patch=4))
    output = model(
        patches,
        encoder_hidden_states=encoder_hidden_states,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * len(x),
    )
    return unpack(output.sample, height, width)


class TwoTimeQwenImageTransformer2DModel(TwoTimeTransformer, QwenImageTransformer2DModel):
    """A ``QwenImageTransformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        if self.config["zero_cond_t"] or self.config["use_additional_t_cond"]:
            raise ValueError("a QwenImage that edits or layers is told more with its time: it has no room for a second")
        self.embed_rows(self.time_text_embed, late, guided)
        if late:
            self.tell_late(list(self.transformer_blocks), self.norm_out, width=self.inner_dim)
