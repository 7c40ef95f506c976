"""Grids of few steps: dynamic programming against brute force, and the angles of a Gaussian that it has to find."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.randomness import generator
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric
from fewstep.flows.sampling import sample
from fewstep.flows.step_grids import StepErrors, beside_uniform, optimal_grid, step_errors
from fewstep.flows.step_losses import COSTS, rms
from fewstep.flows.times import gaussian_grid, step_grid

F64 = torch.float64


def normal_data(c: float) -> GaussianField:
    return GaussianField(torch.zeros(1, dtype=F64), torch.full((1, 1), c * c, dtype=F64))


def noise_of(rows: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def unit_noise(rows: int = 40) -> Tensor:
    """Numbers of mean square 1: the rms of what is linear in them is its factor."""
    noise = noise_of(rows, 1)
    return noise / noise.square().mean().sqrt()


# Dynamic programming


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("weight", [1.0, 1.15])
def test_the_grid_is_that_of_brute_force(steps: int, weight: float):
    for seed in range(20):
        costs = torch.rand(10, 10, generator=generator(seed), dtype=F64) - 0.2 * (weight > 1)  # some below 0
        errors = StepErrors(step_grid(9), costs.where(torch.ones(10, 10).triu(1).bool(), math.inf), weight)

        def loss(grid: tuple[int, ...], errors: StepErrors = errors) -> float:
            return sum(weight**k * float(errors.errors[i, j]) for k, (i, j) in enumerate(pairwise(grid)))

        grids = [(0, *inner, 9) for inner in combinations(range(1, 9), steps - 1)]
        assert errors.loss(steps) == pytest.approx(min(map(loss, grids)), abs=1e-12)
        assert errors.grid(steps).tolist() == errors.times[list(min(grids, key=loss))].tolist()


def test_the_number_of_steps_for_a_tolerance():
    field = normal_data(0.5)
    errors = step_errors(field, field, unit_noise(), 12)
    losses = [errors.loss(n) for n in range(1, 13)]
    assert losses == sorted(losses, reverse=True)
    for tolerance in (losses[0], losses[3], (losses[6] + losses[7]) / 2):
        n = errors.steps_within(tolerance)
        assert losses[n - 1] <= tolerance
        assert n == 1 or losses[n - 2] > tolerance
    with pytest.raises(ValueError, match="tolerance is 1e-06, and the least"):
        errors.steps_within(1e-6)


# Gaussian data: the angles


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=lambda path: type(path).__name__)
def test_gaussian_grid_is_uniform_in_the_angle(path):
    grid = gaussian_grid(8, 0.3, path)
    assert (grid[0], grid[-1], grid.dtype) == (0.0, 1.0, F64)
    angle = torch.atan2(path.sigma(grid), 0.3 * path.alpha(grid))
    torch.testing.assert_close(angle.diff(), torch.full((8,), -math.pi / 16, dtype=F64), rtol=0, atol=1e-12)
    if path == Linear():
        closed = [1 / (1 + 0.3 * math.tan((1 - i / 8) * math.pi / 2)) for i in range(1, 8)]
        torch.testing.assert_close(grid[1:-1], torch.tensor(closed, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(gaussian_grid(8, 1.0, Trigonometric()), step_grid(8), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("steps", "uniform", "angles"), [(2, 0.2, 0.25), (4, 0.3405, 0.36428), (8, 0.4148, 0.42812), (16, 0.4557, 0.46284)]
)
def test_euler_of_a_gaussian_ends_with_these_deviations(steps: int, uniform: float, angles: float):
    field, noise = normal_data(0.5), unit_noise()
    assert float(rms(sample(field, noise, steps))) == pytest.approx(uniform, abs=6e-5)
    ends = sample(field, noise, steps, grid="gaussian(0.5)")
    assert float(rms(ends)) == pytest.approx(angles, abs=6e-6)
    assert float(rms(ends)) == pytest.approx(0.5 * math.cos(math.pi / 2 / steps) ** steps, abs=1e-13)
    assert (ends.sign() == noise.sign()).all()


def test_a_gaussian_grid_by_what_is_known_of_the_data():
    field = normal_data(0.5)
    with pytest.raises(ValueError, match=r"standard deviation of the data, which is not known .* gaussian\(0.5\)"):
        sample(field, unit_noise(), 2, grid="gaussian")
    field.moments = (3.0, 0.2)  # the data were brought to 0 and 1: that of x is 1
    assert torch.equal(
        sample(field, unit_noise(), 3, grid="gaussian"), sample(field, unit_noise(), 3, grid="gaussian(1)")
    )
    for wrong in ("gaussian(-1)", "gaussian(0)", "gaussian(x)", "gaussian()", "gaussian(1e999)", "gaussians"):
        with pytest.raises(ValueError, match=r"gaussian\(0.5\)"):
            sample(field, unit_noise(), 2, grid=wrong)
    with pytest.raises(ValueError, match="optimal_grid"):
        sample(field, unit_noise(), 2, grid="optimal")


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("c", "errors_at"), [(0.5, {2: (0.25, 0.3), 4: (0.1358, 0.1595)}), (0.1, {4: (0.0274, 0.0719)})]
)
def test_dynamic_programming_recovers_the_angles(c: float, errors_at: dict[int, tuple[float, float]]):
    field, noise = normal_data(c), unit_noise(4)
    errors = step_errors(field, field, noise, 60)  # one matrix, every number of steps
    for found in beside_uniform(errors, field, field, noise, list(errors_at)):
        optimal, uniform = errors_at[found.steps]
        assert found.error == pytest.approx(optimal, abs=6e-5)
        assert found.uniform_error == pytest.approx(uniform, abs=6e-5)
        assert torch.equal(found.times, found.optimal)
        assert (found.times - gaussian_grid(found.steps, c)).abs().max() < 1 / 60
    if c == 0.5:
        assert errors.grid(2).tolist() == [0, 40 / 60, 1]


@pytest.mark.parametrize("c", [0.5, 0.1])
def test_what_a_step_loses_in_closed_form(c: float):
    # A step by the angle d ends with cos(d) of the deviation it should have.
    field, noise = normal_data(c), unit_noise(4)
    angles = gaussian_grid(12, c)
    scale = (angles**2 * c * c + (1 - angles) ** 2).sqrt()
    local, propagated = (step_errors(field, field, noise, angles, cost=cost) for cost in ("local", "propagated"))
    for i, j in ((0, 1), (2, 7), (3, 12)):
        share = 1 - math.cos((j - i) * math.pi / 24)
        assert float(local.errors[i, j]) == pytest.approx(float(scale[j]) * share, abs=1e-12)
        # The Heun steps that carry an error on are not exact, yet near.
        assert float(propagated.errors[i, j]) == pytest.approx(c * share, rel=0.15)
    for steps in (2, 3, 4, 6):  # of candidates that hold it, the grid itself is chosen
        torch.testing.assert_close(propagated.grid(steps), gaussian_grid(steps, c), rtol=0, atol=1e-14)


# Many modes (methods reference, 8d): propagated beats local


@pytest.mark.takes_seconds
def test_eight_gaussians_in_three_steps():
    field, noise = eight_gaussians(), noise_of(256, 2)
    ends = field.flow(noise, 0.0, 1.0)

    def off(grid: Tensor) -> float:
        return float(rms(sample(field, noise, grid=grid) - ends))

    propagated, local = (step_errors(field, field, noise, cost=cost).grid(3) for cost in ("propagated", "local"))
    # .287, .320 and .240 of 512 rows of another seed.
    assert off(step_grid(3)) == pytest.approx(0.287, abs=0.015)
    assert off(local) == pytest.approx(0.320, abs=0.02)
    assert off(propagated) == pytest.approx(0.240, abs=0.015)
    assert off(gaussian_grid(3)) == pytest.approx(0.311, abs=0.015)


def test_a_grid_that_loses_is_not_taken():
    field, noise = normal_data(0.5), unit_noise()
    early = torch.full((9, 9), math.inf, dtype=F64).where(torch.ones(9, 9).triu(1) == 0, 1.0)
    early[0, 1] = 0.0
    (found,) = beside_uniform(StepErrors(step_grid(8), early), field, field, noise, [2])
    assert found.optimal.tolist() == [0, 1 / 8, 1]
    assert found.is_uniform
    assert found.times.tolist() == [0, 1 / 2, 1]
    assert found.uniform_error == pytest.approx(0.3, abs=1e-12)
    assert str(found).startswith(f"2 steps of the optimal grid end {found.error:.4g} from the reference")
    # On a line nothing deviates from the chord: that cost knows no grid from another.
    with pytest.warns(UserWarning, match=r"^2 steps .* of the uniform one 0.3: the uniform grid is kept"):
        kept = optimal_grid(field, field, noise, 2, 8, cost="deviation")
    assert torch.equal(kept, step_grid(2))


# Maps, solvers, conditions, ranks


class Damped(nn.Module):
    """u of data N(0, 1/4), off by ``fault (1 - t)``: steps that end early are worse than those that end late."""

    def __init__(self, fault: float = 0.0) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        s, t = (r.reshape(-1, *[1] * (x.ndim - 1)) for r in (s, t))
        first, last = ((r * r / 4 + (1 - r) ** 2).sqrt() for r in (s, t))
        growth = ((s + t) / 4 - (2 - s - t)) / ((first + last) * first)
        fault = self.fault if class_labels is None else self.fault * class_labels.reshape(-1, *[1] * (x.ndim - 1))
        return growth * x + fault * (1 - t)


def teacher(*shape: int) -> GaussianField:
    size = math.prod(shape)
    return GaussianField(torch.zeros(shape, dtype=F64), torch.eye(size, dtype=F64) / 4)


def test_an_exact_map_loses_nothing():
    errors = step_errors(FlowMap(Damped()), teacher(1), noise_of(8, 1), 6)
    upper = torch.ones(7, 7).triu(1).bool()
    assert errors.errors[upper].max() < 1e-14
    assert errors.errors[~upper].isinf().all()


@pytest.mark.parametrize("shape", [(1,), (3, 4, 4), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_a_map_of_any_rank(shape: tuple[int, ...], cost: str):
    student, noise = FlowMap(Damped(0.3)), noise_of(6, *shape)
    with count_calls(student) as calls:
        errors = step_errors(student, teacher(*shape), noise, 8, cost=cost)
    assert calls.count == 8 * 9 / 2 + (cost == "propagated") * (7 * 8 / 2 + 7)
    assert calls.rows == 6 * calls.count
    if cost == "local":  # (t - s) fault (1 - t) in each component
        assert float(errors.errors[2, 4]) == pytest.approx(0.25 * 0.3 * 0.5 * math.sqrt(math.prod(shape)), abs=1e-12)
    (found,) = beside_uniform(errors, student, teacher(*shape), noise, [2])
    best = min(found.error, found.uniform_error)
    ends = teacher(*shape).flow(noise, 0.0, 1.0)
    assert float(rms(sample(student, noise, grid=found.times) - ends)) == pytest.approx(best, abs=1e-12)
    assert cost != "propagated" or found.error < found.uniform_error


def test_conditions_and_a_single_dtype_go_with_the_rows():
    student, noise, labels = FlowMap(Damped(0.3)), noise_of(4, 2).float(), torch.tensor([0, 0, 2, 2])
    both = step_errors(student, teacher(2), noise, 4, cost="local", class_labels=labels).errors
    one = step_errors(student, teacher(2), noise, 4, cost="local", class_labels=torch.ones(4)).errors
    # Faults of 0 and 2: the root of the mean square is sqrt(2) times that of 1.
    assert float(both[1, 2] / one[1, 2]) == pytest.approx(math.sqrt(2), abs=1e-5)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 8), ("heun", 8 + 36), ("midpoint", 8 + 36)])
def test_fields_by_each_solver(solver: str, calls: int):
    class Velocity(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return teacher(1)(x, t)

    field, noise = NetworkField(Velocity()), unit_noise(6)
    with count_calls(field) as made:
        errors = step_errors(field, teacher(1), noise, 8, solver=solver, cost="local")
    assert made.count == calls  # the velocity at a state is asked for once, for all steps from there
    x = teacher(1).flow(noise, 0.0, 0.25)
    end = sample_between(field, x, 0.25, 0.75, solver)
    assert float(errors.errors[2, 6]) == pytest.approx(float(rms(end - teacher(1).flow(noise, 0.0, 0.75))), abs=1e-12)


def sample_between(field: VelocityField, x: Tensor, s: float, t: float, solver: str) -> Tensor:
    from fewstep.flows.solvers import integrate

    return integrate(field, x, torch.tensor([s, t], dtype=F64), solver)


def test_a_map_may_be_its_own_reference():
    student, noise = FlowMap(Damped(0.3)), noise_of(6, 2)
    own = step_errors(student, student, noise, 8)
    assert float(own.errors[3, 4]) == 0.0  # the finest steps are what is right
    assert float(own.errors[0, 8]) > 0.01


def test_the_strength_of_guidance_reaches_each_that_takes_it():
    class Told(nn.Module):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
            return -x * guidance[:, None]

    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -2 * x

    student, noise = FlowMap(Told()), noise_of(4, 2)
    student.guidance = 2.0
    assert float(step_errors(student, NetworkField(Plain()), noise, 4).errors[0, 1]) > 0
    weak = NetworkField(Plain())
    told = step_errors(student, Guided(NetworkField(Plain()), 1.0, weak=weak), noise, 4).errors
    stronger = step_errors(
        student, Guided(NetworkField(Plain()), 1.0, weak=weak), noise, 4, guidance=torch.full((4,), 3.0)
    ).errors
    assert not torch.equal(told, stronger)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_with_re_noising_both_get_the_same_noise(gamma: float):
    exact = FlowMap(Damped())
    errors = step_errors(exact, teacher(1), noise_of(8, 1), 6, gamma=gamma, generator=generator(5))
    assert errors.errors[torch.ones(7, 7).triu(1).bool()].max() < 1e-12
    student = FlowMap(Damped(0.3))
    errors = step_errors(student, teacher(1), noise_of(64, 1), 8, gamma=gamma)
    (found,) = beside_uniform(errors, student, teacher(1), noise_of(64, 1), [3], gamma=gamma)
    assert min(found.error, found.uniform_error) > 0
    again = step_errors(student, teacher(1), noise_of(64, 1), 8, gamma=gamma)
    assert torch.equal(errors.errors, again.errors)


# Bad input


class Bad(nn.Module):
    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x * math.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 9}, "steps is 9 and candidates 8"),
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": [0.0, 0.5, 1.0]}, "or the times themselves as a tensor"),
        ({"candidates": torch.tensor([0.0, 0.5])}, "rise from 0 to 1"),
        ({"candidates": torch.tensor([0.0, 0.5, 0.4, 1.0])}, "rise from 0 to 1"),
        ({"noise": noise_of(1, 1)}, "one row"),
        ({"cost": "l3"}, "unknown cost of a step 'l3'"),
        ({"cost": "deviation", "gamma": 1.0}, "deviation"),
        ({"solver": "heun"}, "flow map takes its steps itself"),
        ({"model": teacher(1), "solver": "adaptive"}, "finds its own times"),
        ({"reference": nn.Identity()}, "the reference is a Identity"),
        ({"reference": teacher(1).on(Trigonometric())}, "use reference.on"),
        ({"model": FlowMap(Bad())}, "the model gives numbers that are not finite"),
        ({"model": FlowMap(Damped()), "reference": FlowMap(Bad())}, "the reference gives numbers that are not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_line(change: dict, says: str):
    given = {"model": FlowMap(Damped()), "reference": teacher(1), "noise": noise_of(4, 1), "steps": 2, "candidates": 8}
    given |= change
    with pytest.raises(ValueError, match=says):
        optimal_grid(**given)


def test_a_consistency_model_is_no_reference():
    student = FlowMap(Damped())
    student.gamma = 1.0
    with pytest.raises(ValueError, match="only knows the way to t = 1"):
        optimal_grid(student, student, noise_of(4, 1), 2)
    assert len(step_errors(student, teacher(1), noise_of(4, 1), 4).grid(2)) == 3
