"""The network calls that a training step is made of, counted by kind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.objectives import Objective

# What a batch through a network costs, in steps of flow matching, by kind of call (see Counts). A backward pass is
# worth two forward passes, one to the inputs and one to the weights. Forward mode has no such rule: what ``probes``
# measured on the MLP of ``benchmarks/objectives.py``, one CPU thread (plain came out as 0.34 there, frozen as 0.64).
UNITS = {"trained": 1.0, "frozen": 2 / 3, "plain": 1 / 3, "tangent": 0.75, "tangent_trained": 2.35}


@dataclass(frozen=True)
class Counts:
    """What a step asks of the networks of student, target and teacher.

    Rows, in batches, by kind of call: ``trained``, forward and backward to the weights; ``frozen``, forward and
    backward to the inputs alone; ``plain``, forward alone; ``tangent``, forward mode (value and derivative) with no
    backward; ``tangent_trained``, forward mode and backward through it. ``calls`` is how often a network was called,
    ``jvps`` how often in forward mode. Whether a call has a backward pass is judged as it is made: one whose result is
    detached later counts as one that has.
    """

    trained: float = 0.0
    frozen: float = 0.0
    plain: float = 0.0
    tangent: float = 0.0
    tangent_trained: float = 0.0
    calls: int = 0
    jvps: int = 0

    @property
    def rows(self) -> dict[str, float]:
        """The kinds of call that occur, and their rows in batches."""
        kinds = {field.name: getattr(self, field.name) for field in fields(self) if field.name in UNITS}
        return {kind: rows for kind, rows in kinds.items() if rows}


@contextmanager
def counting(student: nn.Module, objective: Objective, target: nn.Module | None) -> Iterator[Callable[[int], Counts]]:
    """Count the calls of all networks that a loss knows; gives a function from the rows of a batch to the counts."""
    rows = dict.fromkeys(UNITS, 0)
    calls = jvps = 0

    def hook(network: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal calls, jvps
        is_dual = any(isinstance(a, Tensor) and _has_tangent(a) for a in arguments)
        has_weights = any(p.requires_grad for p in network.parameters())
        is_deep = torch.is_grad_enabled() and (has_weights or any(_wants_grad(a) for a in arguments))
        kind = "trained" if has_weights else "frozen"
        if is_dual:
            kind = "tangent_trained" if is_deep else "tangent"
        elif not is_deep:
            kind = "plain"
        rows[kind] += len(arguments[0])
        calls, jvps = calls + 1, jvps + is_dual

    handles = [network.register_forward_pre_hook(hook) for network in _networks(student, objective, target)]
    try:
        yield lambda batch: Counts(**{kind: n / batch for kind, n in rows.items()}, calls=calls, jvps=jvps)
    finally:
        for handle in handles:
            handle.remove()


def _networks(student: nn.Module, objective: Objective, target: nn.Module | None) -> set[nn.Module]:
    """What is called: the networks of maps and fields, and the fields that have none (exact ones)."""
    models = [student, objective, *([target] if target is not None else [])]
    if objective.has_teacher:
        models.append(objective.teacher)
    found: set[nn.Module] = set()
    for part in (part for model in models for part in model.modules()):
        if isinstance(part, FlowMap | NetworkField):
            found.add(part.network)
        elif isinstance(part, VelocityField) and not isinstance(part, Guided):
            found.add(part)
    return found


def _has_tangent(x: Tensor) -> bool:
    is_inside = forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    return is_inside and forward_ad.unpack_dual(x).tangent is not None


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
