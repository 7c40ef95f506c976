"""Grids of times for few steps, found from a few trajectories: which N steps from noise to data lose least.

What each step between two candidate times costs is measured once; dynamic programming then has the best grid of every
number of steps (as in arXiv 2405.11326, whose own cost is ``deviation`` here).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, generator
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.step_losses import COSTS, GITS, Walk, candidate_times, losses_of, walk_of
from fewstep.flows.times import step_grid


@dataclass(frozen=True, eq=False)
class StepErrors:
    """What each step between two candidate times loses: ``errors[i, j]`` belongs to the step from ``times[i]`` to
    ``times[j]``, infinite where that is no step forward.

    The loss of a grid is the sum over its steps, each later step ``weight`` times as dear as the one before it: a sum
    of distances, not of squares, since errors along a trajectory add up and do not average.
    """

    times: Tensor  # (K + 1,), float64, on the CPU
    errors: Tensor  # (K + 1, K + 1)
    weight: float = 1.0

    def grid(self, steps: int) -> Tensor:
        """The times (steps + 1,) of least loss.

        Raises:
            ValueError: steps below 1, or more than there are candidates.
        """
        _, places = self._solved(check_steps(steps, len(self.times) - 1))
        way = [0]
        for place in reversed(places):
            way.append(int(place[way[-1]]))
        return self.times[way]

    def loss(self, steps: int) -> float:
        """That of the best grid; errors as in :meth:`grid`."""
        return self._solved(check_steps(steps, len(self.times) - 1))[0][-1]

    def steps_within(self, tolerance: float) -> int:
        """The smallest number of steps whose best grid loses at most this.

        Raises:
            ValueError: not even a step to every candidate does.
        """
        losses, _ = self._solved(len(self.times) - 1)
        for steps, loss in enumerate(losses, 1):
            if loss <= tolerance:
                return steps
        best = min(range(len(losses)), key=losses.__getitem__)
        raise ValueError(
            f"tolerance is {tolerance:g}, and the least that a grid of these {len(losses)} candidates loses is "
            f"{losses[best]:.3g}, in {best + 1} steps: take a larger one, or more candidates"
        )

    def _solved(self, most: int) -> tuple[list[float], list[Tensor]]:
        """The least loss of 1, 2, ..., ``most`` steps, and where to go first from each time where so many are left:
        ``V_k(i) = min_j errors[i, j] + weight V_{k-1}(j)``."""
        rest = torch.full_like(self.times, math.inf)
        rest[-1] = 0
        losses, places = [], []
        for _ in range(most):
            rest, place = (self.errors + self.weight * rest).min(dim=1)
            losses.append(float(rest[0]))
            places.append(place)
        return losses, places


def check_steps(steps: int, candidates: int) -> int:
    """The number of steps of a grid.

    Raises:
        ValueError: below 1, or more than there are candidates.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least one is needed")
    if steps > candidates:
        raise ValueError(
            f"steps is {steps} and candidates {candidates}: a grid of {steps} steps needs as many at least"
        )
    return steps


def optimal_grid(
    model: FlowMap | VelocityField,
    reference: FlowMap | VelocityField,
    noise: Tensor,
    steps: int,
    candidates: int | Tensor = 24,
    *,
    cost: str = "propagated",
    solver: str = "euler",
    gamma: float | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """The times (steps + 1,) at which few steps of ``model`` end nearest to its reference; for ``sample(grid=...)``.

    Found on ``noise`` by :func:`step_errors` and dynamic programming, then measured on it beside the uniform grid.
    Where that is as good, it is what is returned, and a warning says so. A grid is right for the guidance, the solver
    and the shape it was found with.

    Args:
        steps: how many steps from t = 0 to t = 1.
        others: as for :func:`step_errors`.

    Raises:
        ValueError: as :func:`step_errors`; steps below 1, or more than there are candidates.

    >>> grid = fewstep.optimal_grid(student, teacher, torch.randn(64, 3, 32, 32), steps=4)
    >>> images = fewstep.sample(student, noise, grid=grid)
    """
    known = {"solver": solver, "gamma": gamma, "generator": generator, **cond}
    check_steps(steps, len(candidate_times(candidates)) - 1)
    errors = step_errors(model, reference, noise, candidates, cost=cost, **known)
    (found,) = beside_uniform(errors, model, reference, noise, [steps], **known)
    if found.is_uniform:
        warnings.warn(f"{found}: the uniform grid is kept", stacklevel=2)
    return found.times


@dataclass(frozen=True, eq=False)
class FoundGrid:
    """A grid of N steps, and how far N steps end from the reference along it and along the uniform one: roots of mean
    squared vector norms."""

    optimal: Tensor  # (N + 1,), as dynamic programming has it
    error: float
    uniform_error: float

    @property
    def steps(self) -> int:
        return len(self.optimal) - 1

    @property
    def is_uniform(self) -> bool:
        """Whether the uniform grid is as good."""
        return self.uniform_error <= self.error

    @property
    def times(self) -> Tensor:
        """The better grid of the two."""
        return step_grid(self.steps) if self.is_uniform else self.optimal

    def __str__(self) -> str:
        errors = f"{self.error:.4g} from the reference, of the uniform one {self.uniform_error:.4g}"
        return f"{self.steps} step{'s' * (self.steps > 1)} of the optimal grid end {errors}"


@torch.no_grad()
def step_errors(
    model: FlowMap | VelocityField,
    reference: FlowMap | VelocityField,
    noise: Tensor,
    candidates: int | Tensor = 24,
    *,
    cost: str = "propagated",
    solver: str = "euler",
    gamma: float | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> StepErrors:
    """What each step of a model between two of K + 1 candidate times loses, measured on n trajectories.

    With ``x_i`` the reference's state at tau_i and X the model's step:

    * ``propagated``: ``rms |F(X_{ij}(x_i)) - F(x_j)|``, F the flow from tau_j to 1: what of the error is left at the
      end;
    * ``local``: ``rms |X_{ij}(x_i) - x_j|``;
    * ``deviation`` (that of arXiv 2405.11326, reconstructed from the authors' code): how much farther than x_j the step
      ends from the chord of the trajectory, ``mean d(X_{ij}(x_i)) - d(x_j)``, in the coordinates ``x / alpha``, where
      the chord runs from the data in the direction of the noise; each step counts 1.15 times as much as the one before.
      Meant for samples of many components: in the plane a step that overshoots the chord passes for a good one.

    Costs, in calls of n rows: of a map K (K + 1) / 2, and where the error is propagated, which the map itself does, as
    many again; of a field K by Euler, and the propagation ``8 K^2 / 3`` calls of its reference, at most 8 Heun steps.

    Args:
        model: whose steps are measured: a map, or a field in steps of ``solver``.
        reference: whose trajectories are right: the teacher; or the model itself, of which a field is then solved
            finely, and a map called at every candidate.
        noise: n starts (n, ...), two at least. 16 images or 256 points are enough.
        candidates: K, uniform in time; or the times themselves, rising from 0 to 1.
        solver: of a field: euler, midpoint or heun.
        gamma: as in ``fewstep.sample``; where it re-noises, so is the reference, with the same noise.
        generator: of that noise; ``generator(0)`` if not given.
        cond: conditions, (n, ...) each, for both; by their mean the grid is that of all classes in them.

    Raises:
        ValueError: an argument that cannot be, before anything is computed; states that are not finite.
    """
    at = candidate_times(candidates)
    walk, noise = walk_of(model, reference, noise, solver, gamma, cond)
    if cost not in COSTS:
        raise unknown("cost of a step", cost, COSTS)
    if cost == "deviation" and walk.gamma:
        raise ValueError(f"gamma={walk.gamma:g} and cost='deviation': that is of trajectories without re-noising")
    if len(noise) < 2:
        raise ValueError("noise has one row: the grid of one trajectory is right for no other; take 16 or more")
    losses = losses_of(walk, walk.trajectories(noise, at), at, cost, _generator(generator))
    return StepErrors(at, losses, GITS if cost == "deviation" else 1.0)


@torch.no_grad()
def beside_uniform(
    errors: StepErrors,
    model: FlowMap | VelocityField,
    reference: FlowMap | VelocityField,
    noise: Tensor,
    steps: Sequence[int],
    *,
    solver: str = "euler",
    gamma: float | None = None,
    generator: Generators | None = None,
    **cond: Any,
) -> list[FoundGrid]:
    """The best grid of each number of steps, each measured beside the uniform one; arguments and errors as those of
    :func:`step_errors`, by which the errors were measured. Costs 2 N steps of n rows each."""
    walk, noise = walk_of(model, reference, noise, solver, gamma, cond)
    ends = None if walk.gamma else walk.trajectories(noise, errors.times)[-1]
    return measured(errors, walk, noise, steps, ends, generator)


def measured(
    errors: StepErrors,
    walk: Walk,
    noise: Tensor,
    steps: Sequence[int],
    ends: Tensor | None,
    draw: Generators | None = None,
) -> list[FoundGrid]:
    """As :func:`beside_uniform`, where the ends of the reference are known."""
    found = []
    for n in steps:
        grid = errors.grid(n)
        pair = [walk.off(noise, times, ends, _generator(draw)) for times in (grid, step_grid(n))]
        found.append(FoundGrid(grid, *torch.stack(pair).tolist()))
    if wrong := [grid.steps for grid in found if not math.isfinite(grid.error + grid.uniform_error)]:
        raise ValueError(f"the model gives numbers that are not finite in {wrong[0]} steps: no grid is found for it")
    return found


def _generator(draw: Generators | None) -> Generators:
    return generator(0) if draw is None else draw
