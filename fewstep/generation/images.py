"""Samples on disk: a grid, arrays, or a folder of images that can be gone on with."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.common.disk import create_file, replace_file, sweep
from fewstep.common.model_files import read_json
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.style import png
from fewstep.flows.signature import Model, rate_of, shape_of
from fewstep.flows.spaces import Space, Tokens
from fewstep.generation.requests import Requests
from fewstep.generation.sounds import save_sounds
from fewstep.training.fingerprint import differences

# In a folder of images: what they were all drawn with, and what each of them is.
FACTS, LINES = "samples.json", "samples.jsonl"
# What may differ between a folder and the call that goes on with it: the name by which the same model was found.
_MAY_DIFFER = ("model",)


def suffix_of(model: Model) -> str:
    """What stands behind the name of what a model's samples can be seen in, or else kept in: .png, .txt or .npz; of
    sound the end of a folder's name, which is of .wav files."""
    if isinstance(model.space, Tokens):
        return ".txt"
    if rate_of(model) is not None:
        return "-sounds"
    try:
        shape = shape_of(model)
    except ValueError:  # a network of one's own that does not say
        return ".png"
    is_picture = (
        len(shape) < 4 if model.latents is not None else shape == (2,) or (len(shape) == 3 and shape[0] in (1, 3))
    )
    return ".png" if is_picture else ".npz"  # videos too


def check_out(
    out: Path, shape: tuple[int, ...], is_text: bool = False, rate: int | None = None, count: int = 1
) -> None:
    """Refuse, before anything is drawn, a file that samples of this shape cannot be written to.

    Args:
        rate: of waveforms, how many numbers are a second.
        count: how many samples there are to be.

    Raises:
        ValueError: no suffix that is known, or images of what is none.
        FileExistsError: a folder with something in it that is not begun by fewstep, a file in the place of a folder, or
            a folder in that of a file.
    """
    if is_text and out.suffix not in (".txt", ".npy", ".npz"):
        raise ValueError(f"--out {out}: samples of text are written as .txt, a line each, .npy or .npz")
    if rate is not None and out.suffix not in ("", ".wav", ".npy", ".npz"):
        raise ValueError(f"--out {out}: sound is written as .wav, .npy, .npz, or into a folder of .wav files")
    if rate is not None and out.suffix == ".wav" and count != 1:
        raise ValueError(f"--out {out}: a .wav has one sample, and these are {count}: --count 1, or a folder")
    if rate is None and out.suffix == ".wav":
        raise ValueError(f"--out {out}: it is not known how many numbers of these samples are a second: write a .npy")
    if not is_text and out.suffix not in ("", ".png", ".wav", ".npy", ".npz"):
        raise ValueError(f"--out {out}: samples are written as .png (a grid), .npy, .npz, or into a folder of PNGs")
    is_image = len(shape) == 3 and shape[0] in (1, 3)
    if (
        not is_text
        and rate is None
        and not is_image
        and not (shape == (2,) and out.suffix == ".png")
        and out.suffix not in (".npy", ".npz")
    ):
        raise ValueError(f"--out {out}: samples of shape {shape} are no images, write them to a .npy or .npz file")
    is_folder = out.suffix == ""
    if not is_folder and out.is_dir():
        raise FileExistsError(f"--out {out}: there is a folder of that name, and a file is to be written")
    for place in (out, *out.parents) if is_folder else out.parents:
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"--out {out}: {place} is a file, and a folder is needed there")
    # What another process begins with is there, or not yet renamed.
    names = os.listdir(out) if is_folder and out.is_dir() else []
    if FACTS not in names and not all(name.lstrip(".").startswith(FACTS) for name in names):
        raise FileExistsError(f"--out {out}: the folder is not empty, and nothing in it is overwritten")


def write(
    samples: Tensor, cond: Mapping[str, Tensor], out: Path, space: Space | None = None, rate: int | None = None
) -> None:
    """Samples (N, ...) to ``out``: a grid (.png), the numbers (.npy; .npz with conditions), tokens of a ``space`` as a
    line of text each (.txt), one sound of a ``rate`` (.wav), or a folder of PNGs."""
    if out.suffix == ".txt" and isinstance(space, Tokens):
        lines = [line.replace("\n", " ").replace("\r", " ") for line in space.text(samples)]
        replace_file(out, "".join(f"{line}\n" for line in lines).encode())
    elif out.suffix == ".wav" and rate is not None:
        save_sounds(samples, rate, [out])
    elif out.suffix in (".npy", ".npz"):
        content = io.BytesIO()
        named: dict[str, Any] = {name: value.numpy() for name, value in {"data": samples, **cond}.items()}
        np.save(content, samples.numpy()) if out.suffix == ".npy" else np.savez(content, **named)
        replace_file(out, content.getvalue())
    elif out.suffix == ".png":
        image_grid(samples, out) if samples.ndim == 4 else png(points_figure({f"{len(samples)} samples": samples}), out)
    else:
        save_pictures(samples, [out / picture_name(i, len(samples)) for i in range(len(samples))])


def picture_name(i: int, count: int, suffix: str = ".png") -> str:
    """The file of sample i of so many, in their order by name."""
    return f"{i:0{max(5, len(str(count - 1)))}d}{suffix}"


def save_pictures(images: Tensor, files: Sequence[Path], texts: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Images (N, 1 or 3, H, W) in [-1, 1] as PNGs, each whole or absent, with ``texts`` as their text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def save(i: int) -> None:
        info, content = PngInfo(), io.BytesIO()
        for name, value in (texts[i] if texts else {}).items():
            info.add_text(name, str(value))
        picture = pixels[i]
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(content, "png", pnginfo=info)
        replace_file(files[i], content.getvalue())

    # What packs an image lets go of Python's lock.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(len(files))))


def claim(out: Path, facts: Mapping[str, Any], requests: Requests, suffix: str = ".png") -> None:
    """Begin a folder of images, or of files of another ``suffix``, or see that it was begun by the same command, whose
    missing ones are then to draw.

    ``samples.json`` has the facts, ``samples.jsonl`` a line for each image. Every process may call this: they write
    the same bytes.

    Raises:
        ValueError: it holds images of other facts.
    """
    sweep(out)
    if not create_file(out / FACTS, (json.dumps(facts, indent=1) + "\n").encode()):
        if differing := differences(read_json(out / FACTS), json.loads(json.dumps(facts)), _MAY_DIFFER):
            raise ValueError(
                f"--out {out} holds other images: {'; '.join(differing)}. Use another folder, or remove that one"
            )
        if (out / LINES).exists():
            return
    lines = ({"file_name": picture_name(i, requests.count, suffix), **says(requests, i)} for i in range(requests.count))
    replace_file(out / LINES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def says(requests: Requests, i: int) -> dict[str, Any]:
    """What tells sample i from the others: its seed, its index of that seed, its prompt and label where it has any."""
    return {name: value for name, value in vars(requests[i]).items() if value is not None}


def missing(out: Path, rows: Sequence[int], count: int, suffix: str = ".png") -> list[int]:
    """Those of the rows whose images are not there."""
    return [i for i in rows if not (out / picture_name(i, count, suffix)).is_file()]
