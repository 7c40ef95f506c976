"""A ``SanaTransformer2DModel``: how it is called, and it with a second time."""

import functools
from typing import Any

from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from ..channels import beside
from .rows import EachHalf, second_of_two, twice
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    guidance: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``SanaTransformer2DModel`` on the state x (B, C, H, W)."""
    config = model.config
    return model(
        beside(model, x, image),
        encoder_hidden_states=encoder_hidden_states,
        timestep=timestep * config["timestep_scale"],
        guidance=None if guidance is None else guidance * config["guidance_embeds_scale"],
        encoder_attention_mask=encoder_attention_mask,
    ).sample


class TwoTimeSanaTransformer2DModel(TwoTimeTransformer, SanaTransformer2DModel):
    """A ``SanaTransformer2DModel``; one that takes a guidance of its own, as Sana-Sprint, goes on doing so."""

    call = staticmethod(call)
    may_be_told = True

    def take_rows(self, late: bool, guided: int) -> None:
        norm: Any = self.time_embed
        takes = self.config["guidance_embeds"]
        self.embed_rows(norm if takes else norm.emb, late, guided)
        if late:
            if takes:
                norm.guidance_embedder.register_forward_hook(twice)
            width = self.proj_out.in_features
            norm.silu, norm.linear = nn.Identity(), EachHalf(norm.linear)
            norm.register_forward_hook(functools.partial(second_of_two, width=width))
            self.tell_late(list(self.transformer_blocks), width=6 * width)
