"""Chords of trajectories, and rows that start from noise alone: in float64, against closed forms."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import Perturbed, batch_of, gradient, loss_of, teacher_of, value

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.data.pairs import Pairs
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Trigonometric
from fewstep.generation.reflow import make_pairs
from fewstep.objectives import ITVM, LMD, Trajectory
from fewstep.objectives.rows import Now


def perturbed(gaussian: GaussianField, size: float = 0.05) -> FlowMap:
    return FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, size))


def stored(field: GaussianField, rows: int = 64, states: int = 5) -> Batch:
    """Rows with exact trajectories, each at times of its own."""
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(rows, 2, generator=draw, dtype=torch.float64)
    times = torch.rand(rows, states, generator=draw, dtype=torch.float64).sort(1).values
    way = torch.stack([field.flow(noise, 0.0, times[:, k]) for k in range(states)], dim=1)
    return Batch(field.flow(noise, 0.0, 1.0), {}, noise, way, times)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that losses are made of, as they are drawn."""
    kept: list[Any] = []
    for method in (Trajectory, ITVM, LMD):
        real = method._draw

        def draw(self: Any, *arguments: Any, real: Any = real) -> Any:
            kept.append(found := real(self, *arguments))
            return found

        monkeypatch.setattr(method, "_draw", draw)
    return kept


# Chords


@pytest.mark.parametrize("make", [lambda v: Trajectory(v), lambda v: ITVM(v, {"trajectory": 1.0, "integral": 0.0})])
def test_the_exact_map_has_no_loss_on_exact_trajectories_and_another_has(gaussian: GaussianField, make: Any):
    student, batch = perturbed(gaussian, 0.0), stored(gaussian)
    loss = loss_of(make(gaussian), student, batch)
    assert value(loss) < 1e-20
    assert gradient(loss, student).abs().max() < 1e-10
    student = perturbed(gaussian)
    loss = loss_of(make(gaussian), student, batch)
    assert all(float(term) > 1e-6 for term in loss.terms.values())
    assert gradient(loss, student).abs().max() > 1e-3


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solved_trajectories_are_exact_to_the_order_of_the_solver(gaussian: GaussianField, solver: str, order: int):
    student, batch = perturbed(gaussian, 0.0), batch_of(gaussian)
    errors = []
    for steps in (20, 40, 80):
        # From noise to the end: all of the solver's error.
        objective = Trajectory(gaussian, solver, steps, reuse=1, diagonal=0.0, ends=1.0)
        errors.append(value(loss_of(objective, student, batch)) ** 0.5)
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.85 * 2**order
    wrong = Trajectory(gaussian, solver, 80, reuse=1, diagonal=0.0, ends=1.0)
    assert value(loss_of(wrong, perturbed(gaussian, 0.3), batch)) ** 0.5 > 3 * errors[-1]


def test_rows_are_at_states_of_trajectories_at_the_times_they_drew(gaussian: GaussianField, seen: list[Any]):
    objective = Trajectory(gaussian, solver_steps=64, reuse=4)
    loss_of(objective, perturbed(gaussian), batch_of(gaussian, 256))
    (rows, parts) = seen.pop()
    torch.testing.assert_close(rows.x, gaussian.flow(rows.noise, 0.0, rows.s), rtol=0, atol=1e-3)
    chord = parts["chord"]
    s, t = rows.s[chord], rows.t[chord]
    assert (t > s).all()
    # Ends are drawn, and met exactly.
    assert 0.15 < float((s == 0).double().mean()) < 0.45
    assert 0.15 < float((t == 1).double().mean()) < 0.45
    tangent = parts["tangent"]
    assert torch.equal(rows.s[tangent], rows.t[tangent])
    assert (rows.s[tangent] < 1).all()
    # No grid of times is learned by heart: those of other trajectories lie between.
    inner = s[(s > 0) & (s < 1)]
    assert len((64 * inner % 1).mul(20).round().unique()) > 10


def test_times_are_those_that_pairs_draws_to_half_a_step(gaussian: GaussianField, seen: list[Any]):
    class Fixed(Trajectory):
        def pairs(self, rows: int, generator: Any, now: Now) -> tuple[Tensor, Tensor]:
            return torch.full((rows,), 0.3), torch.full((rows,), 0.32 if self.reuse == 1 else 0.7)

    for reuse in (1, 8):
        loss_of(Fixed(gaussian, solver_steps=10, reuse=reuse, diagonal=0.0), perturbed(gaussian), batch_of(gaussian))
        rows, _ = seen.pop()
        assert (rows.s - 0.3).abs().max() <= 0.05 + 1e-6
        if reuse == 1:  # two times within a step are a step apart
            torch.testing.assert_close(rows.t - rows.s, torch.full_like(rows.s, 0.1))
        else:
            assert (rows.t - 0.7).abs().max() <= 0.05 + 1e-6


def test_rows_share_a_trajectory_within_their_chunk(seen: list[Any]):
    class Labelled(VelocityField):
        def forward(self, x: Tensor, t: Tensor, *, class_labels: Tensor) -> Tensor:  # pyright: ignore
            return class_labels[:, None].to(x).expand_as(x)

    class Still(torch.nn.Module):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return class_labels[:, None].to(x).expand_as(x)

    labels = torch.arange(40)
    batch = Batch(torch.zeros(40, 2), {"class_labels": labels})
    chunks = [generator(0), generator(1)]
    objective = Trajectory(Labelled(), solver_steps=3, reuse=8)
    loss = loss_of(objective, FlowMap(Still()), batch, generator=chunks)
    rows, _ = seen.pop()
    # Chunks of 20: three trajectories each, for 8, 8 and 4 rows.
    first = torch.tensor([*[0] * 8, *[8] * 8, *[16] * 4])
    assert torch.equal(rows.cond["class_labels"], torch.cat([first, first + 20]))
    assert torch.equal(rows.noise, rows.noise[torch.cat([first, first + 20])])
    assert len(rows.noise.unique(dim=0)) == 6
    assert value(loss) < 1e-10


def test_trajectories_that_the_batch_brings_are_not_solved_again():
    teacher = teacher_of()
    student, batch = FlowMap.from_field(teacher), stored(GaussianField(torch.zeros(2), torch.eye(2)))
    batch = Batch(batch.data.float(), {}, batch.noise.float(), batch.states.float(), batch.times.float())  # pyright: ignore
    for make, rows in ((lambda: Trajectory(teacher), 16), (lambda: ITVM(teacher, "trajectory"), 32)):
        with count_calls(teacher) as calls:
            loss_of(make(), student, batch)
        assert (calls.count, calls.rows) == (1, rows)  # those on the diagonal
    assert value(loss_of(Trajectory(diagonal=0.0), student, batch)) > 0


def test_what_cannot_be_is_refused(gaussian: GaussianField, tmp_path: Path):
    with pytest.raises(ValueError, match=r"without a teacher nobody knows the velocity on s = t: say diagonal: 0"):
        Trajectory()
    with pytest.raises(ValueError, match=r"unknown solver of Trajectory 'rk4'"):
        Trajectory(gaussian, solver="rk4")
    with pytest.raises(ValueError, match=r"Trajectory's reuse is 0: it is 1 at least"):
        Trajectory(gaussian, reuse=0)
    with pytest.raises(ValueError, match=r"ITVM's solver_steps is 0"):
        ITVM(gaussian, "trajectory", solver_steps=0)
    student = perturbed(gaussian)
    with pytest.raises(ValueError, match=r"the data has none: fewstep reflow MODEL --states 8 makes some"):
        Trajectory(diagonal=0.0).check_data(torch.zeros(4, 2), student)
    make_pairs(gaussian.float(), tmp_path, 4, steps=4, states=2, device="cpu")
    Trajectory(diagonal=0.0).check_data(Pairs(tmp_path), student)
    student.path = Trigonometric()
    for objective in (Trajectory(diagonal=0.0), ITVM(gaussian, "trajectory")):
        with pytest.raises(ValueError, match=r"are on another path than the student's \(Trigonometric\(\)\)"):
            objective.check_data(Pairs(tmp_path), student)
    ITVM(gaussian).check_data(Pairs(tmp_path), student)  # which reads no states


# From noise alone


STARTS = {
    "LMD prior": lambda v: LMD(v, starts="prior"),
    "LMD prior, weighted": lambda v: LMD(v, starts="prior", adaptive=1.0),
    "LMD own": lambda v: LMD(v, starts="own"),
    "ITVM own": lambda v: ITVM(v, "interval", starts="own"),
    "ITVM prior, derivative": lambda v: ITVM(v, "derivative", starts="prior"),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_exact_map_is_the_fixed_point_from_noise_alone(gaussian: GaussianField, name: str):
    for size, low, high in ((0.0, 0.0, 1e-10), (0.05, 1e-3, 1e3)):
        student = perturbed(gaussian, size)
        slope = gradient(loss_of(STARTS[name](gaussian), student, batch_of(gaussian)), student).abs().max()
        assert low <= float(slope) < high


def test_integral_from_noise_alone_is_exact_on_average(gaussian: GaussianField, fraction: Callable[[float], None]):
    objective, batch = ITVM(gaussian, "integral", diagonal=0.0, starts="prior"), batch_of(gaussian, 16)
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def slope(size: float) -> Tensor:
        parts, student = [], perturbed(gaussian, size)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            fraction(node)
            parts.append(weight * gradient(loss_of(objective, student, batch), student))
        return torch.stack(parts)

    exact = slope(0.0)
    assert exact.sum(0).abs().max() < 1e-10
    assert exact.abs().max() > 1e-3  # a single draw is far off
    assert slope(0.05).sum(0).abs().max() > 1e-3


@pytest.mark.parametrize("name", STARTS)
def test_no_number_of_the_data_is_used(gaussian: GaussianField, name: str):
    student, batch = perturbed(gaussian, 0.3), batch_of(gaussian)
    objective = STARTS[name](gaussian)
    assert not objective.uses_data
    one, two = (value(loss_of(objective, student, Batch(data))) for data in (batch.data, batch.data * 1e3 - 7))
    assert one == two
    assert LMD(gaussian).uses_data
    assert ITVM(gaussian).uses_data


@pytest.mark.parametrize("starts", ["prior", "own"])
@pytest.mark.parametrize("method", [LMD, lambda v, **k: ITVM(v, "integral", **k)])
def test_where_the_rows_are(gaussian: GaussianField, method: Any, starts: str, seen: list[Any]):
    student = perturbed(gaussian, 0.2)
    objective = method(gaussian, starts=starts)
    loss = loss_of(objective, student, batch_of(gaussian, 128))
    rows, parts = seen[-1]
    torch.testing.assert_close(rows.x, student(rows.noise, 0.0, rows.s))
    assert not rows.x.requires_grad
    (off,) = [name for name in parts if name != objective.diagonal_term]
    diagonal = rows.s[parts[objective.diagonal_term]]
    assert len(diagonal.unique()) > 10
    if starts == "prior":
        assert (rows.s[parts[off]] == 0).all()
        assert torch.equal(rows.x[parts[off]], rows.noise[parts[off]])
        assert (loss.times[off][:, 0] == 0).all()
    else:
        assert len(rows.s[parts[off]].unique()) > 10


def test_starts_that_cannot_be(gaussian: GaussianField):
    with pytest.raises(ValueError, match=r"unknown starts of LMD 'noise'"):
        LMD(gaussian, starts="noise")
    with pytest.raises(ValueError, match=r"interval asks for the map from the middle .* say starts: own"):
        ITVM(gaussian, starts="prior")
    ITVM(gaussian, {"interval": 0.0, "integral": 1.0}, starts="prior")
    with pytest.raises(ValueError, match=r"LMD's adaptive is 1.5"):
        LMD(gaussian, adaptive=1.5)
