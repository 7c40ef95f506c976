"""Images decoded once, by a pool of threads, into one uint8 memory map that is kept in a cache."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from fewstep.common.disk import replace_folder
from fewstep.common.errors import briefly, shown, unknown
from fewstep.common.reading import no_file
from fewstep.common.user_folders import cache_folder
from fewstep.data.formats import formats

LARGEST = 1 << 14  # pixels along a side
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_DECODER = 1  # part of the cache's key: count up when the same options give other pixels
# A small file can unfold to any size. Images of many pixels are decoded one after another, for their memory.
_MOST_PIXELS, _MANY_PIXELS = 1 << 26, 1 << 24
_ONE_AT_A_TIME = Lock()

_ORIENTATION = 0x0112  # in EXIF: 5 to 8 lie on their side

Source = Path | str | bytes
Read = Callable[[slice], Sequence[Source]]


class NoneReadError(ValueError):
    """Of some images none can be read."""


def decode_once(
    read: Read,
    names: list[str],
    fingerprint: list[Any],
    size: int | tuple[int, int] | None,
    channels: int,
    on_error: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The images as a memory map (n, C, H, W) uint8, from the cache where they are, and which of them these are.

    Args:
        read: gives the files (or their bytes) of a slice of the images.
        names: what to call each image in a message.
        fingerprint: changes when the images do; anything that JSON takes.
    """
    if channels not in _MODES:
        raise ValueError(f"channels={channels}: images have 1 (grey), 3 (RGB) or 4 (RGBA)")
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_side(side)
    if on_error not in ("raise", "skip"):
        raise unknown("on_error", on_error, ["raise", "skip"])
    key = hashlib.sha256(json.dumps([_DECODER, fingerprint, size, channels]).encode()).hexdigest()[:32]
    entry = cache_folder() / "pictures" / key
    if not entry.exists():
        _fill(entry, read, names, size, channels, on_error)
    skipped: dict[str, str] = json.loads((entry / "skipped.json").read_text())
    if skipped and on_error == "raise":
        row = next(iter(skipped))
        raise unreadable(names[int(row)], skipped[row])
    if skipped:
        some = "; ".join(f"{names[int(i)]}: {why}" for i, why in list(skipped.items())[:3])
        warnings.warn(f"{len(skipped)} of {len(names)} images cannot be read and are left out ({some})", stacklevel=3)
    kept = np.setdiff1d(np.arange(len(names)), np.array([*map(int, skipped)], dtype=int))
    return np.load(entry / "pixels.npy", mmap_mode="r", allow_pickle=False), kept


def check_side(size: Any) -> None:
    """That this is the side of an image in pixels.

    Raises:
        ValueError: it is no whole number, less than 1, or more than any image here has.
    """
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise ValueError(f"size={shown(size)}: the side of an image is a whole number of pixels, 1 to {LARGEST}")


def _fill(
    entry: Path, read: Read, names: list[str], size: int | tuple[int, int] | None, channels: int, on_error: str
) -> None:
    """Writes a cache entry aside and renames it, so that what is there is whole."""
    with replace_folder(entry, keep=True) as new:  # of another process that was first, the pixels are the same
        skipped = _decode_all(new / "pixels.npy", read, names, size, channels, on_error)
        (new / "skipped.json").write_text(json.dumps(skipped))


def _decode_all(
    target: Path, read: Read, names: list[str], size: int | tuple[int, int] | None, channels: int, on_error: str
) -> dict[int, str]:
    """Decodes all images into one .npy; returns those it could not, with the reason."""
    skipped: dict[int, str] = {}
    shape, first, count = None, "", 0
    # Written as a file, not through a memory map: there a full disk would kill the process instead of raising.
    with target.open("wb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), 256):
            part = read(slice(start, start + 256))
            for i, pixels in enumerate(pool.map(lambda source: decode(source, size, channels), part), start):
                if isinstance(pixels, str):
                    if on_error == "raise":
                        raise unreadable(names[i], pixels)
                    skipped[i] = pixels
                    continue
                if shape is None:
                    shape, first = pixels.shape, names[i]
                    _write_header(file, (len(names), *shape))
                if pixels.shape != shape:
                    raise ValueError(
                        f"images of several sizes: {first} is {shape[2]} x {shape[1]}, "
                        f"{names[i]} is {pixels.shape[2]} x {pixels.shape[1]}: say --data.size 64 (size=64 in Python) "
                        "for the middle square of each, scaled to 64 x 64, and --data.buckets true beside it to keep "
                        "their shapes"
                    )
                file.write(pixels.tobytes())
                count += 1
        if shape is None:
            raise NoneReadError(
                f"none of the {len(names)} images can be read, the first being {names[0]}: {skipped[0]}"
            )
        file.seek(0)
        _write_header(file, (count, *shape))
    return skipped


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    # numpy leaves room in the header for the first axis to change, so that it can be written again over itself.
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def decode(source: Source, size: int | tuple[int, int] | None, channels: int) -> np.ndarray | str:
    """One image as (C, H, W) uint8, its middle scaled to this size (a side, or height and width), or why it cannot be
    read. Of an animation it is the first frame."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(source, bytes) and (why := no_file(Path(source))):
        return why
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as picture:
            wanted = None if size is None else (size, size) if isinstance(size, int) else (size[1], size[0])
            if wanted is not None:
                # lets JPEG decode a large photograph at a fraction of its size
                picture.draft(None, (2 * max(wanted), 2 * max(wanted)))
            pixels = picture.width * picture.height
            most = _MOST_PIXELS // (2 if picture.has_transparency_data else 1)  # a copy of it lies on white
            if pixels > most:
                return f"it has {picture.width} x {picture.height} pixels, and more than {most:,} are not decoded"
            with _ONE_AT_A_TIME if pixels > _MANY_PIXELS else nullcontext():
                ImageOps.exif_transpose(picture, in_place=True)  # cameras turn the image by a note beside it
                picture = _to_mode(picture, channels)
                if wanted is not None:
                    picture = ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)
                array = np.asarray(picture)
    except UnidentifiedImageError:
        return "its content is no image" if source else "it is empty"
    except Exception as error:  # on damaged files Pillow's decoders raise whatever they stumble over
        return briefly(error)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def size_of(source: Source, head: bool = False) -> tuple[int, int]:
    """Height and width of an image that :func:`decode` reads, as the camera turned it; by the ``head`` of its file
    alone, where a PNG could say behind its pixels that it is turned, and none does."""
    from PIL import Image

    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as picture:
        is_read = head and picture.format == "PNG" and not {"exif", "Raw profile type exif"} & picture.info.keys()
        is_turned = not is_read and picture.getexif().get(_ORIENTATION, 1) > 4
        return (picture.width, picture.height) if is_turned else (picture.height, picture.width)


def size_or_why(source: Source) -> tuple[int, int] | str:
    """Height and width of an image, by the first bytes of its file alone; or why they cannot be read."""
    from PIL import UnidentifiedImageError

    if not isinstance(source, bytes) and (why := no_file(Path(source))):
        return why
    try:
        return size_of(source, head=True)
    except UnidentifiedImageError:
        return "its content is no image" if source else "it is empty"
    except Exception as error:  # as in decode
        return briefly(error)


def is_decodable(content: bytes) -> bool:
    """Whether some bytes begin as an image does."""
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=formats()):
            return True
    except Exception:
        return False


def _to_mode(picture: Any, channels: int) -> Any:
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("its pixels are floats, and which of them are black and white is not known")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(picture)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError(f"its pixels are whole numbers from {values.min()} to {values.max()}, not of 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if channels < 4 and picture.has_transparency_data:
        picture = _on_white(picture)
    mode = _MODES[channels]
    return picture if picture.mode == mode else picture.convert(mode)


def _on_white(picture: Any) -> Any:
    """A transparent image on white as RGB, a strip at a time: a large one would take its memory four times."""
    from PIL import Image

    flat = Image.new("RGB", picture.size)
    for top in range(0, picture.height, 256):
        strip = picture.crop((0, top, picture.width, min(top + 256, picture.height))).convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return flat


def unreadable(name: str, why: str) -> ValueError:
    """The error for an image that cannot be read."""
    name = " ".join(name.split())
    return ValueError(
        f"{name} cannot be read ({why}): mend or remove it, or leave such out: on_error: skip (--data.on_error skip, "
        "of fewstep encode --on-error skip)"
    )
