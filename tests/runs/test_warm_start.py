"""Students that go on from a model on disk: an export, a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from toys.exports import family_field, family_map
from toys.families import conditions
from toys.unet import tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.data import ArrayData
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Trigonometric
from fewstep.models.lora import has_lora
from fewstep.networks import MLP
from fewstep.objectives import LMD
from fewstep.runs.build import build
from fewstep.runs.cite import cite
from fewstep.runs.export import export
from fewstep.runs.loading import load, open_run
from fewstep.runs.recipe import Student
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.runs.warm_start import started
from fewstep.training.fit import fit

SHORT: dict[str, Any] = {"training": {"steps": 1, "batch": 8, "quiet": True}, "evaluation": {"count": 0}}


def points(start: Any, **student: Any) -> Any:
    recipe = {"name": "points", "teacher": "checkerboard", "data": "checkerboard", "objective": "LMD", **SHORT}
    return load_recipe({**recipe, "student": {"start": str(start), **student}})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.takes_seconds
def test_a_run_goes_on_from_a_run_or_its_export(tmp_path: Path) -> None:
    first = {"name": "first", "teacher": "checkerboard", "data": "checkerboard", "objective": "LMD", **SHORT}
    run(load_recipe({**first, "student": {"network": "mlp", "options": {"width": 16, "depth": 2}}}), tmp_path / "first")
    folder = export(tmp_path / "first", tmp_path / "export")
    trained = weights(load(folder))
    for start in (tmp_path / "first", folder):
        built = build(points(start))
        assert isinstance(built.student, FlowMap)
        for name, value in weights(built.student).items():
            assert torch.equal(value, trained[name])
        assert all(weight.requires_grad for weight in built.student.parameters())
    done = run(points(folder), tmp_path / "second")
    assert any(not torch.equal(value, trained[name]) for name, value in weights(done.result.ema).items())
    back = load(tmp_path / "second")
    for name, value in weights(done.result.ema).items():
        assert torch.equal(weights(back)[name], value)
    assert yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())["student"]["start"] == str(folder)
    said = cite(str(tmp_path / "second"))
    assert "of the model that the student goes on from: LMD" in said


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_a_map_of_diffusers_is_trained_on(name: str, tmp_path: Path) -> None:
    """In Python it is load and fit."""
    folder = export(family_map(name, second_time="span"), tmp_path / "map")
    student = load(folder)
    before, data = weights(student), torch.randn(4, 4, 8, 8)
    cond = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in conditions(name).items()}
    done = fit(student, LMD(family_field(name)), ArrayData(data, cond), steps=1, batch=4)  # pyright: ignore
    after = weights(done.ema)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("second" in key for key in moved)
    again: Any = load(export(done.ema, tmp_path / "again"))  # pyright: ignore
    assert again.network.second_time == "span"


@pytest.mark.takes_seconds
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained("ddpm")
    np.savez("data.npz", data=np.zeros((8, 1, 8, 8), np.float32))
    student = tiny_student("v_prediction")
    export(student, "fast")
    Path("short.yaml").write_text(yaml.safe_dump({**SHORT, "data": "data.npz", "objective": "LMD"}))
    command = ["distill", "short.yaml", "--teacher", "ddpm", "--student.start", "fast", "--student.lora.rank", "2"]
    assert main([*command, "--out", "again"]) == 0
    model = open_run("again").model
    assert has_lora(model)
    base = model.network.model.conv_in.base_layer.weight  # pyright: ignore
    assert torch.equal(base, student.network.model.conv_in.weight)  # pyright: ignore
    # A map is no teacher, and it is said what it can be.
    assert main(["distill", "short.yaml", "--teacher", "fast", "--out", "never"]) == 2
    assert "to train the map on, name it as student.start" in capsys.readouterr().err


def test_without_a_teacher(tmp_path: Path) -> None:
    export(FlowMap(MLP(2, width=8, depth=2, times=2)), tmp_path / "map")
    recipe = {"name": "alone", "data": "checkerboard", "objective": "MeanFlow", **SHORT}
    built = build(load_recipe({**recipe, "student": {"start": str(tmp_path / "map")}}))
    trained, kept = weights(built.student), weights(load(tmp_path / "map"))
    assert trained.keys() == kept.keys()
    assert all(torch.equal(trained[name], kept[name]) for name in kept)
    field = export(NetworkField(MLP(2, width=8, depth=2)), tmp_path / "field")
    tuned = {**recipe, "objective": "FlowMatching", "student": {"start": str(field)}}
    assert isinstance(build(load_recipe(tuned)).student, NetworkField)


def test_what_does_not_fit(tmp_path: Path) -> None:
    field = export(NetworkField(MLP(2, width=8, depth=2)), tmp_path / "field")
    with pytest.raises(ValueError, match="field is a velocity field, and a flow map is trained: name it as the t"):
        build(points(field))
    plain = export(FlowMap(MLP(2, width=8, depth=2, times=2)), tmp_path / "map")
    with pytest.raises(ValueError, match="map is a flow map, and a velocity field is trained: say stu"):
        build(points(plain, kind="field"))
    other = export(FlowMap(MLP(2, width=8, depth=2, times=2), Trigonometric()), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is on Trigonometric\(\), and the teacher on Linear\(\)"):
        build(points(other))
    wide = export(FlowMap(MLP(3, width=8, depth=2, times=2)), tmp_path / "wide")
    with pytest.raises(ValueError, match="the student does not take the data 'checkerboard' of shape"):
        build(points(wide))
    classed = export(FlowMap(MLP(2, width=8, depth=2, times=2, classes=3)), tmp_path / "classed")
    with pytest.raises(ValueError, match="classed is for 3 classes, and the teacher for none"):
        build(points(classed))
    with pytest.raises(ValueError, match="told its second time as its network is, not span"):
        build(points(plain, second_time="span"))
    for key, value in {"prediction": "data", "weights": "random", "options": {"width": 3}}.items():
        with pytest.raises(ValueError, match=rf"student\.start is a whole model, and student\.{key} would change it"):
            points(plain, **{key: value})
    with pytest.raises(ValueError, match=r"student\.start is a whole model, and student\.network is mlp"):
        points(plain, network="mlp")
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(points(tmp_path / "nowhere"))


@pytest.mark.takes_seconds
def test_a_run_is_opened_with_its_start_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(FlowMap(MLP(2, width=8, depth=2, times=2)), "map")
    run(points("map"), tmp_path / "run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    assert isinstance(load(tmp_path / "run"), FlowMap)
    (tmp_path / "map").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"student\.start: no folder .*/map\. .* or say where it is now"):
        load(tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/map", f"{tmp_path}/moved"))
    assert isinstance(load(tmp_path / "run"), FlowMap)


def test_a_start_that_is_told_no_strength(tmp_path: Path) -> None:
    folder = export(tiny_student("v_prediction", 5), tmp_path / "map")
    section = Student.model_validate({"start": str(folder), "guidance": True})
    with pytest.raises(ValueError, match="told no strength of guidance, and strengths are drawn"):
        started(load(folder), section, (1, 8, 8), None, True)
    with pytest.raises(ValueError, match=r"for samples of shape \(1, 8, 8\), these are \(3, 8, 8\)"):
        started(load(folder), Student.model_validate({"start": str(folder)}), (3, 8, 8), None, True)
