"""A ``DiTTransformer2DModel``: how it is called, and it with a second time."""

import functools
from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor

from ..channels import beside, mean_part
from .rows import one_time
from .transformer import TwoTimeTransformer


def call(
    model: Any, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
) -> Tensor:
    """A ``DiTTransformer2DModel`` on the state x (B, C, H, W)."""
    return mean_part(model(beside(model, x, image), timestep, class_labels).sample, x)


class TwoTimeDiTTransformer2DModel(TwoTimeTransformer, DiTTransformer2DModel):
    """A ``DiTTransformer2DModel``, each block of which embeds the times by itself."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        blocks: Any = self.transformer_blocks
        for block in blocks:
            self.embed_rows(block.norm1.emb, late, guided)
            if late:  # rows of two times come from the head alone, which hears the second
                block.norm1.emb.register_forward_pre_hook(
                    functools.partial(one_time, late=True, guided=guided), with_kwargs=True
                )
        if late:
            for block, is_last in self.by_turn(blocks):
                block.register_forward_pre_hook(
                    functools.partial(one_time, late=is_last, guided=guided), with_kwargs=True
                )
