"""Pairs of noise and data from a folder, as ``fewstep.generation.reflow`` writes them: facts in JSON, rows in
shards."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch, with_ends
from fewstep.data.shards import CHECKS, check_floats, facts_in, gathered, is_count, is_list, is_said, shards_of
from fewstep.data.shards import read_shard as read_tensors
from fewstep.data.texts import Texts

FACTS = "pairs.json"
FORMAT = 1
_CHECKS = CHECKS | {
    "labels": lambda value: value is None or is_list(value, lambda label: type(label) is int and label >= 0),
    "prompts": is_said,
    "states": lambda value: value is None or is_count(value),
    "source": lambda value: value is None or isinstance(value, dict),
    "after": lambda value: value is None or is_list(value, is_count),
    "path": lambda value: value is None or is_list(value, lambda number: type(number) in (int, float)),
}


class Pairs:
    """The pairs in a folder of ``fewstep reflow``: each row brings its own noise (arXiv 2209.03003).

    The shards are memory-mapped: a row is read when it is asked for. Nothing about a row is random.

    Attributes:
        states: how many states between noise and data each row has, with their times; 0 for none.
        two_sided: whether their noise is rows of another data set, where a model between two data sets starts.
        path: the path that those are on, by its ``quarters``; None where there are none.
        cond: all class labels, where there are any; the conditions of prompts are too large for that.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing; says which, and how to go on.
        ValueError: a shard that is damaged or of something else, a format that is not known.

    >>> fit(student, FlowMatching(), Pairs("pairs"), steps=20_000)
    """

    brings_noise = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.facts = read_facts(self.folder)
        self.size: int | None = self.facts["count"]
        self.shape: tuple[int, ...] = tuple(self.facts["shape"])
        self.two_sided = self.facts.get("source") is not None
        self.states: int = self.facts.get("states") or 0
        self.path: list[float] | None = self.facts.get("path")
        files = shard_files(self.folder, self.facts)
        go_on = f"the command that made the folder goes on with it: {self.facts['command']}"
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(files)} shards are missing, the first is {missing[0]}: {go_on}"
            )
        try:
            self._shards = [read_shard(self.folder, self.facts, i) for i in range(len(files))]
            self._texts = Texts(self.folder) if self.facts.get("prompts") else None
        except ValueError as error:
            raise ValueError(f"{error}: {go_on}") from None
        if self._texts is None:
            names = [name for name in self._shards[0] if name not in ("noise", "data", "states", "times")]
            self.cond = {name: torch.cat([shard[name] for shard in self._shards]) for name in names}

    @cached_property
    def _text(self) -> Tensor:
        """Which of the prompts is each row's."""
        return torch.cat([shard["text"] for shard in self._shards])

    def __len__(self) -> int:
        return self.facts["count"]

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,): data, conditions, the noise that each came from, and the states between."""
        if self._texts is not None:
            cond = self._texts.rows(self._text[index])
        else:
            cond = {name: value[index] for name, value in self.cond.items()}
        found = Batch(self._gather("data", index), cond, self._gather("noise", index))
        if not self.states:
            return found
        states = self._gather("states", index, (self.states, *self.shape))
        return replace(found, states=states, times=self._gather("times", index, (self.states,)))

    def bare(self, index: Tensor) -> Tensor:
        """The data of ``index`` (n,) alone."""
        return self._gather("data", index)

    def captions(self, index: Tensor) -> list[str]:
        """The prompts of ``index`` (n,), to be shown; empty where there are none."""
        return [] if self._texts is None else self._texts.captions(self._text[index])

    def _gather(self, name: str, index: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        rows = self.facts["shard"]
        return gathered((shard[name] for shard in self._shards), index // rows, index % rows, shape or self.shape)


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``pairs.json`` says of the pairs in a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is of another format, or no JSON.
    """
    missing = f"no pairs in {folder}: there is no {FACTS}; `fewstep reflow MODEL` makes one"
    facts = facts_in(folder / FACTS, FORMAT, missing, "make the pairs anew", _CHECKS)
    if absent := [key for key in ("count", "shard", "shape", "labels", "command") if key not in facts]:
        raise ValueError(f"{folder / FACTS} says nothing of {absent[0]}: make the pairs anew")
    return facts


def shard_files(folder: Path, facts: dict[str, Any]) -> list[Path]:
    """The files that the pairs are in once all are made."""
    return [folder / f"pairs-{i:05d}.safetensors" for i in range(shards_of(facts))]


def shard_rows(facts: dict[str, Any], shard: int) -> range:
    """Which pairs a shard holds."""
    return range(shard * facts["shard"], min((shard + 1) * facts["shard"], facts["count"]))


def read_shard(folder: Path, facts: dict[str, Any], shard: int) -> dict[str, Tensor]:
    """``noise``, ``data``, the conditions of one shard, and where there are any its ``states`` (rows, K, ...) and
    their ``times`` (rows, K); memory-mapped.

    Raises:
        ValueError: it is damaged or holds something else, times that do not rise within (0, 1) among it.
    """
    file, rows = shard_files(folder, facts)[shard], len(shard_rows(facts, shard))
    tensors = read_tensors(file)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wanted = {"noise": (rows, *facts["shape"]), "data": (rows, *facts["shape"])}
    if facts["labels"] is not None:
        wanted["class_labels"] = (rows,)
    if facts.get("prompts"):
        wanted["text"] = (rows,)
    states = facts.get("states")
    if states:
        wanted |= {"states": (rows, states, *facts["shape"]), "times": (rows, states)}
    if found != wanted:
        raise ValueError(f"{file} holds {str(found)[:120]} and not {wanted}")
    check_floats(file, {name: tensors[name] for name in ("noise", "data", *(("states", "times") if states else ()))})
    if states:
        _check_times(file, tensors["times"])
    return tensors


def _check_times(file: Path, times: Tensor) -> None:
    """That the times of a shard's states, (rows, K), rise within (0, 1) row by row."""
    rises = (with_ends(times).diff() > 0).all(1)
    if not rises.all():
        row = int((~rises).nonzero()[0])
        raise ValueError(
            f"{file} has states at the times {times[row].tolist()} (row {row}), which do not rise within (0, 1)"
        )
