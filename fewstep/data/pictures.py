"""Data sets of pictures: a folder of them, or a Hugging Face data set; each decoded once (see ``decode``)."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fewstep import errors
from fewstep.data.arrays import ArrayData, channels_first
from fewstep.data.decode import Read, Source, decode_once

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_folder(
    path: str | Path,
    size: int | None = None,
    channels: int = 3,
    on_error: str = "raise",
    flip: bool = False,
    labels: bool = True,
) -> ArrayData:
    """All pictures in a folder and below it, in the order of their names.

    They are decoded once, into a cache ($FEWSTEP_CACHE, else ~/.cache/fewstep) that is kept until a file or an option
    changes. Where the pictures lie in two or more sub-folders, these are the classes, in the order of their names.

    Args:
        size: side of the square pictures wanted: the middle square is cut out and resized (Lanczos, antialiased).
            None takes them as they are, if all have one size.
        channels: 1 (grey), 3 (RGB, on white where the picture is transparent) or 4 (RGBA).
        on_error: what a picture that cannot be read does: raise, or skip (left out, with a warning).

    Raises:
        FileNotFoundError: no such folder, or no pictures in it; says what it holds.
        ValueError: a picture that cannot be read, or pictures of several sizes; names them.
    """
    root = Path(path).expanduser()
    names = find_pictures(root)
    stats = [(root / name).stat() for name in names]
    files = [root / name for name in names]
    fingerprint = [[name, s.st_size, s.st_mtime_ns] for name, s in zip(names, stats, strict=True)]
    pixels, kept = decode_once(files.__getitem__, list(map(str, files)), fingerprint, size, channels, on_error)

    classes = class_folders(names, root) if labels else []
    number = {name: k for k, name in enumerate(classes)}
    cond = {"class_labels": np.array([number[names[i].split("/")[0]] for i in kept])} if classes else None
    return ArrayData(pixels, cond, flip, classes=classes)


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
) -> ArrayData:
    """A data set of the Hugging Face hub by name, or a folder that ``save_to_disk`` wrote.

    Pictures are decoded once into the cache, as in ``image_folder``; columns of numbers are read whole.

    Args:
        split: which part; a folder that holds a single data set has none to choose from.
        config: the configuration, for a name on the hub that has several.
        image: the column of the data; by default the first of pictures, else the first of arrays.
        label: the column of the class labels; by default the first ``ClassLabel``.
        size, channels, on_error: for pictures, as in ``image_folder``.
        normalize: for arrays of floats, as in ``ArrayData``.

    Raises:
        FileNotFoundError: the data set cannot be had, for instance offline.
        ValueError: an unknown split or column.
    """
    rows = open_hugging_face(name, split, config)
    kinds, image, label = find_columns(rows, name, image, label)
    arrays = [c for c, kind in kinds.items() if kind.startswith("Array") or kind in ("List", "LargeList", "Sequence")]
    image = image or next(iter(arrays), None)
    if image is None:
        held = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise ValueError(f"{name} has no column of pictures or arrays, only {held}: say image: COLUMN")

    if kinds[image] == "Image":
        row_names = [f"row {i} of {name}" for i in range(len(rows))]
        pixels, kept = decode_once(
            undecoded(rows, image), row_names, [rows._fingerprint, image], size, channels, on_error
        )
    else:
        pixels = channels_first(
            rows.select_columns([image]).with_format("numpy")[:][image], False, f"{image} of {name}"
        )
        kept = np.arange(len(rows))
    cond = {"class_labels": np.array(read_column(rows, label))[kept]} if label and labels else None
    classes = rows.features[label].names if label and kinds[label] == "ClassLabel" else ()
    return ArrayData(pixels, cond, flip, normalize, classes)


def find_pictures(root: Path) -> list[str]:
    """Pictures below a folder by relative name, sorted; hidden files (as macOS archives have them) are no pictures."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is {'a file, not a folder of pictures' if root.exists() else 'not there'}")
    found: list[str] = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    names = sorted(name for name in found if name.lower().endswith(SUFFIXES))
    if not names:
        kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in found)
        held = (
            f"{len(found)} files: {', '.join(f'{k} ({n})' for k, n in kinds.most_common(8))}" if found else "no files"
        )
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {root}, which holds {held}")
    return names


def class_folders(names: Sequence[str], root: Path) -> list[str]:
    """The sub-folders that are classes, in their order; none where there are not two of them, or pictures beside."""
    folders = {name.split("/")[0] for name in names if "/" in name}
    if len(folders) < 2:
        return []
    loose = [name for name in names if "/" not in name]
    if loose:
        warnings.warn(
            f"{len(loose)} pictures such as {loose[0]} lie beside the {len(folders)} sub-folders of {root}: "
            "no class labels are taken from these (labels: false says that none are wanted)",
            stacklevel=3,
        )
        return []
    # Folders named 0 to 10 count as numbers do, so that folder 10 is class 10.
    with suppress(ValueError):
        return sorted(folders, key=int)
    return sorted(folders)


def open_hugging_face(name: str | Path, split: str, config: str | None) -> Any:
    """A data set of the hub, or of a folder that ``save_to_disk`` wrote; raises as ``hugging_face``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the package datasets: pip install 'fewstep[data]'") from error
    folder = Path(name).expanduser()
    if not is_saved_to_disk(folder):
        try:
            return datasets.load_dataset(str(name), config, split=split)
        except (OSError, RuntimeError) as error:  # FileNotFoundError and ConnectionError among them
            why = str(error).strip().split("\n")[0]
            raise FileNotFoundError(
                f"cannot get the Hugging Face data set {str(name)!r} ({why}): check the name and the network, "
                "or give a folder that save_to_disk wrote"
            ) from error
    loaded = datasets.load_from_disk(folder)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise errors.unknown(f"split of {name}", split, map(str, loaded))
    return loaded[split]


def find_columns(
    table: Any, name: str | Path, image: str | None, label: str | None, *others: str | None
) -> tuple[dict[str, str], str | None, str | None]:
    """The kinds of the columns of a Hugging Face data set, and its columns of pictures and of classes: those that are
    named, else the first of each, None where there is none.

    Raises:
        ValueError: a column that is named, these or ``others``, is not there.
    """
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    for column in (image, label, *others):
        if column is not None and column not in kinds:
            raise errors.unknown(f"column of {name}", column, kinds)
    first = {kind: column for column, kind in reversed(kinds.items())}
    return kinds, image or first.get("Image"), label or first.get("ClassLabel")


def read_column(table: Any, column: str) -> list[Any]:
    """A column as plain values; of the other columns nothing is read, or decoded."""
    return list(table.select_columns([column]).with_format(None)[:][column])


def undecoded(table: Any, column: str) -> Read:
    """What gives the files of a column of pictures, or their bytes, as they are."""
    import datasets

    pictures = table.select_columns([column]).with_format(None).cast_column(column, datasets.Image(decode=False))

    def read(part: slice) -> list[Source]:
        return [(cell["bytes"] or cell["path"]) if cell else b"" for cell in pictures[part][column]]

    return read


def is_saved_to_disk(folder: Path) -> bool:
    """Whether a folder is what ``datasets`` writes with ``save_to_disk``."""
    has = {name for name in ("dataset_dict.json", "dataset_info.json", "state.json") if (folder / name).is_file()}
    return "dataset_dict.json" in has or has == {"dataset_info.json", "state.json"}
