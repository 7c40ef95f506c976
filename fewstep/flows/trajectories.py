"""Where a model's own flow carries noise: its trajectories, as finely as they are known."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.flows.chained import Chained
from fewstep.flows.exact import ExactField
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.solvers import integrate


@torch.no_grad()
def teacher_states(field: VelocityField, noise: Tensor, times: Tensor, *, steps: int = 64, **cond: Any) -> Tensor:
    """Where the teacher's own flow carries ``noise`` (B, ...): the states at ``times`` (T,), rising, (T, B, ...).

    Exact for a field in closed form; else Heun, ``steps`` steps for the whole of [0, 1] (two calls each).
    """
    x, here, states = noise, 0.0, []
    for t in times.tolist():
        if t > here:
            x = flow_of(field, x, here, t, steps=steps, **cond)
        states.append(x)
        here = t
    return torch.stack(states)


@torch.no_grad()
def states_of(model: FlowMap | VelocityField, noise: Tensor, times: Tensor, **cond: Any) -> Tensor:
    """The states of a model at ``times`` (T,), from 0 on, (T, B, ...): a field's as :func:`teacher_states`; a map's by
    a call from each time to the next."""
    if not isinstance(model, FlowMap):
        return teacher_states(model, noise, times, **cond)
    states = [noise]
    for s, t in pairwise(times.to(noise.device, torch.promote_types(noise.dtype, torch.float32))):
        states.append(model(states[-1], s, t, **cond))
    return torch.stack(states)


def flow_of(field: VelocityField, x: Tensor, s: float, t: float, *, steps: int = 64, **cond: Any) -> Tensor:
    """The flow of a field from s to t, (B, ...): exact in closed form; else Heun, ``steps`` for the whole of [0, 1]."""
    if isinstance(field, ExactField):
        return field.flow(x, s, t)
    if isinstance(field, Chained):  # each by itself: the velocity jumps between them
        for part, a, b in field.blocks if s <= t else reversed(field.blocks):
            here, there = (min(max((time - a) / (b - a), 0.0), 1.0) for time in (s, t))
            x = x if here == there else flow_of(part, x, here, there, steps=math.ceil(steps * (b - a)), **cond)
        return x
    legs = torch.linspace(s, t, math.ceil(steps * abs(t - s)) + 1, dtype=torch.float64)
    legs = legs.to(x.device, torch.promote_types(x.dtype, torch.float32))
    return integrate(lambda x, t: field(x, t, **cond), x, legs, "heun", space=field.space)
