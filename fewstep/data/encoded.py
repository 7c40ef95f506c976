"""Latents and text embeddings from a folder, as ``fewstep.generation.encoding`` writes them: facts and an index in
JSON, rows in shards that are memory-mapped."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.common.errors import briefly, shown
from fewstep.common.reading import no_file, parse_json, read_text
from fewstep.common.received import plain_name
from fewstep.data.batch import Batch

FACTS, INDEX, TEXTS, NULL = "encoded.json", "index.json", "texts.json", "null.safetensors"
CAPTIONS = "captions.jsonl"  # the texts themselves, for those who read; a line each
FORMAT = 1


MOST_SHARDS = 100_000  # their names have five digits


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def is_said(value: Any) -> bool:
    """Whether it is a text, or nothing."""
    return value is None or isinstance(value, str)


# What facts of folders may be, where they have them: of all folders, and of those with pictures or latents of them.
CHECKS: dict[str, Callable[[Any], bool]] = {
    "shape": lambda value: is_list(value, _is_count) and bool(value),
    "count": _is_count,
    "shard": _is_count,
    "command": lambda value: isinstance(value, str),
    "text": is_said,
    "vae": is_said,
}
_CHECKS = CHECKS | {
    "labels": lambda value: value is None or isinstance(value, bool),
    "classes": lambda value: value is None or is_list(value, lambda name: isinstance(name, str)),
}


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
        try:
            files = read_index(self.folder)
            for name, kept in files.items():
                check_size(self.folder / plain_name(name, self.folder / INDEX), kept)
            latents = [name for name in files if name.startswith("latents")]
            self._shards = [read_shard(self.folder / name) for name in latents]
            for name, shard in zip(latents, self._shards, strict=True):
                _check_rows(self.folder / name, shard, (files[name]["rows"], *self.shape), self.facts)
            self.texts = Texts(self.folder) if self.facts.get("text") else None
        except ValueError as error:
            raise ValueError(f"{error}: {go_on}") from None
        self._starts = torch.tensor([0, *(files[name]["rows"] for name in latents)]).cumsum(0)
        self.size: int | None = int(self._starts[-1])
        self.classes = tuple(self.facts.get("classes") or ())
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
        for name, kept in read_index(self.folder).items():
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
                    found[number] = str(parse_json(line, f"line {number + 1} of {CAPTIONS}"))
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
    facts = facts_in(folder / FACTS, FORMAT, missing, "encode the data anew", _CHECKS)
    if absent := [key for key in ("shape", "command") if key not in facts]:
        raise ValueError(f"{folder / FACTS} says nothing of {absent[0]}: encode the data anew")
    return facts


def facts_in(
    file: Path, wanted: int, missing: str, way_out: str, checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """The facts of a folder in a file of the ``wanted`` format; what is said where it is missing, or of another.
    ``checks`` say what each of them may be."""
    if not file.is_file():
        raise FileNotFoundError(missing)
    facts = parse_json(read_text(file), str(file))
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is no mapping of facts: {way_out}")
    if facts.get("format") != wanted:
        raise ValueError(f"{file} has format {shown(facts.get('format'))}, this fewstep reads {wanted}: {way_out}")
    for key, check in checks.items():
        if key in facts and not check(facts[key]):
            raise ValueError(f"{file} has {key}: {shown(facts[key])}, which cannot be: {way_out}")
    if facts.keys() >= {"count", "shard"} and shards_of(facts) > MOST_SHARDS:
        raise ValueError(f"{file} has more than {MOST_SHARDS:,} shards, which cannot be: {way_out}")
    return facts


def shards_of(facts: Mapping[str, Any]) -> int:
    """How many files rows are in, by their ``count`` and how many are in a ``shard``."""
    return -(-facts["count"] // facts["shard"])


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The shards of an encoded folder by name, and what each is known by.

    Raises:
        ValueError: the file is damaged, or names something that is no shard of the folder.
    """
    file = folder / INDEX
    index = parse_json(read_text(file), str(file))
    for name, kept in index.items() if isinstance(index, dict) else [("", {})]:
        if Path(name).name != name or not is_note(kept):
            raise ValueError(f"{file} is damaged: {name[:60]!r} is no shard with its rows, bytes and sha256")
    if not any(name.startswith("latents") for name in index):
        raise ValueError(f"{file} is damaged: it names no latents")
    return index


def is_note(kept: Any) -> bool:
    """Whether a value is what a shard is known by."""
    kinds = {"rows": int, "bytes": int, "sha256": str}
    return isinstance(kept, dict) and all(type(kept.get(k)) is kind for k, kind in kinds.items()) and kept["rows"] >= 0


def _check_rows(file: Path, shard: dict[str, Tensor], shape: tuple[int, ...], facts: dict[str, Any]) -> None:
    """That a shard has the rows that it should have, and what is said of each."""
    found = {name: tuple(value.shape) for name, value in shard.items()}
    wanted = {"latents": shape}
    wanted |= {name: shape[:1] for name, key in (("text", "text"), ("class_labels", "labels")) if facts.get(key)}
    if found != wanted:
        raise ValueError(f"{file} holds {str(found)[:120]} and not {wanted}")
    check_floats(file, {"latents": shard["latents"]})


def check_floats(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """That tensors are of a type that fewstep writes numbers in.

    Raises:
        ValueError: one is not, by its name.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{file} has {name} of {tensor.dtype}, and float16, bfloat16 or float32 is needed")


def read_texts(folder: Path) -> dict[str, Any]:
    """What is known of the texts of a folder: ``count`` and how many are in a ``shard``.

    Raises:
        FileNotFoundError: there are none. ValueError: the file is damaged.
    """
    file = folder / TEXTS
    known = parse_json(read_text(file), str(file))
    if not isinstance(known, dict) or not all(_is_count(known.get(key)) for key in ("count", "shard")):
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


def read_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped.

    Raises:
        ValueError: it is damaged.
    """
    if why := no_file(file):
        raise ValueError(f"{file} is damaged ({why})")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({briefly(error)})") from None


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
