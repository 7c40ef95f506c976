"""Consistency distillation with the options of SCFlow (arXiv 2412.16906): truncated, in both directions, and consistent
on the chords of its own samples. Against closed forms, in float64."""

from typing import Any

import pytest
import torch
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import (
    Perturbed,
    SolvedAverageVelocity,
    batch_of,
    expected_gradients,
    loss_of,
    mixture,
    three_states,
    value,
)

from fewstep.common.randomness import generator
from fewstep.data.toy import Toy
from fewstep.flows.exact import GaussianField, MixtureField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ConsistencyDistillation
from fewstep.objectives.rows import Now, Rows
from fewstep.training.fit import fit


def rows_at(field: GaussianField, s: torch.Tensor, fraction: float = 0.0) -> Rows:
    """Rows at times s (n,), made of the field's noise and data."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(len(s), 2, generator=draw, dtype=torch.float64)
    data = field.data(len(s), draw)
    x, dx = field.path.sample(noise, data, s)
    return Rows("consistency", x, dx, s, torch.ones_like(s), noise, data, torch.full_like(s, fraction), {})


def errors(objective: ConsistencyDistillation, student: FlowMap, rows: Rows, **now: Any) -> dict[str, torch.Tensor]:
    found = objective.errors(student, rows, {"consistency": slice(None)}, Now(student, **{"progress": 1.0, **now}))
    return {name: error.detach() for name, error in found.items()}


def test_an_euler_step_is_off_by_its_square_and_all_of_them_by_its_length(
    gaussian: GaussianField, gaussian_map: FlowMap
) -> None:
    """The end points of two states a step apart differ by the step's error; the sum over the way from 0 to 1 bounds how
    far the fixed point is off, and halves with the step."""
    off = []
    for count in (20, 40, 80):
        s = torch.arange(count, dtype=torch.float64) / count
        objective = ConsistencyDistillation(gaussian, longest=1 / count, solver="euler", backward=0.1)
        rows = rows_at(gaussian, s)
        # The same trajectory at all times.
        x = gaussian_map(rows.noise[:1].expand(count, 2), torch.zeros_like(s), s)
        rows = Rows("consistency", x, x, s, rows.t, rows.noise, rows.data, rows.fraction, {})
        found = errors(objective, gaussian_map, rows)
        off.append([float(found[name].sqrt().sum()) for name in ("consistency", "backward")])
    first, second, third = torch.tensor(off)
    torch.testing.assert_close(first / second, torch.full((2,), 2.0), rtol=0.1, atol=0)
    torch.testing.assert_close(second / third, torch.full((2,), 2.0), rtol=0.05, atol=0)
    # Of Heun's steps the sum falls by four.
    heun = [
        float(
            errors(ConsistencyDistillation(gaussian, longest=1 / n), gaussian_map, rows_at(gaussian, s))["consistency"]
            .sqrt()
            .mean()
            * n
        )
        for n, s in ((n, torch.arange(40, dtype=torch.float64) / 41) for n in (40, 80))
    ]
    assert 3.5 < heun[0] / heun[1] < 4.5


def test_steps_are_as_long_as_drawn_and_stay_in_time(gaussian: GaussianField) -> None:
    s = torch.tensor([0.0, 0.05, 0.5, 0.95], dtype=torch.float64)
    objective = ConsistencyDistillation(gaussian, longest=0.2)
    fraction = torch.tensor([0.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(objective._moved(s, 1 - s, fraction) - s, s.new_tensor([0.2, 0.15, 0.1, 0.05]))
    torch.testing.assert_close(s - objective._moved(s, -s, fraction), s.new_tensor([0.0, 0.0375, 0.1, 0.2]))
    fixed = ConsistencyDistillation(gaussian, gap=0.1)
    torch.testing.assert_close(fixed._moved(s, 1 - s, fraction), s + 0.1 * (1 - s), rtol=0, atol=0)


def test_truncated_to_the_data_it_is_a_denoiser(gaussian: GaussianField) -> None:
    """The goal is the data where ``1 - s'`` is below the bound; at 1, what solves it is E[x_1 | x_s], the velocity
    taken for the average velocity, and the exact map does not."""
    rows = rows_at(gaussian, torch.linspace(0.01, 0.95, 8, dtype=torch.float64), fraction=0.5)
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.1))
    end = student(rows.x, rows.s, rows.t).detach()
    to_data = (end - rows.data).square().mean(1)
    all_data = errors(ConsistencyDistillation(gaussian, truncate=1.0), student, rows)["consistency"]
    torch.testing.assert_close(all_data, to_data)
    plain = errors(ConsistencyDistillation(gaussian), student, rows)["consistency"]
    some = errors(ConsistencyDistillation(gaussian, truncate=0.45), student, rows)["consistency"]
    is_near = 1 - (rows.s + 0.1 * (1 - rows.s)) < 0.45
    assert not torch.equal(is_near, 1 - rows.s < 0.45)
    assert 2 < int(is_near.sum()) < 6
    torch.testing.assert_close(some, torch.where(is_near, to_data, plain))

    field = mixture()
    states = three_states(to_the_end=True)
    objective = ConsistencyDistillation(field, truncate=1.0)

    class Velocity(torch.nn.Module):
        def forward(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return field(x, s)

    assert expected_gradients(objective, field, Velocity(), states)[-1].abs().max() < 1e-10
    assert expected_gradients(objective, field, SolvedAverageVelocity(field), states)[-1].abs().max() > 1e-3


@pytest.mark.parametrize("variance", [1.0, 0.25, 4.0])
def test_the_exact_map_is_not_consistent_on_its_own_chords(variance: float) -> None:
    """On the chord of z and ``sqrt(C) z`` a state is wider than one of p_t, so that its end point is
    ``((1 - t) + t sqrt(C)) / sqrt(C_t)`` times too far: the reflow term is never zero there, and pulls towards
    straightness. It is zero for straight trajectories alone."""
    field = GaussianField(torch.zeros(2, dtype=torch.float64), variance * torch.eye(2, dtype=torch.float64))
    student = FlowMap(GaussianAverageVelocity(field))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = rows_at(field, t)
    found = errors(ConsistencyDistillation(field, reflow=0.1), student, rows)["reflow"]
    ratio = ((1 - t) + t * variance**0.5) / (t.square() * variance + (1 - t).square()).sqrt()
    end = variance**0.5 * rows.noise
    torch.testing.assert_close(found, (ratio - 1).square() * end.square().mean(1))
    assert (found > 0).all()
    if variance == 1:
        assert float(ratio[1]) == pytest.approx(2**0.5)

    class Straight(torch.nn.Module):
        def forward(self, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(x)

    assert errors(ConsistencyDistillation(field, reflow=0.1), FlowMap(Straight()), rows)["reflow"].max() < 1e-24


def test_the_loss_is_the_sum_of_the_terms_by_their_weights(gaussian: GaussianField) -> None:
    student, batch = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3)), batch_of(gaussian)
    options: Any = {"huber": 0.01, "per_component": True, "longest": 0.1, "solver": "euler", "truncate": 0.4}
    objective = ConsistencyDistillation(gaussian, **options, backward=0.2, reflow=0.3, begin=0.5)
    loss = loss_of(objective, student, batch)
    assert set(loss.terms) == set(loss.times) == {"consistency", "backward", "reflow"}
    weights = {"consistency": 1.0, "backward": 0.2, "reflow": 0.3}
    assert value(loss) == pytest.approx(float(sum(w * loss.terms[name] for name, w in weights.items())), rel=1e-12)
    before = loss_of(objective, student, batch, progress=0.49)
    plain = loss_of(ConsistencyDistillation(gaussian, **options), student, batch)
    assert set(before.terms) == {"consistency"}
    assert value(before) == value(plain) == float(loss.terms["consistency"])


def test_the_distance_of_components() -> None:
    objective = ConsistencyDistillation(GaussianField(torch.zeros(2), torch.eye(2)), huber=0.01, per_component=True)
    x = torch.tensor([[3.0, 0.0], [0.01, 0.01]], dtype=torch.float64)
    root = (9 + 1e-4) ** 0.5 - 0.01
    expected = torch.tensor([root / 2, 0.01 * (2**0.5 - 1)], dtype=torch.float64)
    torch.testing.assert_close(objective.distance(x, torch.zeros_like(x)), expected)


@pytest.mark.takes_seconds
def test_with_reflow_a_student_is_straighter() -> None:
    """How far one-call samples move when they are asked for again half-way on their chords."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]])
    field = MixtureField(means, torch.tensor([0.3, 0.25, 0.35]), torch.tensor([0.5, 0.3, 0.2]))
    noise = torch.randn(1000, 2, generator=generator(1))
    found = []
    for weight in (0.0, 1.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = FlowMap(MLP(2, width=64, depth=3, times=2))
        objective = ConsistencyDistillation(field, ema=0.95, longest=0.2, solver="euler", reflow=weight)
        made = fit(student, objective, Toy(field.data), steps=300, batch=256, lr=3e-3, ema=0.98, quiet=True).ema
        with torch.no_grad():
            y = made(noise, 0.0, 1.0)
            again = made((noise + y) / 2, 0.5, 1.0)
        found.append(float((again - y).square().mean() / y.var()))
    assert found[1] < 0.5 * found[0], found
