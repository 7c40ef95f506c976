"""What the objectives are made of: derivatives, draws of times, tangents, weights, guidance and rounds."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GaussianAverageVelocity
from objective_toys import Perturbed, SolvedAverageVelocity, batch_of, loss_of
from test_times import GAP, N, gap
from torch import Tensor, nn

from fewstep import exact
from fewstep.data import toy
from fewstep.data.batch import Batch
from fewstep.exact import GaussianField
from fewstep.fields import Guided, VelocityField
from fewstep.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import AYF, FMM, LSD, PFMM, PSD, SCM, Objective, Shortcut, two_time
from fewstep.objectives.derivative import derivative, time_derivative
from fewstep.objectives.two_time import Now, Rows, normalized
from fewstep.paths import Linear, Trigonometric
from fewstep.randomness import generator
from fewstep.times import draw_pairs
from fewstep.training.fit import fit
from fewstep.training.run import Run

# Derivatives


def swirl(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(3 * t).sin() * x[:, 0] ** 2, x[:, 1] * t**3 + x[:, 0]], dim=1)


@pytest.mark.parametrize("mode", ["forward", "float32", "difference"])
def test_derivatives_of_a_closed_form(mode: str):
    x = torch.randn(50, 2, generator=generator(1), dtype=torch.float64)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    dx = torch.randn(50, 2, generator=generator(2), dtype=torch.float64)
    value, slope = derivative(swirl, (x, t), (dx, torch.full_like(t, 2.0)), mode)
    expected = torch.stack(
        [
            6 * (3 * t).cos() * x[:, 0] ** 2 + 2 * (3 * t).sin() * x[:, 0] * dx[:, 0],
            6 * x[:, 1] * t**2 + dx[:, 1] * t**3 + dx[:, 0],
        ],
        dim=1,
    )
    inside = slice(None) if mode != "difference" else slice(1, -1)
    assert (slope - expected)[inside].abs().max() < (1e-7 if mode == "difference" else 1e-13)
    assert (slope - expected).abs().max() < 2e-3  # first order at the ends, where the step is one-sided
    assert (value - swirl(x, t))[inside].abs().max() < (1e-7 if mode == "difference" else 1e-15)
    _, of_time = time_derivative(lambda t: swirl(x, t), t, mode)
    assert (of_time[:, 1] - 3 * x[:, 1] * t**2)[inside].abs().max() < 1e-7


def test_the_difference_is_of_second_order():
    """In float32 its step is h = 2e-4: an error of h^2 f''' / 6, which is beyond rounding for a fast function."""
    t = torch.tensor([0.3, 0.6])
    errors = []
    for speed in (200.0, 400.0, 800.0):
        _, slope = time_derivative(lambda t, w=speed: (w * t).sin()[:, None], t, "difference")
        errors.append(slope[:, 0] / (speed * (speed * t).cos()) - 1)
        torch.testing.assert_close(errors[-1], torch.full_like(t, -(speed**2) * 4e-8 / 6), rtol=0.15, atol=2e-4)


@pytest.mark.parametrize("direction", [1.0, -1.0, 0.0])
def test_no_time_leaves_its_range(direction: float):
    seen: list[Tensor] = []
    t = torch.tensor([0.0, 1e-4, 0.5, 1 - 1e-4, 1.0])

    def function(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x * t[:, None]

    along = (torch.ones(5, 1), torch.full((5,), direction))
    _, slope = derivative(function, (torch.ones(5, 1), t), along, "difference")
    assert len(seen) == 2
    assert all((times >= 0).all() and (times <= 1).all() for times in seen)
    torch.testing.assert_close(slope[:, 0], t + direction, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("mode", ["forward", "float32", "difference"])
def test_what_a_derivative_keeps(mode: str):
    network, x, t = MLP(2, width=8, depth=2), torch.randn(4, 2), torch.full((4,), 0.5)
    with torch.no_grad():
        assert not any(out.requires_grad for out in time_derivative(lambda t: network(x, t), t, mode))
    value, slope = time_derivative(lambda t: network(x, t), t, mode)
    assert value.requires_grad
    slope.square().sum().backward()
    assert all(layer.weight.grad is not None for layer in (network.time, *network.hidden, network.output))
    if mode != "forward":  # autocast would spoil it
        outside = slope.detach()
        with torch.autocast("cpu", torch.bfloat16):
            _, slope = time_derivative(lambda t: network(x, t), t, mode)
        assert torch.equal(slope, outside)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_dropout_is_the_same_in_both_calls(mode: str):
    torch.manual_seed(5)
    x, t = torch.ones(64, 8), torch.full((64,), 0.5)
    value, slope = time_derivative(lambda t: nn.functional.dropout(x * t[:, None], 0.5), t, mode)
    kept = value != 0
    assert 0.3 < float(kept.double().mean()) < 0.7
    torch.testing.assert_close(slope, 2.0 * kept, rtol=1e-4, atol=1e-4)  # another mask would give hundreds
    after = torch.rand(1)
    torch.manual_seed(5)
    nn.functional.dropout(x, 0.5)
    assert torch.equal(after, torch.rand(1))  # as after one call


@pytest.mark.parametrize("method", [LSD, SCM, AYF])
def test_modes_agree_in_an_objective(gaussian: GaussianField, method: Any):
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3))
    losses = [
        float(loss_of(method(gaussian, jvp=mode), student, batch_of(gaussian)).total.detach())
        for mode in ("forward", "float32", "difference")
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0] != losses[2]


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
    with torch.no_grad():
        goal = SCM(field, ramp=ramp).goal(student, rows, Now(progress=1.0))
        tangent = student.average_velocity(x, s, one) - goal
    ours = (first + second) * math.pi / (2 * cos)
    # The ramp is not the paper's, which has it before all of the second: here it is before what vanishes at s = 1.
    plain = (student.average_velocity(x, s, one) - field(x, s)).detach()
    ours = plain + ramp * (ours - plain)
    assert ours.abs().max() > 0.5
    torch.testing.assert_close(tangent, normalized(ours), rtol=0, atol=1e-7)


# Guidance


class Still(VelocityField):
    """The same velocity everywhere, which counts the rows it is asked for."""

    path = Linear()

    def __init__(self, velocity: float) -> None:
        super().__init__()
        self.constant = velocity

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # pyright: ignore
        assert "guidance" not in cond
        return torch.full_like(x, self.constant)


class Asked(nn.Module):
    """A network that records the guidance and the points of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(())), []

    def forward(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        self.calls.append((x.detach(), guidance))
        return self.weight + guidance[:, None] * torch.ones_like(x)


@pytest.mark.parametrize("variant", ["EMD", "LMD"])
def test_every_row_has_its_own_strength(variant: str, monkeypatch: pytest.MonkeyPatch):
    # v + (l - 1)(v - v_weak) with v = 1 and v_weak = 0 is l: the average velocity of a student that answers with l.
    teacher = Guided(Still(1.0), 1.0, weak=Still(0.0))
    objective = AYF(teacher, variant, strength=(1.0, 3.0))
    student, data = FlowMap(Asked()), torch.randn(4096, 2, generator=generator(4))
    loss = loss_of(objective, student, Batch(data), target=FlowMap(Asked()))
    assert float(loss.total.detach()) < 1e-9
    x, strength = student.network.calls[-1]
    assert strength.shape == (4096,)
    assert 1.0 <= float(strength.min()) < 1.01
    assert 2.99 < float(strength.max()) <= 3.0
    assert 1.95 < float(strength.mean()) < 2.05
    for points, given in student.network.calls:  # of each part, those of its rows
        index = (points[:, None, 0] == x[None, :, 0]).double().argmax(1) if len(points) < 100 else None
        assert index is None or torch.equal(given, strength[index])


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


# Parts of an objective that train or stay


def student_of(seed: int = 0, dropout: float = 0.0) -> FlowMap:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP(2, width=16, depth=2, times=2)
        nn.init.normal_(network.second_time.last.weight, std=0.1)  # pyright: ignore
    if dropout:
        network.output = nn.Sequential(nn.Dropout(dropout), network.output)  # pyright: ignore
    return FlowMap(network)


def test_the_learned_weight_goes_to_the_logarithm_of_the_error():
    weight = two_time.LearnedWeight()
    s, t = torch.rand(2, 256, generator=generator(0))
    assert torch.equal(weight(s, t), torch.zeros(256))
    error = torch.exp(2 * s - t)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    objective = PSD(learned=True)
    objective.log_weight = weight
    for _ in range(300):
        optimizer.zero_grad()
        objective.weigh(error, s, t, Now()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weight(s, t).detach(), 2 * s - t, rtol=0, atol=0.15)


def train(make: Callable[[], Objective], out: Path | None = None, stop: int = 0) -> tuple[Objective, FlowMap]:
    """24 steps, with dropout; checkpoints every 8 where there is a folder; killed after step ``stop``."""
    objective, student = make(), student_of(dropout=0.2)

    def kill(run: Run) -> None:
        if run.step == stop:
            raise InterruptedError

    data = toy.eight_gaussians()
    fit(student, objective, data, 24, out=out, batch=64, checkpoint_every=8, callbacks=[kill], quiet=True)
    return objective, student


def equal(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "make", [lambda: PSD(learned=True), lambda: PFMM(exact.eight_gaussians(), rounds=4, ema=0.9)], ids=["PSD", "PFMM"]
)
def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path: Path, make: Callable[[], Objective]):
    whole, student = train(make)
    # A round has 6 steps. Killed in the third; the checkpoint is of the second, whose frozen copy must come back.
    with pytest.raises(InterruptedError):
        train(make, tmp_path, stop=14)
    resumed, again = train(make, tmp_path)
    fresh = make()
    fresh.adopt(student_of(dropout=0.2))
    for one, two in ((student, again), (whole, resumed)):
        a, b = one.state_dict(), two.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    # And there was something to lose.
    assert not any(torch.equal(whole.state_dict()[key], value) for key, value in fresh.state_dict().items())


def test_pfmm_killed_and_gone_on_with_the_same_object(tmp_path: Path):
    def make() -> PFMM:
        return PFMM(exact.eight_gaussians(), rounds=4, ema=0.9)

    whole, _ = train(make)
    one = make()
    with pytest.raises(InterruptedError):
        train(lambda: one, tmp_path, stop=14)
    train(lambda: one, tmp_path)
    assert all(torch.equal(one.state_dict()[key], value) for key, value in whole.state_dict().items())


def test_pfmm_refreshes_its_copy_when_a_round_begins_and_never_else():
    objective, student = PFMM(exact.eight_gaussians(), rounds=4, ema=0.5), student_of()
    frozen: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}

    def watch(run: Run) -> None:
        assert objective.frozen is not None
        assert run.target is not None
        frozen[run.step] = next(objective.frozen.parameters()).clone()
        targets[run.step] = next(run.target.parameters()).clone()

    fit(student, objective, toy.eight_gaussians(), 20, batch=64, callbacks=[watch], quiet=True)
    # Step n + 1 is computed at progress n / 20: rounds begin with step 6, 11 and 16, from the copy after 5, 10 and 15.
    for step in range(6, 21):
        assert torch.equal(frozen[step], targets[(step - 1) // 5 * 5])
    assert not torch.equal(frozen[5], frozen[6])
    assert int(objective.round) == 3
    assert objective.frozen is not None
    assert not any(p.requires_grad for p in objective.frozen.parameters())
    assert not any(module.training for module in objective.frozen.modules())


def test_intervals_and_halves_of_pfmm():
    objective = PFMM(exact.eight_gaussians(), rounds=3)
    assert [objective.round_at(p) for p in (0.0, 0.33, 0.34, 0.67, 0.99, 1.0)] == [0, 0, 1, 2, 2, 2]
    for progress, longest in ((0.0, 0.25), (0.5, 0.5), (1.0, 1.0)):
        s, t = objective.pairs(4096, generator(0), Now(progress=progress))
        assert 0.9 * longest < float((t - s).max()) <= longest + 1e-6
