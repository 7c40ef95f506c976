"""Which rows and which noise each step sees: the same on one process and on many, at once or accumulated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch, Data
from fewstep.data.buckets import BucketOrder, buckets_of
from fewstep.data.order import epoch_indices
from fewstep.training.shares import check_shares


class Batches:
    """The micro-batches of each step, for one process.

    The ``batch`` rows of a step are made of chunks of ``chunk`` rows. Chunk c of step n draws its rows from the
    generator of (seed, n, c, 1) and its noise from that of (seed, n, c, 2). Processes and micro-batches share out
    whole chunks, in order, so that the rows and the noise of a step do not depend on how many there are. Of data in
    buckets, all rows of a step are of one (``fewstep.data.buckets.BucketOrder``).

    Raises:
        ValueError: the batch cannot be shared out in whole chunks; names one that can.
    """

    def __init__(
        self, data: Data, batch: int, chunk: int, seed: int, accumulate: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        check_shares(batch, chunk, accumulate, processes)
        self.data, self.batch, self.chunk, self.seed = data, batch, chunk, seed
        self.accumulate, self.rows = accumulate, batch // (processes * accumulate)
        self._first = rank * accumulate * self.rows
        self._buckets = buckets_of(data)
        self._order = BucketOrder([b.count for b in self._buckets], batch, seed) if self._buckets else None

    def micro(self, step: int, index: int) -> tuple[Batch, list[torch.Generator]]:
        """Micro-batch ``index`` of this process in step ``step``, and the noise generators of its chunks."""
        offset = self._first + index * self.rows
        if self.data.size is None:
            rows = torch.zeros(self.rows, dtype=torch.long)
        elif self._order is not None:
            bucket, rows = self._order.rows(step, offset, self.rows)
            rows = rows + self._buckets[bucket].first
        else:
            rows = epoch_indices(self.data.size, self.seed, step * self.batch + offset, self.rows)
        chunks = range(offset // self.chunk, (offset + self.rows) // self.chunk)
        parts = [
            self.data.rows(part, generator(self.seed, step, chunk, 1))
            for part, chunk in zip(rows.split(self.chunk), chunks, strict=True)
        ]
        return join(parts), [generator(self.seed, step, chunk, 2) for chunk in chunks]


def few_rows(data: Data, batch: int) -> list[str]:
    """What is worth knowing of data that have fewer rows than an update takes."""
    found = []
    if data.size is not None and data.size < batch:
        each = f"{batch / data.size:.2g} times"
        found.append(f"{data.size} rows of data and batch={batch}: each update sees each row about {each}")
    if few := [one for one in buckets_of(data) if one.count < batch]:
        found.append(
            f"{len(few)} of {len(buckets_of(data))} buckets have fewer rows than batch={batch}: each of their "
            "batches has rows several times, and comes as much more rarely; a smaller batch, or a larger data.step for "
            "fewer buckets, mixes better"
        )
    return found


def join(parts: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in order."""
    if len(parts) == 1:
        return parts[0]

    def joined(values: list[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.cat(there) if there else None

    return Batch(
        torch.cat([part.data for part in parts]),
        {name: torch.cat([part.cond[name] for part in parts]) for name in parts[0].cond},
        joined([part.noise for part in parts]),
        joined([part.states for part in parts]),
        joined([part.times for part in parts]),
    )
