"""The calls of a model: counted, and told of while they are made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fewstep.flows.guided import Guided


class Calls:
    """How often a network was called, and for how many rows."""

    def __init__(self) -> None:
        self.count, self.rows = 0, 0


@contextmanager
def count_calls(model: nn.Module) -> Iterator[Calls]:
    """Count the calls of a model's network, or of the model itself where it has none (an exact field).

    >>> with count_calls(student) as calls:
    ...     sample(student, noise, steps=4)
    >>> calls.count
    4
    """
    calls = Calls()

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls.count += 1
        calls.rows += len(arguments[0])

    handles = [network.register_forward_pre_hook(hook) for network in networks_of(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def networks_of(model: nn.Module) -> set[nn.Module]:
    """What a model calls: of a guided field, the networks of both."""
    if isinstance(model, Guided):
        return networks_of(model.field) | (set() if model.weak is None else networks_of(model.weak))
    return {getattr(model, "network", model)}


@contextmanager
def each_call(model: nn.Module, expected: int, tick: Callable[[float], None], work: float) -> Iterator[None]:
    """Tells of ``work`` bit by bit, while a model does it in ``expected`` calls that are made within: so that the one
    who waits for a large batch sees it go on. However many calls there were, ``work`` is told of in the end.

    >>> with each_call(teacher, 100, lambda more: print(more, "more"), work=len(noise)):
    ...     sample(teacher, noise, steps=100)
    """
    left = work

    def hook(*_: Any) -> None:
        nonlocal left
        if left > 1.5 * work / expected:  # the last with what comes after it
            left -= work / expected
            tick(work / expected)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    tick(left)
