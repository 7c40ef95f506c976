"""An ``AuraFlowTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import AuraFlowTransformer2DModel
from torch import Tensor

from ..channels import beside
from .rows import RowEmbedding, RowProjection
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """An ``AuraFlowTransformer2DModel`` on the state x (B, C, H, W)."""
    return model(beside(model, x, image), encoder_hidden_states=encoder_hidden_states, timestep=timestep / 1000).sample


class TwoTimeAuraFlowTransformer2DModel(TwoTimeTransformer, AuraFlowTransformer2DModel):
    """An ``AuraFlowTransformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        self.time_step_embed = RowProjection(self.time_step_embed)
        self.time_step_proj = RowEmbedding(self.time_step_proj, late, guided)
        if late:
            blocks = [*self.joint_transformer_blocks, *self.single_transformer_blocks]
            self.tell_late(blocks, self.norm_out, width=self.inner_dim)
