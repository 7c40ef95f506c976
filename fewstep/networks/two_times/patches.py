"""Latents as rows of 2 x 2 patches, which transformers like Flux see, and where each patch is.

It is part of the ``two_times.py`` of an export, so it needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor


def places(height: int, width: int, device: Any) -> Tensor:
    """Where each patch of latents of these sides is: rows of (0, y, x)."""
    y, x = torch.meshgrid(*(torch.arange(side // 2, device=device) for side in (height, width)), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a row of 2 x 2 patches, (B, H W / 4, 4 C).

    Raises:
        ValueError: an odd side.
    """
    rows, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height} x {width} are not of 2 x 2 patches: even sides are needed")
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    rows, _, channels = patches.shape
    grid = patches.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)
