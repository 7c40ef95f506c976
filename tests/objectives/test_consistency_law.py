"""Where consistency training with N steps comes to rest on Gaussian data: by the objective and in closed form."""

import math

import pytest
import torch
from consistency_law import closed_form, fixed_point
from torch import Tensor

from fewstep.flows.times import gaussian_grid, step_grid

F64 = torch.float64


def exact_rows(c: float) -> tuple[Tensor, Tensor]:
    """Noise and data whose second moments are 1, c^2 and 0 to the last digit, so that the mean of a squared error over
    these rows is its expectation."""
    draws = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    white = draws @ torch.linalg.inv(torch.linalg.cholesky(draws.T @ draws / 16)).T
    return white[:, :1], c * white[:, 1:]


@pytest.mark.parametrize(("steps", "std"), [(2, 0.2), (4, 0.34054), (8, 0.41478), (16, 0.45568), (64, 0.48856)])
def test_consistency_training_of_n_steps_ends_with_these_deviations(steps: int, std: float):
    grid = step_grid(steps)
    found = fixed_point(grid, *exact_rows(0.5))
    assert found == pytest.approx(std, abs=6e-6)
    assert found == pytest.approx(closed_form(grid, 0.5), abs=1e-12)


@pytest.mark.parametrize("c", [0.5, 0.1, 2.0])
def test_on_the_times_of_a_gaussian_it_is_c_cos_to_the_n(c: float):
    for steps in (1, 3, 8):
        found = fixed_point(gaussian_grid(steps, c), *exact_rows(c))
        assert found == pytest.approx(c * math.cos(math.pi / 2 / steps) ** steps, abs=1e-12)


def test_the_error_falls_as_one_over_n():
    uniform, angles = (64 * (0.5 - closed_form(grid, 0.5)) for grid in (step_grid(64), gaussian_grid(64, 0.5)))
    assert uniform == pytest.approx(0.74, abs=0.01)
    assert angles == pytest.approx(math.pi**2 * 0.5 / 8, abs=0.01)


@pytest.mark.takes_seconds
def test_a_regression_on_drawn_rows_comes_near():
    draw = torch.Generator().manual_seed(1)
    noise, data = (torch.randn(400_000, 1, generator=draw, dtype=F64) for _ in range(2))
    assert fixed_point(step_grid(4), noise, data / 2) == pytest.approx(0.3405, abs=0.002)  # .3414 of another draw
