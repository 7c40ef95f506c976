"""What the objectives of flow maps share: rows and times, the split into diagonal and other rows, weights.

A method says what ``u(x, s, t)`` is to be (``goal``), or which residual is to vanish (``residual``); all else is here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, same_draws, uniform
from fewstep.data.batch import Batch
from fewstep.flows.broadcasting import as_times
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.times import NATIVE, draw_pairs, draw_times, without_native
from fewstep.objectives.base import (
    Index,
    Loss,
    Objective,
    check_options,
    latent_of,
    noise_of,
    split_rows,
    squared_error,
    tokens_of,
)
from fewstep.objectives.compositions import near_the_end, step_velocity, through_middle
from fewstep.objectives.derivative import MODES, derivative, time_derivative
from fewstep.objectives.native import check_native, moved_natively
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.weights import LearnedWeight, normalized, warmed

# A method of one's own imports all that it is made of from here.
__all__ = [
    "ERRORS",
    "LearnedWeight",
    "Now",
    "Rows",
    "ToTheEnd",
    "TwoTime",
    "drops",
    "near_the_end",
    "normalized",
    "step_velocity",
    "through_middle",
    "warmed",
]

ERRORS = ("auto", "velocity", "data", "tokens")
STARTS = ("data", "prior", "own")


class TwoTime(Objective):
    """The base of objectives that train a flow map. A method of one's own defines ``goal``, or ``residual``.

    The first ``diagonal`` of the rows have s = t, where u is to be the velocity: the teacher's, or without one the
    conditional velocity ``dx``, whose mean it is. The rows are split before any network is called. The loss is the sum
    of two means, over the rows on the diagonal and over the others (papers that write one mean over the batch give
    each term the weight of its share).

    Args:
        teacher: the frozen field, or None to train from data.
        diagonal: the share of rows on s = t.
        times, ends: see :func:`fewstep.flows.times.draw_pairs`; ``native`` before a distribution moves both times
            towards the noise as the scheduler of the student's model does, by the number of tokens of the batch.
        adaptive: p of the weight ``1 / (error + 0.001)^p`` (arXiv 2505.13447), with no gradient; 0 for none. The error
            is a mean over components, so that it does not depend on their number. Where the goal is noisy (no
            teacher), a weight that goes with the noise biases what is learned.
        learned: weigh by ``exp(-w) error + w`` with a learned w(s, t) (arXiv 2505.18825, 2312.02696).
        error_in: ``velocity``; ``data``, the error of the data that u points to, ``x + (1 - s) u``, so a weight
            ``(1 - s)^2``; ``auto``, data for a network that predicts data, whose velocity near s = 1 is its output
            over 1 - s and would drown all else, and velocity for all others; ``tokens``, their cross-entropy, which
            ``auto`` takes where samples are tokens and the goals, of methods for ``any_space``, lie in the simplex.
        weights: of the diagonal term and of the others.
        jvp: how derivatives of the network are taken, see :func:`fewstep.objectives.derivative.derivative`.
        starts: which states the rows are at: ``data``, those of the path between noise and data; ``prior``, no data:
            rows off the diagonal are at s = 0 and the noise, those on it where the map itself has got to, with no
            gradient, ``X_{0,s}(noise)`` (arXiv 2511.19428); ``own``, all rows there. Methods with a teacher have it.

    Raises:
        ValueError: for an option out of its range.
    """

    diagonal_term = "tangent"
    term = "map"
    # Where the velocity is that errors off the diagonal are in: "s", "t", or nowhere, if they are errors of states.
    velocity_at: str | None = "s"
    # Whether goals are made of u itself, as near as it gets: u and goal are then to see the same dropout, as two draws
    # of it differ by more than what is to be learned.
    goal_has_u = False
    # Whether native times are those of the rows off the diagonal too: not where their lengths are the method's own.
    moves_pairs = True
    # The weights of terms that are added to the loss as they are, each a mean over its rows.
    beside: Mapping[str, float] = MappingProxyType({})
    # Terms that see the rows of all parts.
    of_all_rows: tuple[str, ...] = ()

    def __init__(
        self,
        teacher: VelocityField | None = None,
        *,
        diagonal: float,
        times: str = "uniform",
        ends: float = 0.0,
        adaptive: float = 0.0,
        learned: bool = False,
        error_in: str = "auto",
        weights: tuple[float, float] = (1.0, 1.0),
        jvp: str = "forward",
        starts: str = "data",
    ) -> None:
        super().__init__(teacher)
        name = type(self).__name__
        if starts not in STARTS:
            raise unknown(f"starts of {name}", starts, STARTS)
        check_options(name, times, diagonal=diagonal, ends=ends, adaptive=adaptive)
        if error_in not in ERRORS:
            raise unknown(f"error_in of {name}", error_in, ERRORS)
        if jvp not in MODES:
            raise unknown(f"jvp of {name}", jvp, MODES)
        if min(weights) < 0:
            raise ValueError(f"{name}'s weights are {weights}: they are not negative")
        if diagonal == 1:
            raise ValueError(f"{name}'s diagonal is 1: that leaves no row for the map itself, take less")
        self.shares = {self.diagonal_term: diagonal, self.term: 1 - diagonal}
        self.times, self.ends, self.error_in, self.weights = times, ends, error_in, weights
        self.grid = NATIVE if self.moves_pairs and without_native(times)[1] else "uniform"
        self.adaptive, self.jvp = adaptive, jvp
        self.from_data, self.from_noise = starts == "data", starts == "prior"
        self.uses_data = self.from_data
        self.log_weight = LearnedWeight() if learned else None

    # What a method defines

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        """What ``u(x, s, t)`` is to be on these rows, (n, ...); called without grad."""
        raise NotImplementedError

    def residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        """What is to vanish on these rows, (n, ...), with grad: by default ``u - goal``, both of one dropout."""
        again = same_draws(rows.x.device)
        with torch.no_grad():
            goal = self.goal(student, rows, now)
        again()
        return student.average_velocity(rows.x, rows.s, rows.t, **rows.cond) - goal

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        check_native(self.times, student)

    def pairs(self, rows: int, generator: Generators, now: Now) -> tuple[Tensor, Tensor]:
        """The times s, t of the rows off the diagonal, each (rows,)."""
        return draw_pairs(rows, generator, self.times, self.ends)

    def starts(self, rows: int, generator: Generators) -> Tensor:
        """Single times (rows,), those of the diagonal."""
        return draw_times(rows, generator, self.times)

    # What all share

    def velocity(self, rows: Rows) -> Tensor:
        """v_s(x_s): the teacher's, or the conditional velocity."""
        return self.teacher(rows.x, rows.s, **rows.cond) if self.has_teacher else rows.dx

    def derivative(
        self, function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """``(f, df)`` along a direction, by the mode ``jvp``."""
        return derivative(function, at, along, self.jvp)

    def time_derivative(self, function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(t), df/dt)`` row by row, t (n,), by the mode ``jvp``."""
        return time_derivative(function, t, self.jvp)

    def along_flow(self, function: Callable[..., Tensor], rows: Rows, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """``(f, d_s f + (grad f) velocity)`` of f(x, s, t): how it changes as its start moves along the velocity."""
        along = (velocity.to(rows.x.dtype), torch.ones_like(rows.s))
        return self.derivative(lambda x, s: function(x, s, rows.t, **rows.cond), (rows.x, rows.s), along)

    def forward(
        self,
        student: Any,
        batch: Batch,
        *,
        target: Any = None,
        progress: float = 0.0,
        step: int = 0,
        generator: Generators,
    ) -> Loss:
        if self.ema is not None and target is None:
            raise ValueError(f"{type(self).__name__} wants a slow copy of the student as target=, as fit makes it")
        now = Now(target, progress, step)
        rows, parts = self._draw(student, batch, generator, now)
        errors = self.errors(student, rows, parts, now)
        pairs = torch.stack([rows.s, rows.t], dim=1)
        times = {
            name: pairs if name in self.of_all_rows else pairs[parts[name if name in parts else self.term]]
            for name in errors
        }
        weighed = {name: self.weigh(error, times[name][:, 0], times[name][:, 1], now) for name, error in errors.items()}
        means = {name: error.mean() for name, error in errors.items()}

        def mean(names: list[str]) -> Tensor:
            if len(names) == 1 and weighed[names[0]] is errors[names[0]]:
                return means[names[0]]
            return torch.cat([weighed[name] for name in names]).mean()

        others = [name for name in errors if name not in self.beside]
        sides = ([name for name in others if (name == self.diagonal_term) is side] for side in (True, False))
        terms = [w * mean(names) for w, names in zip(self.weights, sides, strict=True) if names]
        terms += [self.beside[name] * weighed[name].mean() for name in errors if name in self.beside]
        return Loss(sum(terms[1:], terms[0]), {name: value.detach() for name, value in means.items()}, times)

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        """The squared error of each row, by term: (n,) each. A term that is no part is of the rows off the diagonal."""
        some = {name: rows.take(name, index) for name, index in parts.items()}
        if type(self).residual is not TwoTime.residual or (self.goal_has_u and drops(student)):
            residuals = {name: self._residual(student, part, now) for name, part in some.items()}
            return {
                name: self._in_unit(squared_error(value, torch.zeros_like(value)), student, some[name])
                for name, value in residuals.items()
            }
        # Full precision at least: under autocast, or with a bf16 student, goals and x differ in type.
        dtype = torch.promote_types(rows.x.dtype, torch.float32)
        with torch.no_grad():
            goals = [
                (self.velocity(part) if name == self.diagonal_term else self.goal(student, part, now)).to(dtype)
                for name, part in some.items()
            ]
            goal = torch.cat(goals)
            if scattered := [index for index in parts.values() if isinstance(index, Tensor)]:
                goal = torch.empty_like(goal).index_copy_(0, torch.cat(scattered), goal)  # in the order of the rows
        # One call for all rows; each goal was made of its own rows alone, so that no call is wasted.
        if (tokens := tokens_of(self, student)) is not None:
            aim = tokens.aim(goal, rows.x, rows.s)
            error = tokens.error(student.end(rows.x, rows.s, rows.t, **rows.cond), aim)
            return {name: error[index] for name, index in parts.items()}
        error = squared_error(student.average_velocity(rows.x, rows.s, rows.t, **rows.cond), goal)
        return {name: self._in_unit(error[index], student, some[name]) for name, index in parts.items()}

    def weigh(self, error: Tensor, s: Tensor, t: Tensor, now: Now) -> Tensor:
        """The errors of rows (n,) with their weights."""
        if self.adaptive:
            error = error * (error.detach() + 1e-3) ** -self.adaptive
        if self.log_weight is not None:
            w = self.log_weight(s, t)
            error = torch.exp(-w) * error + w
        return error

    def _residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        if rows.part != self.diagonal_term:
            return self.residual(student, rows, now)
        with torch.no_grad():
            velocity = self.velocity(rows)
        return student.velocity(rows.x, rows.s, **rows.cond) - velocity

    def _in_unit(self, error: Tensor, student: FlowMap, rows: Rows) -> Tensor:
        """Errors of velocities (n,) as those of data, where they are wanted so."""
        in_data = self.error_in == "data" or (self.error_in == "auto" and student.prediction == "data")
        if not in_data or (self.velocity_at is None and rows.part == self.term):
            return error
        return error * (1 - (rows.t if self.velocity_at == "t" else rows.s)).square()

    def _draw(self, student: FlowMap, batch: Batch, generator: Generators, now: Now) -> tuple[Rows, dict[str, Index]]:
        """The rows of a batch, and which of them belong to which term."""
        count, noise = len(batch), noise_of(batch, generator, student.space)
        shared = split_rows(count, self.shares, generator, noise.device)
        s, t = self.pairs(count, generator, now)
        start, fraction = self.starts(count, generator), uniform(count, generator)
        cond = batch.cond
        s, t, start, fraction = (as_times(value, noise) for value in (s, t, start, fraction))
        start = moved_natively(self.times, student, start, noise)
        if self.moves_pairs:
            s, t = (moved_natively(self.times, student, value, noise) for value in (s, t))
        diagonal = shared[self.diagonal_term]
        if self.from_noise:
            s = torch.zeros_like(s)
        s[diagonal] = t[diagonal] = start[diagonal]
        latent = latent_of(student.path, noise, generator)
        x, dx = noise, torch.zeros_like(noise)
        if student.path.is_affine:  # else the states of an ODE take their place
            x, dx = student.space.between(student.path, noise, batch.data, s, latent)
        rows = Rows("all", x, dx, s, t, noise, batch.data, fraction, cond, latent)
        if not self.from_data:
            rows = self._at_own_states(student, rows, diagonal)
        return rows, {name: index for name, index in shared.items() if self.shares[name]}

    def _at_own_states(self, student: FlowMap, rows: Rows, diagonal: Index) -> Rows:
        """The rows at ``X_{0,s}(noise)`` of the student; where all but those on the diagonal have s = 0, the others are
        at the noise without a call."""
        some, x = rows.take(rows.part, diagonal) if self.from_noise else rows, rows.noise.clone()
        if len(some):
            with torch.no_grad():
                own = student(some.noise, torch.zeros_like(some.s), some.s, **some.cond)
            x[diagonal if self.from_noise else slice(None)] = own.to(x.dtype)
        return replace(rows, x=x)


class ToTheEnd(TwoTime):
    """The base of consistency models: all rows have t = 1, so that the students know ``X_{s,1}`` alone."""

    term = "consistency"
    gamma = 1.0
    ends_alone = True

    def pairs(self, rows: int, generator: Generators, now: Now) -> tuple[Tensor, Tensor]:
        s = self.starts(rows, generator)
        return s, torch.ones_like(s)


def drops(student: nn.Module) -> bool:
    """Whether a student has dropout, and is training."""
    dropping = (m for m in student.modules() if isinstance(m, _DropoutNd | nn.MultiheadAttention) and m.training)
    return any((m.p if isinstance(m, _DropoutNd) else m.dropout) > 0 for m in dropping)
