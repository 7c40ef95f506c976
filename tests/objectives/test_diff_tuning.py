"""Diff-Tuning: its times, its minimiser for two Gaussians in closed form, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.data.given import as_data
from fewstep.flows.fields import VelocityField
from fewstep.flows.paths import Linear
from fewstep.networks import MLP
from fewstep.objectives import DiffTuning

NEW, OLD = (1.0, 0.4), (-0.5, 0.8)  # mean and deviation of the new data, and of the samples
ROWS = 600_000


def normal_rows(mean: float, deviation: float, seed: int, rows: int = ROWS) -> Tensor:
    return mean + deviation * torch.randn(rows, 1, generator=generator(seed), dtype=torch.float64)


def of_gaussian(x: Tensor, t: Tensor, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    """The density of x_t, and ``E[dx_t | x_t]``."""
    variance = t**2 * deviation**2 + (1 - t) ** 2
    centred = x - t * mean
    density = (-(centred**2) / (2 * variance)).exp() / variance.sqrt()
    return density, mean + (t * deviation**2 - (1 - t)) / variance * centred


class Best(VelocityField):
    """The minimiser of two Gaussians, plus ``theta`` times a few functions."""

    def __init__(self, power: float, weight: float, new: tuple[float, float] = NEW) -> None:
        super().__init__()
        self.path, self.power, self.weight, self.new = Linear(), power, weight, new
        self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.seen: list[tuple[Tensor, dict[str, Any]]] = []
        self.shape, self.classes = (1,), 0

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        self.seen.append((times, cond))
        t = times[:, None]
        (p, v), (q, w) = of_gaussian(x, t, *self.new), of_gaussian(x, t, *OLD)
        a, b = (1 - t) ** self.power * p, self.weight * t**self.power * q
        basis = torch.stack([torch.ones_like(x), x, t * x, (3 * x).sin()])
        return (a * v + b * w) / (a + b) + (self.theta[:, None, None] * basis).sum(0)


def slope_of(student: Best, objective: DiffTuning, rows: int = ROWS) -> Tensor:
    """The gradient in theta, in standard deviations of 20 batches' means."""
    slopes: list[Tensor] = []
    for seed in range(20):
        batch = Batch(normal_rows(*student.new, seed=100 + seed, rows=rows // 20))
        student.zero_grad()
        objective(student, batch, generator=generator(seed)).total.backward()
        assert student.theta.grad is not None
        slopes.append(student.theta.grad.clone())
    found = torch.stack(slopes)
    return found.mean(0) / (found.std(0) / math.sqrt(20))


@pytest.mark.parametrize(("power", "weight"), [(1.0, 0.1), (2.0, 1.0)])
def test_the_minimiser_of_two_gaussians_is_that_of_the_closed_form(power: float, weight: float):
    objective = DiffTuning(normal_rows(*OLD, seed=1), share=0.4, weight=weight, power=power)
    student = Best(power, weight)
    objective.adopt(student)
    assert slope_of(student, objective).abs().max() < 4.5
    for wrong in (Best(power, 3 * weight), Best(power + 1, weight)):
        assert slope_of(wrong, objective).abs().max() > 8


@pytest.mark.parametrize("retain", ["samples", "velocity"])
def test_a_model_of_the_new_data_has_nothing_to_learn(retain: str):
    """Where the new data are the model's own, it is the minimiser at any weight."""
    student = Best(1.0, 1.0, new=OLD)
    objective = DiffTuning(normal_rows(*OLD, seed=1), share=0.5, weight=0.7, retain=retain)
    objective.adopt(student)
    assert slope_of(student, objective, 40_000).abs().max() < 4.5
    loss = objective(student, Batch(normal_rows(*OLD, seed=2, rows=512)), generator=generator(0))
    assert (float(loss.terms["retained"]) == 0) == (retain == "velocity")


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_times_of_new_rows_and_of_samples_run_opposite_ways(power: float):
    student = Best(power, 0.1)
    objective = DiffTuning(normal_rows(*OLD, seed=1), share=0.2, power=power)
    objective.adopt(student)
    loss = objective(student, Batch(normal_rows(*NEW, seed=2, rows=20_000)), generator=generator(3))
    new, old = (loss.times[name][:, 0].sort().values for name in ("velocity", "retained"))
    assert (len(new), len(old)) == (16_000, 4000)
    for found, exact in ((new, 1 - (1 - new) ** (power + 1)), (old, old ** (power + 1))):
        ranks = (torch.arange(len(found), dtype=torch.float64) + 0.5) / len(found)
        assert (exact - ranks).abs().max() < 1.95 / math.sqrt(len(found))  # Kolmogorov-Smirnov, p = .001


def test_samples_come_from_the_model_once_and_train_the_null_class_alone():
    torch.manual_seed(0)
    field = fewstep.NetworkField(MLP(2, width=16, depth=2, classes=4))
    objective = DiffTuning(samples=64, share=0.25, null={"class_labels": 3}, steps=4)
    objective.check_student(field)
    objective.adopt(field)
    assert objective._rows is not None
    drawn = objective._rows
    assert drawn.data.shape == (64, 2)
    assert set(drawn.cond["class_labels"].tolist()) == {0, 1, 2}
    noise = torch.randn(64, 2, generator=generator(0))
    cond: dict[str, Any] = drawn.cond
    torch.testing.assert_close(drawn.data, fewstep.sample(field, noise, 4, solver="heun", **cond))
    again = DiffTuning(samples=64, null={"class_labels": 3}, steps=4)
    again.adopt(field)
    assert again._rows is not None
    assert torch.equal(again._rows.data, drawn.data)
    seen: list[Tensor] = []
    hook = field.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    batch = Batch(torch.randn(32, 2), {"class_labels": torch.zeros(32, dtype=torch.long)})
    loss = objective(field, batch, generator=[generator(k) for k in range(2)])
    hook.remove()
    assert seen[0].tolist() == ([3] * 4 + [0] * 12) * 2  # the first quarter of each chunk
    assert batch.cond["class_labels"].sum() == 0
    assert float(loss.total.detach()) == pytest.approx(float(loss.terms["velocity"] + 0.1 * loss.terms["retained"]))
    assert not list(objective.state_dict())


def test_what_does_not_fit_is_refused(tmp_path: Any):
    field = fewstep.NetworkField(MLP(2, width=8, depth=1, classes=3))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"retain": "weights"}, "unknown retain of DiffTuning 'weights'"),
        ({"share": 1.0}, r"share is 1: it lies in \(0, 1\)"),
        ({"power": 0.0}, "power is 0 and its weight 0.1"),
        ({"weight": -1.0}, "weight -1"),
        ({"samples": 0}, "draws 0 samples in 25 steps"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            DiffTuning(**options)
    with pytest.raises(ValueError, match=r"3 classes.*null: \{class_labels: 2\}"):
        DiffTuning().check_student(field)
    with pytest.raises(ValueError, match="not a FlowMap"):
        DiffTuning().check_student(fewstep.FlowMap(MLP(2, times=2)))
    with pytest.raises(ValueError, match="does not say what its samples look like"):
        DiffTuning().check_student(fewstep.NetworkField(nn.Linear(2, 2)))
    rows = as_data(TensorDataset(torch.randn(16, 2), torch.zeros(16, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"samples of shape \(3,\) beside data of shape \(2,\)"):
        DiffTuning(torch.randn(8, 3)).check_data(rows, field)
    with pytest.raises(ValueError, match="'label', which the data do not have: they have class_labels"):
        DiffTuning(torch.randn(8, 2), null={"label": 1}).check_data(rows, field)
    with pytest.raises(ValueError, match=r"retain: velocity asks .* no class_labels"):
        DiffTuning(torch.randn(8, 2), null={"class_labels": 2}, retain="velocity").check_data(rows, field)
    with pytest.raises(ValueError, match="without end"):
        DiffTuning("checkerboard").check_data(rows, field)
    with pytest.raises(FileNotFoundError, match="no data at"):
        DiffTuning(str(tmp_path / "gone.npz")).check_data(rows, field)
    with pytest.raises(ValueError, match="call adopt"):
        DiffTuning()(field, Batch(torch.zeros(4, 2)), generator=generator(0))
