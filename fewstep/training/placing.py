"""Where the parts of a training go: on one process's device, on the devices of several, or shared out over them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewstep.common.distributed import World
from fewstep.objectives.base import Objective
from fewstep.training.ema import Ema
from fewstep.training.run import frozen, mark
from fewstep.training.sharding import Sharding
from fewstep.training.step import Step, parallel


@dataclass(frozen=True)
class Placed:
    """``step`` is the loss as a module, ``model`` what is called in its place. ``still`` is the mark of the weights
    that do not train, which no process holds whole where they are sharded."""

    step: Step
    model: nn.Module
    average: Ema[Any] | None
    slow: Ema[Any] | None
    still: list[float]
    sharding: Sharding | None


def placed(
    student: nn.Module,
    objective: Objective,
    world: World,
    device: torch.device,
    *,
    ema: float | None,
    ema_warmup: bool,
    sharding: Sharding | None,
) -> Placed:
    """Move student and objective to where they train, all processes alike, and copy the student for its averages."""
    if sharding is None:
        student.to(device)
    objective.adopt(student.train())
    step = Step(student, objective)
    if sharding is None:
        objective.to(device)
        model = parallel(step, world)  # before the copies: it makes all processes start alike
    else:
        model = step
        sharding.begin_alike(step)
    lent = sharding is not None
    average = None if ema is None else Ema(student, ema, ema_warmup, lent=lent)
    slow = None if objective.ema is None else Ema(student, objective.ema, lent=lent)
    still = mark(frozen(student).values())
    if sharding is not None:
        copies = [copy for copy in (average, slow) if copy is not None]
        sharding.shard(student, objective, [copy.module for copy in copies])
        for copy in copies:
            copy.follow(student)
    return Placed(step, model, average, slow, still, sharding)
