"""Folders of models: written whole or not at all, over nothing but what fewstep wrote, in the units of their data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import nn
from toys.unet import tiny_field, tiny_student, tiny_unet

import fewstep
from fewstep.cli import main
from fewstep.data import ArrayData
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.generation.drawing import draw
from fewstep.models.lora import add_lora
from fewstep.models.writing import MARK, check_target
from fewstep.networks import MLP, SequenceTransformer
from fewstep.playground.shown import Playground, Wish
from fewstep.runs.loading import open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.runs.runtimes import export_program
from fewstep.training import checkpoints


def points_map(**options: Any) -> FlowMap:
    torch.manual_seed(0)
    student = FlowMap.from_field(NetworkField(MLP(2, width=8, depth=2, **options)))
    for weight in student.parameters():
        nn.init.normal_(weight, std=0.3)
    return student.eval()


def there(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / MARK).write_text('{"_fewstep_version": "0"}')
    (folder / "weights").write_text(text)
    return folder


def written(tmp_path: Path) -> dict[str, Path]:
    """Everything that fewstep writes."""
    adapted = points_map()
    add_lora(adapted, rank=2)
    fewstep.convert(tiny_field("epsilon"), tmp_path / "flow", check=False)
    export_program(points_map(), tmp_path / "program", "torch")
    return {
        "plain": fewstep.export(points_map(), tmp_path / "plain"),
        "map": fewstep.export(tiny_student("flow"), tmp_path / "map"),
        "stock": fewstep.export(tiny_field("epsilon"), tmp_path / "stock"),
        "without a pipeline": fewstep.export(tiny_field("epsilon", 5), tmp_path / "classes"),
        "adapter": fewstep.export(adapted, tmp_path / "adapter", adapter=True),
        "converted": tmp_path / "flow",
        "program": tmp_path / "program",
    }


@pytest.mark.takes_seconds
def test_all_that_fewstep_writes_may_be_replaced(tmp_path: Path) -> None:
    for folder in written(tmp_path).values():
        check_target(folder, overwrite=True)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            check_target(folder, overwrite=False)
    for name in ("plain", "map", "program"):  # exports of before there was a mark
        (tmp_path / name / MARK).unlink()
        check_target(tmp_path / name, overwrite=True)


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "downloaded")
    for name, said in {"thesis": "{}", "list": "[1]", "commented": "// no JSON", "bert": '{"model_type": "x"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(said)
        (tmp_path / name / "thesis.txt").write_text("years")
    for folder in list(tmp_path.iterdir()):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match="is no model that fewstep wrote: nothing in it is overwritten"):
            fewstep.export(points_map(), folder, overwrite=True)
        assert sorted(folder.rglob("*")) == before


SHORT: dict[str, Any] = {"training": {"steps": 2, "batch": 8, "quiet": True}, "evaluation": {"count": 0}}


@pytest.mark.takes_seconds
def test_a_run_is_not_exported_over_what_it_is_opened_with(tmp_path: Path) -> None:
    start = fewstep.export(points_map(), tmp_path / "models" / "start")
    teacher = fewstep.export(NetworkField(MLP(2, width=8, depth=2)), tmp_path / "teacher")
    recipe = {"name": "x", "teacher": str(teacher), "data": "checkerboard", "objective": "LMD", **SHORT}
    run(load_recipe({**recipe, "student": {"start": str(start)}}), tmp_path / "run")
    for folder, key in ((start, r"student\.start"), (teacher, r"teacher\.source")):
        with pytest.raises(ValueError, match=rf"is the {key} of .*run, which could not be opened without it"):
            fewstep.export(tmp_path / "run", folder, overwrite=True)
    with pytest.raises(ValueError, match=r"is the student\.start of"):
        export_program(tmp_path / "run", start, "torch", overwrite=True)
    fewstep.export(tmp_path / "run", tmp_path / "run" / "model")
    fewstep.export(tmp_path / "run", tmp_path / "run" / "model", overwrite=True)


# The units of the data


def normalized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A run on data of mean 1000, in `run`; returns the data."""
    monkeypatch.chdir(tmp_path)
    data = (1000 + 3 * np.random.default_rng(0).normal(size=(40, 2))).astype(np.float32)
    np.save("field.npy", data)
    student = {"network": "mlp", "options": {"width": 8, "depth": 2}}
    recipe = {"name": "x", "data": {"name": "field.npy", "normalize": True}, "objective": "MeanFlow"}
    run(load_recipe({**recipe, "student": student, **SHORT}), tmp_path / "run")
    return data


@pytest.mark.takes_seconds
def test_an_export_knows_the_units_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = normalized(tmp_path, monkeypatch)
    mean, std = data.mean(dtype=np.float64), data.std(dtype=np.float64)
    (tmp_path / "field.npy").unlink()  # it is not needed any more
    assert main(["export", "run", "fast"]) == 0
    assert f"samples * {std:g} + {mean:g}" in capsys.readouterr().out
    for model in (fewstep.load("run"), fewstep.load("fast")):
        assert model.moments == pytest.approx((mean, std), rel=1e-12)
    assert main(["sample", "run", "--count", "5", "--steps", "2", "--out", "run.npy"]) == 0
    assert main(["sample", "fast", "--count", "5", "--steps", "2", "--out", "fast.npy"]) == 0
    assert np.array_equal(np.load("fast.npy"), np.load("run.npy"))
    # By hand, in the units of the network; and so `draw` gives them, by which teachers make data.
    model = fewstep.load("fast")
    assert model.moments is not None
    drawn = draw(model, 5, 2)[0]
    assert np.array_equal(np.load("fast.npy"), (drawn * model.moments[1] + model.moments[0]).numpy())
    assert drawn.abs().max() < 100
    page = Playground.open("fast")
    assert torch.equal(next(page.panels(Wish(steps=1, count=5))).samples, draw(model, 5, 1, decode=True)[0])
    again = fewstep.export(model, tmp_path / "again")
    assert fewstep.load(again).moments == model.moments
    for folder in ("fast", "again"):
        assert f"samples * {model.moments[1]!r} + {model.moments[0]!r}" in (tmp_path / folder / "README.md").read_text()
    export_program("fast", tmp_path / "program", "torch")
    assert json.loads((tmp_path / "program" / "config.json").read_text())["moments"] == list(model.moments)
    assert f"x * {model.moments[1]!r}" in (tmp_path / "program" / "README.md").read_text()


def test_a_run_of_before_the_units_were_kept_takes_them_from_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = normalized(tmp_path, monkeypatch)
    load = checkpoints.load

    def without_moments(path: Path) -> checkpoints.Checkpoint:
        saved = load(path)
        assert saved.state["fingerprint"].pop("data_moments")
        return saved

    monkeypatch.setattr(checkpoints, "load", without_moments)
    model = open_run("run").model
    assert model.moments == pytest.approx((data.mean(dtype=np.float64), data.std(dtype=np.float64)), rel=1e-12)


def test_units_are_handed_on_and_pictures_have_none() -> None:
    field = NetworkField(MLP(2, width=8))
    field.moments = (3.0, 2.0)
    assert FlowMap.from_field(field).moments == field.on(field.path).moments == (3.0, 2.0)
    assert fewstep.Guided(field, 2.0, null={"class_labels": 0}).moments == (3.0, 2.0)
    assert ArrayData(np.zeros((2, 3), np.float32)).moments is None
    assert ArrayData(np.zeros((2, 1, 4, 4), np.uint8)).moments is None
    assert ArrayData(np.array([[1.0], [5.0]]), normalize=True).moments == (3.0, 2.0)


def test_the_units_of_a_model_of_diffusers(tmp_path: Path) -> None:
    student: Any = tiny_student("flow")
    student.moments = (7.0, 0.5)
    back = fewstep.load(fewstep.export(student, tmp_path / "map"))
    assert back.moments == (7.0, 0.5)
    card = (tmp_path / "map" / "README.md").read_text()
    assert 'In their units samples (output_type="latent") are `samples * 0.5 + 7.0`' in card
    noise = torch.randn(2, 1, 8, 8)
    assert torch.equal(sample(back, noise, 1), sample(student, noise, 1))
    field = tiny_field("epsilon")
    field.moments = (7.0, 0.5)
    fewstep.convert(field, tmp_path / "flow", check=False)
    assert fewstep.load(tmp_path / "flow").moments == (7.0, 0.5)


def test_an_export_knows_how_noise_and_data_were_paired(tmp_path: Path) -> None:
    recipe = {"name": "x", "data": "checkerboard", "objective": "FlowMatching", "coupling": "ot", **SHORT}
    student = {"network": "mlp", "options": {"width": 8, "depth": 2}}
    run(load_recipe({**recipe, "student": student}), tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "once")]) == 0
    fewstep.export(fewstep.load(tmp_path / "once"), tmp_path / "twice")
    for folder in ("run", "once", "twice"):
        field = fewstep.load(tmp_path / folder)
        with pytest.raises(ValueError, match=r"independent of the data, .* the coupling 'ot'"):
            fewstep.sample(field, torch.randn(2, 2), 4, eps="kappa")
    assert "(coupling: ot)" in (tmp_path / "twice" / "README.md").read_text()
    (tmp_path / "once" / "fewstep.json").write_text('{"coupling": 3}')
    with pytest.raises(ValueError, match=r"fewstep\.json is not as fewstep writes it, coupling is 3"):
        fewstep.load(tmp_path / "once")


def test_an_export_of_a_chain_is_a_chain(tmp_path: Path) -> None:
    network = SequenceTransformer(3, 3, width=16, depth=1, heads=2)
    field = fewstep.NetworkField(network, prediction="data", space=fewstep.Tokens(3))
    field.chain = "uniform"
    again = fewstep.load(fewstep.export(field, tmp_path / "chain"))
    noise = torch.randn(4, 3, 3)
    drawn = [fewstep.sample(one, noise, 3, generator=torch.Generator().manual_seed(1)) for one in (field, again)]  # pyright: ignore[reportArgumentType]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0].sum(-1), torch.ones(4, 3))  # one-hot, as a chain's samples are
