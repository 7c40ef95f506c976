"""Images and captions in webdataset shards: plain tar files, read by the places of the files in them, here or behind
addresses."""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from fewstep.common.disk import replace_file
from fewstep.common.distributed import environment
from fewstep.common.errors import briefly
from fewstep.common.reading import no_file, parse_json, read_text
from fewstep.common.user_folders import cache_folder
from fewstep.data.captions import Captioned, Rows, identity_of
from fewstep.data.decode import size_or_why
from fewstep.data.formats import PICTURES, is_picture
from fewstep.data.metadata import CAPTIONS, checked, text_of
from fewstep.data.remote import KEEP, Remote, Slots, check_address, described, is_remote

_LONGEST = 1 << 20  # bytes of a caption: more is none
_MOST_BRACES, _MOST = 16, 100_000  # pairs of braces, and shards behind addresses


def webdataset(
    name: str | Path, caption: str | None = None, labels: bool = True, captions: bool = True, keep: int = KEEP
) -> Captioned:
    """Webdataset shards: a ``.tar``, a folder of them, or several by a pattern: ``train-{0000..0099}.tar``, ``*.tar``;
    also behind addresses, ``https://host/train-{0000..0099}.tar`` or ``hf://datasets/OWNER/NAME/train-{00..99}.tar``.

    Files of one name are one row: an image, and its caption in a ``.txt`` or in ``text`` (else ``caption`` or
    ``prompt``) of a ``.json``; a class in a ``.cls``. Only the names are read until an image is wanted.

    Args:
        caption: the key of the captions in the ``.json``, or ``txt``. labels, captions: whether they are wanted.
        keep: of shards behind addresses, how many may be on the disk, for all processes of this machine together. They
            are fetched one after the other, once to list what is in them (which is kept) and once to read it.

    Raises:
        FileNotFoundError: a shard is not there. ValueError: one is damaged or compressed, or has no images; an address
            that is none, a command (``pipe:``). ConnectionError: a server that cannot be reached.
    """
    if is_remote(str(name)):
        check_address(str(name))
        slots = Slots(cache_folder() / "shards", keep)
        if len(urls := list(islice(_braces(str(name)), _MOST + 1))) > _MOST:
            raise ValueError(f"{str(name)[:200]} stands for more than {_MOST:,} shards: make them larger, and fewer")
        found = [_fetched(remote, slots) for remote in described(urls)]
    else:
        found = [_local(file) for file in _tar_files(str(name))]
    identity = identity_of("webdataset", [shard.stamp for shard in found], [caption, labels, captions])
    return Captioned(str(name), identity, lambda: _shard_rows(found, caption, labels, captions))


Held = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Shard:
    """A tar file: ``open`` gives it for as long as it is read, ``held`` what is in it (see :func:`_grouped`)."""

    name: str
    stamp: list[Any]
    open: Callable[[], AbstractContextManager[Path]]
    held: Callable[[], Held]


def _local(file: Path) -> Shard:
    stamp = [file.name, file.stat().st_size, file.stat().st_mtime_ns]
    return Shard(str(file), stamp, lambda: nullcontext(file), lambda: list(_grouped(file, str(file))))


def _fetched(remote: Remote, slots: Slots) -> Shard:
    """A shard behind an address. What is in it, the sizes of images too, is kept in the cache, so that no other start
    fetches it for that."""
    key = hashlib.sha256(json.dumps(remote.stamp).encode()).hexdigest()[:32]
    index = cache_folder() / "shard-lists" / f"{key}.json"

    def held() -> Held:
        if index.is_file():
            return [(name, row) for name, row in parse_json(read_text(index), str(index))]
        with slots.file(remote) as file:
            found = list(_grouped(file, remote.name, is_measured=True))
        replace_file(index, json.dumps(found).encode())
        return found

    return Shard(remote.name, remote.stamp, partial(slots.file, remote), held)


def _tar_files(name: str) -> list[Path]:
    """The shards that a name stands for, in order. Of millions of names the first that is not there ends it."""
    path = Path(name).expanduser()
    if name.count("{") > _MOST_BRACES:
        raise ValueError(f"{name[:200]} has more than {_MOST_BRACES} pairs of braces")
    if os.path.isdir(path):
        return sorted(file for file in path.glob("*.tar") if file.is_file())
    if os.path.exists(path):
        names = iter([str(path)])
    else:
        names = (found for one in _braces(str(path)) for found in (sorted(glob.glob(one)) or [one]))
    found = []
    for one in names:
        if why := no_file(Path(one)):
            raise FileNotFoundError(
                f"no shard {one[:200]}: shards are files here, fetch those that lie elsewhere ({why})"
            )
        found.append(Path(one))
    if not found:
        raise FileNotFoundError(f"{name[:200]} stands for no shard: ranges run upwards, as in {{000..099}}")
    return found


def _braces(text: str) -> Iterator[str]:
    """``a{0..2}`` as a0, a1, a2, and ``{x,y}`` as x, y; numbers keep their zeros."""
    before, inner, after = re.fullmatch(r"([^{}]*)(?:\{([^{}]*)\})?(.*)", text, re.DOTALL).groups()  # pyright: ignore
    if inner is None:
        yield text
        return
    run = re.fullmatch(r"([0-9]{1,15})\.\.([0-9]{1,15})", inner)
    words = inner.split(",") if run is None else (f"{i:0{len(run[1])}d}" for i in range(int(run[1]), int(run[2]) + 1))
    for word in words:
        yield from (f"{before}{word}{rest}" for rest in _braces(after))


def is_shards(folder: Path) -> bool:
    """Whether a folder holds shards, and no images beside them."""
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return any(path.suffix == ".tar" for path in names) and not any(is_picture(path.name) for path in names)


def _shard_rows(shards: Sequence[Shard], caption: str | None, labels: bool, captions: bool) -> Rows:
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    texts: list[str | None] = []
    classes: list[int | None] = []
    sizes: list[Any] = []
    # Processes begin at shards of their own, and find in the cache what others have listed meanwhile.
    world, held = environment(), {}
    for number in sorted(range(len(shards)), key=lambda number: (number - world.rank) % world.size):
        held[number] = shards[number].held()
    for number, shard in enumerate(shards):
        for key, row in held.pop(number):
            if "picture" not in row:
                continue
            names.append(f"{key} in {shard.name}")
            places.append((number, *row["picture"]))
            sizes.append(row.get("size"))
            texts.append(_caption_of(row, caption, names[-1]) if captions else None)
            classes.append(int(row["cls"]) if labels and str(row.get("cls", "")).strip().isdigit() else None)
    if not shards:
        raise ValueError("no shards there that are files: .tar files are needed")
    if not names:
        raise ValueError(f"no images ({PICTURES}) in {shards[0].name}{' and others' if len(shards) > 1 else ''}")

    def read(part: slice) -> list[bytes]:
        found = []
        for number, inside in groupby(places[part], itemgetter(0)):
            with shards[number].open() as file, file.open("rb") as opened:
                for _, start, size in inside:
                    opened.seek(start)
                    found.append(opened.read(size))
        return found

    has_text = captions and (caption is not None or any(text is not None for text in texts))
    said, problems = checked(texts) if has_text else (None, {})
    numbers = [number for number in classes if number is not None]
    measured = [tuple(size) if isinstance(size, list) else size for size in sizes] if all(sizes) else None
    return Rows(names, read, said, numbers if len(numbers) == len(names) else None, problems=problems, sizes=measured)


def _grouped(file: Path, called: str, is_measured: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a shard by their name before the first dot: where the image is, and what is said of it; of one that
    ``is_measured`` how large the image is."""
    key, row = "", {}
    there = file.stat().st_size
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
                if member.offset_data + member.size > there:
                    raise ValueError(f"{member.name[:80]!r} should have {member.size} bytes, which are not there")
                if is_picture(f"image.{kind}"):
                    row["picture"] = member.offset_data, member.size
                    if is_measured and (content := tar.extractfile(member)):
                        row["size"] = size_or_why(content.read())
                elif kind in ("txt", "json", "cls") and member.size <= _LONGEST:
                    content = tar.extractfile(member)
                    text = content.read().decode("utf-8-sig", errors="replace") if content else ""
                    row |= {} if "\0" in text else {kind: text}  # another encoding is no text
    except Exception as error:  # a damaged header may say anything
        why = briefly(error)
        raise ValueError(f"{called} cannot be read ({why}): it is damaged, or compressed (unpack it first)") from None
    if row:
        yield key, row


def _caption_of(row: dict[str, Any], caption: str | None, name: str) -> str | None:
    if caption in (None, "txt") and "txt" in row:
        return text_of(row["txt"].strip())
    said = parse_json(row.get("json", "{}"), f"the .json of {name[:200]}")
    if not isinstance(said, dict):
        return None
    return text_of(said.get(caption or next((c for c in CAPTIONS if c in said), "")))
