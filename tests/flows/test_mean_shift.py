"""What a denoiser of finite data is: one step of mean shift, which climbs a kernel density (arXiv 2305.19947)."""

import pytest
import torch
from torch import Tensor

from fewstep.flows.exact import MixtureField
from fewstep.flows.solvers import euler_step

F64 = torch.float64


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


DATA = points(30, 1)
FIELD = MixtureField(DATA, torch.full((30,), 1e-9, dtype=F64), torch.ones(30, dtype=F64))


def log_density(y: Tensor, width: Tensor) -> Tensor:
    """A kernel density of the data, up to a constant of the width: y (B, 2), width (B,)."""
    return torch.logsumexp(-(y[:, None] - DATA).square().sum(-1) / (2 * width[:, None] ** 2), dim=1)


def denoised(x: Tensor, t: Tensor) -> Tensor:
    return FIELD.path.from_velocity(FIELD(x, t), x, t, "data")


def test_the_denoiser_is_the_mean_of_the_data_under_the_kernel():
    y, t = 1.5 * points(50, 2), torch.linspace(0.05, 0.9, 50, dtype=F64)
    width = (1 - t) / t
    weights = torch.softmax(-(y[:, None] - DATA).square().sum(-1) / (2 * width[:, None] ** 2), dim=1)
    torch.testing.assert_close(denoised(t[:, None] * y, t), weights @ DATA, rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_step_towards_the_denoised_never_lowers_the_density(share: float):
    y, t = 1.5 * points(2000, 3), torch.rand(2000, generator=torch.Generator().manual_seed(4), dtype=F64)
    t = 0.2 + 0.6 * t
    width = (1 - t) / t
    gain = log_density(y + share * (denoised(t[:, None] * y, t) - y), width) - log_density(y, width)
    assert gain.min() > 0
    # The share l of a mean-shift step gains l (2 - l) / 2 times the shift's square over that of the width at least.
    shift = (denoised(t[:, None] * y, t) - y).square().sum(1) / width**2
    assert (gain - share * (2 - share) / 2 * shift).min() > -1e-12


def test_an_euler_step_is_a_partial_mean_shift_step():
    # On the linear path, in the coordinates x / t: y' = (h'/h) y + (1 - h'/h) D, the width h = (1 - t)/t falling to h'.
    t, later = torch.full((40,), 0.3, dtype=F64), torch.full((40,), 0.45, dtype=F64)
    y = 1.5 * points(40, 5)
    ratio = ((1 - later) / later) / ((1 - t) / t)
    stepped = euler_step(FIELD, t[:, None] * y, t, later) / later[:, None]
    expected = ratio[:, None] * y + (1 - ratio)[:, None] * denoised(t[:, None] * y, t)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-10)
