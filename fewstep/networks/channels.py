"""The channels of a model of diffusers: those of the state, of an image beside it, and of a variance behind it.

It is part of the ``two_times.py`` of an export, so it needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor


def patch_of(config: Any) -> int:
    """How many numbers of one channel of the state are channels of their own to the network: Flux, Chroma and
    Qwen-Image see 2 x 2 patches. Flux.2's VAE makes them, and they are channels of the state."""
    return 4 if "axes_dims_rope" in config and "timestep_guidance_channels" not in config else 1


def given_channels(config: Any) -> int:
    """How many channels a model gives, counted as those that it takes."""
    gives = config.get("out_channels") or config["in_channels"]
    return 4 * gives if "zero_cond_t" in config else gives  # Qwen-Image counts those of patches on one side alone


def state_channels(config: Any) -> int:
    """How many channels the state of a model has. An image may go in beside it, and a variance come out behind it: what
    is there of both is said as ``_state_channels`` where the numbers alone would not tell."""
    return (config.get("_state_channels") or min(config["in_channels"], given_channels(config))) // patch_of(config)


def beside(model: Any, x: Tensor, image: Tensor | None, patch: int = 1) -> Tensor:
    """What goes into a model: the state (B, C, ...), and behind it the channels of an image it is conditioned on;
    before it where the config says ``_image_first``.

    Args:
        patch: numbers of one channel that are one of the channels that the config counts.

    Raises:
        ValueError: they are not as many channels as the model takes, or the image has other sides or rows.
    """
    if image is not None and (image.ndim != x.ndim or image.shape[2:] != x.shape[2:] or len(image) != len(x)):
        needed = (len(x), image.shape[1] if image.ndim > 1 else 1, *x.shape[2:])
        raise ValueError(
            f"the condition image has shape {tuple(image.shape)} beside a state {tuple(x.shape)}: scale it to {needed}"
        )
    parts = [x] if image is None else [x, image.to(x)]
    both = torch.cat(parts[::-1] if model.config.get("_image_first") else parts, dim=1)
    if both.shape[1] != (takes := model.config["in_channels"] // patch):
        own = f"the state has {x.shape[1]}" + ("" if image is None else f" and the condition image {image.shape[1]}")
        raise ValueError(f"this {type(model).__name__} takes {takes} channels, {own}: they must add up")
    return both


def signal_step(config: Any) -> int:
    """Of what number the length of a signal is a multiple, for a U-Net of signals."""
    kinds = list(config["down_block_types"])
    halvings = sum(kind in ("DownBlock1D", "AttnDownBlock1D") for kind in kinds)
    halvings += max(0, kinds.count("DownResnetBlock1D") - 1) + (config["mid_block_type"] == "UNetMidBlock1D")
    return 2**halvings


def mean_part(output: Tensor, x: Tensor) -> Tensor:
    """The first half of the channels where the model also predicts a variance."""
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
