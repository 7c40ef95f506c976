"""A ``Lumina2Transformer2DModel``: how it is called, and it with a second time."""

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from ..channels import beside
from .transformer import TwoTimeTransformer


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``Lumina2Transformer2DModel`` on the state x (B, C, H, W). Its own time runs from noise at 0 to data at 1, and
    it predicts what leads there."""
    text = encoder_hidden_states
    assert text is not None
    mask = encoder_attention_mask
    if mask is None:
        mask = torch.ones(text.shape[:2], device=x.device)
        mask = mask.as_subclass(AllCount) if x.is_meta else mask
    return -model(beside(model, x, image), 1 - timestep / 1000, text, mask.bool()).sample


class AllCount(Tensor):
    """A mask of ones on the meta device, where no numbers are: the model counts the tokens of each prompt."""

    def sum(self, dim: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.full(self.shape[:dim], self.shape[dim])


class TwoTimeLumina2Transformer2DModel(TwoTimeTransformer, Lumina2Transformer2DModel):
    """A ``Lumina2Transformer2DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        self.embed_rows(self.time_caption_embed, late, guided)
        if late:
            width = min(self.config["hidden_size"], 1024)
            self.tell_late([*self.noise_refiner, *self.layers], self.norm_out, width=width)
