"""A ``Flux2Transformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from ..channels import beside
from .rows import EachHalf, twice
from .transformer import TwoTimeTransformer, tell


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    guidance: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``Flux2Transformer2DModel`` on the state x (B, C, H, W), each place of which is a token."""
    height, width = x.shape[-2:]
    assert encoder_hidden_states is not None
    place = lambda *sides: torch.cartesian_prod(*(torch.arange(side, device=x.device) for side in sides))  # noqa: E731
    output = model(
        beside(model, x, image).flatten(2).transpose(1, 2),
        encoder_hidden_states=encoder_hidden_states,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        # Where each token is: rows of (0, y, x, 0), and of a prompt (0, 0, 0, number).
        img_ids=place(1, height, width, 1),
        txt_ids=place(1, 1, 1, encoder_hidden_states.shape[1]),
        guidance=guidance,
    )
    return output.sample.transpose(1, 2).unflatten(2, (height, width))


class TwoTimeFlux2Transformer2DModel(TwoTimeTransformer, Flux2Transformer2DModel):
    """A ``Flux2Transformer2DModel``; one that takes a guidance of its own goes on doing so, by the same name."""

    call = staticmethod(call)
    may_be_told = True

    def take_rows(self, late: bool, guided: int) -> None:
        embeddings: Any = self.time_guidance_embed
        self.embed_rows(embeddings, late, guided)
        if not late:
            return
        if embeddings.guidance_embedder is not None:
            embeddings.guidance_embedder.register_forward_hook(twice)
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            modulation: Any = getattr(self, name)
            modulation.act_fn, modulation.linear = nn.Identity(), EachHalf(modulation.linear)
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        for k, (block, is_last) in enumerate(self.by_turn(blocks)):
            sets = 2 if k < len(self.transformer_blocks) else 1  # shift, scale and gate each
            tell(block, is_last, width=3 * sets * self.inner_dim)
        tell(self.norm_out, True, width=self.inner_dim)
