"""A ``FluxTransformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
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
    guidance: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``FluxTransformer2DModel`` on the state x (B, C, H, W), which it sees as 2 x 2 patches."""
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height} x {width} are not of 2 x 2 patches: even sides are needed")
    # Where each patch is: rows of (0, y, x).
    y, z = torch.meshgrid(*(torch.arange(side // 2, device=x.device) for side in (height, width)), indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, z], dim=-1).reshape(-1, 3).float()
    assert encoder_hidden_states is not None
    output = model(
        pack(beside(model, x, image, patch=4)),
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        img_ids=places,
        txt_ids=places.new_zeros(encoder_hidden_states.shape[1], 3),
        guidance=guidance,
    )
    return unpack(output.sample, height, width)


class TwoTimeFluxTransformer2DModel(TwoTimeTransformer, FluxTransformer2DModel):
    """A ``FluxTransformer2DModel``; one that takes a guidance of its own goes on doing so, by the same name."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        if guided and self.config["guidance_embeds"]:
            raise ValueError("this Flux is told the strength of guidance as it is: leave guidance out")
        embeddings: Any = self.time_text_embed
        self.embed_rows(embeddings, late, guided)
        if late:
            for name in ("text_embedder", "guidance_embedder"):
                if hasattr(embeddings, name):
                    getattr(embeddings, name).register_forward_hook(twice)
            blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
            self.tell_late(blocks, self.norm_out, width=self.inner_dim)

    def predict(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        if self.config["guidance_embeds"]:
            return call(self, x, torch.stack([s, self.rows(s, t, None)[:, 0]], dim=-1), guidance=guidance, **cond)
        return TwoTimeTransformer.predict(self, x, s, t, guidance, **cond)


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a row of 2 x 2 patches, (B, H W / 4, 4 C)."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    rows, _, channels = patches.shape
    grid = patches.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)
