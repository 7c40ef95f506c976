"""The most bytes that a training step holds at once: on the CPU, where torch counts none, by the tensors themselves."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def held_bytes(device: torch.device, *parts: nn.Module | None) -> Iterator[Callable[[], int]]:
    """The most bytes held at once inside; gradients of weights are left out: all methods have them."""
    with dropping_gradients(*parts):
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield lambda: torch.cuda.max_memory_allocated(device) - before
        else:
            with Allocations() as made:
                yield lambda: made.peak


@contextmanager
def dropping_gradients(*parts: nn.Module | None) -> Iterator[None]:
    """Gradients of weights are dropped as they come."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    weights = {p for part in parts if part is not None for p in part.parameters() if p.requires_grad}
    handles = [p.register_post_accumulate_grad_hook(drop) for p in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live: torch counts none on the CPU. It sits below
    autograd and forward mode, so that it sees what they keep; the work space inside a kernel it does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for address, storage in {storage._cdata: storage for storage in storages(result)}.items():
            if address in given:  # a view, or written in place
                continue
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """What the tensors of nested arguments are kept in, one for each."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
