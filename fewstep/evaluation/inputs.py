"""What an evaluation starts from: the noise of each sample, what is asked of it, and the rows of the data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.randomness import Generators, generator, sample_generators
from fewstep.data.batch import Batch, Data
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import device_of
from fewstep.flows.sources import starting_points

_SMALL = 1 << 25  # bytes of noise that are kept in memory
_BLOCK = 1000  # rows of data gathered at once: fixed, so that fresh data does not depend on ``batch``
# Keep the generators of rows, fresh data and conditions apart from each other and from those of training.
_ROWS, _FRESH, _CONDITIONS, _TRAINED = 0x726F7773, 0x66726573, 0x636F6E64, 0x74726169
_MOST, _MEMORY = 100_000, 1 << 30  # rows trained on that are looked at, and their bytes


@dataclass(frozen=True)
class Parts:
    """``count`` rows, of which ``make`` gives a range when it is asked for, ``size`` of them at most."""

    count: int
    size: int
    make: Callable[[range], Batch]

    @property
    def ranges(self) -> list[range]:
        return [range(first, min(first + self.size, self.count)) for first in range(0, self.count, self.size)]


@dataclass(frozen=True)
class Starts:
    """Where samples start: the noise of each, and what is asked of it."""

    shape: tuple[int, ...]
    seed: int
    batch: int
    cond: dict[str, Tensor]
    more: "Reader | None" = None
    kept: dict[range, Tensor] = field(default_factory=dict)  # the noise of small samples: drawing it takes its time

    def of(self, model: nn.Module, rows: range) -> tuple[Tensor, Generators, dict[str, Any]]:
        """Noise, the generators it came from (where the model draws more from them) and conditions of some samples,
        where the model is."""
        device = device_of(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        is_renoised = isinstance(model, FlowMap) and model.gamma > 0  # which goes on drawing from the generators
        generators: Generators = []
        if is_renoised or rows not in self.kept:
            # The same bits for all: drawn in float32, whatever the model computes in.
            generators = sample_generators(self.seed, rows)
            drawn = starting_points(model, (len(rows), *self.shape), generators)
            if (len(self.kept) + 1) * self.batch * drawn[0].nbytes <= _SMALL:
                self.kept[rows] = drawn
        else:
            drawn = self.kept[rows]
        cond = {name: value[rows.start : rows.stop] for name, value in self.cond.items()}
        cond |= {} if self.more is None else self.more(rows)
        return drawn.to(device, dtype), generators, {name: value.to(device) for name, value in cond.items()}


def of_one_condition(starts: Starts, row: int, count: int) -> Starts:
    """The same noise, and ``count`` times what sample ``row`` is asked for."""
    cond = {name: value[row : row + 1] for name, value in starts.cond.items()}
    cond |= {} if starts.more is None else starts.more(range(row, row + 1))
    repeated = {name: value.expand(count, *value.shape[1:]) for name, value in cond.items()}
    return Starts(starts.shape, starts.seed, starts.batch, repeated)


@dataclass(frozen=True)
class Reader:
    """What samples are asked for, as the data has it: read when it is needed."""

    data: Data
    index: Tensor
    seed: int

    def __call__(self, samples: range) -> dict[str, Tensor]:
        rows = self.index[torch.arange(samples.start, samples.stop) % len(self.index)]
        return self.data.rows(rows, generator(self.seed, _FRESH, 0, samples.start)).cond


def two_sets(data: Data, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two sets of rows, ``count`` each or as many as there are."""
    if data.size is None:
        return torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    index = torch.randperm(data.size, generator=generator(seed, _ROWS))
    return index[:count], index[count : 2 * count]


def trained_rows(data: Data, seed: int) -> Tensor:
    """Indices of the rows trained on, in order; of more than fit, some at random."""
    size = data.size or 0
    most = min(_MOST, _MEMORY // (4 * math.prod(data.shape)))
    if size <= most:
        return torch.arange(size)
    return torch.randperm(size, generator=generator(seed, _TRAINED))[:most].sort().values


def gather(data: Data, index: Tensor, seed: int, which: int, bare: bool) -> Parts:
    """Rows of the data; ``bare`` without their conditions, which are not read where the data can do without."""
    alone: Any = getattr(data, "bare", None)

    def read(rows: range) -> Batch:
        some, draw = index[rows.start : rows.stop], generator(seed, _FRESH, which, rows.start // _BLOCK)
        if not bare:
            return data.rows(some, draw)
        return Batch(data.rows(some, draw).data if alone is None else alone(some))

    return Parts(len(index), _BLOCK, read)


def in_batches(parts: Parts, most: int, has_cond: bool = True) -> list[Batch]:
    """Rows of the data, ``most`` at a time; without their conditions where the model is asked for nothing."""
    found = []
    for rows in map(parts.make, parts.ranges):
        for start in range(0, len(rows.data), most):
            some = slice(start, start + most)
            cond = {name: value[some] for name, value in rows.cond.items() if has_cond}
            found.append(Batch(rows.data[some], cond))
    return found


def bytes_of_row(cond: Mapping[str, Any]) -> int:
    """Those of a row."""
    return sum(value[0].nbytes for value in cond.values())


def conditions(cond: Mapping[str, Tensor | int], count: int, seed: int) -> dict[str, Tensor]:
    """What each sample is asked for, ``count`` rows."""
    draw, rows = generator(seed, _CONDITIONS), {}
    for name, value in cond.items():
        value = torch.randint(value, (count,), generator=draw) if isinstance(value, int) else value
        rows[name] = value[torch.arange(count) % len(value)]
    return rows
