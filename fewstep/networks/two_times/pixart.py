"""A ``PixArtTransformer2DModel``: how it is called, and it with a second time."""

import functools
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ..channels import beside, mean_part
from .rows import EachHalf, second_of_two
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    resolution: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``PixArtTransformer2DModel`` on the state x (B, C, H, W)."""
    output = model(
        beside(model, x, image),
        encoder_hidden_states=encoder_hidden_states,
        timestep=timestep,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        encoder_attention_mask=encoder_attention_mask,
    )
    return mean_part(output.sample, x)


class TwoTimePixArtTransformer2DModel(TwoTimeTransformer, PixArtTransformer2DModel):
    """A ``PixArtTransformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        norm: Any = self.adaln_single
        width = self.inner_dim
        self.embed_rows(norm.emb, late, guided)
        if late:
            if self.use_additional_conditions:
                raise ValueError("second_time: late, and a PixArt is told the size of the image with its time: say t")
            norm.silu, norm.linear = nn.Identity(), EachHalf(norm.linear)
            norm.register_forward_hook(functools.partial(second_of_two, width=width))
            self.tell_late(list(self.transformer_blocks), width=6 * width)
