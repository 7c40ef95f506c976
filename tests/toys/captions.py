"""Small images with captions, and tiny pipelines on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from toys.families import tiny_pipeline

CAPTIONS = ("a cat", "a dog", "a cat", "dog", "cat")  # four of them distinct


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def captioned_folder(folder: Path, captions: Sequence[str | None] = CAPTIONS, column: str = "text") -> Path:
    """Images of 24 x 20 with a ``metadata.jsonl``."""
    folder.mkdir(parents=True)
    lines = []
    for i, caption in enumerate(captions):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", column: caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pipeline_folder(folder: Path, name: str) -> Path:
    tiny_pipeline(name).save_pretrained(folder)
    return folder
