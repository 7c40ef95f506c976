"""A ``WanTransformer3DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ..channels import beside
from .rows import EachHalf, RowEmbedding, last_token
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_image: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``WanTransformer3DModel`` on the state x (B, C, F, H, W), a video."""
    return model(beside(model, x, image), timestep, encoder_hidden_states, encoder_hidden_states_image).sample


class TwoTimeWanTransformer3DModel(TwoTimeTransformer, WanTransformer3DModel):
    """A ``WanTransformer3DModel``, which takes rows of times as they are: one for each token, of which there is one."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        hear_rows(self, self, late, guided)


def hear_rows(owner: TwoTimeTransformer, model: Any, late: bool, guided: int) -> None:
    """Have a ``WanTransformer3DModel`` take rows of times, as ``owner`` shares its blocks out between both."""
    embeddings = model.condition_embedder
    embeddings.time_embedder = RowEmbedding(embeddings.time_embedder, late, guided, is_stacked=True)
    if late:
        embeddings.act_fn, embeddings.time_proj = nn.Identity(), EachHalf(embeddings.time_proj, dim=1)
        embeddings.register_forward_hook(last_token)
        owner.tell_late(list(model.blocks), width=1, dim=4)
