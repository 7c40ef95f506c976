"""Reflected diffusion: its loss against closed forms, and a map of few calls that is distilled from what it trains."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.__main__ import main
from fewstep.common.randomness import generator, normal, uniform
from fewstep.data.batch import Batch
from fewstep.flows.heat import heat_kernel, reflect
from fewstep.flows.sources import starting_points
from fewstep.networks import MLP
from fewstep.objectives import FlowMatching, ReflectedDiffusion

F64 = torch.float64
BOARD = torch.tensor([[[0, 0.5], [0, 0.5]], [[0.5, 1], [0.5, 1]]])


class Constant(nn.Module):
    """Says one number everywhere."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.value.expand_as(x)


def loss_of(objective: Any, student: Any, data: Tensor, seed: int = 0) -> Any:
    return objective(student, Batch(data), generator=generator(seed))


@pytest.mark.parametrize("prediction", ["noise", "score", "velocity"])
def test_the_loss_is_the_error_of_the_score_times_sigma(prediction: str) -> None:
    path, data = fewstep.Reflected(0, 1, 0.01, 2.0), torch.rand(512, 3, dtype=F64, generator=generator(1))
    draw = generator(0)
    x0, t, z = uniform((512, 3), draw), uniform(512, draw).double(), normal(data, draw)
    assert x0.shape == data.shape  # which has no part in the state
    sigma = (0.01 * 200 ** (1 - t))[:, None]
    x = reflect(data + sigma * z)
    score = heat_kernel(x, data, sigma**2 / 2)[1]
    own = {"noise": -0.3 / sigma, "score": 0.3, "velocity": 0.3 / (math.log(200) * sigma**2)}[prediction]
    loss = loss_of(ReflectedDiffusion(), fewstep.NetworkField(Constant(0.3), path, prediction), data)
    assert float(loss.total.detach()) == pytest.approx(float((sigma**2 * (own - score) ** 2).mean()), rel=1e-9)
    assert torch.equal(loss.times["velocity"][:, 0], t)
    wide = fewstep.NetworkField(Constant(0.3), fewstep.Reflected(-3, 5, 0.01, 2.0), "noise")
    if prediction == "noise":  # in units of the width, whatever the box
        assert torch.allclose(loss_of(ReflectedDiffusion(), wide, 8 * data - 3).total, loss.total, rtol=1e-6)


def test_the_exact_field_has_the_least_loss_and_flow_matching_the_same_one() -> None:
    exact = fewstep.BoxesInBoxField(BOARD, fewstep.Box(0, 1), path=fewstep.Reflected(0, 1))
    data = exact.data(20_000, generator(2)).double()

    class Moved(nn.Module):
        """The exact field, and a part of the way from where its states are, as noise."""

        path, space = exact.path, exact.space

        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def velocity(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return exact(x, t) + self.by * self.path.sigma_dot(t)[:, None] * (x - 0.5)

    for objective in (ReflectedDiffusion(), FlowMatching()):
        less, least, more = (float(loss_of(objective, Moved(by), data).total) for by in (-0.3, 0.0, 0.3))
        assert least < min(less, more)
        assert abs(less - more) < 0.5 * (less + more - 2 * least)  # the least is near 0


@pytest.mark.takes_seconds
def test_a_learned_score_is_distilled_to_one_call_that_stays_in_the_box(tmp_path: Path) -> None:
    """Two cells of a board: a score, its probability flow by ITVM, one call. Euler's call leaves a third outside."""
    torch.manual_seed(0)
    exact = fewstep.BoxesInBoxField(BOARD, fewstep.Box(0, 1))
    data = exact.data(20_000, generator(3))
    options: dict[str, Any] = {"batch": 256, "lr": 5e-3, "warmup": 50, "ema": 0.99, "quiet": True, "device": "cpu"}
    field = fewstep.NetworkField(MLP(2, width=64, depth=3), fewstep.Reflected(0, 1), "noise")
    fewstep.fit(field, ReflectedDiffusion(), data, 800, **options)
    student = fewstep.FlowMap.from_field(field)
    fewstep.fit(student, fewstep.ITVM(field), data, 800, out=tmp_path / "run", **options)

    def outside(model: Any, steps: int, **more: Any) -> float:
        x = fewstep.sample(model, starting_points(model, (4000, 2), generator(1)), steps, **more)
        assert 0 <= x.min() <= x.max() <= 1
        return float((~exact.inside(x)).double().mean())

    assert outside(field, 1) > 0.28
    assert outside(student, 1) < 0.18
    assert outside(student, 4) < 0.14
    assert outside(field, 50, eps="kappa", generator=generator(2)) < 0.14
    # What fit left is opened as it is.
    again = fewstep.load(tmp_path / "run")
    assert again.path == field.path
    assert again.space == fewstep.Box(0, 1)
    assert outside(again, 1) < 0.18


def test_data_outside_the_box_are_refused_from_python_too() -> None:
    field = fewstep.NetworkField(MLP(2, width=8, depth=1), fewstep.Reflected(0, 1), "noise")
    with pytest.raises(ValueError, match="and the box from 0 to 1"):
        fewstep.fit(field, ReflectedDiffusion(), torch.rand(64, 2) * 2 - 1, 1, quiet=True)


@pytest.mark.takes_seconds
def test_a_recipe_trains_it_and_distils_it(tmp_path: Path, capsys: Any) -> None:
    points = tmp_path / "x.npy"
    np.save(points, torch.rand(200, 2).numpy())
    small = ["--training.steps", "3", "--training.batch", "8", "--training.quiet", "true", "--evaluation.count", "0"]
    recipe = tmp_path / "score.yaml"
    recipe.write_text(
        f"data: {points}\nobjective: ReflectedDiffusion\nstudent: {{network: mlp, options: {{width: 16, depth: 2}}, "
        "path: reflected, prediction: noise, space: {name: box, low: 0, high: 1}}\ntraining: {steps: 3}\n"
    )
    score, fast, drawn = tmp_path / "score", tmp_path / "fast", tmp_path / "drawn.npy"
    assert main(["train", str(recipe), *small, "--out", str(score)]) == 0
    field = fewstep.load(score)
    assert field.path == fewstep.Reflected(0, 1)
    assert field.prediction == "noise"
    assert main(["distill", "--teacher", str(score), "--data", str(points), *small, "--out", str(fast)]) == 0
    for run, more in ((fast, ["--steps", "2"]), (score, ["--steps", "4", "--eps", "kappa"])):
        assert main(["sample", str(run), "--count", "32", *more, "--out", str(drawn)]) == 0
        assert 0 <= np.load(drawn).min() <= np.load(drawn).max() <= 1
        drawn.unlink()
    assert "2304.04740" in fewstep.cite(score)
    capsys.readouterr()
    assert main(["train", str(recipe), "--student.space", "torus", "--out", str(tmp_path / "no")]) == 2
    assert "student.path: reflected is for a box" in capsys.readouterr().err
    wrong = ["--student.path", "linear", "--student.prediction", "data"]
    assert main(["train", str(recipe), *wrong, "--out", str(tmp_path / "no")]) == 2
    assert "trains a field on a Reflected path" in capsys.readouterr().err
