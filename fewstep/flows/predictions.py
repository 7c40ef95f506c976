"""What a network may predict along a path, and the algebra between all of it.

A network predicts one of seven *kinds* of thing about ``x_t``:

==========  =============================  ====================================================
velocity    ``a' x1 + s' x0``              flow matching
data        ``x1``                         "sample" in diffusers, "x0" in most diffusion papers
noise       ``x0``                         "epsilon"
v           ``a x0 - s x1``                arXiv 2202.00512 ("v_prediction")
score       ``-x0 / s``                    the score of p_t in expectation
flow        ``-(a' x1 + s' x0)``           diffusers' flow-match models, whose time runs from data to noise
edm         ``s x1 - a x0``                -v, on the path of EDM (arXiv 2206.00364)
==========  =============================  ====================================================
"""

from typing import Protocol

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import as_times, expand

KINDS = ("velocity", "data", "noise", "v", "score", "flow", "edm")


class Affine(Protocol):
    """What the algebra needs of a path ``x_t = alpha(t) x1 + sigma(t) x0``; see :class:`fewstep.flows.paths.Path`."""

    @property
    def data_scale(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def alpha_dot(self, t: Tensor) -> Tensor: ...
    def sigma_dot(self, t: Tensor) -> Tensor: ...
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def to_velocity(path: Affine, prediction: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
    """The velocity (B, ...) that a prediction of this kind, made at ``(x, t)``, stands for.

    Raises:
        ValueError: where the prediction does not determine it, such as a noise prediction where there is no data.
    """
    if kind == "velocity":
        return prediction
    t = as_times(t, x)
    data, noise = data_and_noise(path, prediction, x, t, kind)
    velocity = expand(path.alpha_dot(t), x) * data + expand(path.sigma_dot(t), x) * noise
    return _finite(path, velocity, t, f"velocity from a {kind} prediction")


def from_velocity(path: Affine, velocity: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
    """The inverse of :func:`to_velocity`: what a network of this kind would have predicted, (B, ...)."""
    if kind not in KINDS:
        raise unknown("prediction kind", kind, KINDS)
    if kind in ("velocity", "flow"):
        return velocity if kind == "velocity" else -velocity
    t = as_times(t, x)
    data, noise = data_and_noise(path, velocity, x, t, "velocity")
    return _finite(path, target(path, noise, data, t, kind), t, f"{kind} from a velocity")


def target(path: Affine, noise: Tensor, data: Tensor, t: Tensor | float, kind: str) -> Tensor:
    """What a network of this kind is to predict of noise and data (B, ...) at t: its target in training."""
    t = as_times(t, data)
    a, s, a_dot, s_dot = (expand(c, data) for c in path.coefficients(t))
    d = path.data_scale
    match kind:
        case "data" | "noise":
            return data if kind == "data" else noise
        case "v" | "edm":
            v = d * a * noise - s / d * data
            return v if kind == "v" else -v
        case "score":
            return -noise / s
        case "velocity" | "flow":
            velocity = a_dot * data + s_dot * noise
            return velocity if kind == "velocity" else -velocity
    raise unknown("prediction kind", kind, KINDS)


def data_and_noise(path: Affine, prediction: Tensor, x: Tensor, t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(data, noise), (B, ...) each, that a prediction of this kind at (x, t) expects there."""
    coefficients = split_coefficients(path, t, kind)
    data_x, data_f, noise_x, noise_f = (expand(c, x) for c in coefficients)
    return data_x * x + data_f * prediction, noise_x * x + noise_f * prediction


def split_coefficients(path: Affine, t: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four numbers (B,) in ``data = p x + q F``, ``noise = r x + w F`` for a prediction F of this kind."""
    a, s = path.alpha(t), path.sigma(t)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    match kind:
        case "data":
            return zero, one, 1 / s, -a / s
        case "noise":
            return 1 / a, -s / a, zero, one
        case "score":
            return 1 / a, s * s / a, zero, -s
        case "v" | "edm":
            d, sign = path.data_scale, 1 if kind == "v" else -1
            a = d * a
            power = a * a + s * s
            return d * a / power, -sign * d * s / power, s / power, sign * a / power
        case "velocity" | "flow":
            a_dot, s_dot = path.alpha_dot(t), path.sigma_dot(t)
            det = a_dot * s - a * s_dot
            sign = 1 if kind == "velocity" else -1
            return -s_dot / det, sign * s / det, a_dot / det, -sign * a / det
        case _:
            raise unknown("prediction kind", kind, KINDS)


def _finite(path: Affine, value: Tensor, t: Tensor, what: str) -> Tensor:
    good = value.flatten(1).isfinite().all(1)
    if not good.all():
        raise ValueError(
            f"{path}: the {what} is not finite at t = {float(t[~good][0]):.6g}; if the network's output is finite "
            "there, keep t away from that end"
        )
    return value
