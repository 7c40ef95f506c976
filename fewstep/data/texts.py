"""The conditions of distinct texts, as folders of latents and of pairs keep them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.common.reading import parse_json, read_text
from fewstep.data.shards import (
    MOST_SHARDS,
    gathered,
    is_count,
    read_shard,
    shards_of,
)

TEXTS, NULL = "texts.json", "null.safetensors"
CAPTIONS = "captions.jsonl"  # the texts themselves, for those who read; a line each


class Texts:
    """The conditions of distinct texts, from the shards of a folder; memory-mapped.

    Raises:
        FileNotFoundError: a shard is missing. ValueError: one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        known = read_texts(folder)
        files = text_files(folder, known)
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{len(missing)} of {len(files)} shards of text are missing, one is {missing[0]}")
        self._folder = folder
        self._shards = [read_shard(file) for file in files]
        self._shard: int = known["shard"]

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions of the texts of ``index`` (n,); floats as float32."""
        which, place = index // self._shard, index % self._shard
        return {
            name: gathered((shard[name] for shard in self._shards), which, place, tuple(first.shape[1:]), first.dtype)
            for name, first in self._shards[0].items()
        }

    def captions(self, index: Tensor) -> list[str]:
        """The texts of ``index`` (n,) as they were written; empty for a folder from before they were kept."""
        if not (self._folder / CAPTIONS).is_file():
            return []
        wanted, found = set(index.tolist()), {}
        with (self._folder / CAPTIONS).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number in wanted:
                    found[number] = str(parse_json(line, f"line {number + 1} of {CAPTIONS}"))
        return [found.get(number, "") for number in index.tolist()]


def read_texts(folder: Path) -> dict[str, Any]:
    """What is known of the texts of a folder: ``count`` and how many are in a ``shard``.

    Raises:
        FileNotFoundError: there are none. ValueError: the file is damaged.
    """
    file = folder / TEXTS
    known = parse_json(read_text(file), str(file))
    if not isinstance(known, dict) or not all(is_count(known.get(key)) for key in ("count", "shard")):
        raise ValueError(f"{file} is damaged: it has no count and shard")
    if shards_of(known) > MOST_SHARDS:
        raise ValueError(f"{file} is damaged: it has more than {MOST_SHARDS:,} shards")
    return known


def text_files(folder: Path, texts: dict[str, Any]) -> list[Path]:
    """The shards of the texts of a folder."""
    return [folder / f"text-{i:05d}.safetensors" for i in range(shards_of(texts))]


def read_null(folder: Path) -> dict[str, Tensor]:
    """The conditions of no prompt, as they are kept in a folder; empty where there are none.

    Raises:
        ValueError: they are damaged.
    """
    if not (folder / NULL).is_file():
        return {}
    try:
        return read_shard(folder / NULL)
    except ValueError as error:
        raise ValueError(f"{error}: the command that made the folder makes it anew") from None
