"""The order in which training visits the rows of a data set."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from fewstep.common.randomness import generator

_ORDER = 0x6F72646572  # "order" in ASCII: keeps these generators apart from those of noise and times


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, in the smallest of torch's numbers that holds it: it is kept for as long as it lasts."""
    order = torch.randperm(size, generator=generator(seed, epoch, _ORDER))
    return order.to(torch.int32) if size <= 1 << 31 else order


# Two are kept, since a batch may end one epoch and begin the next.
_permutation = lru_cache(maxsize=2)(permutation)


def epoch_indices(size: int, seed: int, start: int, count: int) -> Tensor:
    """Positions ``start`` to ``start + count`` of the endless stream of epochs, int64 (count,).

    Every epoch is a permutation of ``range(size)`` decided by (seed, epoch). A pure function of its arguments: where a
    run was stopped, how it is cut into batches and how many processes share a batch change nothing about the stream.
    ``count`` may exceed ``size``.
    """
    return stream(size, partial(_permutation, size, seed), start, count)


def stream(size: int, order: Callable[[int], Tensor], start: int, count: int) -> Tensor:
    """The same of epochs whose orders (size,) a function gives by their number."""
    end = start + count
    epochs = range(start // size, (end - 1) // size + 1)
    # cat copies, so that writing to the answer cannot spoil the kept permutation.
    parts = [order(e)[max(start - e * size, 0) : min(end - e * size, size)] for e in epochs]
    return torch.cat(parts).long()
