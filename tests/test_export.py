"""Exports: the same pixels where fewstep is not installed, and what was exported where it is."""

import json
import os
import subprocess
import sysconfig
import textwrap
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from unet_toys import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.exact import CheckerboardField
from fewstep.exporting import export
from fewstep.fields import Guided, NetworkField
from fewstep.loading import load
from fewstep.maps import FlowMap
from fewstep.networks import MLP, UNet
from fewstep.paths import Linear, Reversed, Trigonometric
from fewstep.pipelines import FlowMapPipeline, flow_map
from fewstep.randomness import sample_generators
from fewstep.sampling import sample, sample_noise

# Student's prediction and classes: each kind of network, with and without labels.
STUDENTS = [("flow", None), ("flow", 5), ("epsilon", None), ("v_prediction", 5), ("sample", None)]


def pixels(student: FlowMap, steps: int, gamma: float = 0.0, classes: int | None = None) -> Tensor:
    """What ``fewstep sample`` draws for the samples 0, 1, 2 of seed 7, as an image has it, in [0, 1]."""
    generators = sample_generators(7, range(3))
    noise = sample_noise((3, 1, 8, 8), generators)
    x = sample(student, noise, steps, gamma=gamma, generator=generators, **conditions(classes))
    return (x / 2 + 0.5).clamp(0, 1)


def pipeline(folder: Path) -> FlowMapPipeline:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python code in a venv that has every package of this one but fewstep; returns what it prints."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for entry in Path(folder).iterdir():
            # A .pth file may lead to the sources of fewstep.
            if "fewstep" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)

    def run(code: str, *arguments: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = [python, "-c", textwrap.dedent(code), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


ELSEWHERE = """
    import sys
    from pathlib import Path

    try:
        import fewstep
        sys.exit("fewstep is here")
    except ModuleNotFoundError:
        pass

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
    assert (folder / "pipeline.py").read_text() == Path(flow_map.__file__).read_text()
    for file in folder.rglob("*.py"):
        assert "fewstep" not in "".join(line for line in file.read_text().splitlines() if "import" in line)
    assert {p.name for p in folder.iterdir()} == {"model_index.json", "pipeline.py", "README.md", "scheduler", "unet"}
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
    (run / "recipe.yaml").write_text("objective: {name: LMD}\n")
    student = tiny_student("flow")
    monkeypatch.setattr("fewstep.runs.load_run", {run: student}.__getitem__)
    folder = export(run, tmp_path / "export")
    assert torch.equal(pixels(load(folder), 2), pixels(student, 2))
    assert "Trained with LMD" in (folder / "README.md").read_text()


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


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> FlowMapPipeline:
    return pipeline(export(tiny_student("v_prediction", 5), tmp_path_factory.mktemp("labelled") / "export"))


def test_outputs(labelled: FlowMapPipeline) -> None:
    def draw(**options: Any) -> Any:
        return labelled(class_labels=3, batch_size=2, generator=torch.Generator().manual_seed(0), **options)

    tensor = draw(output_type="pt").images
    assert tensor.shape == (2, 1, 8, 8)
    array = draw(output_type="np").images
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = draw().images
    assert all(isinstance(p, Image.Image) and p.size == (8, 8) for p in pictures)
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, ..., 0] * 255).round())
    assert torch.equal(draw(output_type="pt", return_dict=False)[0], tensor)


def test_noise_may_come_from_anywhere(labelled: FlowMapPipeline) -> None:
    def draw(**options: Any) -> Tensor:
        return labelled(output_type="pt", num_inference_steps=2, **options).images

    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    from_seed = draw(generator=torch.Generator().manual_seed(5), batch_size=2, class_labels=[1, 2])
    assert torch.equal(draw(latents=noise, class_labels=[1, 2]), from_seed)
    assert torch.equal(draw(latents=noise, class_labels=torch.tensor([1, 2])), from_seed)
    # One generator an image: an image is the same in any company.
    many = draw(generator=sample_generators(0, range(4)), class_labels=1)
    torch.testing.assert_close(draw(generator=sample_generators(0, [2]), class_labels=1), many[2:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"class_labels": 1, "gamma": 1.5}, "gamma is 1.5"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type is 'jpg'"),
        ({}, "class_labels are needed, 0 to 4"),
        ({"class_labels": 5}, "class_labels run from 0 to 4"),
        ({"class_labels": [1, 2], "batch_size": 3}, "3 images, but"),
        ({"class_labels": 1, "batch_size": 3, "generator": sample_generators(0, range(2))}, "3 images, but"),
    ],
)
def test_what_the_pipeline_refuses(labelled: FlowMapPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled(**options)


def test_labels_for_a_model_without_classes_and_no_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no classes"):
        pipeline(export(tiny_student("flow"), tmp_path / "a"))(class_labels=1)
    free = pipeline(export(tiny_student("flow", sample_size=None), tmp_path / "b"))
    with pytest.raises(ValueError, match="pass the noise to start from as latents"):
        free()
    assert free(latents=torch.randn(1, 1, 16, 16), output_type="pt").images.shape == (1, 1, 16, 16)


@pytest.mark.parametrize("classes", [None, 5])
def test_half_precision(classes: int | None, tmp_path: Path) -> None:
    """Weights in bf16, as users of diffusers ask for: the state and the times stay in float32."""
    student = tiny_student("v_prediction", classes)
    pipe = FlowMapPipeline.from_pretrained(export(student, tmp_path / "export"), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.bfloat16
    images = pipe(
        num_inference_steps=2, generator=sample_generators(7, range(3)), output_type="pt", **conditions(classes)
    )
    torch.testing.assert_close(images.images, pixels(student, 2, 0.0, classes), atol=0.03, rtol=0)


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
    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (CheckerboardField(), "CheckerboardField has no network"),
        (Guided(tiny_field("flow", 5), 2.0, null={"class_labels": 4}), "Guided has no network.*field inside"),
        (FlowMap(Own()), r"FlowMap of a Own cannot be exported.*state_dict\(\)"),
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
