"""Latents and text embeddings from a folder, as ``fewstep.generation.encoding`` writes them: facts and an index in
JSON, rows in shards that are memory-mapped."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import plain_name
from fewstep.data.batch import Batch
from fewstep.data.buckets import Bucket, bucket_with, usual
from fewstep.data.shards import (
    CHECKS,
    check_floats,
    check_size,
    facts_in,
    gathered,
    is_count,
    is_list,
    is_note,
    is_whole,
    read_shard,
    shards_of,
)
from fewstep.data.texts import Texts, read_null

FACTS, INDEX = "encoded.json", "index.json"
FORMAT = 1
_CHECKS = CHECKS | {
    "labels": lambda value: value is None or isinstance(value, bool),
    "classes": lambda value: value is None or is_list(value, lambda name: isinstance(name, str)),
    "buckets": lambda value: is_list(value, _is_bucket) and bool(value),
}


def _is_bucket(value: Any) -> bool:
    """Whether it is what the facts say of a bucket: the shape of its latents, the height and width of its images, and
    how many there are."""
    return (
        isinstance(value, dict)
        and is_list(value.get("shape"), is_count)
        and is_list(value.get("size"), is_count)
        and len(value["size"]) == 2
        and is_count(value.get("count"))
    )


class Encoded:
    """Latents with the conditions of their captions or classes, from a folder of ``fewstep encode``.

    The shards are memory-mapped: a row is read when it is asked for, as float32. Nothing about a row is random. Images
    that were encoded in buckets of aspects come in ``buckets`` (``fewstep.data.buckets``), and what a model is told of
    an image's size is that of the image itself, of its crop and of its bucket.

    Args:
        buckets: true asks for a folder that was encoded in buckets; one that was has them anyway.

    Attributes:
        cond: all class labels, where the rows have them; conditions of text are too large for that.
        classes: what the class labels mean, where that is known.

    Raises:
        FileNotFoundError: no such folder, or not all of it is there; says how to go on.
        ValueError: a shard that is damaged, or a format that is not known.

    >>> fit(student, ITVM(teacher), Encoded("encoded"), steps=20_000)
    """

    def __init__(self, folder: str | Path, buckets: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.facts = read_facts(self.folder)
        self.shape: tuple[int, ...] = tuple(self.facts["shape"])
        if buckets and "buckets" not in self.facts:
            raise ValueError(
                f"buckets: true, and {self.folder} was encoded at one size, {self.facts.get('size', 'its own')}: "
                "encode the images anew with --buckets into another folder, or leave buckets out"
            )
        go_on = f"the command that made the folder goes on with it: {self.facts['command']}"
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{self.folder} is not whole: {go_on}")
        try:
            files = read_index(self.folder)
            for name, kept in files.items():
                check_size(self.folder / plain_name(name, self.folder / INDEX), kept)
            latents = [name for name in files if name.startswith("latents")]
            self._shards = [read_shard(self.folder / name) for name in latents]
            shapes = _shapes_of(self.folder, self.facts, len(latents))
            for name, shard, shape in zip(latents, self._shards, shapes, strict=True):
                _check_rows(self.folder / name, shard, (files[name]["rows"], *shape), self.facts)
            self.texts = Texts(self.folder) if self.facts.get("text") else None
        except ValueError as error:
            raise ValueError(f"{error}: {go_on}") from None
        self._starts = torch.tensor([0, *(files[name]["rows"] for name in latents)]).cumsum(0)
        self.size: int | None = int(self._starts[-1])
        self.buckets = self._found(shapes) if "buckets" in self.facts else None
        if self.buckets is not None:
            self.shape = usual(self.buckets).shape
        self.classes = tuple(self.facts.get("classes") or ())
        if "class_labels" in self._shards[0]:
            self.cond = {"class_labels": torch.cat([shard["class_labels"] for shard in self._shards])}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _found(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Bucket, ...]:
        """The buckets, by the shapes of the shards: those of one follow each other."""
        found: list[Bucket] = []
        for shape, (first, end) in zip(shapes, pairwise(self._starts.tolist()), strict=True):
            if end > first and found and found[-1].shape == shape:
                found[-1] = Bucket(shape, found[-1].first, end - found[-1].first)
            elif end > first:
                found.append(Bucket(shape, first, end - first))
        return tuple(found)

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
        shape = self.shape if self.buckets is None else bucket_with(self.buckets, index).shape
        which = torch.searchsorted(self._starts, index, right=True) - 1
        return gathered((shard["latents"] for shard in self._shards), which, index - self._starts[which], shape)

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
        return cond if self.buckets is None else cond | self._sizes(index, cond)

    @cached_property
    def _cuts(self) -> Tensor:
        """Of each image its own height and width, and the top and left of its crop, (N, 4)."""
        return torch.cat([shard["cut"] for shard in self._shards])

    def _sizes(self, index: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a model is told of the sizes of images in buckets, in the place of what it was told with their text:
        of SDXL the own size, the crop, the bucket's; of PixArt the bucket's and its aspect."""
        assert self.buckets is not None
        shape = bucket_with(self.buckets, index).shape
        bucket = torch.tensor(next(one["size"] for one in self.facts["buckets"] if tuple(one["shape"]) == shape))
        sizes = bucket.expand(len(index), 2)
        told = {
            "time_ids": torch.cat([self._cuts[index], sizes], dim=1),
            "resolution": sizes,
            "aspect_ratio": sizes[:, :1] / sizes[:, 1:],
        }
        return {name: value.to(cond[name]) for name, value in told.items() if name in cond}


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


def _shapes_of(folder: Path, facts: dict[str, Any], shards: int) -> list[tuple[int, ...]]:
    """The shape of the latents in each shard.

    Raises:
        ValueError: there are other shards than the facts say.
    """
    if "buckets" not in facts:
        return [tuple(facts["shape"])] * shards
    found = [tuple(one["shape"]) for one in facts["buckets"] for _ in range(shards_of({**facts, **one}))]
    if len(found) != shards:
        raise ValueError(f"{folder / INDEX} names {shards} shards of latents, and {FACTS} says {len(found)}")
    return found


def _check_rows(file: Path, shard: dict[str, Tensor], shape: tuple[int, ...], facts: dict[str, Any]) -> None:
    """That a shard has the rows that it should have, and what is said of each."""
    found = {name: tuple(value.shape) for name, value in shard.items()}
    wanted = {"latents": shape}
    wanted |= {name: shape[:1] for name, key in (("text", "text"), ("class_labels", "labels")) if facts.get(key)}
    wanted |= {"cut": (shape[0], 4)} if "buckets" in facts else {}
    if found != wanted:
        raise ValueError(f"{file} holds {str(found)[:120]} and not {wanted}")
    check_floats(file, {"latents": shard["latents"]})
