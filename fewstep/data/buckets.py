"""Data whose rows have several shapes: the rows of each shape are a bucket, and a batch is of one bucket."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import generator, mix
from fewstep.data.batch import Batch, Data
from fewstep.data.order import permutation, stream

_BUCKETS = 0x6275636B657473  # "buckets" in ASCII: keeps these generators apart from all others


@dataclass(frozen=True)
class Bucket:
    """Rows of one shape: the ``count`` rows from number ``first`` on of the data that they belong to."""

    shape: tuple[int, ...]
    first: int
    count: int


def buckets_of(data: Any) -> tuple[Bucket, ...]:
    """The buckets of data; none where all rows have one shape."""
    return tuple(getattr(data, "buckets", None) or ())


def usual(buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the most rows, the first of such."""
    return max(buckets, key=lambda bucket: bucket.count)


def bucket_with(buckets: Sequence[Bucket], index: Tensor) -> Bucket:
    """The bucket that the rows of ``index`` (n,) are of.

    Raises:
        ValueError: they are of several.
    """
    row = int(index[0])
    bucket = buckets[bisect_right([bucket.first for bucket in buckets], row) - 1]
    if not bool(((index >= bucket.first) & (index < bucket.first + bucket.count)).all()):
        raise ValueError("rows of several shapes are asked for at once: those of one bucket are needed")
    return bucket


class Buckets:
    """Several data sets, each of one shape, as one: a ``Data`` with ``buckets``, whose rows are numbered through.

    ``fewstep.fit`` trains on it a batch of one bucket at a time (:class:`BucketOrder`); ``shape`` is that of the bucket
    with the most rows, which is also the one that samples and evaluations are of.

    Args:
        parts: the data sets, of finite size each and of different shapes.

    >>> data = Buckets([ArrayData(wide), ArrayData(square), ArrayData(tall)])
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, found, first = tuple(parts), [], 0
        for part in self.parts:
            if part.size is None:
                raise ValueError("a bucket has a number of rows, and these data never end")
            found.append(Bucket(tuple(part.shape), first, part.size))
            first += part.size
        if len({bucket.shape for bucket in found}) < len(found) or not found:
            raise ValueError(f"buckets have different shapes, these are {[bucket.shape for bucket in found]}")
        self.buckets, self.size = tuple(found), first
        self.shape: tuple[int, ...] = usual(found).shape
        self.classes = tuple(getattr(self.parts[0], "classes", ()))
        conds: list[dict[str, Tensor]] = [part.cond for part in self.parts if hasattr(part, "cond")]
        # Images beside the rows are of the shapes of theirs.
        shapes = {name: {cond[name].shape[1:] for cond in conds} for name in conds[0]} if conds else {}
        if len(conds) == len(self.parts) and all(len(kinds) == 1 for kinds in shapes.values()):
            self.cond = {name: torch.cat([cond[name] for cond in conds]) for name in shapes}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,), all of one bucket.

        Raises:
            ValueError: they are of several.
        """
        bucket = bucket_with(self.buckets, index)
        return self.parts[self.buckets.index(bucket)].rows(index - bucket.first, generator)

    def denormalize(self, data: Tensor) -> Tensor:
        """As that of the parts."""
        undo = getattr(self.parts[0], "denormalize", None)
        return data if undo is None else undo(data)


class InBucket:
    """The rows of one bucket alone, counted from 0: a ``Data`` of one shape. What it does not have itself is that of
    the data."""

    def __init__(self, data: Any, bucket: Bucket) -> None:
        self._data, self._bucket = data, bucket
        self.shape, self.size, self.buckets = bucket.shape, bucket.count, None
        part = slice(bucket.first, bucket.first + bucket.count)
        if (cond := getattr(data, "cond", None)) is not None:
            self.cond = {name: value[part] for name, value in cond.items()}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return self._data.rows(index + self._bucket.first, generator)

    def bare(self, index: Tensor) -> Tensor:
        """The rows without their conditions, where the data can give them so."""
        alone = getattr(self._data, "bare", None)
        index = index + self._bucket.first
        return self._data.rows(index, torch.Generator()).data if alone is None else alone(index)

    def captions(self, index: Tensor) -> list[str]:
        said = getattr(self._data, "captions", None)
        return [] if said is None else said(index + self._bucket.first)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "cond":  # copying looks for such names before the data are there
            raise AttributeError(name)
        return getattr(self._data, name)


def of_one_shape(data: Data, shape: Sequence[int] | None = None) -> Data:
    """The rows of one bucket, for what shows and judges: that of ``shape`` where there is one, else of the most rows.
    Data without buckets are what they are."""
    buckets = buckets_of(data)
    if not buckets:
        return data
    same = [bucket for bucket in buckets if shape is not None and bucket.shape == tuple(shape)]
    return InBucket(data, (same or [usual(buckets)])[0])


class BucketOrder:
    """Which rows each step sees where all rows of a step are of one bucket: a pure function of the step.

    In epoch e, of as many rows as there are, the bucket of n rows gets
    ``floor(((e + 1) n + u) / B) - floor((e n + u) / B)`` batches of B, u drawn once from 0 to B - 1, and the batches of
    all buckets come in random order. Within a bucket rows come as in ``epoch_indices``: each once before one of them
    comes again. So there is no incomplete batch, no row is left out, and each is seen as often as every other: of a
    bucket that is smaller than a batch more rarely, several times at once.

    Args:
        counts: the rows of each bucket. batch: rows of a step. seed: decides all.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = tuple(counts), batch, seed
        self._phases = [mix(seed, place, _BUCKETS) % batch for place in range(len(self.counts))]
        # Of each bucket two orders are kept: a batch may end one epoch of it and begin the next.
        self._orders = [
            lru_cache(maxsize=2)(partial(permutation, count, mix(seed, _BUCKETS, place)))
            for place, count in enumerate(self.counts)
        ]
        self._epoch = lru_cache(maxsize=2)(self._batches)

    def rows(self, step: int, offset: int, count: int) -> tuple[int, Tensor]:
        """The bucket of a step, and its rows ``offset`` to ``offset + count`` of that step, counted within the bucket,
        int64 (count,)."""
        epoch = self._epoch_of(step)
        order, before = self._epoch(epoch), step - self._batches_before(epoch)
        bucket = int(order[before])
        seen = self._visits(bucket, epoch) + int((order[:before] == bucket).sum())
        rows = stream(self.counts[bucket], self._orders[bucket], seen * self.batch + offset, count)
        return bucket, rows

    def _visits(self, bucket: int, epoch: int) -> int:
        """How many batches a bucket has had before an epoch."""
        return (epoch * self.counts[bucket] + self._phases[bucket]) // self.batch

    def _batches_before(self, epoch: int) -> int:
        return sum(self._visits(bucket, epoch) for bucket in range(len(self.counts)))

    def _epoch_of(self, step: int) -> int:
        """The last epoch that begins at or before a step: of small data, many begin at one."""
        low, high = 0, (step + 1 + len(self.counts)) * self.batch // sum(self.counts) + 1
        while high - low > 1:  # _batches_before(low) <= step < _batches_before(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        return low

    def _batches(self, epoch: int) -> Tensor:
        """The buckets of the batches of an epoch, in their order."""
        own = [self._visits(bucket, epoch + 1) - self._visits(bucket, epoch) for bucket in range(len(self.counts))]
        batches = torch.arange(len(own)).repeat_interleave(torch.tensor(own))
        return batches[torch.randperm(len(batches), generator=generator(self.seed, epoch, _BUCKETS))]
