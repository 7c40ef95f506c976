"""Chords of the teacher's trajectories: the map is shown where the ODE goes, and its goal has nothing of the map in it.

Trajectories are stored (``data: {name: teacher, states: K}``, or ``fewstep reflow MODEL --states K``), or solved by the
teacher as the training needs them; one then serves several rows of an update.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, chunk_rows
from fewstep.data.batch import Batch, with_ends
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.solvers import STEPS
from fewstep.objectives.base import Index, rows_of
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime


class Trajectory(TwoTime):
    """``E |u(x_i, t_i, t_j) - (x_j - x_i) / (t_j - t_i)|^2`` over i < j of one trajectory (arXiv 2509.24526, where t_j
    is 1; 2211.13449, where t_i is 0), and ``u = v`` on the diagonal.

    No derivative, no copy and nothing of the student in its goal: exact up to the solver, and as stable as regression.
    Rows draw s and t as other methods do, and take the states of their trajectory that are nearest in time.

    Batches that bring ``states`` (:class:`fewstep.data.Pairs` of ``fewstep reflow --states``) are learned from as they
    are. For others the teacher solves from noise, with the conditions of the batch: ``rows / reuse`` trajectories of
    ``solver_steps`` steps, so ``2 solver_steps / reuse`` calls a row by Heun. They are solved anew at each update, and
    no data is used.

    Args:
        teacher: the frozen field. Without one, states are needed, and ``diagonal`` is 0.
        solver: heun, midpoint or euler.
        solver_steps: of each trajectory; the times in between are shifted at random, all of a trajectory by the same,
            so that no time is left out.
        reuse: how many rows of an update share a trajectory, at different s and t.
        parallel: learn from stored states alone, and each row at all of its states from the noise at once, s = 0, as
            2211.13449 does: K + 1 rows each, in order, for a network that sees them together
            (:class:`fewstep.networks.ParallelTimes`) or one by one. The diagonal is 0 then.
        diagonal, times, ends, options: see :class:`TwoTime`.

    Raises:
        ValueError: for an option out of its range, or a diagonal without a teacher or in parallel.
    """

    term = "chord"
    needs_path = False
    sources = ("2509.24526", "2211.13449")

    def __init__(
        self,
        teacher: VelocityField | None = None,
        solver: str = "heun",
        solver_steps: int = 16,
        reuse: int = 8,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.25,
        error_in: str = "auto",
        parallel: bool = False,
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, error_in=error_in)
        check_solver("Trajectory", solver, solver_steps, reuse)
        if parallel and diagonal:
            raise ValueError(f"Trajectory's diagonal is {diagonal:g}, and in parallel all rows are at s = 0: say 0")
        if teacher is None and diagonal:
            raise ValueError(
                f"Trajectory's diagonal is {diagonal:g}, and without a teacher nobody knows the velocity on s = t: "
                "say diagonal: 0, or name the teacher"
            )
        self.solver, self.solver_steps, self.reuse = solver, solver_steps, reuse
        self.uses_data, self.parallel = teacher is None or parallel, parallel

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        return rows.dx

    def _draw(self, student: FlowMap, batch: Batch, generator: Generators, now: Now) -> tuple[Rows, dict[str, Index]]:
        rows, parts = super()._draw(student, batch, generator, now)
        if self.parallel and (known := given(batch, rows)) is not None:
            return from_the_noise(*known), {self.term: slice(None)}
        way = given(batch, rows) or shared(rows, self, chunk_rows(len(batch), generator))
        return on_the_way(*way, parts.get(self.diagonal_term)), parts

    def check_data(self, data: Any, student: Any) -> None:
        super().check_data(data, student)
        check_states(self, data, student)
        if self.parallel and not getattr(data, "states", 0):
            raise ValueError(
                "Trajectory in parallel needs stored states: data: {name: teacher, states: [0.25, 0.5, 0.75], "
                "steps: 64}, or fewstep reflow MODEL --states 0.25,0.5,0.75"
            )


def check_solver(method: str, solver: str, steps: int, reuse: int) -> None:
    """Raise for a solver that is not known, or fewer than one of anything."""
    if solver not in STEPS:
        raise unknown(f"solver of {method}", solver, STEPS)
    for name, value in (("solver_steps", steps), ("reuse", reuse)):
        if value < 1:
            raise ValueError(f"{method}'s {name} is {value}: it is 1 at least")


def check_states(objective: TwoTime, data: Any, student: Any) -> None:
    """Raise where trajectories are wanted and neither the data nor a teacher has them, or they are on another path."""
    if not getattr(data, "states", 0):
        if not objective.has_teacher:
            raise ValueError(
                f"{type(objective).__name__} without a teacher learns from stored trajectories, and the data has none: "
                "fewstep reflow MODEL --states 8 makes some, or name the teacher"
            )
    elif (path := getattr(data, "path", None)) and path != student.path.quarters:
        raise ValueError(
            f"the states in {getattr(data, 'folder', 'the data')} are on another path than the student's "
            f"({student.path}): draw them from the model on that one, or set student.path to theirs"
        )


def given(batch: Batch, rows: Rows, index: Index = slice(None)) -> tuple[Rows, Tensor, Tensor] | None:
    """The trajectories that a batch brings of these of its rows: the rows, times (n, N), from 0 to 1, and states
    (n, N, ...)."""
    if batch.states is None or batch.times is None:
        return None
    times = with_ends(batch.times[index].to(rows.s))
    return rows, times, torch.cat([rows.noise[:, None], batch.states[index].to(rows.x), rows.data[:, None]], dim=1)


def shared(rows: Rows, how: Any, run: int) -> tuple[Rows, Tensor, Tensor]:
    """Trajectories solved by the teacher of ``how``, with its ``solver`` and ``solver_steps``, as :func:`given`:
    ``reuse`` rows, one after the other, have the one of the first of them, and its conditions.

    Args:
        run: how many of the rows share a generator; they share trajectories among themselves, on any number of
            processes alike.
    """
    leads = torch.arange(len(rows), device=rows.x.device) % run % how.reuse == 0
    whose, first = leads.cumsum(0) - 1, rows.take(rows.part, leads.nonzero().flatten())
    times, states = solve(how.teacher, first, how.solver, how.solver_steps)
    return replace(rows, cond=rows_of(first.cond, whose)), times[whose], states[whose]


@torch.no_grad()
def solve(field: VelocityField, rows: Rows, solver: str, steps: int) -> tuple[Tensor, Tensor]:
    """The trajectories of a field from the noise of these rows: times (n, steps + 1) and states (n, steps + 1, ...).
    The inner times of a row are equally spaced, and shifted by up to half of that, as its ``fraction`` says."""
    x, step = rows.noise, STEPS[solver]
    times = (torch.arange(steps + 1, device=x.device) + rows.fraction[:, None] - 0.5) / steps
    times[:, 0], times[:, -1] = 0, 1
    states = [x]
    for i in range(steps):
        x = step(lambda x, t: field(x, t, **rows.cond), x, times[:, i], times[:, i + 1]).to(x.dtype)
        states.append(x)
    return times, torch.stack(states, dim=1)


def from_the_noise(rows: Rows, times: Tensor, states: Tensor) -> Rows:
    """The rows at the start of their trajectories, each once for each later state, in order; ``dx`` is the chord."""
    count = times.shape[1] - 1
    rows = rows.take(rows.part, torch.arange(len(rows), device=rows.x.device).repeat_interleave(count))
    t, chord = times[:, 1:].flatten(), (states[:, 1:] - states[:, :1]).flatten(0, 1)
    return replace(rows, x=rows.noise, dx=chord / expand(t, chord), s=torch.zeros_like(t), t=t)


def on_the_way(rows: Rows, times: Tensor, states: Tensor, diagonal: Index | None = None) -> Rows:
    """The rows at the states of their trajectories nearest to s and t, at least one state apart; ``dx`` is the chord
    between the two. Those on the ``diagonal`` stay at the first of them, where t = s."""
    each = torch.arange(len(rows), device=rows.x.device)
    i = (times[:, :-1] - rows.s[:, None]).abs().argmin(1)
    j = torch.maximum((times - rows.t[:, None]).abs().argmin(1), i + 1)
    x, end, s, t = states[each, i], states[each, j], times[each, i], times[each, j]
    chord = (end - x) / expand(t - s, x)
    if diagonal is not None:
        t[diagonal] = s[diagonal]
    return replace(rows, x=x, dx=chord, s=s, t=t, noise=states[:, 0], data=states[:, -1])
