"""An ``SD3Transformer2DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..channels import beside
from .rows import twice
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """An ``SD3Transformer2DModel`` on the state x (B, C, H, W)."""
    return model(beside(model, x, image), encoder_hidden_states, pooled_projections, timestep).sample


class TwoTimeSD3Transformer2DModel(TwoTimeTransformer, SD3Transformer2DModel):
    """An ``SD3Transformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        self.embed_rows(self.time_text_embed, late, guided)
        if late:
            self.time_text_embed.text_embedder.register_forward_hook(twice)
            self.tell_late(list(self.transformer_blocks), self.norm_out, width=self.inner_dim)
