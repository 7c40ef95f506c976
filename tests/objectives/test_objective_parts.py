"""What the objectives draw and build: times, tangents, strengths of guidance."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import Perturbed, SolvedAverageVelocity, loss_of, value
from toys.times import GAP, N, gap

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows import exact
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric
from fewstep.flows.times import draw_pairs
from fewstep.objectives import (
    AYF,
    FMM,
    ITVM,
    LMD,
    PSD,
    SCM,
    AlphaFlow,
    ConsistencyTraining,
    ContrastiveFlowMatching,
    Objective,
    Shortcut,
    SplitMeanFlow,
    TwoTime,
)
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.weights import bounded, normalized

# Times


@pytest.mark.parametrize("longest", [0.01, 0.3, 0.99])
def test_pairs_of_a_strip(longest: float):
    s, t = draw_pairs(N, generator(6), longest=longest)
    assert (s >= 0).all()
    assert (t <= 1).all()
    assert (s <= t).all()
    length = t - s
    assert float(length.max()) <= longest + 1e-6
    if longest > 0.1:  # float32 leaves little of short lengths
        assert gap(length / longest, lambda d: 1 - (1 - d.clamp(0, 1)) ** 2) < GAP
    assert gap(s / (1 - length), lambda u: u.clamp(0, 1)) < GAP
    assert abs(float(torch.corrcoef(torch.stack([s / (1 - length), length]))[0, 1])) < 5 / N**0.5


def test_a_strip_of_everything_changes_nothing():
    assert all(map(torch.equal, draw_pairs(100, generator(7)), draw_pairs(100, generator(7), longest=1.0)))


def test_ends_of_a_strip():
    s, t = draw_pairs(N, generator(8), ends=0.5, longest=0.3)
    assert ((s >= 0) & (s <= t) & (t <= 1) & (t - s <= 0.3 + 1e-6)).all()
    # At least three quarters reach as far as they may: to an end, or over all of the strip.
    reaching = (s == 0) | (t == 1) | (t - s > 0.3 - 1e-6)
    assert 0.74 < float(reaching.double().mean()) < 0.8


def test_the_grid_of_shortcut():
    objective = Shortcut(finest=16)
    s, t = objective.pairs(N, generator(9), Now())
    length = t - s
    counts = {float(value): int(count) for value, count in zip(*length.unique(return_counts=True), strict=True)}
    assert set(counts) == {1.0, 0.5, 0.25, 0.125}  # halves of the last are the finest steps
    assert all(abs(count - N / 4) < 5 * (N * 3 / 16) ** 0.5 for count in counts.values())
    place = s / length
    assert torch.equal(place, place.round())
    assert all(len(s[length == value].unique()) == round(1 / value) for value in counts)


@pytest.mark.parametrize(("finest", "steps"), [(2, True), (4, False)])
def test_the_shortest_halves_of_shortcut_are_along_the_velocity(gaussian: GaussianField, finest: int, steps: bool):
    """Of [0, 1]: halves on a grid of two steps are Euler steps, on one of four they are learned."""
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.1))
    x = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    s, t = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    rows = Rows("shortcut", x, x, s, t, x, x, s, {})
    middle = x + 0.5 * (student.velocity(x, 0.0) if steps else student.average_velocity(x, 0.0, 0.5))
    end = middle + 0.5 * (student.velocity(middle, 0.5) if steps else student.average_velocity(middle, 0.5, 1.0))
    with torch.no_grad():
        goal = Shortcut(finest=finest).goal(student, rows, Now(target=student))
    torch.testing.assert_close(goal, end - x)


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        (PSD(), 0.5),
        (PSD(middle="uniform"), 0.3),
        (SplitMeanFlow(), 0.3),
        (ITVM(exact.eight_gaussians()), 0.5),
        (ITVM(exact.eight_gaussians(), middle=0.5), 0.4),
        (ITVM(exact.eight_gaussians(), middle=1.0), 0.3),
    ],
    ids=["PSD", "PSD-U", "SplitMeanFlow", "ITVM", "ITVM, near the middle", "ITVM, anywhere"],
)
def test_where_an_interval_is_cut(gaussian: GaussianField, objective: TwoTime, part: float):
    """For a fraction drawn as 0.3: the goal is the way through that place, by the student's own two parts."""
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.1))
    x = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    s, t = torch.full((2, 8), 0.2, dtype=torch.float64) + torch.tensor([[0.0], [0.5]])
    rows = Rows("interval", x, x, s, t, x, x, torch.full_like(s, 0.3), {})
    m = s + part * (t - s)
    with torch.no_grad():
        goal = objective.goal(student, rows, Now(target=student))
        torch.testing.assert_close(x + 0.5 * goal, student(student(x, s, m), m, t), rtol=0, atol=1e-12)


def test_the_strip_of_fmm_widens():
    objective = FMM(first=0.1, widening=0.5)
    assert [objective.longest(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert FMM(widening=0.0).longest(0.0) == 1.0
    for progress, width in ((0.0, 0.1), (0.25, 0.55), (1.0, 1.0)):
        s, t = objective.pairs(4096, generator(10), Now(progress=progress))
        assert 0.9 * width < float((t - s).abs().max()) <= width + 1e-6
        assert 0.45 < float((s > t).double().mean()) < 0.55


# Tangents


def test_a_normalised_tangent():
    residual = torch.tensor([[3.0, 4.0], [1e-6, 0.0], [1e6, 1e6]])
    rms = torch.tensor([[12.5**0.5], [1e-6 / 2**0.5], [1e6]])
    torch.testing.assert_close(normalized(residual), residual / (rms + 0.1))
    assert normalized(residual).square().mean(1).max() <= 1


@pytest.mark.parametrize("method", [AYF, SCM])
def test_a_tangent_that_is_cut_off(gaussian: GaussianField, method: Callable[..., TwoTime]):
    """Of FACM: where all its numbers are within -1 and 1 the tangent is the plain residual, which ``norm`` shrinks, and
    beyond they stop there."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    s = torch.rand(64, generator=draw, dtype=torch.float64)
    one = torch.ones_like(s)
    rows = Rows("map", x, x, s, one, x, x, s, {})
    for size, is_cut in ((0.03, False), (1.0, True)):
        student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, size))
        u, ahead, behind = (
            student.average_velocity(x + e * gaussian(x, s), s + e, one).detach() for e in (0.0, 1e-6, -1e-6)
        )
        plain = u - gaussian(x, s) - (1 - s)[:, None] * (ahead - behind) / 2e-6
        assert bool(plain.abs().max() > 1) is is_cut
        found = method(gaussian, ramp=1.0, bound="clamp").residual(student, rows, Now(progress=1.0)).detach()
        torch.testing.assert_close(found, plain.clamp(-1, 1), rtol=0, atol=1e-7)
        normed = method(gaussian, ramp=1.0).residual(student, rows, Now(progress=1.0)).detach()
        torch.testing.assert_close(normed, normalized(plain), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="unknown bound 'max'"):
        bounded(x, "max")


@pytest.mark.parametrize("ramp", [1.0, 0.4])
def test_scm_on_the_trigonometric_path_is_that_of_its_paper(gaussian: GaussianField, ramp: float):
    """With theta = (1 - s) pi / 2 and ``f = cos(theta) x - sin(theta) F`` for the map to the data, the paper's tangent
    ``-cos^2 (F - dx/dtheta) - cos sin (x + dF/dtheta)`` is ours times ``cos(theta) 2 / pi``; here with differences."""
    field = gaussian.on(Trigonometric())
    student = FlowMap(Perturbed(SolvedAverageVelocity(field), 2, 0.3), Trigonometric())
    x = torch.randn(20, 2, generator=generator(3), dtype=torch.float64)
    theta = torch.linspace(0.1, 1.5, 20, dtype=torch.float64)

    def time(theta: Tensor) -> Tensor:
        return 1 - theta * 2 / math.pi

    @torch.no_grad()
    def paper_network(x: Tensor, theta: Tensor) -> Tensor:
        end = student(x, time(theta), torch.ones_like(theta))
        return (theta.cos()[:, None] * x - end) / theta.sin()[:, None]

    dx = field(x, time(theta)) * (-2 / math.pi)  # along theta
    ahead, behind = (paper_network(x + e * dx, theta + e) for e in (1e-5, -1e-5))
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    slope = (ahead - behind) / 2e-5
    first, second = -(cos**2) * (paper_network(x, theta) - dx), -cos * sin * (x + slope)
    s, one = time(theta), torch.ones_like(theta)
    rows = Rows("consistency", x, x, s, one, x, x, s, {})
    tangent = SCM(field, ramp=ramp).residual(student, rows, Now(progress=1.0)).detach()
    ours = (first + second) * math.pi / (2 * cos)
    # The ramp is not the paper's, which has it before all of the second: here it is before what vanishes at s = 1.
    plain = (student.average_velocity(x, s, one) - field(x, s)).detach()
    ours = plain + ramp * (ours - plain)
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(tangent, normalized(ours), rtol=0, atol=1e-7)


# Dropout


class Dropping(nn.Module):
    """A network of two times, half of whose output is dropped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.size = nn.Dropout(0.5), nn.Parameter(torch.tensor(10.0, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.drop(self.size * torch.ones_like(x) + 0 * (s + t)[:, None])


@pytest.mark.parametrize("jvp", ["forward", "difference"])
@pytest.mark.parametrize("make", [lambda v, **o: AYF(v, **o), lambda v, **o: SCM(v, **o)], ids=["AYF", "SCM"])
def test_the_tangent_is_made_of_the_u_that_it_trains(make: Any, jvp: str):
    """``u - sg[u] + g`` is g, and no row of g is above 1; two draws of dropout would leave their difference, of 20."""
    field, student = GaussianField(torch.zeros(2), torch.eye(2)), FlowMap(Dropping()).train()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=draw, dtype=torch.float64)
    s = torch.rand(64, generator=draw, dtype=torch.float64)
    rows = Rows("map", x, x, s, torch.ones_like(s), x, x, s, {})
    residual = make(field, jvp=jvp).residual(student, rows, Now(progress=1.0))
    assert float(residual.detach().square().mean(1).max()) < 1
    assert residual.requires_grad


@pytest.mark.parametrize("method", [ConsistencyTraining(huber=0.0), AlphaFlow(adaptive=0.0)], ids=["CT", "AlphaFlow"])
def test_a_goal_made_of_the_student_has_its_dropout(method: Objective):
    """The student's output is one number or nothing, whatever the time: where both sides drop the same, nothing but the
    data is left of the error, which the small step divides."""
    student = FlowMap(Dropping()).train()
    data = torch.zeros(64, 2, dtype=torch.float64)
    noise = torch.zeros_like(data)
    loss = method(student, Batch(data, {}, noise), progress=0.6, generator=generator(0))
    found = float(next(value for name, value in loss.terms.items() if name != "tangent"))
    # X differs by the step times u, and so does AlphaFlow's goal.
    gap = method.gap(0.6) if isinstance(method, ConsistencyTraining) else method.alpha(0.6)  # pyright: ignore
    assert found < 400 * gap


# Guidance


class Still(VelocityField):
    """The same velocity everywhere."""

    path = Linear()

    def __init__(self, velocity: float) -> None:
        super().__init__()
        self.constant = velocity

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # pyright: ignore
        assert "guidance" not in cond
        return torch.full_like(x, self.constant)


class Guessing(nn.Module):
    """Answers with its guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        return self.weight + guidance[:, None] * torch.ones_like(x)


@pytest.mark.parametrize("method", [lambda teacher: AYF(teacher), lambda teacher: AYF(teacher, "LMD"), ITVM, LMD, PSD])
def test_every_row_has_its_own_strength(method: Callable[[Guided], Objective]):
    # v + (l - 1)(v - v_weak) with v = 1 and v_weak = 0 is l, everywhere, so the map is known.
    strengths = 1 + 2 * torch.arange(64) / 64
    batch = Batch(torch.randn(64, 2), {"guidance": strengths})
    student = FlowMap(Guessing())
    assert value(loss_of(method(Guided(Still(1.0), 1.0, weak=Still(0.0))), student, batch, target=student)) < 1e-9
    wrong = method(Guided(Still(1.5), 1.0, weak=Still(0.0)))
    assert value(loss_of(wrong, student, batch, target=student)) > 1e-2


def test_guidance_of_each_row_is_that_of_a_number(gaussian: GaussianField):
    weak = GaussianField(gaussian.mean + 1, torch.eye(2, dtype=torch.float64))
    guided = Guided(gaussian, 7.0, interval=(0.2, 0.9), weak=weak)
    x = torch.randn(12, 2, generator=generator(5), dtype=torch.float64)
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    scales = torch.linspace(0, 3, 12, dtype=torch.float64)
    found = guided(x, t, guidance=scales)
    for row, scale in enumerate(scales.tolist()):
        alone = Guided(gaussian, scale, interval=(0.2, 0.9), weak=weak)
        torch.testing.assert_close(found[row], alone(x[row : row + 1], t[row : row + 1])[0], rtol=0, atol=1e-14)
    ones = guided(x, t, guidance=torch.ones(12))
    assert torch.equal(ones, gaussian(x, t))
    assert not torch.allclose(guided(x, t), ones)


# Contrast, and schedules of a


def test_contrast_leaves_out_dropped_rows_and_takes_other_classes():
    labels = torch.tensor([0, 0, 1, 9, 2, 2, 2, 9])
    velocity = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, data = torch.zeros(8, 2, dtype=torch.float64), torch.arange(16, dtype=torch.float64).reshape(8, 2)
    t = torch.full((8,), 0.5, dtype=torch.float64)

    def contrast(**options: Any) -> float:
        method = ContrastiveFlowMatching(0.5, **options)
        terms = method.more_terms(velocity, Linear(), noise, data, t, 4, {"class_labels": labels})
        return float(terms["contrast"])

    def by_hand(pairs: dict[int, int]) -> float:
        return -0.5 * sum(float((velocity[i] - data[j]).square().mean()) for i, j in pairs.items()) / len(pairs)

    before = {0: 3, 1: 0, 2: 1, 3: 2, 4: 7, 5: 4, 6: 5, 7: 6}
    assert contrast() == pytest.approx(by_hand(before))
    kept = {i: j for i, j in before.items() if labels[i] != 9}
    assert contrast(null=9) == pytest.approx(by_hand(kept))
    other = {0: 3, 1: 3, 2: 1, 3: 2, 4: 7, 5: 7, 6: 7, 7: 6}
    assert contrast(other_classes=True) == pytest.approx(by_hand(other))
    assert contrast(other_classes=True, null=9) == pytest.approx(by_hand({i: other[i] for i in kept}))
    with pytest.raises(ValueError, match="needs data with class_labels"):
        ContrastiveFlowMatching(null=9).more_terms(velocity, Linear(), noise, data, t, 4, {})


def test_the_exponential_schedule_of_alpha_flow_never_takes_a_derivative():
    method = AlphaFlow(schedule="exponential", last=1e-3)
    assert [method.alpha(p) for p in (0.0, 1 / 3, 2 / 3, 1.0)] == pytest.approx([1.0, 0.1, 0.01, 1e-3])
    assert AlphaFlow().alpha(1.0) == 0
    for options, message in (({"schedule": "linear"}, "unknown schedule"), ({"last": 0.0}, "last is 0.0")):
        with pytest.raises(ValueError, match=message):
            AlphaFlow(**options)


def test_steps_of_consistency_training_stretch_towards_data():
    """Of easy consistency tuning: ``(1 + 8 sigmoid(-n)) / q^k`` of the way, and never more than all of it."""
    seen: list[Tensor] = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            seen.append(s)
            return x * self.zero

    data = torch.zeros(64, 1, dtype=torch.float64)
    ConsistencyTraining(stretch=8.0)(FlowMap(Seen()), Batch(data), progress=0.5, generator=generator(0))
    near, s = seen
    expected = torch.minimum((1 - s) * (1 + 8 * torch.sigmoid(-(1 - s) / s)) / 2**5, 1 - s)
    torch.testing.assert_close(near - s, expected, atol=1e-9, rtol=1e-9)
