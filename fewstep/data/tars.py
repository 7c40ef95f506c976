"""Pictures and captions in webdataset shards: plain tar files, read by the places of the files in them."""

import glob
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fewstep.data.captions import CAPTIONS, Captioned, Rows, checked, identity_of, text_of
from fewstep.data.pictures import SUFFIXES

_LONGEST = 1 << 20  # bytes of a caption: more is none


def webdataset(name: str | Path, caption: str | None = None, labels: bool = True, captions: bool = True) -> Captioned:
    """Webdataset shards: a ``.tar``, a folder of them, or several by a pattern: ``train-{0000..0099}.tar``, ``*.tar``.

    Files of one name are one row: a picture, and its caption in a ``.txt`` or in ``text`` (else ``caption`` or
    ``prompt``) of a ``.json``; a class in a ``.cls``. Only the names are read until a picture is wanted.

    Args:
        caption: the key of the captions in the ``.json``, or ``txt``. labels, captions: whether they are wanted.

    Raises:
        FileNotFoundError: a shard is not there. ValueError: one is damaged or compressed, or has no pictures.
    """
    files = _tar_files(str(name))
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    identity = identity_of("webdataset", stats, [caption, labels, captions])
    return Captioned(str(name), identity, lambda: _shard_rows(files, caption, labels, captions))


def _tar_files(name: str) -> list[Path]:
    """The shards that a name stands for, in order."""
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    found = []
    for one in _braces(str(path)):
        matching = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        found += matching
        if not matching or not Path(matching[0]).is_file():
            raise FileNotFoundError(f"no shard {one}: shards are files here, fetch those that lie elsewhere")
    return [Path(one) for one in found]


def _braces(text: str) -> list[str]:
    """``a{0..2}`` as a0, a1, a2, and ``{x,y}`` as x, y; numbers keep their zeros."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = []
    for inner in parts[1::2]:
        run = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
        if run is None:
            choices.append(inner.split(","))
        else:
            choices.append([f"{i:0{len(run[1])}d}" for i in range(int(run[1]), int(run[2]) + 1)])
    fixed = parts[::2]
    return ["".join(a + b for a, b in zip(fixed, [*chosen, ""], strict=True)) for chosen in product(*choices)]


def is_shards(folder: Path) -> bool:
    """Whether a folder holds shards, and no pictures beside them."""
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return any(path.suffix == ".tar" for path in names) and not any(path.suffix.lower() in SUFFIXES for path in names)


def _shard_rows(files: Sequence[Path], caption: str | None, labels: bool, captions: bool) -> Rows:
    names: list[str] = []
    places: list[tuple[Path, int, int]] = []
    texts: list[str | None] = []
    classes: list[int | None] = []
    for file in files:
        for key, row in _grouped(file):
            if "picture" not in row:
                continue
            names.append(f"{key} in {file}")
            places.append((file, *row["picture"]))
            texts.append(_caption_of(row, caption, names[-1]) if captions else None)
            classes.append(int(row["cls"]) if labels and str(row.get("cls", "")).strip().isdigit() else None)
    if not names:
        raise ValueError(f"no pictures ({', '.join(SUFFIXES)}) in {files[0]}{' and others' if len(files) > 1 else ''}")

    def read(part: slice) -> list[bytes]:
        found = []
        for file, start, size in places[part]:
            with file.open("rb") as opened:
                opened.seek(start)
                found.append(opened.read(size))
        return found

    has_text = captions and (caption is not None or any(text is not None for text in texts))
    said, problems = checked(texts) if has_text else (None, {})
    numbers = [number for number in classes if number is not None]
    return Rows(names, read, said, numbers if len(numbers) == len(names) else None, problems=problems)


def _grouped(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a shard by their name before the first dot: where the picture is, and what is said of it."""
    key, row = "", {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isfile() or member.issparse() or not stem:
                    continue
                if (now := f"{folder}/{stem}".lstrip("/")) != key:
                    if row:
                        yield key, row
                    key, row = now, {}
                kind = kind.lower()
                if f".{kind}" in SUFFIXES:
                    row["picture"] = member.offset_data, member.size
                elif kind in ("txt", "json", "cls") and member.size <= _LONGEST:
                    content = tar.extractfile(member)
                    row[kind] = content.read().decode(errors="replace") if content else ""
    except tarfile.TarError as error:
        raise ValueError(f"{file} cannot be read ({error}): it is damaged, or compressed (unpack it first)") from None
    if row:
        yield key, row


def _caption_of(row: dict[str, Any], caption: str | None, name: str) -> str | None:
    if caption in (None, "txt") and "txt" in row:
        return text_of(row["txt"].strip())
    try:
        said = json.loads(row.get("json", "{}"))
    except ValueError:
        raise ValueError(f"the .json of {name} is not JSON") from None
    if not isinstance(said, dict):
        return None
    return text_of(said.get(caption or next((c for c in CAPTIONS if c in said), "")))
