"""What a model is, in a few letters: by this a folder that a model began knows it again."""

import hashlib
from typing import Any

import torch
from torch import nn

from fewstep.flows.paths import Path


def identity(model: nn.Module) -> str:
    """A model by its kind and a hash of its weights and of the numbers that its parts were made with (a path, the
    scale of guidance)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in sorted(vars(module).items()) if key != "training" and _is_plain(value)}
        digest.update(f"{name} {type(module).__name__} {plain}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | Path)
