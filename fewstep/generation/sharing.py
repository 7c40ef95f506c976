"""Several processes draw one set of samples: who draws which rows, and all of them together again."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.common.distributed import World


def shares(count: int, batch: int, world: World) -> list[range]:
    """Rows 0 to ``count - 1`` in calls of a network of ``batch`` at most, as equal as can be: of process r of ``size``
    are those at r, r + size, r + 2 size, ..."""
    rounds = -(-count // (batch * world.size))
    rows = -(-count // (rounds * world.size))
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def gathered(parts: Sequence[Tensor], batches: Sequence[range], world: World) -> Tensor | None:
    """All samples in order, on the main process; None on the others.

    Args:
        parts: the samples of this process's own among ``batches``, on the CPU. batches: the :func:`shares` of all.
    """
    whole = []
    for place, rows in enumerate(batches):
        owner = place % world.size
        if owner == world.rank == 0:
            whole.append(parts[place // world.size])
        elif owner == world.rank:
            dist.send(parts[place // world.size].contiguous(), 0)
        elif world.rank == 0:
            like = parts[0]
            whole.append(torch.empty(len(rows), *like.shape[1:], dtype=like.dtype))
            dist.recv(whole[-1], owner)
    return torch.cat(whole) if world.rank == 0 else None
