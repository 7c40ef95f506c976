"""Data that come from other data, not from noise: the two ends of a stochastic interpolant (arXiv 2303.08797)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch, Data, is_prior
from fewstep.data.buckets import buckets_of
from fewstep.data.given import Around, as_data


class Between(Around):
    """Data whose rows each bring along a row of another data set, where the flow to them starts: a ``Data`` around
    another, for a student on an :class:`~fewstep.flows.interpolants.Interpolant`.

    The row of the ``source`` is drawn at random, from the generator of the rows that are asked for together, after what
    the data draws from it; ``Coupled`` around it pairs them by optimal transport. Its labels and other conditions play
    no part.

    Raises:
        ValueError: two shapes that differ, a source without rows.

    >>> threes, eights = (images[labels == digit] for digit in (3, 8))
    >>> fit(student, PSD(), Between(eights, threes), steps=20_000)
    """

    two_sided = brings_noise = may_couple = True

    def __init__(self, data: Any, source: Any) -> None:
        super().__init__(data)
        self.source_data = source = as_data(source)
        if is_prior(source) or is_prior(data):
            raise ValueError("data: prior has no rows, and a flow between two data sets needs those of both")
        if getattr(self.data, "brings_noise", False):
            raise ValueError("these data come with the noise that each row is made of: leave the source out")
        if buckets_of(self.data) or buckets_of(source):
            raise ValueError("a flow between two data sets pairs rows of one shape: leave buckets out of both")
        if tuple(source.shape) != tuple(self.shape):
            raise ValueError(
                f"a sample of the source has shape {tuple(source.shape)}, one of the data {tuple(self.shape)}: they "
                "must agree"
            )

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as the data gives them, with rows of the source as their noise."""
        batch = self.data.rows(index, generator)
        return replace(batch, noise=draw_rows(self.source_data, len(index), generator))


def draw_rows(data: Data, count: int, generator: torch.Generator) -> Tensor:
    """Rows of data at random, with replacement, (count, ...), without their conditions."""
    index = torch.zeros(count, dtype=torch.long)
    if data.size is not None:
        index = torch.randint(data.size, (count,), generator=generator)
    return data.rows(index, generator).data
