"""How the network of a flow map, which was trained as another model, is asked and answers on the straight path.

A map that was distilled from a diffusion model goes on predicting what that predicts, at the steps of its schedule.
These functions translate. They are part of the ``pipeline.py`` of an export, so they need torch alone.
"""

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from ..networks.held import held_ratios


def second_timestep(diffusion: dict[str, Any], time: Tensor, last: float, alike: bool = False) -> float:
    """Where the map is to end, at time t (0 noise, 1 image), as the network is told it.

    Args:
        diffusion: what the network speaks, see ``FlowMapPipeline``; empty for diffusers' flow.
        last: the timestep of pure noise.
        alike: told as the first time is, by the signal-to-noise ratio there. Otherwise no two times are told as one,
            as those beyond an end of a schedule are by their ratios.
    """
    kind, deviation = diffusion.get("prediction_type"), diffusion.get("sigma_data")
    if alike and kind not in (None, "velocity"):
        return _place(diffusion, float(time))[-1]
    if deviation is None:
        return float((time if kind == "velocity" else 1 - time) * last)
    ends = math.log(diffusion["sigma_min"]), math.log(diffusion["sigma_max"])
    level = torch.sin((1 - time) * (math.pi / 2)) / (torch.sin(time * (math.pi / 2)) / deviation)
    return float(level.log().clamp(*ends) / 4)


def coefficients(diffusion: dict[str, Any], time: Tensor, last: float) -> tuple[float, float, float, float]:
    """How the network gives a velocity at this time: (c, k, p, q) in ``u = p x + q network(c x, k)``.

    A diffusion model and the straight path agree, up to a scale, where their signal-to-noise ratios do. There the
    network is asked, its prediction gives the image and the noise, and these the velocity, image - noise
    (arXiv 2506.02221).
    """
    kind, deviation = diffusion.get("prediction_type"), diffusion.get("sigma_data")
    if kind is None:
        return 1.0, float((1 - time) * last), 0.0, -1.0
    if kind == "velocity":
        return 1.0, float(time * last), 0.0, 1.0
    s, deviation = float(time), deviation or 1.0
    (low, high), ratio, held, timestep = _place(diffusion, s)
    # The network was trained on ``(alpha / deviation) image + sigma noise`` with alpha^2 + sigma^2 = 1, up to a scale.
    odds = held + math.log(deviation)
    alpha, sigma = 1 / math.sqrt(1 + _exp(-2 * odds)), 1 / math.sqrt(1 + _exp(2 * odds))
    if "timesteps" in diffusion:  # on the straight path: that scale is its own
        power = alpha + sigma
        alpha, sigma = alpha / power, sigma / power
    scale = math.hypot(alpha / deviation, sigma) / math.hypot(s, 1 - s)

    # image = image_x x + image_f F and noise = noise_x x + noise_f F, for the network's prediction F
    if kind == "sample":
        image_x, image_f, noise_x, noise_f = 0.0, 1.0, scale / sigma, -alpha / sigma
    elif kind == "epsilon" and "sigma_data" not in diffusion:
        image_x, image_f, noise_x, noise_f = scale / alpha, -sigma / alpha, 0.0, 1.0
    else:
        v = 1 if kind == "v_prediction" else -1  # what EDM calls epsilon is -v
        image_x, image_f = deviation * alpha * scale, -v * deviation * sigma
        noise_x, noise_f = sigma * scale, v * alpha
    # Beyond an end of the schedule the network is asked at its last step, and of its two estimates the one that
    # means something there is kept: the image towards noise, the noise towards the image.
    if ratio <= low:
        noise_x, noise_f = (1 - s * image_x) / (1 - s), -s * image_f / (1 - s)
    elif ratio >= high:
        image_x, image_f = (1 - (1 - s) * noise_x) / s, -(1 - s) * noise_f / s
    return scale, timestep, image_x - noise_x, image_f - noise_f


def _place(diffusion: dict[str, Any], time: float) -> tuple[tuple[float, float], float, float, float]:
    """Where a time is on a schedule: between which log(alpha / sigma) the network is asked, that at the time, the
    nearest to it of those, and the timestep there."""
    ratio = math.inf if time == 1 else math.log(time / (1 - time)) if time > 0 else -math.inf
    low, high = held_ratios(diffusion)
    held = min(max(ratio, low), high)
    if "sigma_data" in diffusion:
        return (low, high), ratio, held, -held / 4
    if "right_angle" in diffusion:
        return (low, high), ratio, held, diffusion["right_angle"] * math.atan(_exp(-held)) * 2 / math.pi
    if "timesteps" in diffusion:
        return (low, high), ratio, held, diffusion["timesteps"] / (1 + _exp(held))
    table = diffusion["log_ratios"]
    if held < table[-1]:  # between that step and one of noise alone the ratio itself is linear
        return (low, high), ratio, held, len(table) - math.exp(held - table[-1])
    after = min(max(bisect_left(table, -held, key=lambda entry: -entry), 1), len(table) - 1)
    return (low, high), ratio, held, after - (held - table[after]) / (table[after - 1] - table[after])


def _exp(x: float) -> float:
    """exp, of infinity too."""
    return math.inf if x > 700 else math.exp(x)
