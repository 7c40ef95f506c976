"""Hugging Face data sets as tables: opened, and their columns of images, numbers and classes found."""

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.common import errors
from fewstep.common.errors import briefly, shortened
from fewstep.data.decode import Read, Source, is_decodable

LISTS = ("List", "LargeList", "Sequence")
# What is read of a column of images; see ``kind_of``.
PICTURE_KINDS = ("Image", "binary", "bytes and path", "base64")


def is_saved_to_disk(folder: Path) -> bool:
    """Whether a folder is what ``datasets`` writes with ``save_to_disk``."""
    has = {name for name in ("dataset_dict.json", "dataset_info.json", "state.json") if (folder / name).is_file()}
    return "dataset_dict.json" in has or has == {"dataset_info.json", "state.json"}


def open_table(name: str | Path, split: str, config: str | None) -> Any:
    """A data set of the hub, or of a folder that ``save_to_disk`` wrote.

    Raises:
        FileNotFoundError: it cannot be had, for instance offline. ValueError: no such split, or a damaged folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the package datasets: pip install 'fewstep[data]'") from error
    folder = Path(name).expanduser()
    if not is_saved_to_disk(folder):
        try:
            return datasets.load_dataset(str(name), config, split=split)
        except (OSError, RuntimeError) as error:  # FileNotFoundError and ConnectionError among them
            why = shortened(str(error).strip().split("\n")[0], 160)
            raise FileNotFoundError(
                f"cannot get the Hugging Face data set {str(name)!r} ({why}): check the name and the network, "
                "or give a folder that save_to_disk wrote"
            ) from error
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # whatever pyarrow and datasets stumble over
        raise ValueError(f"{folder} is no data set that datasets can load ({briefly(error)}): save it anew") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise errors.unknown(f"split of {name}", split, map(str, loaded))
    return loaded[split]


def find_columns(
    table: Any, name: str | Path, image: str | None, label: str | None, *others: str | None
) -> tuple[dict[str, str], str | None, str | None]:
    """The kinds of the columns of a table, and its columns of images and of classes: those that are named, else the
    first of each, None where there is none. Columns of ``Image`` come before those of bytes, these before text.

    Raises:
        ValueError: a column that is named, these or ``others``, is not there.
    """
    kinds = {column: kind_of(table, column) for column in table.features}
    for column in (image, label, *others):
        if column is not None and column not in kinds:
            raise errors.unknown(f"column of {name}", column, kinds)
    first = {kind: column for column, kind in reversed(kinds.items())}
    found = next((first[kind] for kind in PICTURE_KINDS if kind in first), None)
    return kinds, image or found, label or first.get("ClassLabel")


def kind_of(table: Any, column: str) -> str:
    """What a column holds: the name of its feature, or where more is known ``binary``, ``bytes and path`` (as
    ``Image`` keeps it) or ``base64`` (text that is an image, as the first row shows)."""
    feature = table.features[column]
    if isinstance(feature, dict):
        return "bytes and path" if set(feature) == {"bytes", "path"} else "dict"
    kind, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    if kind in LISTS and type(_innermost(feature)).__name__ == "Image":
        return "lists of Image"
    if kind == "Value" and "binary" in dtype:
        return "binary"
    if kind == "Value" and "string" in dtype and len(table) and _is_base64(read_column(table.select([0]), column)[0]):
        return "base64"
    return kind


def _innermost(feature: Any) -> Any:
    while type(feature).__name__ in LISTS:
        feature = feature.feature
    return feature


def read_arrays(table: Any, column: str) -> np.ndarray:
    """A column of arrays or lists as one array, of uint8 where that is what it has: datasets would make it int64."""
    is_uint8 = getattr(_innermost(table.features[column]), "dtype", None) == "uint8"
    kind: dict[str, Any] = {"dtype": np.uint8} if is_uint8 else {}
    return np.asarray(table.select_columns([column]).with_format("numpy", **kind)[:][column])


def held_by(kinds: dict[str, str]) -> str:
    """The columns of a table and their kinds, for errors."""
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items())[:200]


def read_column(table: Any, column: str) -> list[Any]:
    """A column as plain values; of the other columns nothing is read, or decoded."""
    return list(table.select_columns([column]).with_format(None)[:][column])


def undecoded(table: Any, column: str, kind: str) -> Read:
    """What gives the files of a column of images, or their bytes, as they are."""
    import datasets

    pictures = table.select_columns([column]).with_format(None)
    if kind == "Image":
        pictures = pictures.cast_column(column, datasets.Image(decode=False))
    return lambda part: [_source_of(cell) for cell in pictures[part][column]]


def _source_of(cell: Any) -> Source:
    """The bytes of an image or its file; no bytes where there is none."""
    if isinstance(cell, dict):
        return cell["bytes"] or cell["path"] or b""
    if isinstance(cell, str):
        return _from_base64(cell)
    return cell or b""


def _from_base64(text: str) -> bytes:
    # Pages of the web write "data:image/png;base64," before it.
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except (ValueError, binascii.Error):
        return b""


def _is_base64(text: Any) -> bool:
    """Whether a value is an image as text in base64."""
    return isinstance(text, str) and len(text) >= 64 and is_decodable(_from_base64(text))
