"""The shape of a model's trajectories, and what few steps along them lose.

Sampling trajectories of diffusion models lie almost in a plane, all of one shape (arXiv 2305.19947, 2405.11326): this
is why a grid of times found on a few of them serves all, and where they bend is where steps are needed. How straight
they are hangs on the coordinates: of one data point ``x_t / alpha_t`` moves on a line, and ``D_t(x_t)`` not at all.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import generator
from fewstep.flows.calls import count_calls
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Path
from fewstep.flows.step_grids import FoundGrid, StepErrors, measured
from fewstep.flows.step_losses import from_chord, losses_of, rms, walk_of
from fewstep.flows.times import step_grid

CANDIDATES = 12
_DRAWN = 8  # trajectories that are drawn one by one


@dataclass(frozen=True, eq=False)
class Curve:
    """Curves (T, B, ...) in the space of samples, as means over them.

    Attributes:
        planarity: the share of a curve's variance over time in its first 1, 2, 3 principal components, (3,).
        off_chord: the distance from the line between its ends at each time, over the distance of the ends, (T,).
        length: of the curve, over the distance of its ends: 1 is straight.
        plane: the first curves in the plane of their own two first components, (8 or less, T, 2), each from left to
            right.
    """

    planarity: Tensor
    off_chord: Tensor
    length: float
    plane: Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """The shape of a model's trajectories, and the errors of few steps; distances are those of whole samples.

    Attributes:
        times: of the trajectories, (T,).
        state, denoised: the shape of ``x_t``, and of ``D_t(x_t) = E[data | x_t]``, the end that is expected on the way.
        off_chord_scaled: of ``x_t / alpha_t``, its distance from the line that leaves the end in the direction of the
            noise, over the norm of the data, (T,); NaN where alpha is 0.
        curvature: ``|dv/dt| / |v|`` along the trajectories, at ``middles``, (T - 2,) each.
        errors: what each step loses, None for a single trajectory.
        few: the error of each number of steps, along the best grid and the uniform one.
        rows, calls: trajectories, and network calls for each, both models' together.
    """

    times: Tensor
    state: Curve
    denoised: Curve
    off_chord_scaled: Tensor
    middles: Tensor
    curvature: Tensor
    errors: StepErrors | None
    few: list[FoundGrid]
    rows: int
    calls: int

    @property
    def slope(self) -> float:
        """Of the logarithm of the error against that of the number of uniform steps, by least squares: -1 where it
        halves with twice the steps. NaN where there are no two errors above 0."""
        points = [(math.log(grid.steps), math.log(grid.uniform_error)) for grid in self.few if grid.uniform_error > 0]
        if len(points) < 2:
            return math.nan
        x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    def summary(self) -> dict[str, float]:
        """The numbers of it."""
        found: dict[str, float] = {}
        for name, curve in (("state", self.state), ("denoised", self.denoised)):
            found |= {f"{name}_in_{n}_pc": float(share) for n, share in enumerate(curve.planarity, 1)}
            found |= {f"{name}_length": curve.length, f"{name}_off_chord": float(curve.off_chord.max())}
        for grid in self.few:
            found |= {f"error@{grid.steps}": grid.uniform_error, f"error@{grid.steps}_optimal": grid.error}
        return {**found, "slope": self.slope}


@torch.no_grad()
def geometry(
    model: FlowMap | VelocityField,
    noise: Tensor,
    reference: FlowMap | VelocityField | None = None,
    *,
    times: int = 24,
    candidates: int = CANDIDATES,
    steps: Sequence[int] = (1, 2, 4, 8),
    solver: str = "euler",
    gamma: float | None = None,
    **cond: Any,
) -> Geometry:
    """The shape of trajectories from ``noise`` (B, ...), and what few steps of a model lose on them.

    The trajectories are the reference's: the teacher's; the model's own, where there is none. Few are enough, 8 images
    or 64 points. For each this takes 144 network calls to solve a field, ``times`` for its velocities, and those of
    :func:`fewstep.step_errors`: at the defaults 353 for a map beside its teacher, and 734 for a field.

    Args:
        times: the trajectories' number of steps.
        candidates: of which so many are candidates for steps; a divisor of it.
        solver, gamma: as for :func:`fewstep.step_errors`; of a single trajectory nothing is measured.
        steps: numbers of steps, those above ``candidates`` left out.
        cond: conditions, (B, ...) each.

    Raises:
        ValueError: fewer than 4 ``times``, no noise, or as :func:`fewstep.step_errors`.

    >>> found = fewstep.geometry(student, torch.randn(64, 2), teacher)
    >>> found.summary()["state_in_2_pc"]
    """
    if times < 4 or candidates < 1 or times % candidates:
        raise ValueError(f"times is {times} and candidates {candidates}: 4 times at least, each so-many-th a candidate")
    if not len(noise):
        raise ValueError("noise has no rows: there are no trajectories")
    by = model if reference is None else reference
    at = step_grid(times)
    walk, noise = walk_of(model, by, noise, solver, gamma, cond)
    with ExitStack() as stack:
        counts = [stack.enter_context(count_calls(each)) for each in dict.fromkeys((model, by))]
        states = walk.trajectories(noise, at)
        velocities = torch.stack([by.velocity(x, t, **walk.known) for x, t in zip(states, at[:-1], strict=False)])
        errors, few = None, []
        if len(noise) > 1:
            known = states[:: times // candidates]
            losses = losses_of(walk, known, at[:: times // candidates], "propagated", generator(0))
            errors = StepErrors(at[:: times // candidates], losses)
            counts_of = [n for n in dict.fromkeys(steps) if n <= candidates]
            few = measured(errors, walk, noise, counts_of, None if walk.gamma else states[-1])
    if not (states.isfinite().all() and velocities.isfinite().all()):
        raise ValueError(
            "the model gives numbers that are not finite along its trajectories: there is no shape of them"
        )
    ends = [states[-1] / float(by.path.alpha(at[-1]))]
    denoised = [_expected(by.path, x, v, t) for x, v, t in zip(states, velocities, at[:-1], strict=False)]
    denoised = torch.stack(denoised + ends)
    scaled = [
        float(from_chord(x, states, by.path, t).mean() / rms(states[-1])) if by.path.alpha(t) > 0 else math.nan
        for x, t in zip(states, at, strict=True)
    ]
    moves, mean = velocities.diff(dim=0), (velocities[1:] + velocities[:-1]) / 2
    bends = [float(rms(move) / rms(v).clamp(min=1e-12)) * times for move, v in zip(moves, mean, strict=True)]
    return Geometry(
        at,
        curve_of(states),
        curve_of(denoised),
        torch.tensor(scaled),
        (at[:-2] + at[1:-1]) / 2,
        torch.tensor(bends),
        errors,
        few,
        len(noise),
        round(sum(count.rows for count in counts) / len(noise)),
    )


def _expected(path: Path, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The end that is expected at x: ``E[data | x]``; between two data sets, of which no velocity says that, the end of
    a straight line."""
    return x + (1 - t).to(x) * v if path.two_sided else path.from_velocity(v, x, t, "data")


def curve_of(states: Tensor) -> Curve:
    """The shape of curves (T, B, ...), of two times at least."""
    x = states.flatten(2).transpose(0, 1).to(torch.promote_types(states.dtype, torch.float32))  # (B, T, D)
    centred = x - x.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))  # rising
    values, vectors = values.clamp(min=0).flip(-1), vectors.flip(-1)
    whole = values.sum(dim=1, keepdim=True)
    shares = torch.where(whole > 0, values[:, :3].cumsum(dim=1) / whole.clamp(min=1e-30), 1.0)
    chord = x[:, -1] - x[:, 0]
    span = chord.norm(dim=1)
    offset = x - x[:, :1]
    along = (offset * chord[:, None]).sum(-1) / span.square().clamp(min=1e-30)[:, None]
    off = (offset - along[..., None] * chord[:, None]).norm(dim=-1).mean(dim=0)
    length = x.diff(dim=1).norm(dim=-1).sum(dim=1).mean()
    is_still = float(span.mean()) < 1e-6 * (1 + float(x.norm(dim=-1).mean()))  # a point, but for rounding
    plane = vectors[:_DRAWN, :, :2] * values[:_DRAWN, None, :2].sqrt()
    plane = plane * torch.where(plane[:, -1:, :1] < plane[:, :1, :1], -1.0, 1.0)
    sag = (plane[:, :1, 1:] + plane[:, -1:, 1:]).sign()  # both ends below the middle
    plane = torch.cat([plane[..., :1], plane[..., 1:] * torch.where(sag > 0, -1.0, 1.0)], dim=-1)
    return Curve(
        shares.mean(dim=0).cpu(),
        (off * 0 if is_still else off / span.mean()).cpu(),
        1.0 if is_still else float(length / span.mean()),
        plane.cpu(),
    )
