"""The second time of a ``UNet2DModel`` of diffusers' own class (``class_embed_type="timestep"``) in any type.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from typing import Any

from torch import Tensor, nn


def takes_any_type(model: Any) -> None:
    """Have a model with ``class_embed_type="timestep"`` bring what it embeds of a class to the type of its weights:
    diffusers does so with what it embeds of the time, and leaves this in float32."""
    embedding = model.class_embedding
    if in_its_type not in embedding._forward_pre_hooks.values():
        embedding.register_forward_pre_hook(in_its_type)


def in_its_type(embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a module is given, in the type of its weights."""
    dtype = next(embedding.parameters()).dtype
    return tuple(value.to(dtype) for value in args)
