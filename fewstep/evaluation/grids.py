"""Grids of images as PNG."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fewstep.common.disk import replace_file
from fewstep.evaluation.style import INK

if TYPE_CHECKING:
    from PIL.Image import Image


def image_grid(
    images: Tensor, path: str | Path | None = None, columns: int | None = None, labels: Sequence[str] = ()
) -> bytes:
    """A grid of images (N, 1 or 3, H, W) in [-1, 1] as PNG; written to ``path`` where one is given.

    Small images are enlarged by a whole factor, to some 64 pixels, so that each pixel stays a sharp square.

    Args:
        columns: images a row; by default such that the grid is about square.
        labels: what each row shows, written at its left.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid takes images of shape (N, 1 or 3, H, W), not {tuple(images.shape)}")
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    factor = max(1, 64 // max(height, width))
    gap = 2
    pixels = images.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255).byte()
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3).permute(0, 2, 3, 1).numpy()
    height, width = height * factor + gap, width * factor + gap
    canvas = np.full((rows * height + gap, columns * width + gap, channels), 255, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * height + gap, i % columns * width + gap
        canvas[top : top + height - gap, left : left + width - gap] = tile
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    if labels:
        picture = _labelled(picture, labels, [gap + (row + 0.5) * height for row in range(rows)])
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    if path is not None:
        replace_file(Path(path), content.getvalue())
    return content.getvalue()


def _labelled(picture: "Image", labels: Sequence[str], middles: Sequence[float]) -> "Image":
    """The image with words at its left, each at the height of its middle."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    margin = 20 + round(max(font.getlength(label) for label in labels))
    white, ink = (ImageColor.getcolor(colour, picture.mode) for colour in ("white", INK))
    wider = Image.new(picture.mode, (picture.width + margin, picture.height), white)
    wider.paste(picture, (margin, 0))
    for label, middle in zip(labels, middles, strict=True):
        ImageDraw.Draw(wider).text((margin - 10, middle), label, fill=ink, font=font, anchor="rm")
    return wider
