"""Solvers for ``dx/dt = v(x, t)``, for any callable velocity.

A step is a function ``(velocity, x, t, t_next, space) -> x_next`` over times (B,); ``integrate`` walks it along a grid.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import expand
from fewstep.flows.spaces import Euclid, Space

Velocity = Callable[[Tensor, Tensor], Tensor]
EUCLID = Euclid()


def euler_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, space: Space = EUCLID) -> Tensor:
    """First order, one call."""
    return space.move(x, expand(t_next - t, x) * velocity(x, t))


def midpoint_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, space: Space = EUCLID) -> Tensor:
    """Second order, two calls; never asks at the end of the step, so not at t = 1 either."""
    middle = (t + t_next) / 2
    return space.move(x, expand(t_next - t, x) * velocity(euler_step(velocity, x, t, middle, space), middle))


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, space: Space = EUCLID) -> Tensor:
    """Second order, two calls: the trapezoidal rule with an Euler predictor (arXiv 2206.00364)."""
    here = velocity(x, t)
    there = velocity(space.move(x, expand(t_next - t, x) * here), t_next)
    return space.move(x, expand(t_next - t, x) * (here + there) / 2)


STEPS = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}
SOLVERS = (*STEPS, "adaptive")
CALLS = {"euler": 1, "midpoint": 2, "heun": 2}  # of the velocity, a step
LONGEST = 20_000  # steps of the adaptive solver, of which smooth velocities take some tens or hundreds


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    solver: str = "heun",
    *,
    tolerance: float = 1e-6,
    space: Space = EUCLID,
) -> Tensor:
    """The state at the last of ``times``, from ``x`` (B, ...) at the first.

    Args:
        velocity: called with samples (B, ...) and times (B,).
        times: the grid, 1-D and monotone in either direction; ``adaptive`` needs only its two ends.
        solver: euler, midpoint or heun, or adaptive (Dormand-Prince 5(4) of torchdiffeq, ``tolerance`` both
            relative and absolute).
        space: how steps are taken; the adaptive solver, which adds them up, is brought into it at the end.

    Raises:
        ValueError: if the solver is not known, the grid has fewer than two times, or the adaptive solver finds no end.
    """
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"a grid of two or more times is needed, not one of shape {tuple(times.shape)}")
    if solver == "adaptive":
        from torchdiffeq import odeint

        ends = times[[0, -1]].to(x.device)
        if ends[0] == ends[1]:
            return x
        within: Any = {"rtol": tolerance, "atol": tolerance, "options": {"max_num_steps": LONGEST}}
        try:
            states: Any = odeint(lambda t, x: velocity(x, t.expand(len(x))), x, ends, **within)
        except AssertionError as error:  # as torchdiffeq says that its steps are too many, or of no length
            raise ValueError(
                f"the adaptive solver does not get from t = {float(ends[0]):g} to {float(ends[1]):g} at tolerance "
                f"{tolerance:g} ({error}): the velocity jumps; take a larger tolerance, or heun"
            ) from None
        return space.move(states[-1], torch.zeros_like(x))
    if solver not in STEPS:
        raise unknown("solver", solver, SOLVERS)
    step = STEPS[solver]
    times = times.to(x.device)
    for t, t_next in pairwise(times):
        x = step(velocity, x, t.expand(len(x)), t_next.expand(len(x)), space)
    return x
