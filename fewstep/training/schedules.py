"""Learning-rate schedules: pure functions of how far the training is, so that there is no state to save."""

import math
from collections.abc import Callable

from fewstep.common.errors import unknown

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def schedule_factor(name: str, progress: float, step: int = 0, warmup: int = 0) -> float:
    """What the learning rate is multiplied by, in [0, 1]: the decay at ``progress`` times the linear warm-up.

    Args:
        name: ``constant`` or ``cosine`` (1 at progress 0, 0 at progress 1).
        progress: how much of the training is done, in [0, 1]; by steps or by time.
        step: the number of updates done.
        warmup: steps of linear warm-up; the first update takes 1 / warmup, update ``warmup`` the whole.

    Raises:
        ValueError: the schedule is not known.
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return warm * SCHEDULES[name](min(max(progress, 0.0), 1.0))
