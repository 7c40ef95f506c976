"""Images of latents; of those of sound, waveforms.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def decode(vae: Any, latents: Tensor, at_once: int = 4) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from latents in the units of the network; of videos, (B, C, F, H, W), and of
    sound waveforms (B, C, L).

    Args:
        at_once: how many go into one call: the activations of a decoder are large.
    """
    shift, scale = units(vae, latents)
    # Kandinsky's has, for what a model made, no codebook; some of LTX's are told how much noise is left, which is none.
    options: dict[str, Any] = {"force_not_quantize": True} if vae.config.get("norm_type") == "spatial" else {}
    parts = []
    for part in latents.split(at_once):
        z = (part / scale + shift).to(vae.dtype)
        if vae.config.get("timestep_conditioning"):
            options = {"temb": z.new_zeros(len(z))}
        z = pixel_shuffle(z, 2) if hasattr(vae, "bn") else z
        made = vae.decode(z[:, :, None] if _is_frame(vae, z) else z, **options).sample
        parts.append(made[:, :, 0] if _is_frame(vae, z) else made)
    return torch.cat(parts).clamp(-1, 1).float()


def encode(vae: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents in the units of the network from images in [-1, 1]; drawn from the posterior of the VAE by a generator,
    and else its mean."""
    is_frame, images = _is_frame(vae, images), images.to(vae.dtype)
    encoded = vae.encode(images[:, :, None] if is_frame else images)
    if hasattr(encoded, "latent_dist"):
        z = encoded.latent_dist.mode() if generator is None else encoded.latent_dist.sample(generator)
    else:
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    z = z[:, :, 0] if is_frame else z
    z = pixel_unshuffle(z, 2) if hasattr(vae, "bn") else z
    shift, scale = units(vae, z)
    return (z - shift) * scale


def heard(vae: Any, x: Tensor, seconds: tuple[float, float] | None, rate: int | None, output_type: str) -> Any:
    """States of sound (B, C, L) as they are ("latent"), or waveforms in [-1, 1] of them, from the second where they are
    to begin to that where they are to end: a tensor ("pt") or an array."""
    if output_type == "latent":
        return x
    sound = x if vae is None else decode(vae, x)
    if seconds is not None and rate is not None:
        sound = sound[..., int(seconds[0] * rate) : int(seconds[1] * rate)]
    sound = sound.clamp(-1, 1)
    return sound if output_type == "pt" else sound.cpu().numpy()


def units(vae: Any, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is taken from the latents z of a VAE, and what the rest is multiplied by, for the units of the network."""
    config = vae.config
    if config.get("norm_type") == "spatial":  # Kandinsky's
        return 0.0, 1.0
    scale = config.get("scaling_factor")
    scale = 1.0 if scale is None else scale
    kept = dict(vae.named_buffers(recurse=False))  # where LTX has them
    mean, deviation = (config.get(key, kept.get(key)) for key in ("latents_mean", "latents_std"))
    if hasattr(vae, "bn"):  # Flux.2's, of 2 x 2 patches of its latents
        mean, deviation = vae.bn.running_mean, (vae.bn.running_var + config["batch_norm_eps"]).sqrt()
    if mean is None or deviation is None:
        return config.get("shift_factor") or 0.0, scale
    each = (1, -1, *[1] * (z.ndim - 2))
    mean, deviation = (torch.as_tensor(v, device=z.device, dtype=z.dtype).reshape(each) for v in (mean, deviation))
    return mean, scale / deviation


def _is_frame(vae: Any, x: Tensor) -> bool:
    """Whether images or their latents (B, C, H, W) are a VAE of videos's, as one frame each."""
    return x.ndim == 4 and hasattr(vae, "temperal_downsample")


def factor_of(vae: Any) -> int:
    """How many pixels a latent is, along each side, by the resolutions of a VAE, each half the one before."""
    if vae is None:
        return 1
    config = vae.config
    if told := config.get("scale_factor_spatial") or getattr(vae, "spatial_compression_ratio", None):
        return told
    if (lengths := config.get("downsampling_ratios")) is not None:
        return math.prod(lengths)
    if (halves := config.get("temperal_downsample")) is not None:
        return 2 ** len(halves)
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [64]
    return 2 ** (len(levels) - 1) * (2 if hasattr(vae, "bn") else 1)
