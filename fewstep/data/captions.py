"""Pictures and what is said of them, where they lie: folders with ``metadata.jsonl`` and Hugging Face data sets.

Nothing is decoded here: ``fewstep.encoding`` turns them into what a latent model trains on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data.decode import Source
from fewstep.data.pictures import (
    class_folders,
    find_columns,
    find_pictures,
    open_hugging_face,
    read_column,
    undecoded,
)
from fewstep.errors import unknown

# Columns that are taken for captions where none is named.
CAPTIONS = ("text", "caption", "prompt")
_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Rows:
    """Pictures, a row each: ``read`` gives the files (or their bytes) of a slice, ``names`` what to call them.

    ``captions`` and ``labels`` (whole numbers, of ``classes``) are one a row, None where there are none. ``problems``
    says of rows that cannot be used why.
    """

    names: Sequence[str]
    read: Callable[[slice], Sequence[Source]]
    captions: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Captioned:
    """A source of pictures and captions, by its ``name``. ``identity`` changes when they do; ``rows`` are listed when
    first needed."""

    name: str
    identity: str
    _list: Callable[[], Rows]

    @cached_property
    def rows(self) -> Rows:
        return self._list()


def image_folder(name: str | Path, caption: str | None = None, labels: bool = True, captions: bool = True) -> Captioned:
    """The pictures of a folder and those below it.

    Where there is a ``metadata.jsonl`` (one in each sub-folder, if one likes), its rows are the pictures: ``file_name``
    beside it, and the caption in ``text`` (else ``caption`` or ``prompt``). Otherwise all pictures are taken, without
    captions, and two or more sub-folders are classes.

    Args:
        caption: the column of the captions. labels: whether sub-folders are classes.
        captions: whether captions are wanted; otherwise ``metadata.jsonl`` is not read.

    Raises:
        FileNotFoundError: no such folder, no pictures in it, or a picture that is not there.
        ValueError: an unknown column, or a line that is no row.
    """
    root = Path(name).expanduser()
    names = find_pictures(root)
    lists = sorted(root.rglob(_METADATA)) if captions else []
    if not lists:
        if captions and caption is not None:
            raise ValueError(f"caption: {caption} names a column of {_METADATA}, and there is none in {root}")
        classes = class_folders(names, root) if labels else []
        number = {name: k for k, name in enumerate(classes)}
        rows = Rows(
            [str(root / name) for name in names],
            [root / name for name in names].__getitem__,
            labels=[number[name.split("/")[0]] for name in names] if classes else None,
            classes=tuple(classes),
        )
        identity = identity_of("folder", [_stat(root, name) for name in names], rows.labels)
        return Captioned(str(root), identity, lambda: rows)

    listed: list[tuple[str, str | None]] = []
    for file in lists:
        listed += _metadata(file, root, caption)
    texts, problems = checked([text for _, text in listed])
    files = [root / name for name, _ in listed]
    rows = Rows([str(file) for file in files], files.__getitem__, texts, problems=problems)
    identity = identity_of("folder", [_stat(root, name) for name, _ in listed], texts)
    return Captioned(str(root), identity, lambda: rows)


def hugging_face(
    name: str | Path,
    split: str = "train",
    config: str | None = None,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    labels: bool = True,
    captions: bool = True,
) -> Captioned:
    """A data set of the Hugging Face hub (``hf:NAME``), or a folder that ``save_to_disk`` wrote.

    Args:
        split, config: which part of it.
        image: the column of pictures, by default the first. caption: that of the captions, by default ``text``,
            ``caption`` or ``prompt``, else the only one of text. label: that of the classes.
        labels, captions: whether they are wanted.

    Raises:
        FileNotFoundError: the data set cannot be had. ValueError: an unknown split or column, or no pictures.
    """
    source = str(name).removeprefix("hf:")
    table = open_hugging_face(source, split, config)
    kinds, image, label = find_columns(table, source, image, label, caption)
    if image is None or kinds[image] != "Image":
        held = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise ValueError(f"{source} has no column of pictures{f' {image}' if image else ''}, only {held}")
    texts = [
        c for c, feature in table.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    caption = caption or next((c for c in CAPTIONS if c in kinds), texts[0] if len(texts) == 1 else None)
    caption = caption if captions else None
    read = undecoded(table, image)

    def rows() -> Rows:
        said, problems = (None, {}) if caption is None else checked(map(text_of, read_column(table, caption)))
        return Rows(
            [f"row {i} of {source}" for i in range(len(table))],
            read,
            said,
            read_column(table, label) if label and labels else None,
            tuple(table.features[label].names) if label and kinds[label] == "ClassLabel" else (),
            problems,
        )

    identity = identity_of("hugging-face", table._fingerprint, [image, caption, label, labels])
    return Captioned(str(name), identity, rows)


def _metadata(file: Path, root: Path, caption: str | None) -> Iterator[tuple[str, str | None]]:
    """The pictures of one ``metadata.jsonl`` by their names under the root, and their captions."""
    column = caption
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line)
            inner = PurePosixPath(row["file_name"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{where} is no row: {{"file_name": "0001.png", "text": "a cat"}} is one') from None
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"{where}: file_name {row['file_name']} is not beside {_METADATA}")
        if not (file.parent / inner).is_file():
            raise FileNotFoundError(f"{where}: there is no picture {file.parent / inner}")
        if column is None:
            column = next((name for name in CAPTIONS if name in row), None)
            if column is None:
                raise ValueError(
                    f"{where} has no caption ({', '.join(CAPTIONS)}), only {', '.join(row)}: say caption: COLUMN"
                )
        elif number == 1 and column not in row:
            raise unknown(f"column of {file}", column, row)
        yield (file.parent / inner).relative_to(root).as_posix(), text_of(row.get(column))


def text_of(value: Any) -> str | None:
    """A caption; the first, where there are several."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def checked(texts: Iterable[str | None]) -> tuple[list[str], dict[int, str]]:
    """Captions, and which rows have none."""
    texts = list(texts)
    return [text or "" for text in texts], {i: "it has no caption" for i, text in enumerate(texts) if text is None}


def _stat(root: Path, name: str) -> list[Any]:
    found = (root / name).stat()
    return [name, found.st_size, found.st_mtime_ns]


def identity_of(kind: str, *what: Any) -> str:
    """A source by its kind and a hash of what decides its rows."""
    return f"{kind} {hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"
