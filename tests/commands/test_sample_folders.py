"""Samples as a folder of images: how each was made, gone on with, refused; and by several processes."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toys.families import tiny_pipeline
from toys.processes import torchrun
from toys.sampling import Draw, close

from fewstep.cli import main
from fewstep.common.distributed import World
from fewstep.generation import drawing
from fewstep.generation.images import save_pictures
from fewstep.generation.sharing import shares


def test_a_folder_of_pictures_says_how_each_was_made(models: Path, tmp_path: Path, draws: Draw) -> None:
    images = draws("classes", "--count", "5", "--seed", "4", "--gamma", "0.5")
    draws("classes", "--count", "5", "--seed", "4", "--gamma", "0.5", "--out", "pics", "--batch", "2")
    names = [f"{i:05d}.png" for i in range(5)]
    assert sorted(os.listdir("pics")) == [*names, "samples.json", "samples.jsonl"]
    lines = [json.loads(line) for line in Path("pics/samples.jsonl").read_text().splitlines()]
    assert lines[3] == {"file_name": "00003.png", "seed": 4, "index": 3, "label": 3}
    picture: Any = Image.open("pics/00003.png")
    assert picture.text == {
        "model": "classes", "seed": "4", "index": "3", "label": "3", "steps": "2", "grid": "uniform",
        "gamma": "0.5",
    }  # fmt: skip
    wanted = np.clip(np.round((images[3, 0] + 1) * 127.5), 0, 255)
    assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1
    # Its own list makes it again, in any order.
    Path("one.jsonl").write_text(json.dumps(lines[3]) + "\n" + json.dumps(lines[1]))
    close(draws("classes", "--prompts", "one.jsonl", "--gamma", "0.5"), images[[3, 1]])


def test_only_missing_pictures_are_drawn(models: Path, draws: Draw, capsys: Any, monkeypatch: Any) -> None:
    words = ["classes", "--count", "6", "--out", "pics", "--batch", "2"]
    draws("plain")  # x.npy, which `draws` reads
    draws(*words)
    before = {name: Path("pics", name).read_bytes() for name in os.listdir("pics")}
    for name in ("00001.png", "00004.png", "00005.png"):
        Path("pics", name).unlink()
    drawn: list[int] = []
    real = drawing.draw_batches

    def counting(model: Any, asked: Any, batches: Any, *more: Any, **options: Any) -> Any:
        drawn.extend(row for rows in batches for row in rows)
        return real(model, asked, batches, *more, **options)

    monkeypatch.setattr(drawing, "draw_batches", counting)
    capsys.readouterr()
    draws(*words)
    assert drawn == [1, 4, 5]
    assert "6 samples (3 were there), 2 network calls each" in capsys.readouterr().out
    after = {name: Path("pics", name).read_bytes() for name in os.listdir("pics")}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name not in ("00001.png", "00004.png", "00005.png"))
    for name in ("00001.png", "00005.png"):
        one, other = (np.asarray(Image.open(f)).astype(int) for f in (f"pics/{name}",) * 2)
        assert np.abs(one - other).max() <= 1
    draws(*words)
    assert "6 samples (6 were there)\n" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(models: Path, draws: Draw, refused: Any) -> None:
    draws("plain")
    draws("classes", "--count", "2", "--out", "pics")
    said = refused("classes", "--count", "2", "--out", "pics", "--seed", "1", "--steps", "3")
    assert "--out pics holds other images: seed is 0 there and 1 here" in said
    assert "steps is 2 there and 3 here" in said
    assert "weights is FlowMap" in refused("plain", "--count", "2", "--out", "pics")
    assert "seeds, prompts and labels is" in refused("classes", "--count", "2", "--out", "pics", "--labels", "3")
    Path("notes").mkdir()
    Path("notes/thesis.txt").write_text("precious")
    assert "the folder is not empty" in refused("plain", "--out", "notes")


@pytest.mark.takes_seconds
def test_pictures_of_latents_and_of_other_encoders_are_others(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pipeline = tiny_pipeline("sd")
    unet, config = pipeline.unet, {**pipeline.vae.config, "latent_channels": 3}
    pipeline.register_modules(
        unet=type(unet).from_config({**unet.config, "in_channels": 3, "out_channels": 3}),
        vae=type(pipeline.vae).from_config(config),
    )
    pipeline.save_pretrained("sd")
    words = ["sample", "sd", "--prompt", "a cat", "--steps", "1", "--count", "1", "--device", "cpu", "--out", "pics"]
    assert main(words) == 0
    assert main([*words, "--latents"]) == 2
    assert "latents is False there and True here" in capsys.readouterr().err
    for part, name in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        before = Path("sd", part, name).read_bytes()
        weights = load_file(Path("sd", part, name))
        save_file({key: value * 1.1 for key, value in weights.items()}, Path("sd", part, name))
        assert main(words) == 2
        assert f"{part.partition('_')[0]} is " in capsys.readouterr().err
        Path("sd", part, name).write_bytes(before)
    assert main(words) == 0


def test_what_is_in_the_way_is_named(models: Path, refused: Any) -> None:
    Path("afile").write_text("precious")
    Path("adir.png").mkdir()
    assert "--out afile: afile is a file, and a folder is needed there" in refused("plain", "--out", "afile")
    assert "--out afile/x.png: afile is a file" in refused("plain", "--out", "afile/x.png")
    assert "--out afile/b/c: afile is a file" in refused("plain", "--out", "afile/b/c")
    assert "--out adir.png: there is a folder of that name" in refused("plain", "--out", "adir.png")
    assert Path("afile").read_text() == "precious"


def test_a_folder_is_not_begun_by_a_command_that_cannot_be(refused: Any) -> None:
    for words in (
        ["--gamma", "2"],
        ["--steps", "0"],
        ["--guidance-scale", "2"],
        ["--solver", "heun"],
        ["--dtype", "fp16"],
    ):
        refused("plain", "--out", "pics", *words)


def test_pictures_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full"):
        save_pictures(torch.zeros(1, 1, 4, 4), [tmp_path / "0.png"])
    assert not list(tmp_path.iterdir())


def test_the_shares_are_all_rows_once_and_about_equal() -> None:
    for count, batch, size in ((64, 256, 2), (300, 256, 2), (1000, 256, 2), (7, 2, 3), (1, 5, 4), (64, 32, 1)):
        batches = shares(count, batch, World(0, size))
        assert [row for rows in batches for row in rows] == list(range(count))
        assert max(map(len, batches)) <= batch
        own = [sum(map(len, batches[rank::size])) for rank in range(size)]
        assert max(own) - min(own) <= max(map(len, batches))
    assert list(map(len, shares(64, 256, World(0, 2)))) == [32, 32]
    assert shares(64, 32, World(0, 2)) == shares(64, 32, World())


@pytest.mark.takes_seconds
def test_two_processes_draw_what_one_does(models: Path, tmp_path: Path, draws: Draw) -> None:
    words = ["--count", "9", "--batch", "2", "--gamma", "0.5", "--seed", "2"]
    one = draws("classes", *words)
    draws("classes", *words, "--out", "one")
    script = tmp_path / "twice.py"
    script.write_text(
        "import sys\nfrom fewstep.cli import main\n"
        "words = ['sample', *sys.argv[1:], '--device', 'cpu']\n"
        "sys.exit(main([*words, '--out', 'two.npy']) or main([*words, '--out', 'two']))\n"
    )
    done = torchrun(script, models / "classes", *words, timeout=300)
    assert done.stdout == "two.npy: 9 samples, 2 network calls each\ntwo: 9 samples, 2 network calls each\n"
    close(np.load("two.npy"), one)
    assert sorted(os.listdir("two")) == sorted(os.listdir("one"))
    assert Path("two/samples.jsonl").read_bytes() == Path("one/samples.jsonl").read_bytes()
    for i in range(9):
        pictures = [np.asarray(Image.open(f"{folder}/{i:05d}.png")).astype(int) for folder in ("one", "two")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
