"""Conditions drawn anew for each row: left out now and then, which guidance needs (arXiv 2207.12598), and the strength
of guidance, for students that are told it (arXiv 2210.03142)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.common.randomness import uniform
from fewstep.data.batch import Batch, Data
from fewstep.data.given import Around


class Dropped(Around):
    """Data whose conditions give way to those that stand for none, in a share of the rows: a ``Data`` around another.

    All the conditions named in ``null`` go together, row by row; the others stay. Which rows is drawn from their
    generator, after what the data draws.

    Args:
        data: what conditions are dropped from. share: of the rows, in [0, 1].
        null: what stands for none, a number or one sample's tensor each, such as ``{"class_labels": 10}``.

    Raises:
        ValueError: a share outside [0, 1], nothing to drop, or a condition that the data does not have.
    """

    def __init__(self, data: Data, share: float, null: Mapping[str, Tensor | float]) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"conditions are dropped in a share of {share} of the rows: it lies in [0, 1]")
        if not null:
            raise ValueError("conditions are dropped in favour of those for none: say null, as in {class_labels: 10}")
        super().__init__(data)
        self.share, self.null = share, dict(null)
        has = getattr(self.data, "cond", None)
        if has is None:
            has = self.data.rows(torch.zeros(1, dtype=torch.long), torch.Generator()).cond
        if missing := sorted(set(null) - set(has)):
            raise ValueError(f"there is no condition {missing[0]!r} to drop, the data has {', '.join(has) or 'none'}")

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as the data gives them, some without their conditions."""
        batch = self.data.rows(index, generator)
        out = uniform(len(batch), generator) < self.share
        cond = dict(batch.cond)
        for name, value in self.null.items():
            kept = cond[name]
            cond[name] = torch.where(out.view(-1, *[1] * (kept.ndim - 1)), blank(name, value, kept), kept)
        return replace(batch, cond=cond)


def blank(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """The condition that stands for none, a number or one sample's tensor, for rows like these (B, ...).

    Raises:
        ValueError: a fraction, or NaN, for a condition of whole numbers, which has no such value.
    """
    if isinstance(value, float) and not value.is_integer() and not like.is_floating_point():
        raise ValueError(f"null: {name} is {value}, and the condition {name} has whole numbers ({like.dtype})")
    return torch.as_tensor(value).to(like).expand_as(like)


class Strengths(Around):
    """Data whose rows have the condition ``guidance`` (n,), drawn uniformly from a range: a ``Data`` around another.

    A :class:`fewstep.Guided` teacher guides each row by its own strength, and the student is told it, whatever the
    objective: one student for all strengths.

    Args:
        data: what the rows come from. low, high: the range of strengths.

    Raises:
        ValueError: a range that is none, or data that has a condition of that name.

    >>> fit(FlowMap.from_field(teacher, guidance=True), ITVM(Guided(teacher, 2.0, null=null)), Strengths(data, 1, 3))
    """

    def __init__(self, data: Data, low: float, high: float) -> None:
        if not low <= high:
            raise ValueError(f"the strengths of guidance run from {low} to {high}: the first is the smaller one")
        if "guidance" in getattr(data, "cond", {}):
            raise ValueError("the data has a condition guidance, which would be drawn anew: leave one of them out")
        super().__init__(data)
        self.low, self.high = low, high

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as the data gives them, and the strength of each."""
        batch = self.data.rows(index, generator)
        strength = self.low + (self.high - self.low) * uniform(len(batch), generator)
        return replace(batch, cond={**batch.cond, "guidance": strength.to(batch.data)})

    @property
    def cond(self) -> dict[str, Tensor]:
        """The conditions of all rows, where the data has them so; the ends of the range for the strengths."""
        return {**self.data.cond, "guidance": torch.tensor([self.low, self.high])}  # pyright: ignore
