"""Images of many shapes encoded by bucket: whole or absent, in the order that training finds again, and what a model
is told of their sizes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys.captions import captioned_folder, pipeline_folder

import fewstep
from fewstep.cli import main
from fewstep.common.distributed import World
from fewstep.common.randomness import generator
from fewstep.data import Encoded, load_data
from fewstep.data.buckets import buckets_of
from fewstep.generation import encoding
from fewstep.generation.bucketing import buckets_for, multiple_of
from fewstep.generation.encoding import encoded_once
from fewstep.latents.vae import Latents
from fewstep.runs.encode import encode

# Width and height of the images of a folder, and the bucket (height, width) of each about 32 x 32, in steps of 4.
SIZES = [(64, 64), (128, 64), (65, 64), (40, 160), (129, 64), (30, 31)]
BUCKETS = [(20, 48), (32, 32), (64, 16)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: pipeline_folder(root / name, name) for name in ("sd", "sdxl", "pixart", "dit", "flux")}


def photos(root: Path) -> Path:
    """Images with captions beside them, as kohya's scripts want them."""
    root.mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a cat" if i % 2 else "a dog\n")
    return root


def make(model: Any, data: Path, out: Path, **options: Any) -> int:
    how = {"size": 32, "shard": 2, "batch": 2, "device": "cpu", "buckets": True, "dtype": "float32", "bucket_step": 4}
    return encode(model, data, out, **{**how, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:1 of 6 images are smaller")
def test_rows_are_the_latents_of_their_bucket(folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = fewstep.load(folders["sd"])
    data = photos(tmp_path / "photos")
    assert make(model, data, tmp_path / "out", batch=10, shard=10) == 0
    rows = load_data(tmp_path / "out", buckets=True)
    assert isinstance(rows, Encoded)
    assert [bucket.shape for bucket in buckets_of(rows)] == [(4, h // 2, w // 2) for h, w in BUCKETS]
    assert [bucket.count for bucket in buckets_of(rows)] == [2, 3, 1]
    assert (rows.shape, rows.size) == ((4, 16, 16), 6)
    # The same pixels as a folder of images in buckets has, through the VAE.
    pixels = load_data(data, size=32, buckets=True, bucket_step=4)
    for bucket in buckets_of(rows):
        index = torch.arange(bucket.first, bucket.first + bucket.count)
        images = pixels.rows(index, generator(0)).data
        assert torch.equal(rows.rows(index, generator(0)).data, model.latents.encode(images))
        assert torch.equal(rows.bare(index), rows.rows(index, generator(0)).data)
    assert rows.captions(torch.tensor([0, 1])) == ["a cat", "a dog"]  # of 1.png and 4.png
    rows.check()
    with pytest.raises(ValueError, match="rows of several shapes"):
        rows.bare(torch.tensor([1, 2]))


@pytest.mark.filterwarnings("ignore:1 of 6 images are smaller")
@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_a_model_is_told_the_sizes_of_each_image(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    model: Any = fewstep.load(folders[name])
    make(model, photos(tmp_path / "photos"), tmp_path / "out", dtype="float16")
    rows = Encoded(tmp_path / "out")
    first, second = (rows.rows(torch.tensor(index), generator(0)).cond for index in ([0, 1], [3, 2]))
    if name == "sdxl":
        # 128 x 64 covers 48 x 20 as 48 x 24, of which 2 rows go on top; 129 x 64 in the same way.
        assert first["time_ids"].tolist() == [[64, 128, 2, 0, 20, 48], [64, 129, 2, 0, 20, 48]]
        assert second["time_ids"].tolist() == [[64, 65, 0, 0, 32, 32], [64, 64, 0, 0, 32, 32]]
    else:
        assert first["resolution"].tolist() == [[20, 48]] * 2
        assert torch.equal(first["aspect_ratio"], torch.full((2, 1), 20 / 48))
        assert second["aspect_ratio"].tolist() == [[1.0]] * 2
    wanted = model.text.encode(["a cat", "a dog"], size=(20, 48))
    assert first.keys() == wanted.keys()
    assert all(first[key].dtype == wanted[key].dtype for key in wanted)
    assert torch.equal(first["encoder_hidden_states"], wanted["encoder_hidden_states"].half().float())


class Killed(BaseException):
    """What cannot be caught by mistake."""


@pytest.mark.filterwarnings("ignore:1 of 6 images are smaller")
def test_killed_and_shared_the_bytes_are_the_same(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = fewstep.load(folders["sd"])
    data = photos(tmp_path / "photos")
    make(model, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        real, count = Latents.encode, []

        def dying(self: Latents, images: torch.Tensor) -> torch.Tensor:
            count.append(1)
            if len(count) > 2:
                raise Killed
            return real(self, images)

        patch.setattr(Latents, "encode", dying)
        with pytest.raises(Killed):
            make(model, data, tmp_path / "killed")
    assert not (tmp_path / "killed" / "index.json").exists()
    make(model, data, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    for rank in (1, 0):
        monkeypatch.setattr(encoding, "environment", lambda rank=rank: World(rank, 2, rank))
        missing = make(model, data, tmp_path / "shared")
    assert missing == 0
    assert files(tmp_path / "shared") == files(tmp_path / "whole")
    # Other buckets are other data.
    with pytest.raises(ValueError, match="bucket_step is 4 there and 8 here"):
        make(model, data, tmp_path / "whole", bucket_step=8)


@pytest.mark.filterwarnings("ignore:1 of 6 images are smaller")
def test_the_cache_and_images_that_cannot_be_used(folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = fewstep.load(folders["sd"])
    data = photos(tmp_path / "photos")
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:-400])  # all of the tallest bucket
    (data / "5.txt").unlink()
    with pytest.raises(ValueError, match=r"5\.png cannot be read \(it has no caption\)"):
        encoded_once(model, data, size=32, buckets=True, bucket_step=4)
    with pytest.warns(UserWarning, match="1 of 6 images cannot be read"):
        rows = encoded_once(model, data, size=32, buckets=True, bucket_step=4, on_error="skip")
    assert [bucket.count for bucket in buckets_of(rows)] == [2, 2]
    again = encoded_once(model, data, size=32, buckets=True, bucket_step=4, on_error="skip")
    assert again.folder == rows.folder
    assert encoded_once(model, data, size=32, on_error="skip").buckets is None


def test_a_folder_from_before_there_were_buckets(folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = fewstep.load(folders["sd"])
    encode(model, captioned_folder(tmp_path / "photos"), tmp_path / "old", size=32, shard=2, device="cpu")
    assert not {"bucket_step", "small", "buckets"} & json.loads((tmp_path / "old" / "encoded.json").read_text()).keys()
    assert Encoded(tmp_path / "old").buckets is None
    with pytest.raises(ValueError, match="encoded at one size, 32: encode the images anew with --buckets"):
        load_data(tmp_path / "old", buckets=True)


@pytest.mark.filterwarnings("ignore:1 of 6 images are smaller")
def test_damage_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model: Any = fewstep.load(folders["sd"])
    make(model, photos(tmp_path / "photos"), out := tmp_path / "out")
    facts = json.loads((out / "encoded.json").read_text())

    def said(buckets: Any) -> str:
        (out / "encoded.json").write_text(json.dumps({**facts, "buckets": buckets}))
        with pytest.raises(ValueError, match=str(out)) as caught:
            Encoded(out)
        return str(caught.value)

    assert "buckets" in said([])
    assert "buckets" in said([{"shape": [4, 8, 8], "size": [16], "count": 2}])
    assert "says 1" in said(facts["buckets"][:1])
    swapped = [{**one, "shape": facts["buckets"][0]["shape"]} for one in facts["buckets"]]
    assert "and not" in said(swapped)


def test_the_buckets_that_a_model_takes(folders: dict[str, Path], tmp_path: Path) -> None:
    sd, flux, dit = (fewstep.load(folders[name]) for name in ("sd", "flux", "dit"))
    assert [multiple_of(model) for model in (sd, flux)] == [4, 4]  # type: ignore[arg-type]
    assert buckets_for(flux, 32, 8) == (8, [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one shape .*draws squares alone.*leave buckets out"):
        buckets_for(dit, 32)  # type: ignore[arg-type]


@pytest.mark.takes_seconds
def test_by_the_command(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = photos(tmp_path / "photos"), tmp_path / "out"
    shutil.copytree(folders["sd"], tmp_path / "sd")
    words = ["encode", "--teacher", str(tmp_path / "sd"), "--data", str(data), "--out", str(out), "--device", "cpu"]
    words += ["--size", "32", "--buckets", "--bucket-step", "4", "--small", "drop"]
    monkeypatch.setattr(sys, "argv", ["fewstep", *words])
    with pytest.warns(UserWarning, match="1 of 6 images are smaller than their bucket and left out"):
        assert main(words) == 0
    assert "5 images in 3 buckets, 2 captions" in capsys.readouterr().out
