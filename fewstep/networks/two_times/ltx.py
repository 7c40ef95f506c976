"""An ``LTXVideoTransformer3DModel``: how it is called, and it with a second time."""

import functools
from typing import Any

from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from ..channels import beside
from .rows import EachHalf, second_of_two
from .transformer import TwoTimeTransformer

# Frames a second, and how many of them and of the pixels are one latent: what its pipeline tells it of a video.
_RATE, _FRAMES, _PIXELS = 25, 8, 32


def call(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """An ``LTXVideoTransformer3DModel`` on the state x (B, C, F, H, W), a video, each place of which is a token."""
    frames, height, width = x.shape[2:]
    output = model(
        beside(model, x, image).flatten(2).transpose(1, 2),
        encoder_hidden_states=encoder_hidden_states,
        timestep=timestep,
        encoder_attention_mask=encoder_attention_mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(_FRAMES / _RATE, _PIXELS, _PIXELS),
    )
    return output.sample.transpose(1, 2).unflatten(2, (frames, height, width))


class TwoTimeLTXVideoTransformer3DModel(TwoTimeTransformer, LTXVideoTransformer3DModel):
    """An ``LTXVideoTransformer3DModel``."""

    call = staticmethod(call)

    def take_rows(self, late: bool, guided: int) -> None:
        norm: Any = self.time_embed
        width = self.proj_in.out_features
        self.embed_rows(norm.emb, late, guided)
        # The model lays the times of all rows in one line.
        norm.register_forward_pre_hook(functools.partial(as_rows, columns=2 + guided), with_kwargs=True)
        if late:
            norm.silu, norm.linear = nn.Identity(), EachHalf(norm.linear)
            norm.register_forward_hook(functools.partial(second_of_two, width=width))
            self.time_embed.register_forward_hook(functools.partial(side_by_side, width=6 * width))
            self.tell_late(list(self.transformer_blocks), width=1, dim=3)


def as_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], columns: int) -> Any:
    """Times in one line, (B columns,), in rows again."""
    times, *others = args
    rows = kwargs["batch_size"]
    return (times.view(rows, columns) if len(times) == rows * columns else times, *others), kwargs


def side_by_side(_: nn.Module, __: Any, output: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    """Two embeddings in one, (B, 2 width), as those of two tokens."""
    return output[0].unflatten(1, (2, width)), *output[1:]
