"""Exports: the same pixels where fewstep is not installed, and what was exported where it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.exports import pipeline, pixels
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed, Trigonometric
from fewstep.flows.sampling import sample, sample_noise
from fewstep.networks import MLP, UNet
from fewstep.pipelines import flow_map
from fewstep.pipelines.source import whole
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

# Student's prediction and classes: each kind of network, with and without labels.
STUDENTS = [("flow", None), ("flow", 5), ("epsilon", None), ("v_prediction", 5), ("sample", None)]


ELSEWHERE = """
    import sys
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    folder, start = Path(sys.argv[1]), int(sys.argv[2])
    images = {}
    for export in sorted(folder.iterdir()):
        try:
            DiffusionPipeline.from_pretrained(export)
            sys.exit("its code ran without being trusted")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
        labels = {"class_labels": [0, 1, 4]} if export.name.endswith("-5") else {}
        for steps, gamma in [(n, 0.0) for n in range(1, 9)] + [(4, 0.5), (4, 1.0)]:
            generators = [torch.Generator().manual_seed((start + i) & 0xFFFFFFFF) for i in range(3)]
            out = pipe(num_inference_steps=steps, generator=generators, gamma=gamma, output_type="pt", **labels)
            images[f"{export.name} {steps} {gamma}"] = out.images.contiguous()
    assert "fewstep" not in sys.modules
    save_file(images, folder.parent / "images.safetensors")
"""


@pytest.mark.takes_seconds
def test_the_same_pixels_without_fewstep(tmp_path: Path, elsewhere: Callable[..., str]) -> None:
    """Bit-equal: the pipeline does fewstep's arithmetic in fewstep's order, in float32, its coefficients in float64.
    Only the re-noising in between (0 < gamma < 1) is written more simply, and may differ in the last place."""
    students = {}
    for prediction, classes in STUDENTS:
        name = f"{prediction}-{classes}"
        students[name] = tiny_student(prediction, classes)
        export(students[name], tmp_path / "exports" / name)
    elsewhere(ELSEWHERE, tmp_path / "exports", sample_generators(7, range(1))[0].initial_seed())
    images = load_file(tmp_path / "images.safetensors")
    assert len(images) == len(STUDENTS) * 10
    for key, image in images.items():
        name, steps, gamma = key.split()
        expected = pixels(students[name], int(steps), float(gamma), 5 if name.endswith("-5") else None)
        if float(gamma) in (0.0, 1.0):
            assert torch.equal(image, expected), key
        else:
            torch.testing.assert_close(image, expected, atol=1e-5 if "epsilon" in name else 1e-6, rtol=0)
        assert image.std() > 0.01  # not all black or white


def test_the_code_in_an_export_is_the_pipeline_and_asks_for_no_fewstep(tmp_path: Path) -> None:
    folder = export(tiny_student("flow", 5), tmp_path / "export")
    assert (folder / "pipeline.py").read_text() == whole(flow_map.__file__)
    for file in folder.rglob("*.py"):
        assert "fewstep" not in "".join(line for line in file.read_text().splitlines() if "import" in line)
    assert {p.name for p in folder.iterdir()} == {
        "model_index.json", "fewstep.json", "README.md", "scheduler", "unet", "pipeline.py",
    }  # fmt: skip
    assert not list(folder.rglob("*.bin"))
    again = export(load(folder), tmp_path / "again")
    assert str(tmp_path) not in "".join(p.read_text() for p in again.rglob("*.json"))  # nobody's home folder


@pytest.mark.parametrize(("prediction", "classes"), STUDENTS)
def test_fewstep_reads_a_map_back_to_the_bit(prediction: str, classes: int | None, tmp_path: Path) -> None:
    student = tiny_student(prediction, classes)
    back = load(export(student, tmp_path / "export"))
    assert isinstance(back, FlowMap)
    assert not back.training
    assert torch.equal(pixels(back, 3, 0.5, classes), pixels(student, 3, 0.5, classes))
    again = export(back, tmp_path / "again")  # goes on from there
    assert torch.equal(pixels(load(again), 2, 0.0, classes), pixels(student, 2, 0.0, classes))


@pytest.mark.parametrize(("prediction", "classes"), STUDENTS)
def test_a_field_is_a_stock_model_and_scheduler(prediction: str, classes: int | None, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DModel

    field = tiny_field(prediction, classes)
    folder = export(field, tmp_path / "export")
    assert not list(folder.rglob("*.py"))
    back = load(folder)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.4, 1.0])
    with torch.no_grad():
        assert torch.equal(back(x, t, **conditions(classes)), field(x, t, **conditions(classes)))
    assert isinstance(UNet2DModel.from_pretrained(folder / "unet"), UNet2DModel)
    if classes is None:
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(num_inference_steps=2).images[0].size == (8, 8)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert scheduler == ("FlowMatchEulerDiscreteScheduler" if prediction == "flow" else "DDPMScheduler")


@pytest.mark.parametrize("times", [1, 2])
def test_a_network_for_points(times: int, tmp_path: Path) -> None:
    network = MLP(3, width=16, depth=2, times=times, classes=4)
    path = Trigonometric()
    model: Any = FlowMap(network, path, "data") if times == 2 else NetworkField(network, path, "noise", path=Linear())
    back = load(export(model, tmp_path / "export"))
    assert type(back) is type(model)
    assert (back.native, back.prediction, back.path) == (model.native, model.prediction, model.path)
    noise, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    expected = sample(model, noise, 3, class_labels=labels)
    assert torch.equal(sample(back, noise, 3, class_labels=labels), expected)
    assert expected.isfinite().all()


def test_a_run_is_exported_with_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: run\ndata: checkerboard\nobjective: {name: LMD}\n")
    student = tiny_student("flow")
    monkeypatch.setattr("fewstep.runs.loading.load_run", lambda folder, **_: {run: student}[folder])
    folder = export(run, tmp_path / "export")
    assert torch.equal(pixels(load(folder), 2), pixels(student, 2))
    assert "Trained with LMD" in (folder / "README.md").read_text()


@pytest.mark.takes_seconds
def test_what_a_run_hands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its averaged weights, its recipe, its last images and its figures; and it is no run to any command."""
    monkeypatch.chdir(tmp_path)
    recipe: dict[str, Any] = {
        "name": "points", "teacher": "checkerboard", "data": "checkerboard", "objective": "LMD",
        "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
        "training": {"steps": 2, "batch": 8, "quiet": True}, "evaluation": {"count": 16, "teacher_steps": [1]},
    }  # fmt: skip
    done = run(load_recipe(recipe), tmp_path / "run")
    assert main(["export", "run", "fast"]) == 0
    assert "fewstep sample" in capsys.readouterr().err
    folder = tmp_path / "fast"
    for name, value in load(folder).state_dict().items():
        assert torch.equal(value, done.result.ema.state_dict()[name])
    assert {p.name for p in (folder / "training").iterdir()} == {"recipe.yaml", "quality.png", "samples.png"}
    assert (folder / "training" / "recipe.yaml").read_text() == (tmp_path / "run" / "recipe.yaml").read_text()
    for name, source in (("quality.png", "quality.png"), ("samples.png", "samples/step-00000002.png")):
        copy, own = (np.asarray(Image.open(f)) for f in (folder / "training" / name, tmp_path / "run" / source))
        assert np.array_equal(copy, own)
    card = (folder / "README.md").read_text()
    assert "Trained with LMD ([arXiv" in card
    assert "(training/recipe.yaml)" in card
    assert "![Quality against network calls](training/quality.png)" in card
    assert "![Samples at the end of the training](training/samples.png)" in card
    assert "| student |" in card
    assert "@" in card.split("```bibtex\n")[1].split("```")[0]
    assert main(["sample", "fast", "--count", "4", "--out", "x.npy"]) == 0
    with pytest.raises(FileExistsError):
        export(tmp_path / "run", folder)


# The model card


def test_the_card_says_how_to_use_it(tmp_path: Path) -> None:
    table = "| calls | distance |\n|---|---|\n| 1 | 4.5 |"
    card = (export(tiny_student("flow", 5), tmp_path / "fast", method="ITVM", quality=table) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert 'DiffusionPipeline.from_pretrained("fast", trust_remote_code=True)' in card
    assert table in card
    assert "Trained with ITVM" in card
    assert "https://arxiv.org/abs/" in card


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("classes", [0, 4])
def test_the_code_on_a_card_runs(times: int, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = MLP(2, width=8, depth=2, times=times, classes=classes)
    card = (export(FlowMap(network) if times == 2 else NetworkField(network), tmp_path / "m") / "README.md").read_text()
    code = (
        card.split("```python\n")[1].split("```")[0].replace("fewstep.load", "load").replace("fewstep.sample", "sample")
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"load": load, "sample": sample}
    exec(code, names)
    assert names["samples"].shape == (4, 2)


# The pipeline


# Refusals, before anything is written


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    first, second = tiny_student("flow"), tiny_student("flow", seed=1)
    folder = export(first, tmp_path / "export")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(second, folder)
    assert torch.equal(pixels(load(folder), 1), pixels(first, 1))
    export(second, folder, overwrite=True)
    assert torch.equal(pixels(load(folder), 1), pixels(second, 1))

    (tmp_path / "empty").mkdir()
    export(first, tmp_path / "empty")

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match=r"photos is there and is no model"):
        export(first, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"export", "empty", "photos"}


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student("flow")
    folder = export(student, tmp_path / "export")
    before = (folder / "README.md").read_text()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("diffusers.FlowMapEulerDiscreteScheduler.save_pretrained", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            export(student, target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert (folder / "README.md").read_text() == before


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (CheckerboardField(), "CheckerboardField has no network"),
        (Guided(tiny_field("flow", 5), 2.0, null={"class_labels": 4}), "Guided has no network.*field inside"),
        (FlowMap(Own(3)), "FlowMap cannot be exported: its Own cannot be made anew from its config"),
        (NetworkField(UNet(tiny_unet()), Linear(), "data"), r"predicts data on Linear\(\).*Reversed\(\), 'flow'"),
        (NetworkField(UNet(tiny_unet()), Reversed(), "flow", path=Trigonometric()), "on the linear path"),
    ],
)
def test_what_cannot_be_exported(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(tmp_path / "nowhere", tmp_path / "export")


@pytest.mark.takes_seconds
@pytest.mark.parametrize("classes", [None, 5])
def test_a_student_that_is_told_the_strength_of_guidance(
    classes: int | None, elsewhere: Callable[..., str], tmp_path: Path
) -> None:
    """In fewstep, in its pipeline, and in diffusers where fewstep is not."""
    student = FlowMap.from_field(tiny_field("v_prediction", classes), guidance=True)
    with torch.no_grad():
        student.network.model.class_embedding.strength.linear_2.weight.normal_(
            generator=torch.Generator().manual_seed(0)
        )
    folder = export(student, tmp_path / "guided")
    noise = sample_noise((3, 1, 8, 8), sample_generators(7, range(3)))
    x = sample(student, noise, 2, guidance=torch.full((3,), 3.0), **conditions(classes))
    expected = (x / 2 + 0.5).clamp(0, 1)
    back = load(folder)
    assert torch.equal(sample(back, noise, 2, guidance=torch.full((3,), 3.0), **conditions(classes)), x)  # pyright: ignore
    asked = {"latents": noise, "num_inference_steps": 2, "output_type": "pt", **conditions(classes)}
    found = pipeline(folder)(guidance_scale=3.0, **asked).images
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - pipeline(folder)(**asked).images).abs().max() > 1e-3
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    labels = ", class_labels=[0, 1, 4]" if classes else ""
    said = elsewhere(
        f"""
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
noise = load_file({str(tmp_path / "noise.safetensors")!r})["noise"]
images = pipe(latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="pt"{labels}).images
print(float(images.double().sum()))
"""
    )
    assert float(said.split()[-1]) == pytest.approx(float(expected.double().sum()), rel=1e-6)


def test_a_strength_that_nobody_takes_is_refused(tmp_path: Path) -> None:
    folder = export(tiny_student(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, and this model is not told any: leave it out"):
        pipeline(folder)(guidance_scale=2.0)


# Latent models


# An image beside the state


# EDM, and time that runs forward


def test_the_strength_that_a_map_was_trained_for(tmp_path: Path) -> None:
    student = FlowMap.from_field(tiny_field("v_prediction"), guidance=True)
    with torch.no_grad():
        student.network.model.class_embedding.strength.linear_2.weight.normal_(  # pyright: ignore
            generator=torch.Generator().manual_seed(0)
        )
    student.guidance = 3.0
    folder = export(student, tmp_path / "guided")
    expected, back = pixels(student, 2), load(folder)
    assert isinstance(back, FlowMap)
    assert torch.equal(pixels(back, 2), expected)
    asked = {"num_inference_steps": 2, "output_type": "pt"}
    found = pipeline(folder)(generator=sample_generators(7, range(3)), **asked).images
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# Every path
