"""Solvers: measured orders, calls and directions, on the Gaussian, whose flow is known."""

import math
from itertools import pairwise

import pytest
import torch

from fewstep.flows.paths import Linear, VariancePreserving
from fewstep.flows.solvers import SOLVERS, STEPS, integrate

F64 = torch.float64
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2}
CALLS = {"euler": 1, "midpoint": 2, "heun": 2}


class Recorded:
    """A velocity that notes when it was asked."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, x, t):
        self.times.append(t)
        return self.velocity(x, t)


def test_every_solver_is_tested():
    assert set(ORDERS) == set(STEPS)
    assert (*ORDERS, "adaptive") == SOLVERS


def logistic(x, t):
    """dx/dt = (1 + t) x (1 - x), neither linear nor autonomous: logit(x) moves by t + t^2 / 2."""
    return (1 + t[:, None]) * x * (1 - x)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.9, 0.2)])
def test_measured_order(solver, s, t):
    start = torch.linspace(0.1, 0.9, 9, dtype=F64)[:, None]
    end = torch.sigmoid(start.logit() + t + t**2 / 2 - s - s**2 / 2)

    def error(steps):
        return float((integrate(logistic, start, torch.linspace(s, t, steps + 1, dtype=F64), solver) - end).norm())

    for coarse, fine in pairwise(error(steps) for steps in (32, 64, 128)):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.1)
        assert fine < coarse < 0.1


@pytest.mark.parametrize("solver", ORDERS)
def test_a_gaussian_is_approached_at_least_at_that_order(gaussian, points, solver):
    end = gaussian.flow(points, 0.0, 1.0)

    def error(steps):
        return float((integrate(gaussian, points, torch.linspace(0, 1, steps + 1, dtype=F64), solver) - end).norm())

    assert math.log2(error(64) / error(128)) > ORDERS[solver] - 0.1


@pytest.mark.parametrize("solver", ORDERS)
def test_one_step_by_hand(solver):
    # dx/dt = t x from 1 with one step of 0.5 starting at t = 0.2.
    x, h, t = 1.0, 0.5, 0.2
    euler = x + h * t * x
    expected = {
        "euler": euler,
        "midpoint": x + h * (t + h / 2) * (x + h / 2 * t * x),
        "heun": x + h / 2 * (t * x + (t + h) * euler),
    }[solver]
    grid = torch.tensor([t, t + h], dtype=F64)
    end = integrate(lambda x, t: t[:, None] * x, torch.ones(3, 1, dtype=F64), grid, solver)
    torch.testing.assert_close(end, torch.full_like(end, expected), rtol=0, atol=1e-15)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
def test_adaptive_meets_its_tolerance_in_both_directions(gaussian, points, tolerance):
    for s, t in ((0.0, 1.0), (1.0, 0.0), (0.7, 0.3)):
        ends = torch.tensor([s, t], dtype=F64)
        end = integrate(gaussian, points, ends, "adaptive", tolerance=tolerance)
        # The error of all steps together, of the worst row.
        assert (end - gaussian.flow(points, s, t)).abs().max() < 100 * tolerance


def test_adaptive_works_harder_for_more(gaussian, points):
    calls = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        velocity = Recorded(gaussian)
        integrate(velocity, points, torch.tensor([0.0, 1.0], dtype=F64), "adaptive", tolerance=tolerance)
        calls.append(len(velocity.times))
    assert calls[0] < calls[1] < calls[2]


def test_adaptive_goes_nowhere_in_no_time(gaussian, points):
    assert torch.equal(integrate(gaussian, points, torch.tensor([0.3, 0.3]), "adaptive"), points)


@pytest.mark.parametrize("solver", CALLS)
def test_calls_and_times(gaussian, points, solver):
    velocity = Recorded(gaussian)
    integrate(velocity, points, torch.tensor([0.0, 0.25, 1.0], dtype=F64), solver)
    assert len(velocity.times) == 2 * CALLS[solver]
    assert all(t.shape == (64,) and t.dtype == F64 for t in velocity.times)
    asked = [float(t[0]) for t in velocity.times]
    assert asked == {"euler": [0, 0.25], "midpoint": [0, 0.125, 0.25, 0.625], "heun": [0, 0.25, 0.25, 1]}[solver]


def test_midpoint_and_euler_never_ask_at_the_end(gaussian, points):
    # ... where a variance-preserving velocity may be infinite.
    path = VariancePreserving()
    field = gaussian.on(path)

    def velocity(x, t):
        assert (t < 1).all()
        return field(x, t)

    for solver in ("euler", "midpoint"):
        assert integrate(velocity, points, torch.linspace(0, 1, 9, dtype=F64), solver).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_solved_alone_even_where_all_sizes_agree(gaussian, points, solver):
    square = points[:2]
    grid = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    both = integrate(gaussian, square, grid, solver, tolerance=1e-9)
    alone = torch.cat([integrate(gaussian, square[i : i + 1], grid, solver, tolerance=1e-9) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-7 if solver == "adaptive" else 1e-14)


def test_images_and_float32():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for solver in SOLVERS:
        end = integrate(lambda x, t: -x, x, torch.tensor([0.0, 0.1]), solver)
        assert end.shape == x.shape
        assert end.dtype == torch.float32
        torch.testing.assert_close(end, x * math.exp(-0.1), rtol=0.01, atol=0)
    straight, _ = Linear().sample(x, torch.zeros_like(x), 0.0)
    assert torch.equal(straight, x)


def test_errors(gaussian, points):
    with pytest.raises(ValueError, match=r"unknown solver 'huen': did you mean 'heun'.*adaptive, euler, heun, mid"):
        integrate(gaussian, points, torch.tensor([0.0, 1.0]), "huen")
    for grid in (torch.tensor(0.5), torch.tensor([0.5]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="a grid of two or more times"):
            integrate(gaussian, points, grid)
