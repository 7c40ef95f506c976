"""What a step of a model loses against its reference, from any candidate time to any other: what grids of times are
found by."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path
from fewstep.flows.sampling import beyond, check_options, placed
from fewstep.flows.signature import takes
from fewstep.flows.solvers import STEPS, integrate
from fewstep.flows.times import check_grid, step_grid
from fewstep.flows.trajectories import flow_of, states_of

COSTS = ("propagated", "local", "deviation")
GITS = 1.15  # how much more each step counts than the one before it, in arXiv 2405.11326
# Heun steps from 0 to 1 that carry an error on to t = 1: both ends of it take them, so that their own error cancels.
_LEGS = 8


def candidate_times(candidates: int | Tensor) -> Tensor:
    """K + 1 times from 0 to 1, float64, on the CPU.

    Raises:
        ValueError: K below 1, or times that do not rise from 0 to 1.
    """
    if not isinstance(candidates, Tensor):
        if not isinstance(candidates, int):
            raise ValueError(f"candidates={shown(candidates)}: a number of times, or the times themselves as a tensor")
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}: at least as many as steps are needed, such as 24")
        return step_grid(candidates)
    at = candidates.detach().double().cpu()
    check_grid("candidate times", at)
    return at


@dataclass(frozen=True, eq=False)
class Walk:
    """The steps of a model, and those of its reference that they are held against. Times are numbers on the CPU."""

    model: FlowMap | VelocityField
    reference: FlowMap | VelocityField
    solver: str
    gamma: float
    cond: dict[str, Any]  # of the model
    known: dict[str, Any]  # of the reference, which need not be told the strength of guidance

    def trajectories(self, noise: Tensor, times: Tensor) -> Tensor:
        """The reference's states (T, B, ...)."""
        return states_of(self.reference, noise, times, **self.known)

    def starts(self, states: Tensor, times: Tensor) -> list[Tensor]:
        """A field at the reference's states, with which its steps from there begin; of a map there is none."""
        if isinstance(self.model, FlowMap):
            return []
        return [self.model(x, t, **self.cond) for x, t in zip(states, times, strict=True)]

    def step(self, x: Tensor, s: Tensor, t: Tensor, fresh: Tensor, start: Tensor | None = None) -> Tensor:
        """The model's step from s to t, re-noised as the sampler does. ``start``: the field at (x, s), if known."""
        if isinstance(self.model, FlowMap):
            r, shrink, level = self._beyond(t)
            return self._noised(self.model(x, s, r, **self.cond), shrink, level, fresh)

        def velocity(y: Tensor, at: Tensor) -> Tensor:
            return start if y is x and start is not None else self.model(y, at, **self.cond)

        s, t = (time.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x)) for time in (s, t))
        return STEPS[self.solver](velocity, x, s, t)

    def reference_step(self, x: Tensor, s: Tensor, t: Tensor, fresh: Tensor) -> Tensor:
        """The reference's flow in the place of the model's step."""
        r, shrink, level = self._beyond(t)
        by = self.reference
        if s < r:
            x = (
                by(x, s, r, **self.known)
                if isinstance(by, FlowMap)
                else flow_of(by, x, float(s), float(r), **self.known)
            )
        return self._noised(x, shrink, level, fresh)

    def carried(self, ends: list[Tensor], t: Tensor) -> list[Tensor]:
        """States at t as they are at 1: by a call of the map, or by the flow of a field's reference."""
        is_map = isinstance(self.model, FlowMap)
        by, cond = (self.model, self.cond) if is_map else (self.reference, self.known)
        if isinstance(by, FlowMap):
            return [by(end, t, torch.ones_like(t), **cond) for end in ends]
        legs = torch.linspace(float(t), 1, math.ceil(_LEGS * (1 - float(t))) + 1, dtype=torch.float64)
        legs = legs.to(ends[0].device, torch.promote_types(ends[0].dtype, torch.float32))
        return [integrate(lambda x, t: by(x, t, **cond), end, legs, "heun", space=by.space) for end in ends]

    def off(self, noise: Tensor, grid: Tensor, ends: Tensor | None, draw: Generators) -> Tensor:
        """How far the model's steps along a grid end from the reference: from ``ends``, or where these hang on the
        re-noising, from where the reference is with the same."""
        x = y = noise
        for s, t in pairwise(grid):
            fresh = normal(noise, draw) if self.gamma and t < 1 else noise
            x = self.step(x, s, t, fresh)
            y = self.reference_step(y, s, t, fresh) if ends is None else y
        return rms(x - (y if ends is None else ends))

    def _beyond(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.gamma and t < 1:
            return beyond(self.model.path, t, self.gamma)
        return t, torch.ones_like(t), torch.zeros_like(t)

    def _noised(self, x: Tensor, shrink: Tensor, level: Tensor, fresh: Tensor) -> Tensor:
        return float(shrink) * x + float(level) * fresh if self.gamma else x


def walk_of(
    model: FlowMap | VelocityField,
    reference: Any,
    noise: Tensor,
    solver: str,
    gamma: float | None,
    cond: dict[str, Any],
) -> tuple[Walk, Tensor]:
    """The steps of a model beside those of its reference, and the noise where the model is.

    Raises:
        ValueError: options that are not for this model, or a reference that is none for it.
    """
    check_options(model, 1, solver=solver, gamma=gamma)
    if not isinstance(model, FlowMap) and solver not in STEPS:
        raise ValueError(f"solver={solver!r} finds its own times: a grid is for {', '.join(STEPS)}")
    if not isinstance(reference, FlowMap | VelocityField):
        raise ValueError(f"the reference is a {type(reference).__name__}: a teacher is needed, or the model itself")
    if not reference.path.same_as(model.path):
        raise ValueError(
            f"the reference is on {reference.path}, the model on {model.path}: use reference.on(model.path)"
        )
    if isinstance(reference, FlowMap) and reference.gamma:
        raise ValueError("the reference only knows the way to t = 1 (a consistency model): its teacher is needed")
    noise, cond = placed(model, noise, cond)
    if isinstance(model, FlowMap):
        gamma = model.gamma if gamma is None else gamma
    known = dict(cond)
    if not isinstance(reference, Guided) and not takes(reference, "guidance"):
        known.pop("guidance", None)
    return Walk(model, reference, solver, gamma or 0.0, cond, known), noise


def losses_of(walk: Walk, states: Tensor, at: Tensor, cost: str, draw: Generators) -> Tensor:
    """What each step loses (K + 1, K + 1), infinite where there is none: see ``step_errors``. The reference's states at
    these times are (K + 1, B, ...).

    Raises:
        ValueError: states that are not finite.
    """
    noise = states[0]
    _check_finite(states.flatten(1).isfinite().all(1), at, "reference")
    starts = walk.starts(states[:-1], at[:-1])
    fresh = normal(noise, draw) if walk.gamma else noise
    columns = []
    for j in range(1, len(at)):
        ends = [walk.step(states[i], at[i], at[j], fresh, *starts[i : i + 1]) for i in range(j)]
        ends.append(walk.reference_step(states[j], at[j], at[j], fresh))
        if cost == "deviation":
            *far, near = [from_chord(end, states, walk.model.path, at[j]).mean() for end in ends]
            columns.append(torch.stack(far) - near)
            continue
        if cost == "propagated" and at[j] < 1:
            ends = walk.carried(ends, at[j])
        columns.append(torch.stack([rms(end - ends[-1]) for end in ends[:-1]]))
    _check_finite(torch.stack([column.isfinite().all() for column in columns]), at[1:], "model")
    losses = torch.full((len(at), len(at)), math.inf, dtype=torch.float64)
    for j, column in enumerate(columns, 1):
        losses[:j, j] = column.cpu()
    return losses


def rms(vectors: Tensor) -> Tensor:
    """The root of the mean squared norm of vectors (B, ...), summed in float32 at least."""
    return vectors.flatten(1).to(torch.promote_types(vectors.dtype, torch.float32)).square().sum(dim=1).mean().sqrt()


def from_chord(x: Tensor, states: Tensor, path: Path, t: Tensor) -> Tensor:
    """How far ``x / alpha`` is from the line that leaves the data in the direction of the noise, (B,)."""
    noise, end = states[0].flatten(1), states[-1].flatten(1) / float(path.alpha(torch.ones_like(t)))
    offset = x.flatten(1) / float(path.alpha(t)) - end
    along = (offset * noise).sum(1, keepdim=True) / noise.square().sum(1, keepdim=True)
    return (offset - along * noise).norm(dim=1)


def _check_finite(good: Tensor, at: Tensor, whose: str) -> None:
    if not good.all():
        first = float(at[int((~good).nonzero()[0])])
        raise ValueError(f"the {whose} gives numbers that are not finite up to t = {first:g}: no grid is found for it")
