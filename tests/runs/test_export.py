"""Exports: the same pixels where fewstep is not installed, and what was exported where it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.exports import pipeline
from toys.families import made, tiny_vae
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import DiffusionField, Guided, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed, Trigonometric
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.tabulated import Tabulated
from fewstep.latents.vae import Latents
from fewstep.models.exported import FlowMapPipeline
from fewstep.networks import MLP, UNet, flow_model
from fewstep.pipelines import flow_map
from fewstep.pipelines.native_times import coefficients
from fewstep.pipelines.source import whole
from fewstep.runs.export import export
from fewstep.runs.opening import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

# Student's prediction and classes: each kind of network, with and without labels.
STUDENTS = [("flow", None), ("flow", 5), ("epsilon", None), ("v_prediction", 5), ("sample", None)]


def pixels(student: FlowMap, steps: int, gamma: float = 0.0, classes: int | None = None) -> Tensor:
    """What ``fewstep sample`` draws for the samples 0, 1, 2 of seed 7, as an image has it, in [0, 1]."""
    generators = sample_generators(7, range(3))
    noise = sample_noise((3, 1, 8, 8), generators)
    x = sample(student, noise, steps, gamma=gamma, generator=generators, **conditions(classes))
    return (x / 2 + 0.5).clamp(0, 1)


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
    monkeypatch.setattr("fewstep.runs.opening.load_run", lambda folder, **_: {run: student}[folder])
    folder = export(run, tmp_path / "export")
    assert torch.equal(pixels(load(folder), 2), pixels(student, 2))
    assert "Trained with LMD" in (folder / "README.md").read_text()


@pytest.mark.takes_seconds
def test_what_a_run_hands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its averaged weights, its recipe, its last pictures and its figures; and it is no run to any command."""
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
    with pytest.raises(ValueError, match="no fixed size: pass height and width, or the noise to start from as latents"):
        free()
    noise = torch.randn(1, 1, 16, 12, generator=torch.Generator().manual_seed(3))
    images = free(latents=noise, output_type="pt").images
    assert images.shape == (1, 1, 16, 12)
    sized = free(height=16, width=12, generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(sized, images)


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


def tiny_vq(**options: Any) -> Any:
    """Images of 3 x 16 x 16 and latents of 1 x 8 x 8."""
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 1, "num_vq_embeddings": 8}
    return made(VQModel, **{**blocks, **sizes, "scaling_factor": 0.6, **options})


VAES: dict[str, Callable[[], Any]] = {
    "vq": tiny_vq,
    "kl": lambda: tiny_vae(latent_channels=1, shift_factor=0.2),
    "normed": lambda: tiny_vae(latent_channels=1, latents_mean=[0.3], latents_std=[1.7]),
}


def latent_field(prediction: str, vae: Any) -> NetworkField:
    field = tiny_field(prediction)
    field.latents = Latents(vae)
    return field


@pytest.mark.takes_seconds
@pytest.mark.parametrize("vae", VAES)
def test_a_latent_map_gives_the_images_of_its_vae(
    vae: str, tmp_path: Path, elsewhere: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny_student("v_prediction")
    student.latents = Latents(VAES[vae]())
    folder = export(student, tmp_path / "latent")
    generators = sample_generators(7, range(2))
    latents = sample(student, sample_noise((2, 1, 8, 8), generators), 2)
    expected = student.latents.decode(latents) / 2 + 0.5
    assert expected.std() > 0.01
    back = load(folder)
    assert back.latents is not None
    assert torch.equal(back.latents.decode(latents), student.latents.decode(latents))
    again = export(back, tmp_path / "again")  # from the folder of its VAE
    asked = {"num_inference_steps": 2, "generator": generators, "output_type": "pt"}
    for place in (folder, again):
        generators = sample_generators(7, range(2))
        found = pipeline(place)(**{**asked, "generator": generators}).images
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    command = ["sample", str(folder), "--count", "2", "--seed", "7", "--steps", "2", "--out", str(tmp_path / "x.npy")]
    assert main(command) == 0
    np.testing.assert_allclose(np.load(tmp_path / "x.npy") / 2 + 0.5, expected.numpy(), atol=1e-6)
    if vae == "vq":
        start = sample_generators(7, range(1))[0].initial_seed()
        elsewhere(
            """
            import sys
            import torch
            from diffusers import DiffusionPipeline
            from safetensors.torch import save_file

            pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
            generators = [torch.Generator().manual_seed((int(sys.argv[2]) + i) & 0xFFFFFFFF) for i in range(2)]
            images = pipe(num_inference_steps=2, generator=generators, output_type="pt").images
            save_file({"images": images.contiguous()}, sys.argv[3])
            """,
            again, start, tmp_path / "images.safetensors",
        )  # fmt: skip
        images = load_file(tmp_path / "images.safetensors")["images"]
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


@pytest.mark.takes_seconds
def test_a_latent_pipeline_stays_one(tmp_path: Path) -> None:
    LDMPipeline(tiny_vq(), tiny_unet(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ldm")
    field = load(tmp_path / "ldm")
    back = load(export(field, tmp_path / "field"))
    z = torch.randn(2, 1, 8, 8)
    assert field.latents is not None
    assert back.latents is not None
    assert torch.equal(back.latents.decode(z), field.latents.decode(z))
    pipe, original = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("field", "ldm"))
    assert isinstance(pipe, LDMPipeline)
    images = []
    for one in (pipe, original):
        one.set_progress_bar_config(disable=True)
        made = one(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")  # pyright: ignore
        images.append(made.images)
    np.testing.assert_array_equal(images[0], images[1])
    student = FlowMap.from_field(field)
    images = pipeline(export(student, tmp_path / "map"))(output_type="pt", num_inference_steps=1).images
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (lambda: latent_field("epsilon", VAES["kl"]()), "LDMPipeline does not bring latents into the units of its VAE"),
        (lambda: latent_field("flow", tiny_vq()), "LDMPipeline does not go with its FlowMatchEulerDiscreteScheduler"),
        (lambda: tiny_field("epsilon", 5), "none tells it its class"),
        (lambda: tiny_field("epsilon", in_channels=3), "none gives it the image"),
        (lambda: tiny_field("flow", sample_size=None), "none knows the size"),
        (
            lambda: DiffusionField(UNet(tiny_unet()), EDMEulerScheduler()),
            "DDPMPipeline does not go with its EDMEulerScheduler",
        ),
        (lambda: DiffusionField(UNet(tiny_unet()), PNDMScheduler()), "DDPMPipeline does not go with its PNDMScheduler"),
    ],
)
def test_no_pipeline_is_named_that_cannot_run(
    field: Callable[[], Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = field()
    folder = export(first, tmp_path / "field")
    assert not (folder / "model_index.json").exists()
    card = (folder / "README.md").read_text()
    assert f"No pipeline of diffusers samples it: {reason}" in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("50", "2"), names)
    assert names["samples"].isfinite().all()
    assert ("images" in names) == (first.latents is not None)
    assert (load(export(first, folder, overwrite=True)).latents is None) == (first.latents is None)


def test_a_vae_that_is_gone(tmp_path: Path) -> None:
    LDMPipeline(tiny_vq(), tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "ldm")
    field = load(tmp_path / "ldm")
    (tmp_path / "ldm" / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*vqvae"):
        export(field, tmp_path / "field")
    assert [p.name for p in tmp_path.iterdir()] == ["ldm"]


# An image beside the state


@pytest.mark.takes_seconds
@pytest.mark.parametrize("classes", [None, 5])
def test_a_map_that_takes_an_image(
    classes: int | None, tmp_path: Path, elsewhere: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_student("v_prediction", classes, in_channels=3)
    folder = export(student, tmp_path / "beside")
    image = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    generators = sample_generators(7, range(3))
    noise = sample_noise((3, 1, 8, 8), generators)
    x = sample(student, noise, 3, gamma=1.0, generator=generators, image=image, **conditions(classes))
    expected = (x / 2 + 0.5).clamp(0, 1)
    pipe = pipeline(folder)
    asked: dict[str, Any] = {"num_inference_steps": 3, "gamma": 1.0, "output_type": "pt", **conditions(classes)}
    found = pipe(image=image, generator=sample_generators(7, range(3)), **asked).images
    assert torch.equal(found, expected)
    assert (pipe(image=-image, generator=sample_generators(7, range(3)), **asked).images - found).abs().max() > 1e-3
    assert torch.equal(sample(load(folder), noise, 1, image=image, **conditions(classes)),
                       sample(student, noise, 1, image=image, **conditions(classes)))  # fmt: skip
    for wrong, message in (
        (None, r"takes an image beside the state: image of shape \(3, 2, 8, 8\) is needed"),
        (image[:, :1], r"image has shape \(3, 1, 8, 8\), this model needs \(3, 2, 8, 8\)"),
        (image[:2], r"3 images, but"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(image=wrong, latents=noise, batch_size=3, **asked)
    monkeypatch.chdir(tmp_path)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert elsewhere(f"import os; os.chdir({str(tmp_path)!r})\n{code}\nprint(len(images))").split()[-1] == "4"


def test_an_image_for_a_map_that_takes_none(labelled: FlowMapPipeline) -> None:
    with pytest.raises(ValueError, match="takes no image beside the state: leave image out"):
        labelled(class_labels=1, image=torch.zeros(1, 1, 8, 8))


def test_a_run_is_sampled_with_the_images_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(tiny_unet(5), DDPMScheduler(prediction_type="v_prediction")).save_pretrained("ddpm")
    draw = np.random.default_rng(0)
    pictures, beside = draw.integers(0, 255, (4, 1, 8, 8), dtype=np.uint8), draw.normal(size=(4, 2, 8, 8))
    np.savez("edges.npz", data=pictures, image=beside.astype(np.float32), labels=np.array([0, 1, 2, 3]))
    recipe: dict[str, Any] = {
        "name": "edges", "data": {"name": "edges.npz", "conditions": ["image"], "label": "labels"},
        "training": {"steps": 1, "batch": 4, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    student = {"network": "auto", "kind": "field", "image": 2}
    tuned = {**recipe, "teacher": "ddpm", "objective": "FlowMatching", "student": student}
    run(load_recipe(tuned), tmp_path / "field")
    run(load_recipe({**recipe, "teacher": "field", "objective": "LMD"}), tmp_path / "map")

    options = ["--steps", "2", "--count", "6", "--seed", "7", "--batch", "4"]
    image = torch.tensor(beside, dtype=torch.float32)[torch.arange(6) % 4]
    noise = sample_noise((6, 1, 8, 8), sample_generators(7, range(6)))
    for name, asked in (("field", []), ("map", []), ("field", ["--teacher"]), ("map", ["--teacher"])):
        model: Any = load(tmp_path / ("field" if name == "map" else "ddpm") if asked else tmp_path / name)
        cond = {"class_labels": torch.arange(6) % 5}
        if model.network.model.config["in_channels"] == 3:  # all but the teacher of the first
            cond["image"] = image
        assert main(["sample", name, *asked, *options, "--out", "x.npz"]) == 0
        found, expected = np.load("x.npz"), sample(model, noise, 2, **cond)
        np.testing.assert_allclose(found["data"], expected.numpy(), rtol=1e-4, atol=1e-4)
        assert ("image" in found) == ("image" in cond)
    np.testing.assert_array_equal(found["image"], image.numpy())

    # An export has no data.
    for name in ("field", "map"):
        assert main(["export", name, f"{name}-export"]) == 0
        for command in (["sample"], ["reflow", "--count", "2", "--steps", "1"]):
            assert main([*command, f"{name}-export", "--out", "never"]) == 2
            said = capsys.readouterr().err
            assert "an image" in said
            assert "fewstep.sample(model, noise, image=" in said
    assert not list(tmp_path.glob("never*"))


# EDM, and time that runs forward


OTHERS = {
    "edm": EDMEulerScheduler(),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_max=70.0),
    "forward": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, invert_sigmas=True),
    "noise on the line": UniPCMultistepScheduler(500, use_flow_sigmas=True),
    "data on the line": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="sample"),
    "no signal": DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def other_student(name: str) -> FlowMap:
    student = FlowMap.from_field(DiffusionField(UNet(tiny_unet()), OTHERS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return student


@pytest.mark.parametrize("name", OTHERS)
def test_the_calls_of_a_map_that_began_elsewhere(name: str, tmp_path: Path) -> None:
    student = other_student(name)
    folder = export(student, tmp_path / "map")
    back: Any = load(folder)
    assert (back.native, back.prediction, back.path) == (student.native, student.prediction, student.path)
    pipe, x = pipeline(folder), torch.randn(2, 1, 8, 8)
    for s, t in torch.tensor([[0.0, 0.3], [0.3, 0.9], [0.6, 0.6], [0.999, 0.9995]]):
        with torch.no_grad():
            expected = student(x, s, t)
            assert torch.equal(back(x, s, t), expected)
            found = pipe._map(x, s, t)
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_pixels_of_a_map_that_began_elsewhere(name: str, tmp_path: Path) -> None:
    student = other_student(name)
    pipe = pipeline(export(student, tmp_path / "map"))
    for steps in (1, 3):
        found = pipe(num_inference_steps=steps, generator=sample_generators(7, range(3)), output_type="pt").images
        expected = pixels(student, steps)
        assert expected.isfinite().all()
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["stock", "told"])
def test_a_pipeline_in_every_type_of_numbers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    student = FlowMap.from_field(tiny_field("v_prediction"), guidance=name == "told")
    pipe = pipeline(export(student, tmp_path / "map"))
    exact = pixels(student, 2)
    found = pipe.to(dtype)(num_inference_steps=2, generator=sample_generators(7, range(3)), output_type="pt").images
    torch.testing.assert_close(found.float(), exact, atol=1e-5 if dtype == torch.float64 else 0.05, rtol=0)


DIFFUSIONS: list[dict[str, Any]] = [
    *({"prediction_type": kind, "log_ratios": list(tiny_field("epsilon").native.log_ratios)}  # pyright: ignore
      for kind in ("epsilon", "sample", "v_prediction")),
    *({"prediction_type": kind, "sigma_data": data, "sigma_min": 0.002, "sigma_max": 80.0}
      for kind in ("epsilon", "v_prediction") for data in (0.5, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: f"{d['prediction_type']} {d.get('sigma_data')}")
def test_the_two_files_that_are_carried_agree(diffusion: dict[str, Any]) -> None:
    last = len(diffusion.get("log_ratios", [0])) - 1
    times = torch.cat([torch.arange(0, 64) / 64, 2.0 ** -torch.arange(7, 20), 1 - 2.0 ** -torch.arange(7, 20)]).double()
    into, step, skip, out = flow_model.flow_scaling(1 - times, diffusion)
    found = torch.tensor([coefficients(diffusion, time, last) for time in times], dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([into, step, -skip, -out], 1), atol=1e-11, rtol=1e-11)


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


def trajectories() -> list[Trajectory]:
    options: dict[Any, dict[str, Any]] = {
        Tabulated: {"log_ratios": (3.0, 0.5, -2.0)},
        Preconditioned: {"sigma_max": 9.0},
    }
    found, classes = [], Trajectory.__subclasses__()
    for kind in classes:
        classes.extend(kind.__subclasses__())
        if kind.__module__.startswith("fewstep.flows."):
            found.append(kind(**options.get(kind, {})))
    return found


@pytest.mark.parametrize("path", trajectories(), ids=lambda path: type(path).__name__)
def test_a_network_on_every_path(path: Trajectory, tmp_path: Path) -> None:
    for model in (
        NetworkField(MLP(2, width=8, depth=2), path, "v", path=Linear()),
        FlowMap(MLP(2, width=8, depth=2, times=2), path),
    ):
        back: Any = load(export(model, tmp_path / type(model).__name__))
        assert (back.native, back.prediction, back.path) == (model.native, model.prediction, model.path)
        x = torch.randn(3, 2)
        with torch.no_grad():
            assert torch.equal(back.velocity(x, 0.3), model.velocity(x, 0.3))
