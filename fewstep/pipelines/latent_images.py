"""Images of latents.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from latents in the units of the network."""
    config, shift = vae.config, vae.config.get("shift_factor") or 0.0
    scale, mean, deviation = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
    scale = 1.0 if scale is None else scale
    if mean is not None and deviation is not None:
        each = (1, -1, *[1] * (latents.ndim - 2))
        shift, deviation = (torch.tensor(v, device=latents.device).reshape(each) for v in (mean, deviation))
        scale = scale / deviation
    options = {}
    if config.get("norm_type") == "spatial":  # Kandinsky's
        shift, scale, options = 0.0, 1.0, {"force_not_quantize": True}
    # Few in one call: the activations of a decoder are large.
    parts = [vae.decode((part / scale + shift).to(vae.dtype), **options).sample for part in latents.split(4)]
    return torch.cat(parts).clamp(-1, 1).float()


def factor_of(vae: Any) -> int:
    """How many pixels a latent is, along each side, by the resolutions of a VAE, each half the one before."""
    if vae is None:
        return 1
    levels = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels") or [64]
    return 2 ** (len(levels) - 1)
