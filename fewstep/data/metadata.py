"""What is said of images in files beside them, as other trainers write and read it: rows of ``metadata.jsonl``,
``.csv`` or ``.parquet``, and a ``.txt`` or ``.caption`` for each image."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.common.errors import unknown
from fewstep.common.reading import no_file, parse_json, read_text, reading
from fewstep.data.listing import Folder

# Columns that are taken for captions where none is named.
CAPTIONS = ("text", "caption", "prompt")
# The first that is in a folder is read.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")
_ROW = '{"file_name": "0001.png", "text": "a cat"}'
_LONGEST = 1 << 20  # bytes of a caption: more is none


def metadata_files(folder: Folder) -> list[str]:
    """The files of rows in a folder and below it, one in each."""
    there = {name for name in folder.others if name.rpartition("/")[2] in METADATA}
    folders = {name.rpartition("/")[0]: "" for name in sorted(there)}
    names = ([f"{at}/{name}".lstrip("/") for name in METADATA] for at in folders)
    return [next(name for name in some if name in there) for some in names]


def captions_in(file: Path, root: Path, caption: str | None) -> Iterator[tuple[str, str | None, str | None]]:
    """The images of a file of rows by their names under the root, the caption of each, and why it cannot be used.

    Raises:
        ValueError: the file cannot be read, a row that is none, or no column of captions.
    """
    column = None
    for where, row in _rows_of(file):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} is no row of a file_name and a text, such as {_ROW}")
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"{where}: file_name {name[:100]} is not beside {file.name}")
        if column is None:
            column = caption or next((known for known in CAPTIONS if known in row), None)
            if column is None:
                held = ", ".join(map(str, row))[:150]
                raise ValueError(f"{where} has no caption ({', '.join(CAPTIONS)}), only {held}: say caption: COLUMN")
            if column not in row:
                raise unknown(f"column of {file}", column, map(str, row))
        why = no_file(file.parent / inner)
        yield (
            (file.parent / inner).relative_to(root).as_posix(),
            text_of(row.get(column)),
            why and f"{where}: {why}",
        )


def _rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with what to call it."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{file} needs the package pyarrow: pip install 'fewstep[data]'") from error
        with reading(file):
            rows = parquet.read_table(file).to_pylist()
        yield from ((f"row {i} of {file}", row) for i, row in enumerate(rows))
        return
    text = read_text(file)
    if file.suffix == ".jsonl":
        # Not by splitlines: a text may have a U+2028 in it, and JSON keeps it as it is.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield (where := f"line {number} of {file}"), parse_json(line, where)
        return
    head = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if "file_name" in [name.strip('" ') for name in head.split(mark)]), ",")
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    with reading(file):
        for row in table:
            yield f"line {table.line_num} of {file}", {key: value for key, value in row.items() if key is not None}


def sidecars(folder: Folder, kinds: Iterable[str] = SIDECARS) -> list[Path | None]:
    """The file of each image's caption, which has its name and one of these suffixes; None where there is none."""
    there = set(folder.others)
    stems = (name.rpartition(".")[0] for name in folder.names)
    found = (next((stem + kind for kind in kinds if stem + kind in there), None) for stem in stems)
    return [None if name is None else folder.root / name for name in found]


def caption_in(file: Path | None) -> str | None:
    """The caption in a file of one, its lines joined by spaces; None where there is none.

    Raises:
        ValueError: it is no text in UTF-8.
    """
    if file is None or no_file(file) or file.stat().st_size > _LONGEST:
        return None
    return " ".join(line.strip() for line in read_text(file).split("\n") if line.strip())


def text_of(value: Any) -> str | None:
    """A caption; the first, where there are several."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def checked(texts: Iterable[str | None]) -> tuple[list[str], dict[int, str]]:
    """Captions, and which rows have none."""
    texts = list(texts)
    return [text or "" for text in texts], {i: "it has no caption" for i, text in enumerate(texts) if text is None}
