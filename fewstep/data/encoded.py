"""Latents and text embeddings from a folder, as ``fewstep.encoding`` writes them: facts and an index in JSON, rows in
shards that are memory-mapped."""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.batch import Batch

FACTS, INDEX, TEXTS, NULL = "encoded.json", "index.json", "texts.json", "null.safetensors"
CAPTIONS = "captions.jsonl"  # the texts themselves, for those who read; a line each
FORMAT = 1


class Encoded:
    """Latents with the conditions of their captions or classes, from a folder of ``fewstep encode``.

    The shards are memory-mapped: a row is read when it is asked for, as float32. Nothing about a row is random.

    Attributes:
        cond: all class labels, where the rows have them; conditions of text are too large for that.
        classes: what the class labels mean, where that is known.

    Raises:
        FileNotFoundError: no such folder, or not all of it is there; says how to go on.
        ValueError: a shard that is damaged, or a format that is not known.

    >>> fit(student, ITVM(teacher), Encoded("encoded"), steps=20_000)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.facts = read_facts(self.folder)
        self.shape: tuple[int, ...] = tuple(self.facts["shape"])
        go_on = f"the command that made the folder goes on with it: {self.facts['command']}"
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{self.folder} is not whole: {go_on}")
        files = json.loads((self.folder / INDEX).read_text())
        try:
            for name, kept in files.items():
                check_size(self.folder / name, kept)
            latents = [name for name in files if name.startswith("latents")]
            self._shards = [read_shard(self.folder / name) for name in latents]
            self.texts = Texts(self.folder) if self.facts["text"] else None
        except ValueError as error:
            raise ValueError(f"{error}: {go_on}") from None
        self._starts = torch.tensor([0, *(files[name]["rows"] for name in latents)]).cumsum(0)
        self.size: int | None = int(self._starts[-1])
        self.classes = tuple(self.facts["classes"] or ())
        if "class_labels" in self._shards[0]:
            self.cond = {"class_labels": torch.cat([shard["class_labels"] for shard in self._shards])}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def null(self) -> dict[str, Tensor]:
        """The conditions of no prompt, one sample's; none for a model without text."""
        return read_null(self.folder)

    @cached_property
    def _text(self) -> Tensor:
        """Which of the captions is each row's."""
        return torch.cat([shard["text"] for shard in self._shards])

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,): latents and conditions."""
        return Batch(self.bare(index), self._conditions(index))

    def bare(self, index: Tensor) -> Tensor:
        """The latents of ``index`` (n,) alone, (n, c, h, w)."""
        which = torch.searchsorted(self._starts, index, right=True) - 1
        return gathered((shard["latents"] for shard in self._shards), which, index - self._starts[which], self.shape)

    def captions(self, index: Tensor) -> list[str]:
        """The captions of ``index`` (n,), to be shown; empty where there are none."""
        return [] if self.texts is None else self.texts.captions(self._text[index])

    def check(self) -> None:
        """Read every shard, and see that it is what was written.

        Raises:
            ValueError: one is damaged; names it.
        """
        for name, kept in json.loads((self.folder / INDEX).read_text()).items():
            if not is_whole(self.folder / name, kept):
                raise ValueError(f"{self.folder / name} is damaged: {self.facts['command']} makes it anew")

    def _conditions(self, index: Tensor) -> dict[str, Tensor]:
        cond = {} if self.texts is None else self.texts.rows(self._text[index])
        if "class_labels" in self._shards[0]:
            cond["class_labels"] = self.cond["class_labels"][index]
        return cond


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
                    found[number] = str(json.loads(line))
        return [found.get(number, "") for number in index.tolist()]


def gathered(
    shards: Iterable[Tensor], which: Tensor, place: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows (n, *shape) of several shards: row i is number ``place[i]`` of shard ``which[i]``."""
    out = torch.empty(len(which), *shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
    wanted = set(which.tolist())
    for number, shard in enumerate(shards):
        if number in wanted:
            here = which == number
            out[here] = shard[place[here]].to(out.dtype)
    return out


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``encoded.json`` says of a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is of another format, or no JSON.
    """
    missing = f"nothing encoded in {folder}: there is no {FACTS}; `fewstep encode` makes one"
    return facts_in(folder / FACTS, FORMAT, missing, "encode the data anew")


def facts_in(file: Path, wanted: int, missing: str, way_out: str) -> dict[str, Any]:
    """The facts of a folder in a file of the ``wanted`` format; what is said where it is missing, or of another."""
    if not file.is_file():
        raise FileNotFoundError(missing)
    try:
        facts = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if facts.get("format") != wanted:
        raise ValueError(f"{file} has format {facts.get('format')}, this fewstep reads {wanted}: {way_out}")
    return facts


def read_texts(folder: Path) -> dict[str, Any]:
    """What is known of the texts of a folder: ``count`` and how many are in a ``shard``.

    Raises:
        FileNotFoundError: there are none. ValueError: the file is damaged.
    """
    try:
        return json.loads((folder / TEXTS).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / TEXTS} is damaged ({error})") from None


def text_files(folder: Path, texts: dict[str, Any]) -> list[Path]:
    """The shards of the texts of a folder."""
    return [folder / f"text-{i:05d}.safetensors" for i in range(-(-texts["count"] // texts["shard"]))]


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


def read_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is damaged ({error})") from None


def is_whole(file: Path, kept: dict[str, Any]) -> bool:
    """Whether a file has the hash that it was written with."""
    if not file.is_file() or file.stat().st_size != kept["bytes"]:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == kept["sha256"]


def check_size(file: Path, kept: dict[str, Any]) -> None:
    """That a shard is there and as long as it was written; its hash takes reading it all, see ``Encoded.check``.

    Raises:
        ValueError: it is not.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    if file.stat().st_size != kept["bytes"]:
        raise ValueError(f"{file} is damaged ({file.stat().st_size} bytes, it had {kept['bytes']})")
