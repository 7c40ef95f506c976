"""The pipeline of an export as diffusers' own are used: parts passed or left out, saved again, compiled, pushed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMapEulerDiscreteScheduler
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from toys.exports import asked, family_map, pipeline, speak
from toys.families import conditions, tiny_pipeline, tiny_vae
from toys.unet import tiny_field, tiny_student

from fewstep.flows.maps import FlowMap
from fewstep.generation.requests import class_names
from fewstep.latents.vae import Latents
from fewstep.models.exported import FlowMapPipeline
from fewstep.playground.shown import _names
from fewstep.runs.export import export
from fewstep.runs.loading import load

CLASSES = [DiffusionPipeline, FlowMapPipeline]
TEXT = ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]


def opened(kind: Any, folder: Path, **options: Any) -> Any:
    trust = {"trust_remote_code": True} if kind is DiffusionPipeline else {}
    pipe = kind.from_pretrained(folder, **trust, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_map(name: str = "sd") -> FlowMap:
    student = family_map(name)
    student.latents = Latents(tiny_vae())
    return student


@pytest.fixture(scope="module")
def text_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny_pipeline("sd3").save_pretrained(folder / "sd3")
    return export(speak(FlowMap.from_field(load(folder / "sd3"))), folder / "map")  # pyright: ignore


@pytest.fixture(scope="module")
def latent_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(latent_map(), tmp_path_factory.mktemp("latent") / "map")


# Parts


@pytest.mark.takes_seconds
@pytest.mark.parametrize("kind", CLASSES)
def test_parts_that_are_passed_are_the_parts(kind: Any, text_export: Path) -> None:
    first = opened(kind, text_export)
    names = [*TEXT, "vae", "scheduler"]
    passed = {name: getattr(first, name) for name in names}
    assert all(passed.values())
    for name, part in passed.items():
        assert getattr(opened(kind, text_export, **{name: part}), name) is part
    again = opened(kind, text_export, **passed)
    assert all(getattr(again, name) is part for name, part in passed.items())
    again.transformer = first.transformer
    assert torch.equal(
        *(pipe("cat", latents=torch.ones(1, 4, 8, 8), output_type="pt").images for pipe in (first, again))
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_a_network_that_is_passed(kind: Any, text_export: Path, tmp_path: Path) -> None:
    """By diffusers one of its own classes alone: it takes none for a class that the folder carries, and says so."""
    folder = export(tiny_student("flow"), tmp_path / "map")
    unet = opened(kind, folder).unet
    assert opened(kind, folder, unet=unet).unet is unet
    transformer = opened(kind, text_export).transformer
    if kind is FlowMapPipeline:
        assert opened(kind, text_export, transformer=transformer).transformer is transformer
    else:
        with pytest.raises(ValueError, match="two_times is not one of the libraries"):
            opened(kind, text_export, transformer=transformer)
    with pytest.raises(ValueError, match="nothing without its network: pass a unet or a transformer"):
        opened(kind, folder, unet=None)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("kind", CLASSES)
def test_parts_that_are_left_out(kind: Any, text_export: Path) -> None:
    for name in (*TEXT, "vae"):
        assert getattr(opened(kind, text_export, **{name: None}), name) is None
    # SD3 encodes without its third encoder, and without any other there are conditions made beforehand.
    small = opened(kind, text_export, text_encoder_3=None, tokenizer_3=None)
    noise: dict[str, Any] = {"latents": torch.ones(1, 4, 8, 8), "output_type": "pt"}
    assert small("cat", **noise).images.shape == (1, 3, 16, 16)
    cond = load(text_export).text.encode(["cat"])  # pyright: ignore
    for left_out in (["text_encoder"], ["text_encoder_2"], TEXT):
        bare = opened(kind, text_export, **dict.fromkeys(left_out))
        assert torch.equal(bare(**noise, **cond).images, opened(kind, text_export)(**noise, **cond).images)
        with pytest.raises(ValueError, match="has no text encoders: leave it out"):
            bare("cat")


@pytest.mark.parametrize("kind", CLASSES)
def test_without_a_vae_there_are_latents(kind: Any, latent_export: Path) -> None:
    cond = conditions("sd")
    pipe, bare = opened(kind, latent_export), opened(kind, latent_export, vae=None)
    with pytest.raises(ValueError, match=r"output_type is 'pil', and the VAE is not here: output_type='latent'"):
        bare(**cond)
    size = {"height": 24, "width": 16}
    found = bare(**size, **{**asked(**cond), "output_type": "latent"}).images
    assert found.shape == (2, 4, 12, 8)
    assert torch.equal(found, pipe(**size, **{**asked(**cond), "output_type": "latent"}).images)


def test_options_that_are_passed(latent_export: Path) -> None:
    assert opened(FlowMapPipeline, latent_export, gamma=1.0).config["gamma"] == 1.0
    assert opened(DiffusionPipeline, latent_export, gamma=1.0).config["gamma"] == 1.0


# Saved again


@pytest.mark.takes_seconds
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["stock", "classes", "latents"])
def test_what_is_saved_again_is_an_export(kind: Any, name: str, tmp_path: Path) -> None:
    made = {"stock": lambda: tiny_student("epsilon"), "classes": lambda: family_map("dit"), "latents": latent_map}
    cond = {"stock": {}, "classes": conditions("dit"), "latents": conditions("sd")}[name]
    first = opened(kind, export(made[name](), tmp_path / "map"))
    first.save_pretrained(tmp_path / "saved")
    expected = first(**asked(**cond)).images
    opened(kind, tmp_path / "saved").save_pretrained(tmp_path / "again")
    code = lambda folder: {p.relative_to(folder): p.read_text() for p in folder.rglob("*.py")}  # noqa: E731
    for folder in (tmp_path / "saved", tmp_path / "again"):
        assert code(folder) == code(tmp_path / "map")
        for other in CLASSES:
            assert torch.equal(opened(other, folder)(**asked(**cond)).images, expected)
    assert isinstance(load(tmp_path / "again"), FlowMap)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("kind", CLASSES)
def test_text_is_saved_again_with_its_encoders_or_without(kind: Any, text_export: Path, tmp_path: Path) -> None:
    noise: dict[str, Any] = {"latents": torch.ones(1, 4, 8, 8), "output_type": "pt"}
    pipe = opened(kind, text_export)
    expected, cond = pipe("cat", **noise).images, load(text_export).text.encode(["cat"])  # pyright: ignore
    pipe.save_pretrained(tmp_path / "saved")
    saved: Any = opened(DiffusionPipeline, tmp_path / "saved")
    torch.testing.assert_close(saved("cat", **noise).images, expected, atol=1e-6, rtol=0)
    opened(kind, text_export, **dict.fromkeys(TEXT)).save_pretrained(tmp_path / "small")
    assert not [p for p in (tmp_path / "small").iterdir() if p.name.startswith("t") and p.name != "transformer"]
    small: Any = opened(DiffusionPipeline, tmp_path / "small")
    torch.testing.assert_close(small(**noise, **cond).images, expected, atol=1e-6, rtol=0)
    assert load(tmp_path / "small").text is None


# As the hub has it


def test_diffusers_finds_each_file_of_code_on_the_hub(text_export: Path, tmp_path: Path) -> None:
    """It takes every list of the index for a part, and of a part one file of code."""
    for folder in (
        text_export,
        export(tiny_student("flow"), tmp_path / "a"),
        export(family_map("dit"), tmp_path / "b"),
    ):
        index = json.loads((folder / "model_index.json").read_text())
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        code, _ = _get_custom_components_and_folders("me/map", index, files)
        assert {f"{part}/{name}.py" for part, name in code.items()} == {
            f for f in files if f.endswith(".py") and "/" in f
        }
        assert {file for file in files if file.endswith(".py") and "/" not in file} == {"pipeline.py"}


def test_conditions_as_earlier_versions_wrote_them(tmp_path: Path) -> None:
    folder = export(family_map("dit"), tmp_path / "map")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["needs"] == "class_labels"
    (folder / "model_index.json").write_text(json.dumps({**index, "needs": ["class_labels"]}))
    assert opened(FlowMapPipeline, folder).config["needs"] == "class_labels"


# Compiled


@pytest.mark.takes_seconds
def test_a_compiled_network_is_what_runs(tmp_path: Path) -> None:
    cond = conditions("flux")
    pipe = pipeline(export(family_map("flux"), tmp_path / "map"))
    expected, calls = pipe(**asked(**cond)).images, []

    def counted(graph: Any, _: Any) -> Any:
        return lambda *given: (calls.append(1), graph(*given))[1]

    pipe.transformer = torch.compile(pipe.transformer, backend=counted)
    torch.testing.assert_close(pipe(**asked(**cond)).images, expected, atol=1e-5, rtol=0)
    once = len(calls)
    assert once >= 2  # a network call a step
    pipe(**asked(4, **cond))
    assert len(calls) == 3 * once
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(pipeline(tmp_path / "saved")(**asked(**cond)).images, expected)


# What is asked for


def test_what_is_no_size_or_noise(latent_export: Path, tmp_path: Path) -> None:
    square, cond = pipeline(export(family_map("dit"), tmp_path / "dit")), conditions("dit")
    for noise in ({"height": 16}, {"width": 16}, {"latents": torch.zeros(2, 4, 8, 16)}):
        with pytest.raises(ValueError, match="this model makes squares alone"):
            square(**cond, **noise)
    with pytest.raises(ValueError, match="height is 9: this model makes images of multiples of 2 pixels"):
        square(height=9, width=9, **cond)
    pipe, cond = pipeline(latent_export), conditions("sd")
    for wrong in (torch.zeros(4, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 1, 8, 8)):
        with pytest.raises(
            ValueError, match=r"latents have shape .*: noise \(B, 4, \.\.\.\) of 4 dimensions is needed"
        ):
            pipe(latents=wrong, batch_size=len(wrong), **{k: v[:1].expand(len(wrong), -1, -1) for k, v in cond.items()})
    with pytest.raises(ValueError, match="latents are a ndarray"):
        pipe(latents=torch.zeros(2, 4, 8, 8).numpy(), **cond)
    free = pipeline(export(tiny_student("flow", sample_size=None), tmp_path / "free"))
    for odd in ({"height": 9, "width": 8}, {"latents": torch.zeros(1, 1, 9, 8)}):
        with pytest.raises(ValueError, match="multiples of 2"):
            free(**odd)


def test_prompts_are_texts(text_export: Path) -> None:
    pipe = pipeline(text_export)
    for wrong in (("cat", "dog"), ["cat", 1], 7):
        with pytest.raises(ValueError, match=r"prompt is .*: a text, or a list of texts, is needed"):
            pipe(wrong)
    with pytest.raises(ValueError, match="the number of images is 0: a whole number from 1 on is needed"):
        pipe([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "the number of images is 0: a whole number from 1 on"),
        ({"batch_size": 2.0}, "the number of images is 2.0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0"),
        ({"class_labels": 1.5}, "class_labels are 1.5: one number or name"),
        ({"class_labels": [[1, 2]]}, r"class_labels are \[\[1, 2\]\]"),
        ({"class_labels": ("hen", 2)}, "class_labels are"),
        ({"class_labels": []}, "the number of images is 0"),
        ({"image": "a.png"}, "takes no image beside the state"),
    ],
)
def test_numbers_that_are_none(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    pipe = pipeline(export(family_map("dit"), tmp_path / "map"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 1, **options})


def test_the_scheduler_is_one_of_flow_maps(tmp_path: Path) -> None:
    pipe = pipeline(export(tiny_student("flow"), tmp_path / "map"))
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=2.0)
    pipe()
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="scheduler is a EulerDiscreteScheduler: a FlowMapEulerDiscreteScheduler has"):
        pipe()


# Names of classes, some of which are not known


def test_names_of_some_classes(tmp_path: Path) -> None:
    folder = export(family_map("dit"), tmp_path / "map")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"3": "hen", "1": "cat, kitten"}}))
    model: Any = load(folder)
    assert model.class_names == ("", "cat, kitten", "", "hen")
    assert class_names(model) == {"cat": 1, "kitten": 1, "hen": 3}
    assert _names(model) == ["class 0", "cat, kitten", "class 2", "hen", "class 4"]
    again = export(model, tmp_path / "again")
    assert json.loads((again / "model_index.json").read_text())["id2label"] == {"1": "cat, kitten", "3": "hen"}


# The card of a model without a size


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["pixels", "image", "latents", "field"])
def test_the_code_on_the_card_of_a_model_of_any_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student: Any = tiny_student("flow", sample_size=None, **({"in_channels": 3} if name != "pixels" else {}))
    if name == "latents":
        student.latents = Latents(tiny_vae(latent_channels=1))
    if name == "field":
        student = tiny_field("v_prediction", 5, sample_size=None, in_channels=3)
    card = (export(student, tmp_path / "fast") / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("64, 64", "16, 8").replace("steps=50", "steps=1")
    assert "height, width = 16, 8" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    if name == "field":
        assert names["samples"].shape == (4, 1, 16, 8)
    else:
        assert [image.size for image in names["images"]] == [(8, 16)] * 4
