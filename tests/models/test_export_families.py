"""Exports of every family of diffusers: the same pixels by the folder's own code, where fewstep is and is not."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys.exports import asked, family_field, family_map, pipeline, speak
from toys.families import MODELS, conditions, made, tiny_pipeline, tiny_vae
from toys.unet import tiny_field, tiny_unet

from fewstep.common.randomness import sample_generators
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed
from fewstep.flows.sampling import sample, sample_noise
from fewstep.latents.vae import Latents
from fewstep.models.adapter_files import PEFT_CONFIG, PEFT_FILE, load_adapter
from fewstep.models.exported import network_folder
from fewstep.models.lora import add_lora, merge_lora
from fewstep.networks import FAMILIES, UNet, two_time_model
from fewstep.pipelines.source import whole
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


def drawn(student: FlowMap, cond: dict[str, Tensor], steps: int = 2, gamma: float = 0.0) -> Tensor:
    """What fewstep draws for the samples 0 and 1 of seed 7, in [0, 1] as the pipeline gives it."""
    generators = sample_generators(7, range(2))
    noise = sample_noise((2, *student.network.shape), generators)  # pyright: ignore
    x = sample(student, noise, steps, gamma=gamma, generator=generators, **cond)
    return (x / 2 + 0.5).clamp(0, 1)


NAMES = [name for name in MODELS if name != "wan"]


# Of those that came later one way is tried: the others are told apart in the tests of students.
FIRST = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")
WAYS = [(name, way) for name in NAMES for way in ("t", "span", "late") if name in FIRST or way == "t"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("name", "second_time"), WAYS)
def test_the_pipeline_of_each_family_draws_what_fewstep_does(name: str, second_time: str, tmp_path: Path) -> None:
    try:
        student = family_map(name, second_time=second_time)
    except ValueError as error:  # some models have no room for it, and say so
        assert second_time == "late"
        pytest.skip(str(error))
    folder, cond = export(student, tmp_path / "map"), conditions(name)
    expected = drawn(student, cond)
    assert expected.isfinite().all()
    assert expected.std() > 0.01
    back: Any = load(folder)
    assert torch.equal(drawn(back, cond), expected)
    assert back.network.second_time == second_time
    assert (back.native, back.prediction, back.network.shape) == (
        student.native, student.prediction, student.network.shape,
    )  # fmt: skip
    carried = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(carried).__module__.startswith("diffusers_modules")
    carried.set_progress_bar_config(disable=True)
    for pipe in (pipeline(folder), carried):
        assert torch.equal(pipe(**asked(**cond)).images, expected)
        found = pipe(**asked(3, gamma=1.0, **cond)).images
        torch.testing.assert_close(found, drawn(student, cond, 3, 1.0), atol=1e-5, rtol=0)
    assert not list(folder.rglob("*.bin"))
    assert not [p.name for p in folder.iterdir() if p.name.startswith(("text", "tokenizer", "vae"))]


@pytest.mark.parametrize("name", ["sd", "pixart"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_the_network_speaks(name: str, prediction: str, tmp_path: Path) -> None:
    network = family_field(name).network
    student = speak(FlowMap.from_field(DiffusionField(network, DDPMScheduler(prediction_type=prediction))))
    cond = conditions(name)
    found = pipeline(export(student, tmp_path / "map"))(**asked(**cond)).images
    assert torch.equal(found, drawn(student, cond))


@pytest.mark.parametrize("name", ["sd", "dit", "sd3", "flux"])
def test_a_strength_of_guidance_is_told(name: str, tmp_path: Path) -> None:
    student = family_map(name, guidance=True)
    student.guidance = 3.0
    folder, cond = export(student, tmp_path / "map"), conditions(name)
    pipe = pipeline(folder)
    at_three = pipe(**asked(**cond)).images
    assert torch.equal(at_three, drawn(student, cond))
    assert torch.equal(pipe(**asked(guidance_scale=3.0, **cond)).images, at_three)
    at_five = pipe(**asked(guidance_scale=5.0, **cond)).images
    assert torch.equal(at_five, drawn(student, {**cond, "guidance": torch.full((2,), 5.0)}))
    assert (at_five - at_three).abs().max() > 1e-4
    back: Any = load(folder)
    assert back.guidance == 3.0
    assert back.network.takes_guidance
    assert "guidance_scale=3" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="not told any: leave it out"):
        pipeline(export(family_map(name), tmp_path / "plain"))(**asked(guidance_scale=3.0, **cond))


def test_the_guidance_that_flux_takes_itself(tmp_path: Path) -> None:
    field = family_field("flux", guidance_embeds=True)
    student, cond = speak(FlowMap.from_field(field)), conditions("flux")
    pipe = pipeline(export(student, tmp_path / "map"))
    found = pipe(**asked(guidance_scale=3.5, **cond)).images
    assert torch.equal(found, drawn(student, {**cond, "guidance": torch.full((2,), 3.5)}))
    with pytest.raises(ValueError, match=r"guidance_scale=3\.5 or so"):
        pipe(**asked(**cond))


@pytest.mark.takes_seconds
def test_images_of_another_size(tmp_path: Path) -> None:
    for name in ("sd", "sd3", "flux"):
        student, cond = family_map(name), conditions(name)
        student.latents = Latents(tiny_vae())  # two pixels a latent
        pipe = pipeline(export(student, tmp_path / name))
        images = pipe(height=24, width=16, **asked(**cond)).images
        assert images.shape == (2, 3, 24, 16)
        noise = sample_noise((2, 4, 12, 8), sample_generators(7, range(2)))
        expected = student.latents.decode(sample(student, noise, 2, **cond)) / 2 + 0.5
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
        assert pipe(**asked(**cond)).images.shape == (2, 3, 16, 16)
        step = 2 if name == "sd" else 4  # transformers take whole patches
        with pytest.raises(ValueError, match=f"height is 17: this model makes images of multiples of {step} pixels"):
            pipe(height=17, **asked(**cond))
    square = pipeline(export(family_map("dit"), tmp_path / "dit"))
    assert square(height=16, width=16, **asked(**conditions("dit"))).images.shape == (2, 4, 16, 16)
    with pytest.raises(ValueError, match="states of 12 x 8 are asked for: this model makes squares alone"):
        square(height=12, **asked(**conditions("dit")))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux", "dit"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    student, cond = family_map(name), conditions(name)
    pipe = type(pipeline(export(student, tmp_path / "map"))).from_pretrained(tmp_path / "map", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.network.dtype == torch.bfloat16
    assert (pipe(**asked(**cond)).images - drawn(student, cond)).abs().mean() < 0.02


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    pipe = pipeline(export(family_map("sdxl"), tmp_path / "sdxl"))
    with pytest.raises(ValueError, match="needs encoder_hidden_states, one row an image: pass encoder_hidden_states,"):
        pipe()
    with pytest.raises(ValueError, match="needs time_ids"):
        pipe(**{name: value for name, value in conditions("sdxl").items() if name != "time_ids"})
    with pytest.raises(ValueError, match="has no text encoders: leave it out"):
        pipe("a cat")
    with pytest.raises(ValueError, match="negative_prompt is no option of this pipeline"):
        pipe(negative_prompt="a dog", **conditions("sdxl"))
    pipe = pipeline(export(family_map("dit"), tmp_path / "dit"))
    with pytest.raises(ValueError, match="class_labels are needed, 0 to 4"):
        pipe()
    with pytest.raises(ValueError, match="class_labels run from 0 to 4, these from 5 to 5"):
        pipe(class_labels=5)


def test_the_class_is_one_that_fewstep_writes(tmp_path: Path) -> None:
    folder = export(family_map("dit"), tmp_path / "map")
    index = json.loads((folder / "model_index.json").read_text())
    assert network_folder(index) == "transformer"
    assert index["transformer"] == ["two_times", "TwoTimeDiTTransformer2DModel"]
    assert (folder / "transformer" / "two_times.py").read_text() == whole(
        inspect.getfile(two_time_model("DiTTransformer2DModel"))
    )
    index["transformer"] = ["two_times", "TwoTimeDiTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="did you mean 'TwoTimeDiTTransformer2DModel'"):
        load(folder)


def test_a_video(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "cross_attn_norm": True,
    }  # fmt: skip
    network = FAMILIES["WanTransformer3DModel"](made(diffusers.WanTransformer3DModel, **options))
    network.size = (2, 8, 8)
    student = speak(FlowMap.from_field(DiffusionField(network, FlowMatchEulerDiscreteScheduler(shift=3.0))))
    cond = {"encoder_hidden_states": torch.randn(2, 8, 32)}
    folder = export(student, tmp_path / "map")
    expected = drawn(student, cond)
    assert expected.shape == (2, 4, 2, 8, 8)
    assert torch.equal(drawn(load(folder), cond), expected)  # pyright: ignore
    pipe = pipeline(folder)
    assert torch.equal(pipe(**asked(**cond)).images, expected.transpose(1, 2))
    found = pipe(**{**asked(**cond), "output_type": "latent"}).images
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), expected, atol=0, rtol=0)
    frames = pipe(**{**asked(**cond), "output_type": "np"}).images
    assert frames.shape == (2, 2, 8, 8, 4)


# Before there was one file for all families


@pytest.mark.parametrize(("classes", "guidance"), [(5, False), (5, True), (None, True)])
def test_an_export_of_before(classes: int | None, guidance: bool, tmp_path: Path) -> None:
    """Its class has another name, and its config does not say how the second time goes in."""
    student = speak(FlowMap.from_field(tiny_field("v_prediction", classes), guidance=guidance))
    folder = export(student, tmp_path / "map")
    old = "GuidedTimeUNet2DModel" if guidance else "ClassTimeUNet2DModel"
    (folder / "unet" / "two_times.py").rename(folder / "unet" / "class_time_unet.py")
    index = json.loads((folder / "model_index.json").read_text())
    for key in ("shape", "needs"):
        del index[key]
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["class_time_unet", old]}))
    config = json.loads((folder / "unet" / "config.json").read_text())
    del config["second_time"], config["told_guidance"]
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": old}))
    back: Any = load(folder)
    assert back.network.takes_guidance == guidance
    x, cond = torch.randn(2, 1, 8, 8), {"class_labels": torch.tensor([1, 4])} if classes else {}
    cond |= {"guidance": torch.tensor([2.0, 3.0])} if guidance else {}
    with torch.no_grad():
        assert torch.equal(back(x, 0.3, 0.8, **cond), student(x, 0.3, 0.8, **cond))


# Without fewstep


ELSEWHERE = """
    import sys
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file, save_file

    folder, start = Path(sys.argv[1]), int(sys.argv[2])
    images = {}
    for export in sorted(folder.iterdir()):
        pipe = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
        cond = load_file(folder.parent / f"{export.name}.safetensors")
        for steps in range(1, 9):
            generators = [torch.Generator().manual_seed((start + i) & 0xFFFFFFFF) for i in range(2)]
            out = pipe(num_inference_steps=steps, generator=generators, output_type="pt", **cond)
            images[f"{export.name} {steps}"] = out.images.contiguous()
    assert "fewstep" not in sys.modules
    save_file(images, folder.parent / "images.safetensors")
"""


@pytest.mark.takes_seconds
def test_the_same_pixels_of_each_family_without_fewstep(tmp_path: Path, elsewhere: Callable[..., str]) -> None:
    students = {name: family_map(name) for name in NAMES}
    for name, student in students.items():
        export(student, tmp_path / "exports" / name)
        save_file(conditions(name), tmp_path / f"{name}.safetensors")
    elsewhere(ELSEWHERE, tmp_path / "exports", sample_generators(7, range(1))[0].initial_seed())
    images = load_file(tmp_path / "images.safetensors")
    assert len(images) == len(NAMES) * 8
    for key, image in images.items():
        name, steps = key.split()
        torch.testing.assert_close(image, drawn(students[name], conditions(name), int(steps)), atol=1e-6, rtol=0)


# Adapters


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_a_map_and_the_map_with_it_merged(name: str, tmp_path: Path) -> None:
    field, cond = family_field(name), conditions(name)
    student = FlowMap.from_field(field)
    add_lora(student, rank=2)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    folder = export(student, tmp_path / "adapter", adapter=True)
    assert {file.name for file in folder.iterdir()} == {PEFT_FILE, PEFT_CONFIG, "fewstep.json"}
    saved = json.loads((folder / PEFT_CONFIG).read_text())["modules_to_save"]
    assert any("second" in module for module in saved)
    again = FlowMap.from_field(field)
    load_adapter(again, folder)
    expected = drawn(student.eval(), cond)
    assert torch.equal(drawn(again.eval(), cond), expected)
    assert (drawn(FlowMap.from_field(field), cond) - expected).abs().max() > 1e-3

    fresh: Any = FlowMap.from_field(field).network
    PeftModel.from_pretrained(fresh.model, str(folder))  # peft reads it too, in place
    merged = merge_lora(student)
    back = load(export(student, tmp_path / "merged"))
    assert isinstance(back, FlowMap)
    assert torch.equal(drawn(back, cond), drawn(merged, cond))
    torch.testing.assert_close(drawn(back, cond), expected, atol=1e-4, rtol=0)


# Fields


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_a_field_is_the_pipeline_that_it_came_from(name: str, tmp_path: Path) -> None:
    tiny_pipeline(name).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    field: Any = load(tmp_path / "source")
    if name == "flux":
        field.network.size = 8
    speak(field)
    folder = export(field, tmp_path / "tuned")
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.py"))
    back, cond = load(folder), conditions(name)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(back(x, t, **cond), field(x, t, **cond))
    index = json.loads((tmp_path / "source" / "model_index.json").read_text())
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == index["_class_name"]
    card = (folder / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("tuned")' in card
    assert ("class_labels=[0, 1]" if name == "dit" else '"a photo of a cat"') in card
    if name in ("dit", "pixart"):  # these pipelines make images of their own sizes only
        return
    pipe.set_progress_bar_config(disable=True)
    source: Any = DiffusionPipeline.from_pretrained(tmp_path / "source")
    source.set_progress_bar_config(disable=True)
    part = "unet" if "UNet" in MODELS[name][0] else "transformer"
    setattr(source, part, field.network.model)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    images = [p("a cat", generator=torch.Generator().manual_seed(0), **options).images for p in (pipe, source)]
    np.testing.assert_array_equal(images[0], images[1])


def test_a_field_whose_pipeline_nobody_knows(tmp_path: Path) -> None:
    folder = export(family_field("sd3"), tmp_path / "bare")
    assert not (folder / "model_index.json").exists()
    card = (folder / "README.md").read_text()
    assert "No pipeline of diffusers samples it: the one that it came from is not known. `transformer/`" in card
    x, cond = torch.randn(2, 4, 8, 8), conditions("sd3")
    with torch.no_grad():
        assert torch.equal(load(folder)(x, 0.3, **cond), family_field("sd3")(x, 0.3, **cond))


def test_a_field_that_no_scheduler_of_diffusers_runs(tmp_path: Path) -> None:
    network = family_field("sd").network
    field = NetworkField(network, Reversed(), "flow", path=Linear())
    with pytest.raises(ValueError, match=r"ConditionalUNet that predicts flow .*`fewstep convert MODEL --out FOLDER`"):
        export(field, tmp_path / "field")
    assert not list(tmp_path.iterdir())


@pytest.mark.takes_seconds
def test_what_a_part_of_the_pipeline_lacks(tmp_path: Path) -> None:
    """An optional part that was not fetched is left out; a text encoder without its weights is named."""
    tiny_pipeline("sd").save_pretrained(tmp_path / "source")
    index = json.loads((tmp_path / "source" / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (tmp_path / "source" / "model_index.json").write_text(json.dumps(index))
    folder = export(load(tmp_path / "source"), tmp_path / "tuned")
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert isinstance(DiffusionPipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline)
    field = load(tmp_path / "source")
    (tmp_path / "source" / "text_encoder" / "model.safetensors").unlink()
    for model in (field, FlowMap.from_field(field)):  # pyright: ignore
        with pytest.raises(FileNotFoundError, match=r"no weights in .*text_encoder: model.safetensors is missing"):
            export(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_unet_beside_an_image_in_latents(tmp_path: Path) -> None:
    """Of the other families a U-Net alone takes one."""
    student = speak(FlowMap.from_field(DiffusionField(UNet(tiny_unet(in_channels=3)), DDPMScheduler())))
    image = torch.randn(2, 2, 8, 8)
    pipe = pipeline(export(student, tmp_path / "map"))
    assert torch.equal(pipe(image=image, **asked()).images, drawn(student, {"image": image}))


@pytest.mark.takes_seconds
def test_classes_are_asked_for_by_name(tmp_path: Path) -> None:
    """As a pipeline of DiT has them, with several names of a class between commas; and a run those of its data."""
    student = family_map("dit")
    student.class_names = ("hen", "cat, tabby cat", "dog", "fox", "owl")
    folder = export(student, tmp_path / "map")
    assert load(folder).class_names == student.class_names
    pipe = pipeline(folder)
    by_number = pipe(**asked(class_labels=[1, 4])).images
    assert torch.equal(pipe(**asked(class_labels=["tabby cat", "owl"])).images, by_number)
    assert torch.equal(pipe(**asked(class_labels="dog")).images, pipe(**asked(class_labels=2)).images)
    with pytest.raises(ValueError, match="there is no class 'wolf'; known: hen, cat, tabby cat, dog"):
        pipe(**asked(class_labels="wolf"))
    recipe = {
        "name": "named", "objective": "FlowMatching", "data": "digits", "evaluation": {"count": 0},
        "student": {
            "network": "unet", "options": {
                "block_out_channels": [8], "norm_num_groups": 4, "num_class_embeds": 10, "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
            },
        },
        "training": {"steps": 1, "batch": 8, "quiet": True},
    }  # fmt: skip
    run(load_recipe(recipe), tmp_path / "run")
    assert load(tmp_path / "run").class_names == tuple("0123456789")
