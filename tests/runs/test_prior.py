"""No data at all: a shape and classes in their place, as the teacher says them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Data, Prior
from fewstep.data.batch import Batch
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, Corrected, FlowMatching, Trajectory
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

PICTURES = """
import torch
from torch import nn

from fewstep import NetworkField


class Net(nn.Module):
    shape, classes = (1, 8, 8), 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x, t, class_labels):
        return self.scale[class_labels].view(-1, 1, 1, 1) * x


class Two(Net):
    def forward(self, x, s, t, class_labels):
        return super().forward(x, s, class_labels)


def teacher():
    return NetworkField(Net())


class Needy(Net):
    def forward(self, x, t, class_labels, depth):
        return x


def needy():
    return NetworkField(Needy())
"""


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((watch, "_MEASURED"), (watch, "_POINTS"), (judge, "_POINTS")):
        monkeypatch.setattr(module, name, 8)


def recipe_of(**more: Any) -> dict[str, Any]:
    return {
        "name": "free", "teacher": "checkerboard", "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
        "data": "prior", "objective": {"name": "LMD", "starts": "prior"},
        "training": {"steps": 2, "batch": 16, "quiet": True},
        "evaluation": {"count": 16, "batch": 16, "steps": [1], "teacher_steps": [1]}, **more,
    }  # fmt: skip


def test_it_has_a_shape_and_classes_drawn_alike() -> None:
    data = Prior([1, 4, 4], classes=3)
    assert isinstance(data, Data)
    batch = data.rows(torch.zeros(600, dtype=torch.long), generator(0))
    assert batch.data.shape == (600, 1, 4, 4)
    assert (batch.data == 0).all()
    counts = batch.cond["class_labels"].bincount()
    assert (counts.shape, bool((counts > 150).all())) == ((3,), True)
    assert torch.equal(batch.cond["class_labels"], data.rows(torch.arange(600), generator(0)).cond["class_labels"])
    assert Prior((2,)).rows(torch.arange(3), generator(0)).cond == {}
    for shape, classes in (((), 0), ((0,), 0), ((2,), -1)):
        with pytest.raises(ValueError, match="sides of 1 at least"):
            Prior(shape, classes)


@pytest.mark.parametrize("make", [lambda v: FlowMatching(), lambda v: LMD(v), lambda v: ITVM(v)])
def test_what_learns_from_data_refuses_it(make: Any) -> None:
    torch.manual_seed(0)
    field = NetworkField(MLP(2, width=8, depth=2))
    objective, student = make(field), FlowMap.from_field(field)
    with pytest.raises(ValueError, match=r"learns from data, and data: prior has only a shape"):
        fewstep.fit(student, objective, Prior((2,)), steps=1, quiet=True)


def test_what_needs_none_takes_it() -> None:
    torch.manual_seed(0)
    field = NetworkField(MLP(2, width=8, depth=2))
    for make in (
        lambda v: LMD(v, starts="own"),
        lambda v: ITVM(v, "integral", starts="prior"),
        lambda v: Trajectory(v, solver_steps=2),
        lambda v: Corrected(LMD(v, starts="prior"), begin=0.0),
    ):
        result = fewstep.fit(FlowMap.from_field(field), make(field), Prior((2,)), steps=2, batch=64, quiet=True)
        assert result.losses
    with pytest.raises(ValueError, match=r"ITVM learns from data"):
        fewstep.fit(FlowMap.from_field(field), Corrected(ITVM(field)), Prior((2,)), steps=1, quiet=True)


def test_a_run_without_data_never_asks_for_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    real = Prior.rows
    monkeypatch.setattr(Prior, "rows", lambda self, *more: seen.append(real(self, *more)) or seen[-1])
    found = run(load_recipe(recipe_of()), tmp_path / "run").evaluation
    assert found is not None
    assert {name for row in found.rows for name in row} >= {"rmse", "error_median"}
    assert not {"sliced_w2", "histogram_kl"} & {name for row in found.rows for name in row}
    assert seen
    assert all((batch.data == 0).all() for batch in seen)
    # Held against data after all: only where they are named.
    held = {"count": 16, "batch": 16, "steps": [1], "teacher_steps": [1], "data": "checkerboard"}
    found = run(load_recipe(recipe_of(evaluation=held)), tmp_path / "held").evaluation
    assert found is not None
    assert "histogram_kl" in found.rows[0]
    for evaluation in ({"metrics": ["sliced_w2"], "count": 16}, {"metrics": ["rmse", "energy"], "count": 16}):
        with pytest.raises(ValueError, match=r"evaluation\.metrics asks for \w+, and data: prior has no rows"):
            run(load_recipe(recipe_of(evaluation=evaluation)), tmp_path / "refused")


def test_the_teacher_says_shape_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures.py").write_text(PICTURES)
    tree = recipe_of(teacher="pictures.py:teacher", student={"network": "pictures.py:Two"})
    data: Any = build(load_recipe(tree)).data
    assert (data.shape, data.cond["class_labels"].tolist()) == ((1, 8, 8), [0, 1, 2])
    said = build(load_recipe({**tree, "data": {"name": "prior", "shape": [1, 6, 6], "classes": 2}})).data
    assert (said.shape, said.cond["class_labels"].tolist()) == ((1, 6, 6), [0, 1])  # pyright: ignore
    assert run(load_recipe(tree), tmp_path / "run").evaluation is not None
    with pytest.raises(ValueError, match=r"data: prior has classes alone, and the teacher needs depth"):
        build(load_recipe({**tree, "teacher": "pictures.py:needy"}))
    with pytest.raises(ValueError, match=r"data\.shapes"):
        build(load_recipe({**tree, "data": {"name": "prior", "shapes": [1]}}))
    with pytest.raises(ValueError, match=r"data: prior is what a teacher says, and there is none"):
        build(load_recipe(recipe_of(teacher=None, objective="FlowMatching")))


@pytest.mark.takes_seconds
def test_the_command_plans_trains_goes_on_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["checkerboard-lmd", "--data", "prior", "--objective.starts", "prior", "--objective.adaptive", "1"]
    tiny = ["--training.batch", "32", "--training.chunk", "32", "--evaluation.count", "8", "--training.quiet", "true"]
    tiny += ["--evaluation.batch", "8", "--training.max_seconds", "null", "--out", "run"]
    assert main(["plan", *words]) == 0
    assert main(["distill", *words, *tiny, "--steps", "3"]) == 0
    assert main(["distill", *words, *tiny, "--steps", "5"]) == 0
    assert main(["evaluate", "run", "--steps", "1", "--count", "8"]) == 0
    assert "rmse" in json.loads(Path("run/quality.json").read_text())["rows"][0]
    capsys.readouterr()
    assert main(["distill", "checkerboard-itvm", "--data", "prior", "--out", "x"]) == 2
    assert "ITVM learns from data, and data: prior has only a shape" in capsys.readouterr().err
    assert not Path("x").exists()
