"""A ``FluxTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..channels import beside
from .patches import pack, places, unpack
from .rows import twice
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    guidance: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``FluxTransformer2DModel`` on the state x (B, C, H, W), which it sees as 2 x 2 patches."""
    height, width = x.shape[-2:]
    patches = pack(beside(model, x, image, patch=4))
    assert encoder_hidden_states is not None
    output = model(
        patches,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        img_ids=places(height, width, x.device),
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=x.device),
        guidance=guidance,
    )
    return unpack(output.sample, height, width)


class TwoTimeFluxTransformer2DModel(TwoTimeTransformer, FluxTransformer2DModel):
    """A ``FluxTransformer2DModel``; one that takes a guidance of its own goes on doing so, by the same name."""

    call = staticmethod(call)
    may_be_told = True

    def take_rows(self, late: bool, guided: int) -> None:
        embeddings: Any = self.time_text_embed
        self.embed_rows(embeddings, late, guided)
        if late:
            for name in ("text_embedder", "guidance_embedder"):
                if hasattr(embeddings, name):
                    getattr(embeddings, name).register_forward_hook(twice)
            blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
            self.tell_late(blocks, self.norm_out, width=self.inner_dim)
