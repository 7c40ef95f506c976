"""Times that a distribution calls ``native``: moved as the scheduler of the student's model does, by the size of a
sample."""

from typing import Any

import torch
from torch import Tensor

from fewstep.flows.times import NATIVE, without_native


def moved_natively(distribution: str, student: Any, times: Tensor, data: Tensor) -> Tensor:
    """Times (B,) as a distribution wants them: with ``native`` before it, moved as the scheduler of the student's model
    does for samples of so many tokens as ``data`` (B, ...) has: where there is a times as much noise beside the data.
    """
    if not without_native(distribution)[1]:
        return times
    shift, path = student.shift, student.path
    tokens = shift.tokens(tuple(data.shape[1:]))
    if path.is_straight or path.two_sided:
        return shift.moved(times, tokens)
    moved = path.time_of(path.alpha(times), shift.strength(tokens) * path.sigma(times))
    return torch.where((times == 0) | (times == 1), times, moved)


def check_native(distribution: str, student: Any) -> None:
    """That a distribution with ``native`` before it is for a student whose model has a scheduler that moves times.

    Raises:
        ValueError: it is not, or the scheduler's are those of a number of steps.
    """
    if not without_native(distribution)[1]:
        return
    if (shift := getattr(student, "shift", None)) is None:
        raise ValueError(
            f"times: {distribution}: {NATIVE} moves times as the flow-match scheduler of the student's model does, and "
            "this one has none: name the distribution alone"
        )
    if shift.by_steps:
        shift.strength(1)
