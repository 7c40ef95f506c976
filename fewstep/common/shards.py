"""Tensors of which each process keeps a share (``DTensor``): what is a whole one, what a share, and how one becomes the
other."""

from typing import Any

import torch
from torch import Tensor, nn


def is_shard(tensor: Any) -> bool:
    """Whether a process keeps only its share of a tensor (a ``DTensor``)."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that this process keeps, on the same memory: all of one that is whole."""
    if not is_shard(tensor):
        return tensor
    shard: Any = tensor
    with torch.no_grad():
        return shard.to_local()


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what a process keeps where it is sharded as ``like`` is."""
    if not is_shard(like):
        return whole
    shard: Any = like
    rows = -(-len(whole) // shard.device_mesh.size())
    first = min(shard.device_mesh.get_local_rank() * rows, len(whole))
    return whole[first : first + rows]


def shard_like(own: Tensor, like: Tensor) -> Tensor:
    """A tensor of which the processes have the parts that they have of ``like``."""
    if not is_shard(like):
        return own
    from torch.distributed.tensor import DTensor

    shard: Any = like
    return DTensor.from_local(
        own, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are shared out over the processes, so that all of them have to call it."""
    return any(map(is_shard, model.parameters()))
