"""What a stranger has beside the page: models, images and texts under the names that the pages give them.

Each is made once, when a page first names it, and copied into the folder of each page that does.
"""

import contextlib
import gzip
import io
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from page_short import shortened_command
from toys.captions import captioned_folder, picture
from toys.families import made as made_model
from toys.families import tiny_model, tiny_pipeline
from toys.first_hour import write_photos

from fewstep.cli import main

_CAPTIONS = ("a cat", "a dog", "dog", "a cat", "cat", "a dog", "a cat", "dog")


def _ddpm(size: int, channels: int = 3) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        unet = made_model(
            UNet2DModel, sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
            layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)

    return make


def _pipeline(name: str) -> Callable[[Path], object]:
    return lambda folder: tiny_pipeline(name).save_pretrained(folder)


def _two_variants(folder: Path) -> None:
    pipeline = tiny_pipeline("sd")
    pipeline.save_pretrained(folder)
    pipeline.save_pretrained(folder, variant="fp16")


def _labelled(folder: Path) -> None:
    """A DiT that knows what its classes are called."""
    tiny_pipeline("dit").save_pretrained(folder)
    index = folder / "model_index.json"
    names = {"0": "tench", "1": "goldfish, Carassius auratus", "2": "hen", "3": "cock", "4": "hammerhead"}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))


def _split_pictures(folder: Path) -> None:
    for part in ("train", "test"):
        for kind in ("daisy", "rose"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(3):
                picture(i).save(folder / part / kind / f"{i}.png")


def _points(file: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(file, points=3 + 2 * rng.standard_normal((64, 2), dtype=np.float32))


def _texts(file: Path) -> None:
    file.write_text("\n".join(_CAPTIONS) + "\n")


def _run(*words: str) -> Callable[[Path], None]:
    """A run, made of the inputs beside it."""

    def make(folder: Path) -> None:
        _quietly(["distill", *words, "--out", str(folder)])

    return make


def _export(run: str) -> Callable[[Path], None]:
    return lambda folder: _quietly(["export", str(input_of(run, folder)), str(folder)])


def _received(folder: Path) -> None:
    """A run of somebody else's that names code."""
    code = folder.parent / "code-of-others"
    code.mkdir()
    (code / "net.py").write_text("from fewstep.networks import MLP\n\n\nclass Net(MLP):\n    pass\n")
    network = ["--student.network", str(code / "net.py:Net"), "--student.options", "{dim: 2, times: 2, width: 8}"]
    _run("checkerboard-itvm", *network)(folder)


def _quietly(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(shortened_command(words, measured=True))
    if code:
        raise RuntimeError(f"an input of the pages cannot be made: fewstep {' '.join(words)}\n{said.getvalue()}")


def input_of(name: str, other: Path) -> Path:
    """The input of this name, made where the other one is."""
    home = next(parent for parent in other.parents if parent.name == "inputs")
    return made(name, home)


def _embedded_guidance(folder: Path) -> None:
    """A Flux that is told the guidance scale, as Flux.1-dev."""
    pipe = tiny_pipeline("flux")
    pipe.register_modules(transformer=tiny_model("flux", guidance_embeds=True))
    pipe.save_pretrained(folder)


INPUTS: dict[str, Callable[[Path], object]] = {
    "my-ddpm": _ddpm(32),
    "my-model": _ddpm(16),
    "digits-ddpm": _ddpm(8, channels=1),
    "photos": write_photos,
    "flowers": _split_pictures,
    "captioned-images": lambda folder: captioned_folder(folder, _CAPTIONS),
    "captioned-pictures": lambda folder: captioned_folder(folder, _CAPTIONS),
    "captions.txt": _texts,
    "prompts.txt": _texts,
    "points.npz": _points,
    "field.npy": lambda file: np.save(file, np.random.default_rng(0).normal(288, 12, (16, 3, 32, 32))),
    "stable-diffusion": _two_variants,
    "sd15": _pipeline("sd"),
    "sdxl": _pipeline("sdxl"),
    "sd3": _pipeline("sd3"),
    "flux-dev": _embedded_guidance,
    "DiT-XL-2-256": _labelled,
    "runs/fast": lambda f: _run("--teacher", str(input_of("my-ddpm", f)), "--data", str(input_of("photos", f)))(f),
    "runs/teacher": lambda folder: _quietly(["train", "checkerboard-reflow", "--out", str(folder)]),
    "runs/one": _run("checkerboard-itvm"),
    "runs/two": _run("checkerboard-itvm", "--seed", "1"),
    "fast-pipeline": _export("runs/fast"),
    "runs/text": lambda f: _run(
        "--teacher", str(input_of("stable-diffusion", f)), "--data", str(input_of("captioned-images", f))
    )(f),
    "fast-sd": _export("runs/text"),
    "received-run": _received,
}
# Models that recipes name on the hub, as if they had been fetched before.
FETCHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
}


def made(name: str, home: Path) -> Path:
    """The input in ``home``, a folder called inputs, made if it is not there."""
    place = home / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        INPUTS[name](place)
    return place


def lay(text: str, written: str, home: Path, here: Path) -> None:
    """Copy what a text names, and does not write, into the folder ``here``, if it is not there."""
    for name in INPUTS:
        word = rf"(?<![\w./-])(?:\./)?{re.escape(name)}(?![\w.-])"
        if re.search(word, text) and not re.search(word, written) and not (here / name).exists():
            source = made(name, home)
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, here / name)


def write_hub(cache: Path) -> None:
    """The cache of huggingface_hub, with tiny twins of the published models in it."""
    for name, kind in FETCHED.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        tiny_pipeline(kind).save_pretrained(folder / "snapshots" / ("0" * 40))


def write_idx(folder: Path) -> None:
    """A few images of ten classes in the files of MNIST."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 64), ("t10k", 32)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
