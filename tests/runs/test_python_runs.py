"""Runs that ``fewstep.fit`` leaves from Python: each is opened by its folder alone, or says at once what it lacks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys.first_hour import write_ddpm

import fewstep
from fewstep.cli import main
from fewstep.common.options import read_yaml
from fewstep.data import load_data
from fewstep.flows.description import describe, made_again
from fewstep.flows.maps import FlowMap
from fewstep.models.lora import add_lora
from fewstep.networks import MLP
from fewstep.objectives.base import Loss, Objective
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import evaluate_run, run
from fewstep.training.run import Result

FEW: Any = {"steps": 2, "batch": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "my-ddpm"
    write_ddpm(folder)
    return folder


def _fit(out: Path, student: Any, objective: Objective, data: Any, **options: Any) -> Result:
    return fewstep.fit(student, objective, data, out=out, **{**FEW, **options})


def _is_same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.takes_seconds
def test_readmes_own_lines_leave_a_run(ddpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, out, run = fewstep.load(ddpm), tmp_path / "fast", str(tmp_path / "fast")
    data = torch.randn(16, 3, 16, 16)
    result = _fit(out, FlowMap.from_field(teacher), fewstep.ITVM(teacher), data)
    said = capsys.readouterr().err
    assert "--data NAME" in said
    assert "--teacher" not in said  # it knows where it was loaded from

    again, noise = fewstep.load(out), torch.randn(2, 3, 16, 16)
    assert _is_same(again, result.ema)
    images = fewstep.sample(result.ema, noise, steps=2)
    assert torch.equal(fewstep.sample(again, noise, steps=2), images)
    assert main(["sample", run, "--steps", "2", "--count", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert main(["export", run, str(tmp_path / "export")]) == 0
    torch.testing.assert_close(fewstep.sample(fewstep.load(tmp_path / "export"), noise, steps=2), images)
    assert main(["cite", run]) == 0

    few = ["--steps", "1", "--teacher-steps", "1", "--count", "4"]
    assert main(["evaluate", run, *few]) == 2
    assert "--data NAME" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", data.numpy())
    assert main(["evaluate", run, *few, "--data", str(tmp_path / "x.npy")]) == 0
    assert main(["compare", run, "--out", str(tmp_path / "compare")]) == 0


@pytest.mark.takes_seconds
def test_what_has_a_name_is_known_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = fewstep.CheckerboardField()
    student = FlowMap(MLP(2, width=8, depth=1, times=2))
    result = _fit(tmp_path / "run", student, fewstep.ITVM(teacher, ema=0.5), load_data("checkerboard"))
    assert "note" not in capsys.readouterr().err
    recipe = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert recipe["teacher"] == {"source": "checkerboard"}
    assert recipe["data"] == {"name": "checkerboard"}
    assert recipe["objective"]["ema"] == 0.5
    assert recipe["training"]["batch"] == 8
    assert _is_same(fewstep.load(tmp_path / "run"), result.ema)
    found = evaluate_run(tmp_path / "run", "cpu", steps=(1,), teacher_steps=(1,), count=64)
    assert found is not None
    assert "rmse" in found.rows[0]


@pytest.mark.takes_seconds
def test_a_fine_tuned_field_goes_on_and_is_opened(ddpm: Path, tmp_path: Path) -> None:
    data, out = torch.randn(16, 3, 16, 16), tmp_path / "run"
    _fit(out, fewstep.load(ddpm).requires_grad_(True), fewstep.FlowMatching(), data)
    result = _fit(out, fewstep.load(ddpm).requires_grad_(True), fewstep.FlowMatching(), data, steps=4)
    assert result.step == 4
    again = fewstep.load(out)
    assert isinstance(again, fewstep.DiffusionField)
    assert _is_same(again, result.ema)
    fewstep.export(out, tmp_path / "export")


class Own(Objective):
    """A method of one's own, which no name leads to."""

    def forward(self, student: Any, batch: Any, **_: Any) -> Loss:
        return Loss(student(batch.data, 0.0, 1.0).square().mean())


class Bare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


def test_a_method_of_ones_own_is_opened_and_judged(tmp_path: Path) -> None:
    result = _fit(tmp_path / "run", FlowMap(MLP(2, width=8, depth=1, times=2)), Own(), load_data("two-moons"))
    assert _is_same(fewstep.load(tmp_path / "run"), result.ema)
    assert evaluate_run(tmp_path / "run", "cpu", steps=(1,), count=64) is not None


@pytest.mark.takes_seconds
@pytest.mark.parametrize("what", ["network", "adapter"])
def test_what_cannot_be_made_again_is_said_at_once(
    what: str, ddpm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "network":
        student, data = FlowMap(Bare(2)), torch.randn(16, 2)
    else:
        student, data = FlowMap.from_field(fewstep.load(ddpm)), torch.randn(16, 3, 16, 16)
        add_lora(student, rank=2)
    _fit(tmp_path / "run", student, fewstep.MeanFlow(), data)
    said = capsys.readouterr().err
    assert "cannot be loaded, sampled or exported later" in said.splitlines()[0]
    with pytest.raises(ValueError, match="only be gone on with, by the same call") as refused:
        fewstep.load(tmp_path / "run")
    assert len(str(refused.value)) < 400
    _fit(tmp_path / "run", student, fewstep.MeanFlow(), data, steps=3)


@pytest.mark.takes_seconds
def test_a_recipe_does_not_go_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    _fit(out, FlowMap(MLP(2, width=8, depth=1, times=2)), fewstep.MeanFlow(), load_data("checkerboard"))
    for command in ("train", "distill"):
        assert main([command, str(out)]) == 2
        assert f"the run in {out} was started by fewstep.fit" in capsys.readouterr().err
    few = {"steps": "2", "training.batch": "8", "training.chunk": "8", "training.quiet": "true"}
    recipe = load_recipe("checkerboard-itvm", {**few, "evaluation.count": "0"})
    with pytest.raises(ValueError, match=r"started by fewstep\.fit in Python.*--fresh"):
        run(recipe, out)
    run(recipe, out, fresh=True)
    assert not (out / "student.json").exists()
    assert fewstep.load(out).network.config["width"] != 8


def test_a_description_is_of_names_that_are_known() -> None:
    said = json.loads(json.dumps(describe(FlowMap(MLP(2, times=2)))))
    assert describe(made_again(said)) == said
    for wrong in ({"name": "Popen", "options": {}}, {"name": "UNet", "model": "Popen", "config": {}}):
        with pytest.raises(ValueError, match="unknown"):
            made_again({**said, "network": wrong})
    with pytest.raises(ValueError, match="no scheduler"):
        made_again({**said, "scheduler": {"name": "os", "config": {}}})
    with pytest.raises(ValueError, match="unknown path"):
        made_again({**said, "native": {"name": "Popen", "options": {}}})


def test_a_run_of_a_stranger_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    _fit(out, FlowMap(MLP(2, width=8, depth=1, times=2)), fewstep.MeanFlow(), load_data("checkerboard"))
    recipe = read_yaml(out / "recipe.yaml")
    for key, value in (("teacher", {"source": "os:system"}), ("objective", {"name": "os:system"})):
        (out / "recipe.yaml").write_text(json.dumps({**recipe, key: value}))
        with pytest.raises(ValueError, match="names code, os:system"):
            fewstep.load(out)
        with pytest.raises(ValueError, match="names code, os:system"):
            evaluate_run(out, "cpu")
