"""What an evaluation found: a table that is kept as JSON, read back and put beside others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fewstep.common.parsing import checked
from fewstep.common.reading import parse_json, read_text
from fewstep.evaluation.measure import METRICS


@dataclass(eq=False)
class Evaluation:
    """How good a model is at each number of network calls, and its teacher beside it.

    Attributes:
        rows: one a model and step count: ``model`` (student or teacher), ``steps``, ``nfe`` (network calls a sample;
            guidance makes two a step) and the metrics.
        floor: the metrics of data against data, as many rows: what a perfect model would have. Empty where there are
            not enough data for two sets.
        facts: what else decides the numbers: shape, count, seed, rows of data, rows with end points, extractor.
        samples: the first 64 of each row, ``"student 1"``, ``"teacher 100"``, ..., and of ``"data"``, on the CPU.
        captions: the prompts of those samples; empty where they were not asked for by a text.
    """

    rows: list[dict[str, Any]]
    floor: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict, repr=False)
    captions: list[str] = field(default_factory=list, repr=False)

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows. The floor, where there is one, is the last row; None stands where there is no value."""
        columns = list(dict.fromkeys(chain.from_iterable(self.rows)))
        rows = [*self.rows, {"model": "data", **self.floor}] if self.floor else self.rows
        return columns, [[row.get(column) for column in columns] for row in rows]

    def to_json(self) -> str:
        """All but the samples."""
        return json.dumps({"rows": self.rows, "floor": self.floor, "facts": self.facts}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """What ``to_json`` wrote."""
        return cls._of(parse_json(text, "an evaluation"), "an evaluation")

    @classmethod
    def read(cls, file: Path) -> "Evaluation":
        """That of a ``quality.json``.

        Raises:
            ValueError: it is none, or was changed; says what is wrong.
        """
        return cls._of(parse_json(read_text(file), str(file)), file)

    @classmethod
    def _of(cls, value: Any, where: str | Path) -> "Evaluation":
        kept = checked(_Kept, value, where, "measure again, with fewstep evaluate RUN")
        return cls(**kept.model_dump(exclude_unset=True))


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]  # the metrics  # pyright: ignore[reportIncompatibleVariableOverride]
    model: str
    steps: int
    nfe: float


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow")
    shape: list[int]
    count: int


class _Kept(BaseModel):
    """What ``quality.json`` says."""

    model_config = ConfigDict(extra="forbid")
    rows: list[_Row] = Field(min_length=1)
    floor: dict[str, float | None] = {}
    facts: _Facts


# What decides the numbers of an evaluation: with other values they say nothing beside each other.
_DECISIVE = ("shape", "count", "data", "extractor")


def alike(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Evaluation]]:
    """The evaluations in groups that :func:`compare` takes: of one shape, count, data and extractor each."""
    groups: dict[str, dict[str, Evaluation]] = {}
    for name, evaluation in evaluations.items():
        key = json.dumps([evaluation.facts.get(fact) for fact in _DECISIVE])
        groups.setdefault(key, {})[name] = evaluation
    return list(groups.values())


def compare(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[Any]]]:
    """Several students side by side: columns ``metric``, ``nfe``, one for each name, and one for the teacher, or one
    for each teacher where they differ. A row is a metric at a number of network calls; None where it was not measured.

    Raises:
        ValueError: if they were measured on another number of samples, shape or extractor: such values say nothing
            beside each other.
    """
    (base, one), *others = evaluations.items()
    for name, other in others:
        for fact in _DECISIVE:
            if one.facts.get(fact) != other.facts.get(fact):
                has, differs = one.facts.get(fact), other.facts.get(fact)
                raise ValueError(
                    f"{base!r} was evaluated with {fact} = {has}, {name!r} with {differs}: evaluate both alike"
                )
    series = {name: _by_calls(e, "student") for name, e in evaluations.items()}
    teachers = {name: found for name, e in evaluations.items() if (found := _by_calls(e, "teacher"))}
    if len({json.dumps(t) for t in teachers.values()}) == 1:
        teachers = {"teacher": next(iter(teachers.values()))}
    else:
        teachers = {f"{name}'s teacher": t for name, t in teachers.items()}
    series |= teachers
    metrics = dict.fromkeys(m for points in series.values() for row in points.values() for m in row if m in METRICS)
    rows = []
    for metric in metrics:
        for nfe in sorted({n for points in series.values() for n in points}):
            values = [points.get(nfe, {}).get(metric) for points in series.values()]
            rows.append([metric, nfe, *values])
    return ["metric", "nfe", *series], rows


def _by_calls(evaluation: Evaluation, role: str) -> dict[int, dict[str, Any]]:
    return {row["nfe"]: row for row in evaluation.rows if row["model"] == role}
