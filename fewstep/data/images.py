"""Data sets of images: a folder of them, or a Hugging Face data set; each decoded once (see ``decode``)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.arrays import ArrayData, channels_first
from fewstep.data.aspects import assign, bucket_sizes, sizes_of, step_for
from fewstep.data.buckets import Buckets
from fewstep.data.decode import NoneReadError, Read, decode_once
from fewstep.data.listing import open_folder, stamp
from fewstep.data.tables import (
    LISTS,
    PICTURE_KINDS,
    find_columns,
    held_by,
    open_table,
    read_arrays,
    read_column,
    undecoded,
)


def image_folder(
    path: str | Path,
    size: int | None = None,
    channels: int = 3,
    on_error: str = "raise",
    flip: bool = False,
    labels: bool = True,
    split: str | None = None,
    beside: str | None = None,
    beside_channels: int = 3,
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
) -> ArrayData | Buckets:
    """All images in a folder and below it that Pillow reads, in the order of their names.

    They are decoded once, into a cache ($FEWSTEP_CACHE, else ~/.cache/fewstep) that is kept until a file or an option
    changes. Where the images lie in two or more sub-folders, these are the classes, in the order of their names;
    ``train``, ``test`` and ``val`` are no classes, but parts of which one is used.

    Args:
        size: side of the square images wanted: the middle square is cut out and resized (Lanczos, antialiased).
            None takes them as they are, if all have one size.
        channels: 1 (grey), 3 (RGB, on white where the image is transparent) or 4 (RGBA).
        on_error: what an image that cannot be read does: raise, or skip (left out, with a warning).
        split: which part is used, by default train where there are parts: see ``fewstep.data.listing.open_folder``.
        beside: another folder, with an image of the same name (whatever its suffix) for each: the condition ``image``,
            cut and resized as the images are.
        beside_channels: of that image: 1, 3 or 4.
        buckets: keep the shapes of images: each is cut to the nearest of some sizes, all of about the area of the
            square of ``size`` (``fewstep.data.aspects``), and the rows of each size are a bucket.
        bucket_step: of what the sides of buckets are multiples; by default of 8, and not much finer than ``size / 16``.
        small: what becomes of images smaller than their bucket: enlarge, or drop.

    Raises:
        FileNotFoundError: no such folder, or no images in it; says what it holds.
        ValueError: an image that cannot be read, or images of several sizes; names them. No such split. An image with
            none of its name beside it.
    """
    folder = open_folder(Path(path).expanduser(), split)
    files = [folder.root / name for name in folder.names]
    fingerprint = [stamp(folder.root, name) for name in folder.names]
    classes, numbers = folder.classes() if labels else ([], [])
    check_buckets(buckets, size, bucket_step, small)
    if buckets:
        known = {"class_labels": np.array(numbers)} if classes else {}

        def more(rows: np.ndarray, bucket: tuple[int, int]) -> dict[str, np.ndarray]:
            if beside is None:
                return {}
            named = [folder.names[row] for row in rows]
            return {"image": _beside(Path(beside).expanduser(), named, bucket, beside_channels, folder.root)}

        how = Bucketing(size or 0, bucket_step, small, channels, on_error)
        said = {"classes": classes, "name": str(folder.root)}
        return in_buckets(how, files.__getitem__, list(map(str, files)), fingerprint, known, more, flip=flip, **said)
    pixels, kept = decode_once(files.__getitem__, list(map(str, files)), fingerprint, size, channels, on_error)
    cond = {"class_labels": np.array(numbers)[kept]} if classes else {}
    if beside is not None:
        names = [folder.names[row] for row in kept]
        cond["image"] = _beside(Path(beside).expanduser(), names, size, beside_channels, folder.root)
        if cond["image"].shape[2:] != pixels.shape[2:]:
            sides, others = (" x ".join(map(str, a.shape[:1:-1])) for a in (pixels, cond["image"]))
            raise ValueError(
                f"images in {folder.root} are {sides}, those beside them in {beside} {others}: say --data.size 64 "
                "(size=64 in Python) for both"
            )
    return ArrayData(pixels, cond, flip, classes=classes, name=str(folder.root))


def check_buckets(buckets: bool, size: int | None, bucket_step: int | None, small: str) -> None:
    """That what is said of buckets is said beside them.

    Raises:
        ValueError: it is not, or buckets without a size.
    """
    if buckets and size is None:
        raise ValueError("buckets: true cuts images to about the area of a square: say its side, --data.size 512")
    if not buckets and (bucket_step is not None or small != "enlarge"):
        name = "bucket_step" if bucket_step is not None else "small"
        raise ValueError(f"{name} is said of buckets of aspects, and there are none: say buckets: true beside it")


@dataclass(frozen=True)
class Bucketing:
    """How images are put into buckets: as the options of :func:`image_folder` say."""

    size: int
    bucket_step: int | None
    small: str
    channels: int
    on_error: str


def in_buckets(
    how: Bucketing,
    read: Read,
    names: Sequence[str],
    fingerprint: list[Any],
    cond: Mapping[str, np.ndarray],
    more: Callable[[np.ndarray, tuple[int, int]], Mapping[str, np.ndarray]] = lambda rows, size: {},
    **options: Any,
) -> Buckets:
    """Images decoded once, an array for each bucket.

    Args:
        read, names, fingerprint: as for :func:`decode_once`. cond: conditions of all of them, by name.
        more: gives further conditions of some rows, of a bucket of this height and width.
        options: of the arrays.
    """
    sizes = bucket_sizes(how.size, step_for(how.size, 8 if how.bucket_step is None else 1, how.bucket_step))
    put = assign(sizes_of(read, names, fingerprint), names, sizes, how.small, how.on_error)
    parts: list[ArrayData] = []
    for bucket, rows in zip(put.sizes, put.rows, strict=True):

        def some(part: slice, rows: list[int] = rows) -> list[Any]:
            return [read(slice(row, row + 1))[0] for row in rows[part]]

        own = [fingerprint[row] if len(fingerprint) == len(names) else [*fingerprint, row] for row in rows]
        named = [names[row] for row in rows]
        try:
            pixels, kept = decode_once(some, named, own, bucket, how.channels, how.on_error)
        except NoneReadError as error:
            if how.on_error == "raise":
                raise
            warnings.warn(f"{error}: left out", stacklevel=3)
            continue
        index = np.array(rows)[kept]
        told = {name: value[index] for name, value in cond.items()} | dict(more(index, bucket))
        parts.append(ArrayData(pixels, told, **options))
    if not parts:
        raise ValueError(f"none of the {len(names)} images can be read")
    return Buckets(parts)


def _beside(
    folder: Path, names: list[str], size: int | tuple[int, int] | None, channels: int, root: Path
) -> np.ndarray:
    """The images of a folder that have these names but for their suffix, (n, channels, H, W) uint8."""
    there = open_folder(folder, "all")
    by_stem = {name.rpartition(".")[0]: name for name in there.names}
    stems = [name.rpartition(".")[0] for name in names]
    if missing := [name for name, stem in zip(names, stems, strict=True) if stem not in by_stem]:
        raise ValueError(
            f"{len(missing)} of {len(names)} images in {root} have none of their name in {folder}, the first is "
            f"{missing[0]}: one beside each is needed"
        )
    wanted = [by_stem[stem] for stem in stems]
    files = [there.root / name for name in wanted]
    fingerprint = [stamp(there.root, name) for name in wanted]
    return decode_once(files.__getitem__, list(map(str, files)), fingerprint, size, channels, "raise")[0]


def hugging_face(
    name: str | Path,
    split: str = "train",
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
    channels: int = 3,
    on_error: str = "raise",
    flip: bool = False,
    normalize: bool = False,
    labels: bool = True,
    channels_last: bool | None = None,
    buckets: bool = False,
    bucket_step: int | None = None,
    small: str = "enlarge",
) -> ArrayData | Buckets:
    """A data set of the Hugging Face hub by name, or a folder that ``save_to_disk`` wrote.

    Images are decoded once into the cache, as in ``image_folder``; columns of numbers are read whole. A column of
    images is one of ``Image``, of bytes, of ``{bytes, path}``, or of text in base64.

    Args:
        split: which part; a folder that holds a single data set has none to choose from.
        config: the configuration, for a name on the hub that has several.
        image: the column of the data; by default the first of images, else the first of arrays.
        label: the column of the class labels; by default the first ``ClassLabel``.
        size, channels, on_error, buckets, bucket_step, small: for images, as in ``image_folder``.
        normalize, channels_last: for arrays, as in ``fewstep.data.files.npy``.

    Raises:
        FileNotFoundError: the data set cannot be had, for instance offline.
        ValueError: an unknown split or column, or a column that is neither images nor numbers.
    """
    table = open_table(name, split, config)
    kinds, image, label = find_columns(table, name, image, label)
    arrays = [c for c, kind in kinds.items() if kind.startswith("Array") or kind in LISTS]
    image = image or next(iter(arrays), None)
    if image is None:
        raise ValueError(f"{name} has no column of images or arrays, only {held_by(kinds)}: say image: COLUMN")

    where = f"{image} of {name}"
    if kinds[image] in PICTURE_KINDS:
        row_names = [f"row {i} of {name}" for i in range(len(table))]
        read = undecoded(table, image, kinds[image])
        check_buckets(buckets, size, bucket_step, small)
        if buckets:
            known = {"class_labels": np.array(read_column(table, label))} if label and labels else {}
            names = table.features[label].names if label and kinds[label] == "ClassLabel" else ()
            how = Bucketing(size or 0, bucket_step, small, channels, on_error)
            said = {"classes": names, "name": where, "flip": flip}
            return in_buckets(how, read, row_names, [table._fingerprint, image], known, **said)
        pixels, kept = decode_once(read, row_names, [table._fingerprint, image], size, channels, on_error)
    elif image in arrays:
        pixels = channels_first(read_arrays(table, image), channels_last, where)
        kept = np.arange(len(table))
    else:
        raise ValueError(f"{where} holds neither images nor arrays, the columns are {held_by(kinds)}")
    cond = {"class_labels": np.array(read_column(table, label))[kept]} if label and labels else None
    classes = table.features[label].names if label and kinds[label] == "ClassLabel" else ()
    return ArrayData(pixels, cond, flip, normalize, classes, where)
