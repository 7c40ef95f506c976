"""What the objectives ask for: the exact flow map, and nothing else. In float64, on fields in closed form."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import (
    ALL,
    DISTILLS,
    EXACT,
    Perturbed,
    SolvedAverageVelocity,
    batch_of,
    gradient,
    loss_of,
    mixture,
    picture_of,
    value,
)

from fewstep.data.batch import Batch
from fewstep.flows.broadcasting import expand
from fewstep.flows.exact import ExactField, GaussianField
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import EMD, ITVM, LMD, FlowMatching, Objective


class Truth(NamedTuple):
    """A field, its exact map with a perturbation of a given size, and how far from zero a gradient at size 0 may be."""

    field: ExactField
    student: Callable[[float], FlowMap]
    tolerance: float


@pytest.fixture(params=["gaussian", "pictures", "mixture"])
def truth(request: pytest.FixtureRequest, gaussian: GaussianField) -> Truth:
    if request.param == "mixture":
        field = mixture()
        return Truth(field, lambda size: FlowMap(Perturbed(SolvedAverageVelocity(field), 2, size)), 1e-6)
    field = gaussian if request.param == "gaussian" else picture_of(gaussian)
    return Truth(field, lambda size: FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, size)), 1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_map_has_no_loss_and_no_gradient_and_another_has(truth: Truth, name: str):
    field, make, tolerance = truth
    objective, batch, student = DISTILLS[name](field), batch_of(field, 32), make(0.0)
    loss = loss_of(objective, student, batch)
    assert value(loss) < tolerance**2
    assert gradient(loss, student).abs().max() < tolerance
    assert set(loss.terms) == set(loss.times)

    student = make(0.05)
    loss = loss_of(objective, student, batch)
    assert all(float(term) > 1e-6 for term in loss.terms.values())
    assert gradient(loss, student).abs().max() > 1e-3


def test_integral_is_exact_on_average(truth: Truth, fraction: Callable[[float], None]):
    field, make, tolerance = truth
    objective, batch = ITVM(field, "integral", diagonal=0.0), batch_of(field, 16)
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def gradients(size: float) -> Tensor:
        """The gradient at each place of m between s and t, with its weight."""
        parts, student = [], make(size)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            fraction(node)
            parts.append(weight * gradient(loss_of(objective, student, batch), student))
        return torch.stack(parts)

    exact = gradients(0.0)
    assert exact.sum(0).abs().max() < tolerance
    assert exact.abs().max() > 1e-3  # a single draw is far off
    assert gradients(0.05).sum(0).abs().max() > 1e-3


def test_step_is_exact_to_third_order_in_the_step(truth: Truth, fraction: Callable[[float], None]):
    field, make, _ = truth
    fraction(0.0)  # h = step_size
    # From 0 to 1 all rows: nothing but the error of one Heun step is left, which halves three times when h halves.
    errors = [
        value(loss_of(ITVM(field, "step", diagonal=0.0, step_size=h, ends=1.0), make(0.0), batch_of(field))) ** 0.5
        for h in (0.1, 0.05, 0.025)
    ]
    assert 6.5 < errors[0] / errors[1] < 9.5
    assert 7 < errors[1] / errors[2] < 9
    assert errors[2] < 1e-4
    wrong = loss_of(ITVM(field, "step", diagonal=0.0, step_size=0.025, ends=1.0), make(0.05), batch_of(field))
    assert value(wrong) ** 0.5 > 10 * errors[2]


def test_derivative_sets_in_slowly_and_is_bounded(gaussian: GaussianField):
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)), batch_of(gaussian)
    batch = Batch(batch.data, noise=batch.data.flip(0).contiguous())
    for progress, share in ((0.0, 0.0), (0.1, 0.4), (0.25, 1.0), (0.8, 1.0)):
        loss = loss_of(ITVM(gaussian, "derivative", diagonal=0.0, times="uniform"), student, batch, progress=progress)
        s, t = loss.times["derivative"].unbind(1)
        x, _ = student.path.sample(batch.data.flip(0), batch.data, s)
        # d_t u by differences, not by the derivative that the objective takes.
        u, ahead, behind = (student.average_velocity(x, s, t + e) for e in (0.0, 1e-6, -1e-6))
        residual = u - gaussian(x + expand(t - s, x) * u, t) + share * expand(t - s, x) * (ahead - behind) / 2e-6
        rms = residual.square().mean(1, keepdim=True).sqrt()
        expected = (residual / (rms + 0.1)).square().mean().detach()
        assert value(loss) == pytest.approx(float(expected), rel=1e-6)
    far = GaussianField(gaussian.mean + 1e6, torch.eye(2, dtype=torch.float64))
    assert 0.9 < float(loss_of(ITVM(far, "derivative", times="uniform"), student, batch).terms["derivative"]) < 1.0


@pytest.mark.parametrize("through_teacher", [False, True])
def test_the_gradient_of_lmd_is_that_of_its_loss(gaussian: GaussianField, through_teacher: bool):
    class Recorded(VelocityField):
        """Answers as it did when it was first asked."""

        path, answers, place = gaussian.path, [], 0

        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # pyright: ignore
            self.place += 1
            if len(self.answers) < self.place:
                self.answers.append(gaussian(x, t))
            return self.answers[self.place - 1].detach()

    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.2)), batch_of(gaussian)
    found = gradient(loss_of(LMD(gaussian, through_teacher), student, batch), student)
    teacher = gaussian if through_teacher else Recorded()
    theta = next(p for p in student.parameters())
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for move in (0.0, 1e-5, -2e-5):  # the first is what a recorded teacher answers for good
            theta += move * direction
            teacher.place = 0
            losses.append(value(loss_of(LMD(teacher), student, batch)))
    slope = (losses[1] - losses[2]) / 2e-5
    assert float(found @ direction.flatten()) == pytest.approx(slope, rel=1e-6)


# Nothing in these is held fixed but a copy of the student, so that their gradient is that of a function.
WHOLE = (
    "ITVM interval", "LMD through the teacher", "EMD full", "AYF LMD", "PFMM", "ConsistencyDistillation, Huber", "CTM",
    "Shortcut", "FMM",
)  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_the_gradient_is_that_of_the_loss(gaussian: GaussianField, name: str):
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.2)), batch_of(gaussian)
    objective, target = ALL[name](gaussian), FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.1))
    found = gradient(loss_of(objective, student, batch, target=target), student)
    theta = next(student.parameters())
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for move in (1e-5, -2e-5):
            theta += move * direction
            losses.append(value(loss_of(objective, student, batch, target=target)))
    assert float(found @ direction.flatten()) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_weights_and_shares_of_itvm(gaussian: GaussianField):
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)), batch_of(gaussian)
    weighted = ITVM(gaussian, "mixed", initial_weight=2.0, terminal_weight=0.5)
    loss = loss_of(weighted, student, batch)
    expected = 2.0 * loss.terms["initial"] + 0.5 * (loss.terms["interval"] + loss.terms["integral"]) / 2
    assert value(loss) == pytest.approx(float(expected), rel=1e-12)
    # Of 64 rows 32 are diagonal; of the others 8 and 24 go to the two targets, and all weigh the same.
    loss = loss_of(ITVM(gaussian, {"step": 1.0, "interval": 3.0}, diagonal=0.5), student, batch)
    assert {name: len(times) for name, times in loss.times.items()} == {"initial": 32, "step": 8, "interval": 24}
    expected = loss.terms["initial"] + 0.25 * loss.terms["step"] + 0.75 * loss.terms["interval"]
    assert value(loss) == pytest.approx(float(expected), rel=1e-12)


def test_the_diagonal_of_itvm_goes_with_what_the_student_starts_from(gaussian: GaussianField):
    """A teacher without a network has a student that starts from random weights, with the velocity to learn."""
    network = NetworkField(MLP(2))
    assert ITVM(gaussian).shares["initial"] == 0.75
    assert ITVM(network).shares["initial"] == 0.5
    assert ITVM(Guided(network, 2.0, weak=NetworkField(MLP(2)))).shares["initial"] == 0.5
    assert ITVM(gaussian, diagonal=0.25).shares["initial"] == 0.25


def test_the_error_of_a_data_predicting_student_is_that_of_its_data(gaussian: GaussianField):
    """The weight (1 - s)^2 turns the error of u into that of ``x + (1 - s) u``: asked for, or if data is predicted."""
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)), batch_of(gaussian)
    x = torch.zeros(64, 2, dtype=torch.float64)

    def objective(**options: str) -> ITVM:
        return ITVM(gaussian, "interval", diagonal=0.0, **options)

    plain, weighted = (loss_of(objective(error_in=name), student, batch) for name in ("velocity", "data"))
    assert value(plain) == value(loss_of(objective(), student, batch))
    assert value(weighted) < value(plain)

    class AsData(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + (1 - s)[:, None] * self.network(x, s, t)

    as_data = FlowMap(AsData(student.network), prediction="data")
    torch.testing.assert_close(as_data(x, 0.2, 0.7), student(x, 0.2, 0.7))
    assert value(loss_of(objective(), as_data, batch)) == pytest.approx(value(weighted), rel=1e-9)


def test_times_of_the_terms(gaussian: GaussianField):
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2)), batch_of(gaussian, 512)
    for objective, same in (
        (ITVM(gaussian, diagonal=0.5, times="uniform", ends=0.3), "initial"),
        (LMD(gaussian, ends=0.3), "tangent"),
    ):
        times = loss_of(objective, student, batch).times
        s, t = times.pop(same).unbind(1)
        assert torch.equal(s, t)
        s, t = torch.cat(list(times.values())).unbind(1)
        assert (s <= t).all()
        assert s.unique().numel() > 100
        assert 0.2 < float((s == 0).double().mean()) < 0.4
        assert 0.2 < float((t == 1).double().mean()) < 0.4


# Flow matching


def test_flow_matching_asks_for_the_exact_velocity(gaussian: GaussianField):
    def gradients(size: float) -> Tensor:
        student = NetworkField(Perturbed(gaussian, 2, size))
        parts = [loss_of(FlowMatching(), student, batch_of(gaussian, 4000), seed=n) for n in range(40)]
        return torch.stack([gradient(part, student) for part in parts])

    exact, off = gradients(0.0), gradients(0.1)
    error = exact.std(0) / 40**0.5
    # 12 numbers beyond 4.5 standard errors: once in ten thousand; the seeds are fixed.
    assert ((exact.mean(0) / error).abs() < 4.5).all()
    assert ((off.mean(0) / error).abs() > 20).any()


def test_flow_matching_trains_the_diagonal_of_a_map(gaussian: GaussianField):
    network = Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)
    batch = batch_of(gaussian)
    student = FlowMap(network)
    loss = loss_of(FlowMatching("logit-normal"), student, batch)
    t = loss.times["velocity"][:, 0]
    assert torch.equal(t, loss.times["velocity"][:, 1])
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, dx = student.path.sample(noise, batch.data, t)
    expected = (network(x, t, t) - dx).detach().square().mean()
    assert value(loss) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("method", "is_at_end"), [(LMD, True), (EMD, False)])
def test_errors_of_velocities_are_turned_into_data_where_the_velocities_are(
    gaussian: GaussianField, method: Callable[..., Objective], is_at_end: bool
):
    """Lagrangian errors are of velocities at t, where a data-predicting network divides by 1 - t; the others' at s."""
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)), batch_of(gaussian)
    each = []
    for row in range(4):
        one = Batch(batch.data[row : row + 1])
        plain, weighted = (
            loss_of(method(gaussian, diagonal=0.0, error_in=unit), student, one, seed=row)
            for unit in ("velocity", "data")
        )
        s, t = next(iter(plain.times.values()))[0]
        each.append((value(weighted) / value(plain), float((1 - (t if is_at_end else s)) ** 2)))
    for found, expected in each:
        assert found == pytest.approx(expected, rel=1e-9)
