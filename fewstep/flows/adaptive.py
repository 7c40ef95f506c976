"""As many steps as each sample needs: a step and its two halves say how far off the step is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import check_options, placed, rows_of
from fewstep.flows.solvers import STEPS


@dataclass(frozen=True, eq=False)
class Adaptive:
    """Samples (B, ...), and for each how many steps it took along its way and how many it was given, those that only
    judged others among them; (B,) each."""

    samples: Tensor
    steps: Tensor
    tried: Tensor


@torch.no_grad()
def sample_adaptive(
    model: FlowMap | VelocityField,
    noise: Tensor,
    tolerance: float,
    *,
    most: int = 64,
    solver: str = "euler",
    **cond: Any,
) -> Adaptive:
    """Data from noise (B, ...), each sample in as many steps as bring the error of each below ``tolerance``.

    A step from s to t is held against its two halves, ``|X_{s,t}(x) - X_{m,t}(X_{s,m}(x))|`` (Richardson's way to an
    error). Where they are near, the sample goes on from the halves; else the first half is judged so itself, of which
    the step is known already, and then what comes after it. Rows at different times share a call, and those that are
    done take part in none. A sample's own result hangs on no other.

    Costs three steps of a sample that two are enough for, and never more than three times the steps that it takes; and
    one look at what is left to do each round, which waits for a GPU. There is no re-noising.

    Args:
        tolerance: the largest error of a step, the root of its mean square over the components of a sample.
        most: steps of a sample, a power of 2: steps of 1 / most are taken as they are.
        solver: of a field: euler, midpoint or heun.
        cond: conditions, (B, ...) each.

    Raises:
        ValueError: a tolerance that is not positive, ``most`` that is no power of 2, a map that only knows the way to
            t = 1, or as ``fewstep.sample``; errors that are not finite.

    >>> few = sample_adaptive(student, torch.randn(64, 3, 32, 32), tolerance=0.02)
    >>> few.samples, few.steps.float().mean()
    """
    check_options(model, 1, solver=solver)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance:g}: it is positive, such as 0.02")
    if most < 2 or most & (most - 1):
        raise ValueError(f"most is {most}: steps are halved, so it is a power of 2, such as 64")
    if isinstance(model, FlowMap) and model.gamma:
        raise ValueError("a map that only knows the way to t = 1 (a consistency model) has no halves of a step")
    if solver not in STEPS:
        raise ValueError(f"solver={solver!r} finds its own steps: sample(..., solver={solver!r}, tolerance=) takes it")
    x, cond = placed(model, noise.clone(), cond)
    dtype = torch.promote_types(x.dtype, torch.float32)
    place, length = (torch.full((len(x),), n, device=x.device) for n in (0, most))  # in units of 1 / most
    steps, tried = torch.zeros_like(place), torch.zeros_like(place)
    whole, is_known = torch.empty_like(x), torch.zeros_like(place, dtype=torch.bool)

    def step(rows: Tensor, x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        some = rows_of(cond, rows)
        s, t = begin.to(dtype) / most, end.to(dtype) / most
        tried[rows] += 1
        if isinstance(model, FlowMap):
            return model(x, s, t, **some)
        return STEPS[solver](lambda x, t: model(x, t, **some), x, s, t)

    while len(left := (place < most).nonzero().flatten()):
        new = left[~is_known[left]]
        if len(new):
            whole[new] = step(new, x[new], place[new], place[new] + length[new])
        least, rows = left[length[left] == 1], left[length[left] > 1]
        x[least] = whole[least]
        steps[least] += 1
        done = [least]
        if len(rows):
            begin, half = place[rows], length[rows] // 2
            middle = step(rows, x[rows], begin, begin + half)
            end = step(rows, middle, begin + half, begin + 2 * half)
            error = (whole[rows] - end).flatten(1).to(dtype).square().mean(1).sqrt()
            if not error.isfinite().all():
                raise ValueError("the model gives numbers that are not finite: there is no step that is short enough")
            near, far = rows[error <= tolerance], rows[error > tolerance]
            x[near] = end[error <= tolerance]
            steps[near] += 2
            whole[far] = middle[error > tolerance]
            length[far] //= 2
            is_known[far] = True
            done.append(near)
        for rows in done:
            place[rows] += length[rows]
            length[rows] = place[rows] & -place[rows]  # the longest step that the tree of halves has from there
            is_known[rows] = False
    return Adaptive(x, steps, tried)
