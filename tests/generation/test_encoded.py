"""Latents and text embeddings kept in shards: those of the model, once, whole or absent, known by what made them."""

import copy
import json
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys.captions import CAPTIONS, captioned_folder, picture, pipeline_folder

import fewstep
from fewstep.cli import main
from fewstep.common.distributed import World
from fewstep.common.randomness import generator
from fewstep.data import Data, Encoded, load_data
from fewstep.data.decode import decode
from fewstep.data.texts import Texts
from fewstep.flows.fields import VelocityField
from fewstep.generation import encoding
from fewstep.generation.encoding import encoded_once
from fewstep.generation.texts import turns_of, write_texts
from fewstep.latents import encoders
from fewstep.latents.prompts import Prompts
from fewstep.latents.vae import Latents
from fewstep.runs.encode import encode

COUNT = len(CAPTIONS)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("models") / "sd", "sd")


@pytest.fixture(scope="module")
def field(sd: Path) -> VelocityField:
    model = fewstep.load(sd)
    assert isinstance(model, VelocityField)
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return captioned_folder(tmp_path / "photos")


def make(model: Any, data: Path, out: Path, **options: Any) -> int:
    return encode(model, data, out, **{"size": 16, "shard": 2, "batch": 2, "device": "cpu", **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images(data: Path, size: int = 16) -> torch.Tensor:
    """The images as the cache of images has them."""
    array = load_data(data, size=size)
    return array.rows(torch.arange(COUNT), generator(0)).data


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_rows_are_what_the_model_makes_of_them(tmp_path: Path, photos: Path, name: str) -> None:
    folder = pipeline_folder(tmp_path / name, name)
    model: Any = fewstep.load(folder)
    assert make(model, photos, tmp_path / "out", dtype="float32", shard=10, batch=10) == 0
    data = load_data(tmp_path / "out")
    assert isinstance(data, Encoded)
    assert isinstance(data, Data)
    assert (data.size, len(data), data.shape) == (COUNT, COUNT, (4, 8, 8))
    index = torch.tensor([3, 0, 2, 4, 1])
    batch = data.rows(index, generator(0))
    assert torch.equal(batch.data, model.latents.encode(images(photos))[index])
    distinct = list(dict.fromkeys(CAPTIONS))
    wanted = model.text.encode(distinct, size=(16, 16))
    which = torch.tensor([distinct.index(CAPTIONS[i]) for i in index])
    assert batch.cond.keys() == wanted.keys()
    for key, value in batch.cond.items():
        assert torch.equal(value, wanted[key][which]), key
        assert value.dtype == wanted[key].dtype
    null = model.text.null()
    assert data.null.keys() == null.keys()
    assert all(torch.equal(data.null[key], null[key]) for key in null)


@pytest.mark.takes_seconds
def test_half_precision_rounds_all_but_sizes(tmp_path: Path, photos: Path) -> None:
    model: Any = fewstep.load(pipeline_folder(tmp_path / "sdxl", "sdxl"))
    make(model, photos, tmp_path / "full", dtype="float32", size=32)
    make(model, photos, tmp_path / "half", size=32)
    full, half = (load_data(tmp_path / name).rows(torch.arange(COUNT), generator(0)) for name in ("full", "half"))
    assert torch.equal(half.data, full.data.half().float())
    assert torch.equal(half.cond["encoder_hidden_states"], full.cond["encoder_hidden_states"].half().float())
    assert torch.equal(half.cond["time_ids"], torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(COUNT, 1))
    turns = turns_of(World(), rest=False)
    write_texts(model.text, ["a cat"], tmp_path / "texts", size=(514, 1001), dtype="bfloat16", turns=turns)
    told = Texts(tmp_path / "texts").rows(torch.tensor([0]))["time_ids"]
    assert told.tolist() == [[514, 1001, 0, 0, 514, 1001]]


@pytest.mark.takes_seconds
def test_pictures_are_cut_as_everywhere_else(field: VelocityField, photos: Path, tmp_path: Path) -> None:
    make(field, photos, tmp_path / "out", dtype="float32", batch=1)
    pixels = decode(photos / "1.png", 16, 3)
    assert isinstance(pixels, np.ndarray)
    image = torch.from_numpy(pixels)[None].float().sub(127.5).div(127.5)
    assert field.latents is not None
    row = load_data(tmp_path / "out").rows(torch.tensor([1]), generator(0)).data
    assert torch.equal(row, field.latents.encode(image))


def test_a_caption_is_encoded_once(
    field: VelocityField, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = Prompts._encode

    def encode(self: Prompts, prompts: list[str], *more: Any) -> dict[str, torch.Tensor]:
        asked.extend(prompts or [""])
        return real(self, prompts, *more)

    monkeypatch.setattr(Prompts, "_encode", encode)
    make(field, photos, tmp_path / "out")
    assert Counter(asked) == Counter([*dict.fromkeys(CAPTIONS), ""])
    assert json.loads((tmp_path / "out" / "encoded.json").read_text())["captions"] == 4
    # The empty prompt not even for other data.
    asked.clear()
    make(field, captioned_folder(tmp_path / "more", ["cat", "dog"]), tmp_path / "more-out")
    assert asked == ["cat", "dog"]


class Killed(BaseException):
    """What cannot be caught by mistake."""


def test_killed_and_started_again_the_bytes_are_the_same(
    field: VelocityField, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(field, photos, tmp_path / "whole")
    out, real, count = tmp_path / "killed", Latents.encode, []

    def dying(self: Latents, pictures: torch.Tensor) -> torch.Tensor:
        count.append(len(pictures))
        if len(count) == 2:
            raise Killed
        return real(self, pictures)

    monkeypatch.setattr(Latents, "encode", dying)
    with pytest.raises(Killed):
        make(field, photos, out)
    assert "latents-00000.safetensors" in files(out)
    assert "latents-00001.safetensors" not in files(out)
    with pytest.raises(FileNotFoundError, match=r"killed is not whole: the command that made .*goes on with it"):
        load_data(out)
    count.clear()
    monkeypatch.setattr(Latents, "encode", lambda self, pictures: count.append(len(pictures)) or real(self, pictures))
    monkeypatch.setattr(Prompts, "encode", lambda *_, **__: pytest.fail("the captions are there"))
    seen: list[tuple[int, int]] = []
    assert make(field, photos, out, progress=lambda done, total: seen.append((done, total))) == 0
    assert count == [2, 1]
    assert seen[-1] == (9, 9)  # five images, four captions
    assert files(out) == files(tmp_path / "whole")


def test_damage_is_noticed_named_and_mended(field: VelocityField, photos: Path, tmp_path: Path) -> None:
    make(field, photos, tmp_path / "out", command="fewstep encode again")
    before, file = files(tmp_path / "out"), tmp_path / "out" / "latents-00001.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    data = Encoded(tmp_path / "out")  # as long as it was: only its hash tells
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is damaged: fewstep encode again makes it anew"):
        data.check()
    make(field, photos, tmp_path / "out")
    assert files(tmp_path / "out") == before
    file.write_bytes(changed[:-1])
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is damaged \(\d+ bytes, .*fewstep encode again"):
        Encoded(tmp_path / "out")
    file.unlink()
    (tmp_path / "out" / "text-00000.json").unlink()
    with pytest.raises(ValueError, match=r"latents-00001\.safetensors is missing"):
        Encoded(tmp_path / "out")
    make(field, photos, tmp_path / "out")
    assert files(tmp_path / "out") == before
    Encoded(tmp_path / "out").check()


@pytest.mark.parametrize("name", ["null.safetensors", "texts.json"])
def test_what_the_shards_share_is_known_and_mended_too(
    field: VelocityField, photos: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    make(field, photos, out, command="fewstep encode again")
    before = files(out)
    changed = bytearray(before[name])
    changed[-2] ^= 1
    (out / name).write_bytes(changed)
    if name == "null.safetensors":  # as long as it was: only its hash tells
        with pytest.raises(ValueError, match=r"null\.safetensors is damaged: fewstep encode again makes it anew"):
            Encoded(out).check()
    (out / name).write_bytes(changed[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged \(\d+ bytes, .*fewstep encode again"):
        Encoded(out)
    make(field, photos, out)
    assert files(out) == before


@pytest.mark.takes_seconds
def test_what_was_made_otherwise_is_refused(field: VelocityField, sd: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(field, photos, out)
    before = files(out)
    with pytest.raises(
        ValueError, match=r"other encoded data: shape is \[4, 8, 8\] there and \[4, 4, 4\] here; size is 16"
    ):
        make(field, photos, out, size=8)
    with pytest.raises(ValueError, match=r"other encoded data: shard is 2 there and 3 here\. Use another folder"):
        make(field, photos, out, shard=3)
    others = captioned_folder(tmp_path / "others", ["a"])
    with pytest.raises(ValueError, match=r"other encoded data: data is folder \w+ there and folder \w+ here\."):
        make(field, others, out)
    other = copy.deepcopy(field)
    other.latents = Latents(copy.deepcopy(field.latents.vae))  # pyright: ignore
    with torch.no_grad():
        next(other.latents.vae.parameters())[0] += 1
    with pytest.raises(
        ValueError, match=r"other encoded data: vae is AutoencoderKL \w+ there and AutoencoderKL \w+ here\."
    ):
        make(other, photos, out)
    folder = shutil.copytree(sd, tmp_path / "model")
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**vocabulary, "model_max_length": 7}))
    with pytest.raises(ValueError, match=r"other encoded data: text is StableDiffusionPipeline \w+ there and"):
        make(folder, photos, out)
    with pytest.raises(ValueError, match=r"was encoded by another model: text is StableDiffusionPipeline \w+ there"):
        encoding.check_model(Encoded(out), fewstep.load(folder), "out")
    encoding.check_model(Encoded(out), field, "out")
    assert files(out) == before
    make(field, photos, out, batch=1, command="another")  # these two change nothing

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"notes holds something else than encoded data"):
        make(field, photos, tmp_path / "notes")
    facts = json.loads((out / "encoded.json").read_text())
    (out / "encoded.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(ValueError, match=r"encoded\.json has format 2, this fewstep reads 1"):
        load_data(out)


def test_a_model_is_known_wherever_it_lies(sd: Path, tmp_path: Path) -> None:
    """Another place, and what diffusers writes of the place, are the same model; its weights are not."""
    folder = shutil.copytree(sd, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}, indent=7))
    before = Latents(sd), Prompts(sd)
    after = Latents(folder), Prompts(folder)
    assert encoders.vae_identity(before[0]) == encoders.vae_identity(after[0])
    assert encoders.text_identity(before[1]) == encoders.text_identity(after[1])
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert encoders.vae_identity(before[0]) != encoders.vae_identity(Latents(folder))
    weights = folder / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert encoders.text_identity(before[1]) != encoders.text_identity(after[1])
    weights.unlink()
    shutil.rmtree(folder / "tokenizer")
    assert encoders.text_identity(after[1]) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"shard": -1}, "shard must be at least 1, got -1"),
        ({"dtype": "float15"}, r"unknown dtype 'float15': did you mean 'float16'\?"),
        ({"on_error": "ignore"}, "unknown on_error 'ignore'"),
        ({"size": 15}, "images of 15 x 15: .*multiples of 2"),
        ({"size": -2}, "size=-2"),
        ({"size": "big"}, "size='big': the side of an image is a whole number"),
        ({"capton": "x"}, r"unknown option of .* 'capton': did you mean 'caption'\?"),
    ],
)
def test_what_cannot_be_is_refused(
    field: VelocityField, photos: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(field, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_and_data_that_do_not_belong_together(field: VelocityField, photos: Path, tmp_path: Path) -> None:
    bare = copy.deepcopy(field)
    bare.latents = None
    with pytest.raises(ValueError, match="the model works on pixels, it has no VAE"):
        make(bare, photos, tmp_path / "out")
    (photos / "metadata.jsonl").unlink()
    for encoding_of in (partial(make, out=tmp_path / "out"), encoded_once):
        with pytest.raises(ValueError, match=r"conditioned on text, and [^()]*photos has no captions: .*metadata"):
            encoding_of(field, photos)
    dit = fewstep.load(pipeline_folder(tmp_path / "dit", "dit"))
    with pytest.raises(ValueError, match=r"the model has 5 classes, and .*photos has no labels"):
        make(dit, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_class_labels_for_a_model_of_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("cat", "dog", "owl", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "photos" / name / f"{i}.png")
    make(pipeline_folder(tmp_path / "dit", "dit"), tmp_path / "photos", tmp_path / "out", shard=3)
    data: Any = load_data(tmp_path / "out")
    assert data.cond["class_labels"].tolist() == [0, 1, 1, 2]
    assert data.rows(torch.tensor([3, 0]), generator(0)).cond["class_labels"].tolist() == [2, 0]
    assert data.classes == ("cat", "dog", "owl")
    assert data.null == {}


def test_a_model_of_classes_reads_no_captions(tmp_path: Path) -> None:
    """Neither those that are missing, nor a list of something else."""
    dit = fewstep.load(pipeline_folder(tmp_path / "dit", "dit"))
    for name in ("cat", "dog"):
        captioned_folder(tmp_path / "photos" / name, ["x", "y"], column="photographer")
    make(dit, tmp_path / "photos", tmp_path / "out")
    assert load_data(tmp_path / "out").cond["class_labels"].tolist() == [0, 0, 1, 1]  # pyright: ignore

    datasets = pytest.importorskip("datasets")
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    rows = {"image": [picture(0), picture(1)], "text": ["x", None], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(str(tmp_path / "saved"))
    data = encoded_once(dit, tmp_path / "saved", size=16)  # pyright: ignore[reportArgumentType]
    assert data.cond["class_labels"].tolist() == [1, 0]


def test_bad_pictures_and_rows_without_caption(field: VelocityField, tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "photos", ["a", None, "cat", "dog"])
    with pytest.raises(ValueError, match=r"1\.png cannot be read \(it has no caption\)"):
        make(field, folder, tmp_path / "out")
    (folder / "2.png").write_bytes(b"no image")
    assert not (tmp_path / "out").exists()
    assert make(field, folder, tmp_path / "out", on_error="skip", dtype="float32", batch=1) == 0
    data: Any = load_data(tmp_path / "out")
    assert len(data) == 2
    batch = data.rows(torch.arange(2), generator(0))
    assert field.latents is not None
    assert field.text is not None
    seen = load_data(folder, size=16, on_error="skip").rows(torch.tensor([0, 2]), generator(0)).data
    torch.testing.assert_close(batch.data, field.latents.encode(seen))
    wanted = field.text.encode(["a", "dog"])["encoder_hidden_states"]
    torch.testing.assert_close(batch.cond["encoder_hidden_states"], wanted)
    captioned_folder(tmp_path / "none", [None])
    with pytest.raises(ValueError, match=r"none of the 1 images of .*none can be used"):
        make(field, tmp_path / "none", tmp_path / "empty", on_error="skip")


def test_numbers_that_do_not_fit_are_not_kept(
    field: VelocityField, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Latents, "encode", lambda _, pictures: torch.full((len(pictures), 4, 8, 8), 1e5))
    with pytest.raises(ValueError, match="latents are not finite in float16: say dtype: bfloat16 or float32"):
        make(field, photos, tmp_path / "out")
    assert make(field, photos, tmp_path / "wide", dtype="bfloat16") == 0


def test_processes_share_out_the_shards(
    field: VelocityField, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(field, photos, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in ((1, 3), (0, 0)):  # three shards of latents, one of text; in any order
        monkeypatch.setenv("RANK", str(rank))
        assert make(field, photos, tmp_path / "two") == missing
    assert files(tmp_path / "two") == files(tmp_path / "one")
    # In a training, each sees to it that all is there.
    monkeypatch.setenv("RANK", "1")
    assert make(field, photos, tmp_path / "three", rest=True) == 0
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_turns() -> None:
    assert turns_of(World(1, 3), rest=False)(8) == [1, 4, 7]
    assert turns_of(World(1, 3), rest=True)(8) == [1, 4, 7, 6, 5, 3, 2, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's maps")
def test_shards_are_mapped_not_read(field: VelocityField, photos: Path, tmp_path: Path) -> None:
    make(field, photos, tmp_path / "out")
    data = Encoded(tmp_path / "out")
    maps = Path("/proc/self/maps").read_text()
    assert all(str(tmp_path / "out" / name) in maps for name in ("latents-00002.safetensors", "text-00000.safetensors"))
    assert not hasattr(data, "cond")


def test_only_the_encoders_of_a_folder_are_loaded(sd: Path, photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "model")
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    assert make(folder, photos, tmp_path / "out", size=None) == 0
    assert Encoded(tmp_path / "out").shape == (4, 8, 8)


def test_the_cache(field: VelocityField, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoded_once(field, photos, size=16)
    assert first.folder.parent == tmp_path / "cache" / "encoded"
    monkeypatch.setattr(Latents, "encode", lambda *_: pytest.fail("it is in the cache"))
    assert encoded_once(field, photos, size=16).folder == first.folder
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    assert encoded_once(field, photos, size=8).folder != first.folder
    lines = (photos / "metadata.jsonl").read_text()
    (photos / "metadata.jsonl").write_text(lines.replace("a dog", "a tod"))
    second = encoded_once(field, photos, size=16)
    assert second.folder != first.folder
    assert torch.equal(second.bare(torch.arange(COUNT)), first.bare(torch.arange(COUNT)))


@pytest.mark.takes_seconds
def test_the_command(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["encode", "--teacher", str(sd), "--data", "photos", "--out", "enc", "--size", "16", "--shard", "2"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("enc: 5 images, 4 captions, 0.0 MB")
    assert f"fewstep distill --teacher {sd} --data enc" in said.err
    assert main([*words[:-1], "3"]) == 2
    assert "shard is 2 there and 3 here" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words[:6], "half", *words[7:]]) == 0
    assert "half: 1 shards are still missing" in capsys.readouterr().out
