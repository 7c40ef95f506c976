"""A text-to-image model distilled from a recipe: from images and captions, or from prompts alone."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys.captions import CAPTIONS, captioned_folder, pipeline_folder
from toys.families import tiny_model, tiny_pipeline

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator, sample_generators
from fewstep.data import Encoded, Pairs
from fewstep.data.arrays import ArrayData
from fewstep.data.conditions import Dropped
from fewstep.data.couplings import uncoupled
from fewstep.evaluation import evaluate as evaluation
from fewstep.flows.guided import Guided
from fewstep.flows.sampling import sample_noise
from fewstep.generation import encoding
from fewstep.generation.reflow import make_pairs
from fewstep.latents.prompts import Prompts
from fewstep.latents.vae import Latents
from fewstep.playground.shown import Playground, Wish
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.datasets import given_by, make_data
from fewstep.runs.encode import encode
from fewstep.runs.loading import load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import evaluate_run, run

FAMILIES = ("sd", "sdxl", "sd3", "flux")
ALL = torch.arange(len(CAPTIONS))


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(watch, "teacher_states", partial(watch.teacher_states, steps=2))
    monkeypatch.setattr(watch, "_COLUMNS", 2)
    monkeypatch.setattr(judge, "_DECODED", 2)
    monkeypatch.setattr(evaluation, "_SOLVE", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        pipeline_folder(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_folder(tmp_path_factory.mktemp("data") / "photos")


def recipe_of(teacher: Path, data: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": "fast", "teacher": {"source": str(teacher), "guidance": {"scale": 3.0, "null": "text"}}, "data": data,
        "objective": "ITVM", "training": {"steps": 2, "batch": 2, "quiet": True},
        "evaluation": {"count": 4, "steps": [1, 2], "teacher_steps": [1]}, **more,
    }  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", FAMILIES)
def test_from_pictures_and_captions_to_a_student(models: Path, photos: Path, tmp_path: Path, name: str) -> None:
    tree, out = recipe_of(models / name, {"name": str(photos), "size": 16}), tmp_path / "run"
    run(load_recipe(tree), out)
    with Image.open(out / "samples" / "step-00000002.png") as grid:  # images of 16 x 16 in three channels
        assert grid.mode == "RGB"
        assert min(grid.size) >= 32
    found = json.loads((out / "quality.json").read_text())
    assert [(row["model"], row["nfe"]) for row in found["rows"]] == [("student", 1), ("student", 2), ("teacher", 2)]
    assert all(row["rmse"] > 0 for row in found["rows"])
    assert found["facts"]["shape"] == [4, 8, 8]
    page = (out / "report.html").read_text()
    assert "data:image/png" in page
    # The prompts of the two images that it shows.
    assert sum(page.count(f"<td>{caption}</td>") for caption in set(CAPTIONS)) == 2
    done = run(load_recipe(tree, {"steps": "3", "evaluation.count": "0"}), out)
    assert done.result.step == 3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 1


@pytest.mark.takes_seconds
def test_sample_grids_are_decoded(models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of images for each step count and one of the teacher's, of the captions of the first rows."""
    recipe = load_recipe(recipe_of(models / "sd", {"name": str(photos), "size": 16}))
    built, grids = build(recipe), []
    monkeypatch.setattr(watch, "image_grid", lambda images, *_, **__: grids.append(images))
    watcher = watch.Watch(recipe, uncoupled(built.data), built.teacher, tmp_path)
    watcher.draw(built.student, 0)
    assert [grid.shape for grid in grids] == [(6, 3, 16, 16)]
    first = uncoupled(built.data).rows(torch.arange(2), generator(0)).cond["encoder_hidden_states"]
    assert torch.equal(watcher._conditions(2, torch.device("cpu"))["encoder_hidden_states"], first)


@pytest.mark.takes_seconds
def test_samples_of_a_run_take_its_captions_or_prompts(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encode(models / "sd", photos, tmp_path / "encoded", size=16, dtype="float32")
    recipe = load_recipe(recipe_of(models / "sd", {"name": str(tmp_path / "encoded")}, evaluation={"count": 0}))
    run(recipe, tmp_path / "run")
    words = ["sample", "run", "--steps", "1", "--count", "2", "--device", "cpu"]
    assert main([*words, "--latents", "--first", "1", "--out", "rows.npz"]) == 0
    student = load_run(tmp_path / "run")
    rows = build(recipe).data.rows(torch.tensor([1, 2]), generator(0)).cond
    noise = sample_noise((2, 4, 8, 8), sample_generators(0, [1, 2]))
    with np.load("rows.npz") as kept:
        assert kept.files == ["data"]  # and none of the captions' embeddings, which are larger
        wanted = fewstep.sample(student, noise, 1, encoder_hidden_states=rows["encoder_hidden_states"])
        np.testing.assert_allclose(kept["data"], wanted, atol=1e-5)

    shutil.rmtree(tmp_path / "encoded")  # which prompts do not need
    assert main([*words, "--prompt", "a cat", "--out", "images.npy"]) == 0
    play = Playground.open("run")
    assert play.has_text
    panel = next(iter(play.panels(Wish(steps=1, count=2, prompts=("a cat",)))))
    np.testing.assert_allclose(np.load("images.npy"), panel.samples, atol=1e-4)


def test_conditions_of_rows_are_given_in_turn_without_those_of_prompts(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = fewstep.load(models / "sd")
    data = ArrayData(np.zeros((3, 4, 8, 8)), {"encoder_hidden_states": torch.arange(3.0), "class_labels": ALL[:3]})
    monkeypatch.setattr("fewstep.runs.datasets.data_of", lambda *_: data)
    recipe = load_recipe(recipe_of(models / "sd", {"name": "rows.npz", "conditions": "rows.npz"}))
    assert given_by(recipe, model, 2, first=2)["encoder_hidden_states"].tolist() == [2, 0]
    assert given_by(recipe, model, 9).keys() == {"encoder_hidden_states"}
    assert given_by(recipe, model, 2, text=False) == {}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_strengths_of_guidance_told_to_the_student(models: Path, photos: Path, tmp_path: Path, name: str) -> None:
    tree = recipe_of(models / name, {"name": str(photos), "size": 16})
    tree["teacher"]["guidance"] = {"scale": 5, "range": [1, 8], "null": "text"}
    tree["evaluation"] |= {"count": 4 if name == "sd" else 0, "steps": [1]}
    run(load_recipe(tree), tmp_path / "run")
    student: Any = load_run(tmp_path / "run")
    assert student.guidance == 5
    batch = build(load_recipe(tree)).data.rows(ALL, generator(0))
    assert (batch.cond["guidance"] >= 1).all()
    assert (batch.cond["guidance"] <= 8).all()
    assert len(batch.cond["guidance"].unique()) > 1


@pytest.mark.takes_seconds
def test_the_teacher_is_guided_by_the_empty_prompt(models: Path, photos: Path, tmp_path: Path) -> None:
    """SDXL's stands for the text, and leaves the sizes as they are."""
    tree = recipe_of(models / "sdxl", {"name": str(photos), "size": 16, "dtype": "float32"})
    built, field = build(load_recipe(tree)), fewstep.load(models / "sdxl")
    batch = built.data.rows(ALL, generator(0))
    assert field.text is not None
    null = {name: value.expand_as(batch.cond[name]) for name, value in field.text.null().items()}
    assert null.keys() == {"encoder_hidden_states", "text_embeds"}
    x, t = torch.randn(5, 4, 8, 8, generator=generator(1)), torch.full((5,), 0.5)
    with torch.no_grad():
        strong, weak = (field.velocity(x, t, **cond) for cond in (batch.cond, {**batch.cond, **null}))
        assert isinstance(built.teacher, Guided)
        wanted = weak + 3 * (strong - weak)
        torch.testing.assert_close(built.teacher(x, t, **batch.cond), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.takes_seconds
def test_training_loads_no_text_encoders(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be left out of the teacher's folder, once the captions are encoded."""
    encode(models / "sdxl", photos, tmp_path / "encoded", size=16)
    teacher = shutil.copytree(models / "sdxl", tmp_path / "teacher")
    for part in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(teacher / part)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(Prompts, "encode", lambda *_, **__: pytest.fail("no prompt is to be encoded"))
    tree = recipe_of(teacher, str(tmp_path / "encoded"), drop={"share": 0.5, "null": "text"})
    run(load_recipe(tree, {"evaluation.count": "0"}), tmp_path / "run")
    assert evaluate_run(tmp_path / "run", steps=[1], count=4) is not None
    # Nor where the data are encoded by the training, from its second start on.
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "third"))
    tree = recipe_of(models / "sd", {"name": str(photos), "size": 16}, drop={"share": 0.5, "null": "text"})
    build(load_recipe(tree))
    monkeypatch.setattr(Prompts, "encode", lambda *_, **__: pytest.fail("no prompt is to be encoded"))
    monkeypatch.setattr(Latents, "encode", lambda *_: pytest.fail("no image is to be encoded"))
    build(load_recipe(tree))


def test_captions_are_dropped_in_favour_of_the_empty_prompt(models: Path, photos: Path, tmp_path: Path) -> None:
    encode(models / "sdxl", photos, tmp_path / "encoded", size=16)
    data = Encoded(tmp_path / "encoded")
    dropped, kept = Dropped(data, 1.0, data.null).rows(ALL, generator(0)), data.rows(ALL, generator(0))
    assert torch.equal(dropped.data, kept.data)
    assert torch.equal(dropped.cond["time_ids"], kept.cond["time_ids"])
    assert not dropped.cond["encoder_hidden_states"].any()  # SDXL's is all zeros
    assert kept.cond["encoder_hidden_states"].any()


@pytest.mark.takes_seconds
def test_data_encoded_by_another_model_is_refused(models: Path, photos: Path, tmp_path: Path) -> None:
    encode(models / "sd", photos, tmp_path / "encoded", size=16)
    with pytest.raises(ValueError, match=r"encoded was encoded by another model: vae is AutoencoderKL \w+ there and"):
        build(load_recipe(recipe_of(models / "flux", str(tmp_path / "encoded"))))
    with pytest.raises(ValueError, match=r"unknown option of .* 'size': Known: buckets"):
        build(load_recipe(recipe_of(models / "sd", {"name": str(tmp_path / "encoded"), "size": 16})))


@pytest.mark.takes_seconds
def test_pairs_of_other_text_encoders_are_refused(models: Path, tmp_path: Path) -> None:
    field: Any = fewstep.load(models / "sd")
    make_pairs(field, tmp_path / "pairs", 4, steps=1, prompts=["a cat"], device="cpu")
    tree = recipe_of(models / "sd", str(tmp_path / "pairs"), objective="FlowMatching")
    build(load_recipe(tree))
    other = shutil.copytree(models / "sd", tmp_path / "other")
    config = json.loads((other / "tokenizer" / "tokenizer_config.json").read_text())
    (other / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 7}))
    tree["teacher"]["source"] = str(other)
    with pytest.raises(ValueError, match=r"pairs was encoded by another model: text is \w+ \w+ there .*Draw the pairs"):
        build(load_recipe(tree))


@pytest.mark.takes_seconds
def test_options_of_another_type_are_one_error(models: Path, photos: Path) -> None:
    for option, said in (("size", "size='big': the side of an image"), ("encode_batch", "batch must be .*'big'")):
        with pytest.raises(ValueError, match=said):
            build(load_recipe(recipe_of(models / "sd", {"name": str(photos), "size": 16, option: "big"})))


@pytest.mark.takes_seconds
def test_a_damaged_empty_prompt_is_named_in_a_training(models: Path, photos: Path, tmp_path: Path) -> None:
    encode(models / "sd", photos, tmp_path / "encoded", size=16)
    file = tmp_path / "encoded" / "null.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"null\.safetensors is damaged .*: the command that made the folder makes it"):
        build(load_recipe(recipe_of(models / "sd", str(tmp_path / "encoded"))))


@pytest.mark.takes_seconds
def test_held_out_pictures_are_encoded_too(models: Path, photos: Path, tmp_path: Path) -> None:
    others = captioned_folder(tmp_path / "others", ["cat", "dog", "a cat", "a dog"])
    tree = recipe_of(models / "sd", {"name": str(photos), "size": 16})
    tree["evaluation"] |= {"data": {"name": str(others), "size": 16}, "steps": [1]}
    run(load_recipe(tree), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "quality.json").read_text())["facts"]["data"] == 4


def test_a_recipe_of_pixels_says_how_to_get_latents(models: Path, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((4, 3, 16, 16), np.uint8))
    with pytest.raises(ValueError, match=r"a folder of images, hf:NAME or webdataset shards are encoded for it once"):
        build(load_recipe(recipe_of(models / "sd", str(tmp_path / "x.npy"))))


def prompted(**more: Any) -> dict[str, Any]:
    return {"name": "teacher", "prompts": list(CAPTIONS), "count": 7, "steps": 2, **more}


@pytest.mark.takes_seconds
def test_a_run_is_sampled_with_prompts_or_those_of_its_data(models: Path, photos: Path, tmp_path: Path) -> None:
    tree = recipe_of(models / "sd", {"name": str(photos), "size": 16})
    tree["evaluation"]["count"] = 0
    run(load_recipe(tree), tmp_path / "run")
    words = ["sample", str(tmp_path / "run"), "--count", "2", "--steps", "1", "--latents", "--out"]
    assert main([*words, str(tmp_path / "data.npy")]) == 0
    assert main([*words, str(tmp_path / "said.npy"), "--prompt", "a cat", "a dog"]) == 0
    import numpy as np

    given, said = (np.load(tmp_path / f"{name}.np{kind}") for name, kind in (("data", "y"), ("said", "y")))
    np.testing.assert_allclose(given, said, rtol=0.02, atol=0.02 * float(np.abs(said).std()))


@pytest.mark.takes_seconds
def test_conditions_that_would_fill_the_memory_are_read_as_they_are_needed(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(models / "sd", photos, tmp_path / "encoded", size=16)
    data, field = Encoded(tmp_path / "encoded"), fewstep.load(models / "sd")
    options: dict[str, Any] = {
        "teacher": field,
        "data": data,
        "steps": [1],
        "teacher_steps": [2],
        "count": 5,
        "batch": 2,
    }
    whole = evaluation.evaluate(field, **options)
    most, real = [], Encoded._conditions

    def counted(self: Encoded, index: torch.Tensor) -> dict[str, torch.Tensor]:
        most.append(len(index))
        return real(self, index)

    monkeypatch.setattr(Encoded, "_conditions", counted)
    monkeypatch.setattr(evaluation, "_LARGE", 0)
    assert evaluation.evaluate(field, **options).rows == whole.rows
    assert max(most) == 2


@pytest.mark.takes_seconds
def test_an_extractor_of_images_sees_latents_decoded(models: Path, photos: Path, tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        num_features = 3

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1:] == (3, 16, 16)
            return self.weight * x.mean((2, 3))

    encode(models / "sd", photos, tmp_path / "encoded", size=16)
    data, field = Encoded(tmp_path / "encoded"), fewstep.load(models / "sd")
    assert field.latents is not None
    options: dict[str, Any] = {"steps": [1], "count": 5, "extractor": Mean(), "metrics": ["fd"]}
    found = evaluation.evaluate(field, data=data, decode=field.latents.decode, **options)
    assert found.rows[0]["fd"] > 0


@pytest.mark.takes_seconds
def test_a_student_of_another_size_than_the_teacher(models: Path, photos: Path, tmp_path: Path) -> None:
    data = make_data(load_recipe(recipe_of(models / "sd", {"name": str(photos), "size": 32})), None, None)
    assert data.shape == (3, 32, 32)  # no teacher, no latents
    built = build(load_recipe(recipe_of(models / "sd", {"name": str(photos), "size": 32})))
    assert built.data.shape == (4, 16, 16)
    assert encoding.read_facts(uncoupled(built.data).folder)["size"] == 32  # pyright: ignore


@pytest.mark.takes_seconds
def test_a_teacher_that_is_told_its_strength(models: Path, photos: Path, tmp_path: Path) -> None:
    """As Flux.1-dev is: what it draws, and each row of data, is of that strength."""
    pipeline = tiny_pipeline("flux")
    pipeline.register_modules(transformer=tiny_model("flux", guidance_embeds=True))
    pipeline.save_pretrained(tmp_path / "dev")
    tree = recipe_of(tmp_path / "dev", prompted(shape=[4, 8, 8], count=3, steps=1, solver="euler"))
    tree["teacher"]["guidance"] = {"scale": 3.5, "embedded": True}
    tree["evaluation"] = {"count": 0, "steps": [1]}
    run(load_recipe(tree), tmp_path / "run")
    field: Any = fewstep.load(tmp_path / "dev")
    batch = Pairs(tmp_path / "run" / "teacher-samples").rows(torch.arange(3), generator(0))
    assert batch.noise is not None
    cond: dict[str, Any] = {**batch.cond, "guidance": torch.full((3,), 3.5)}
    torch.testing.assert_close(batch.data, fewstep.sample(field, batch.noise, 1, **cond), rtol=1e-4, atol=1e-4)
    tree["data"] = {"name": str(photos), "size": 16}
    assert build(load_recipe(tree)).data.rows(ALL, generator(0)).cond["guidance"].tolist() == [3.5] * 5


@pytest.mark.takes_seconds
def test_what_cannot_be_is_known_before_pictures_are_encoded(models: Path, photos: Path, tmp_path: Path) -> None:
    recipe = {"name": "wrong", "teacher": str(models / "sd"), "data": {"name": str(photos), "size": 16}}
    training = {"training": {"steps": 1, "batch": 4, "quiet": True}, "evaluation": {"count": 0}, "objective": "ITVM"}
    for wrong in ({"student": {"lora": {"targets": ["nope"]}}}, {"data": {"name": str(photos), "size": 15}}):
        with pytest.raises(ValueError, match=r"no layer of this|must be multiples of 2"):
            build(load_recipe({**recipe, **training, **wrong}), tmp_path / "run")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
