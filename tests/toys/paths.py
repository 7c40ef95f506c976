"""Paths of every kind, and what a network would predict on them."""

import pytest
import torch

from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.predictions import KINDS
from fewstep.flows.tabulated import Tabulated

F64 = torch.float64


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)


DDPM = Tabulated.from_alphas_cumprod((1 - BETAS).cumprod(0))


CONTINUOUS = [Linear(), Trigonometric(), VariancePreserving(), VariancePreserving(0.3, 45.0)]


UNIT_POWER = [*CONTINUOUS[1:], DDPM, Tabulated((3.0, 1.0, 0.0, -4.0))]


PATHS = [Linear(), *UNIT_POWER, Preconditioned(0.5)]


by_path = pytest.mark.parametrize("path", PATHS, ids=str)


by_kind = pytest.mark.parametrize("kind", KINDS)


def close(x, y, tolerance=1e-12):
    """Equal to the tolerance, relative to the size of y."""
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=g, dtype=F64)


def predictions(path, x1, x0, t):
    """What a perfect network of each kind says, from the true data and noise; t (B,), x (B, D)."""
    a, s, a_dot, s_dot = (c[:, None] for c in path.coefficients(t))
    velocity = a_dot * x1 + s_dot * x0
    d = path.sigma_data if isinstance(path, Preconditioned) else 1.0
    return {
        "velocity": velocity,
        "data": x1,
        "noise": x0,
        "v": d * a * x0 - s * x1 / d,
        "edm": s * x1 / d - d * a * x0,
        "score": -x0 / s,
        "flow": -velocity,
    }
