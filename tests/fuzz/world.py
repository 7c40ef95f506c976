"""The real files that are damaged: tiny runs, models, exports and data, all in one folder, made once."""

import json
import os
import tarfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from toys import families as family_toys
from toys.unet import tiny_unet

from fewstep.cli import main

_POINTS: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 1}},
    "data": {"name": "data/points.npz"},
    "objective": "ITVM",
    "training": {"steps": 2, "batch": 8, "quiet": True, "warmup": 1},
    "evaluation": {"steps": [1], "teacher_steps": [1], "count": 8, "batch": 8},
}
_FLOW: dict[str, Any] = {
    **_POINTS,
    "name": "flow",
    "teacher": None,
    "objective": "FlowMatching",
    "evaluation": {"count": 0},
}
_OWN: dict[str, Any] = {
    **_POINTS,
    "name": "own",
    "teacher": {"source": "runs/flow", "guidance": None},
    "data": {"name": "teacher", "count": 16, "steps": 1},
    "student": {"network": "auto"},
    "evaluation": {"count": 0},
}
_IMAGES: dict[str, Any] = {
    "name": "images",
    "data": {"name": "data/photos", "size": 8},
    "objective": "FlowMatching",
    "student": {
        "network": "unet",
        "options": {
            "block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2, "num_class_embeds": 2,
            "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "attention_head_dim": 4,
        },
    },
    "training": {"steps": 1, "batch": 4, "quiet": True},
    "evaluation": {"count": 0},
}  # fmt: skip
_MAP: dict[str, Any] = {
    "name": "map",
    "teacher": "models/ddpm",
    "data": {"name": "data/photos", "size": 8, "labels": False},
    "objective": {"name": "MeanFlow"},
    "training": {"steps": 1, "batch": 4, "quiet": True},
    "evaluation": {"count": 0},
}
RECIPES = {"points": _POINTS, "flow": _FLOW, "own": _OWN, "images": _IMAGES, "map": _MAP}


def build(folder: Path) -> None:
    """Fill an empty folder."""
    with chdir(folder):
        _data(Path("data"))
        _models(Path("models"))
        Path("recipes").mkdir()
        for name, recipe in RECIPES.items():
            Path(f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        for words in (
            *(f"train recipes/{name}.yaml --out runs/{name}" for name in ("points", "flow", "own", "images", "map")),
            "export runs/points exports/points",
            "export runs/map exports/map",
            "convert models/ddpm --no-check --out exports/ddpm-flow",
            "reflow runs/flow --count 8 --steps 1 --out data/pairs",
            "encode --teacher models/dit --data data/photos --size 16 --out data/encoded --device cpu",
        ):
            if code := _quietly(words.split()):
                raise RuntimeError(f"fewstep {words} ended with {code}: fuzz.world does not stand")


def _quietly(words: list[str]) -> int:
    """A command, its output thrown away unless it fails."""
    kept = os.dup(1), os.dup(2)
    log = Path("log").open("w+")  # noqa: SIM115
    try:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        code = main([*words])
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
    if code:
        log.seek(0)
        print(log.read())
    log.close()
    Path("log").unlink()
    return code


def _models(folder: Path) -> None:
    DDPMPipeline(unet=tiny_unet(in_channels=3, out_channels=3), scheduler=DDPMScheduler()).save_pretrained(
        folder / "ddpm"
    )
    family_toys.tiny_pipeline("dit").save_pretrained(folder / "dit")
    family_toys.tiny_pipeline("sd").save_pretrained(folder / "sd")
    family_toys.tiny_pipeline("flux").save_pretrained(folder / "flux")


def _data(folder: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(4):
        place = folder / "photos" / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    lines = [{"file_name": f"{('cat', 'dog')[i % 2]}/{i}.png", "text": "a cat"} for i in range(4)]
    (folder / "photos" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = random.normal(size=(32, 2)).astype(np.float32)
    np.savez(folder / "points.npz", points)
    np.save(folder / "points.npy", points)
    np.save(folder / "images.npy", random.integers(0, 255, (8, 8, 8), dtype=np.uint8))
    (folder / "idx").mkdir()
    pictures = random.integers(0, 255, (8, 8, 8), dtype=np.uint8)
    for name, header, body in (
        ("train-images-idx3-ubyte", (0x803, 8, 8, 8), pictures),
        ("train-labels-idx1-ubyte", (0x801, 8), np.arange(8, dtype=np.uint8)),
    ):
        (folder / "idx" / name).write_bytes(np.array(header, dtype=">u4").tobytes() + body.tobytes())
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "train-0000.tar", "w") as tar:
        for i in range(4):
            tar.add(folder / "photos" / ("cat", "dog")[i % 2] / f"{i}.png", f"{i}.png")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "prompts.jsonl").write_text('{"text": "a cat", "seed": 3}\n{"text": "a dog", "seed": 4, "index": 1}\n')


def settle() -> None:
    """One thread, as in every case, and no more than one."""
    torch.set_num_threads(1)
