"""Several processes make one thing together: each makes items of its own, and the main process has them in order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from fewstep.common.distributed import World

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_turn(items: Sequence[Item], make: Callable[[Item], Made], world: World) -> Iterator[Made]:
    """What is made of each item, in their order, on the main process; on the others nothing, though they have to be
    iterated over too. Process r makes those of items r, r + size, r + 2 size, ..., and none is a round ahead, so that
    memory holds as many as there are processes."""
    for start in range(0, len(items), world.size):
        mine = [make(items[start + world.rank])] if start + world.rank < len(items) else []
        if world.size == 1:
            yield from mine
            continue
        found: list[Any] | None = [None] * world.size if world.is_main else None
        dist.gather_object(mine, found)
        for made in found or ():
            yield from made


def rounds(items: int, world: World) -> int:
    """How many of so many items the main process makes, which has the most: see :func:`in_turn`."""
    return -(-items // world.size)


def told(value: Made, world: World) -> Made:
    """What the main process has, in every process; anything that can be pickled, as they trust each other."""
    held: list[Any] = [value]
    if world.size > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]
