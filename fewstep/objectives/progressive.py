"""Progressive methods: two parts of an interval teach the whole, ``X_{m,t}(X_{s,m}(x)) = X_{s,t}(x)``. No derivative.

They differ in whose the parts are (current weights, an EMA copy, a copy frozen for a round), in where the interval is
cut, and in which intervals are drawn.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, uniform
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.times import draw_pairs
from fewstep.objectives.base import check_decay
from fewstep.objectives.compositions import step_velocity, through_middle
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime

MIDDLES = ("midpoint", "uniform")


class PSD(TwoTime):
    """Progressive self-distillation: ``E |u(x, s, t) - sg[(1 - g) u(x, s, m) + g u(X_{s,m}(x), m, t)]|^2`` with
    ``g = (t - m) / (t - s)`` (arXiv 2505.18825); m the midpoint (PSD-M) or uniform (PSD-U). Current weights.

    Args:
        teacher: where there is one, its velocity teaches the diagonal; else the data.
        middle: ``midpoint`` or ``uniform``.
        diagonal, times, ends, learned, options: see :class:`TwoTime`.
    """

    term = "progressive"
    any_space = True
    sources = ("2505.18825",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        middle: str = "midpoint",
        diagonal: float = 0.75,
        times: str = "uniform",
        ends: float = 0.0,
        learned: bool = False,
        error_in: str = "auto",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, learned=learned, error_in=error_in)
        if middle not in MIDDLES:
            raise unknown("middle of PSD", middle, MIDDLES)
        self.middle = middle

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        part = rows.fraction if self.middle == "uniform" else torch.full_like(rows.fraction, 0.5)
        return through_middle(student, rows, part)


class SplitMeanFlow(TwoTime):
    """``E |u(x, s, t) - sg[(1 - g) u(x, s, m) + g u(X_{s,m}(x), m, t)]|^2``, m uniform (arXiv 2507.16884): interval
    splitting, the integral form of MeanFlow. PSD-U with half of the rows on the diagonal.

    Args:
        teacher: where there is one, its velocity (guided, in the paper) teaches the diagonal; else the data.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    term = "split"
    any_space = True
    sources = ("2507.16884",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        diagonal: float = 0.5,
        times: str = "uniform",
        ends: float = 0.0,
        adaptive: float = 0.0,
        error_in: str = "auto",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, adaptive=adaptive, error_in=error_in)

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        return through_middle(student, rows, rows.fraction)


class Shortcut(TwoTime):
    """Shortcut models: intervals of dyadic length on their own grid, taught by two halves of an EMA copy
    (arXiv 2410.12557).

    Lengths are 1, 1/2, ... 2/``finest``. The halves of the shortest are single Euler steps of the copy's velocity,
    which leaves an error of the order of 1 / finest.

    Args:
        teacher: where there is one, its velocity teaches the diagonal; else the data.
        finest: the steps of the finest grid, a power of 2.
        ema: decay of the copy.
        diagonal, times, options: see :class:`TwoTime`; ``times`` are those of the diagonal.
    """

    term = "shortcut"
    moves_pairs = False
    any_space = True
    sources = ("2410.12557",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        finest: int = 128,
        ema: float = 0.9,
        diagonal: float = 0.75,
        times: str = "uniform",
        error_in: str = "auto",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, error_in=error_in)
        if finest < 2 or finest & (finest - 1):
            raise ValueError(f"Shortcut's finest is {finest}: it is a power of 2, such as 128")
        self.finest, self.ema = finest, check_decay("Shortcut", ema)

    def pairs(self, rows: int, generator: Generators, now: Now) -> tuple[Tensor, Tensor]:
        lengths = self.finest.bit_length() - 1
        count = 2.0 ** (uniform(rows, generator) * lengths).floor()
        s = (uniform(rows, generator) * count).floor() / count
        return s, s + 1 / count

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        x, s, t = rows.x, rows.s, rows.t
        half = (t - s) / 2
        m = s + half
        is_step = half * self.finest < 1.5  # one step of the finest grid: along the velocity
        first = now.target.average_velocity(x, s, torch.where(is_step, s, m), **rows.cond)
        near = student.space.move(x, expand(half, x) * first)
        second = now.target.average_velocity(near, m, torch.where(is_step, m, t), **rows.cond)
        return (first + second) / 2


class PFMM(TwoTime):
    """Progressive flow map matching: ``E |X_{s,t}(x_s) - X^T_{m,t}(X^T_{s,m}(x_s))|^2 / (t - s)^2``, m the midpoint, T
    the student as it was when the round began (arXiv 2406.07507; on a fixed grid, progressive distillation,
    arXiv 2202.00512).

    Round r of R trains the strip ``t - s <= 2^(r + 1 - R)``, so that halves are what the round before has learned; in
    the first round they are Heun steps of the teacher, of length 2^-R at most. Errors of a round stay for good.

    Args:
        teacher: the frozen field.
        rounds: R; equal shares of the training.
        ema: decay of the copy that becomes T.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    term = "progressive"
    moves_pairs = False
    sources = ("2406.07507", "2202.00512")
    round: Tensor

    def __init__(
        self,
        teacher: VelocityField,
        rounds: int = 5,
        ema: float = 0.99,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
        error_in: str = "auto",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, error_in=error_in)
        if rounds < 1:
            raise ValueError(f"PFMM's rounds are {rounds}: at least one is needed")
        self.rounds, self.ema = rounds, check_decay("PFMM", ema)
        self.frozen: nn.Module | None = None
        self.register_buffer("round", torch.zeros((), dtype=torch.long))
        self._current: int | None = None  # ``round`` without asking a GPU, once it was read

    def adopt(self, student: nn.Module) -> None:
        super().adopt(student)
        self.frozen = deepcopy(student).eval().requires_grad_(False)
        self.round.zero_()
        self._current = None  # a checkpoint may be read after this

    def round_at(self, progress: float) -> int:
        """The round, from 0."""
        return min(int(progress * self.rounds), self.rounds - 1)

    def pairs(self, rows: int, generator: Generators, now: Now) -> tuple[Tensor, Tensor]:
        longest = 2.0 ** (self.round_at(now.progress) + 1 - self.rounds)
        return draw_pairs(rows, generator, self.times, self.ends, longest)

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        if self._begin_round(now) > 0:
            return through_middle(self._frozen(), rows, torch.full_like(rows.s, 0.5))
        m = (rows.s + rows.t) / 2
        first = step_velocity(self.teacher, rows.x, rows.s, m, rows.cond)
        near = rows.x + expand(m - rows.s, rows.x) * first
        return (first + step_velocity(self.teacher, near, m, rows.t, rows.cond)) / 2

    def _begin_round(self, now: Now) -> int:
        """The round. At the start of each, T becomes the averaged student."""
        current = self.round_at(now.progress)
        if self._current is None:
            self._current = int(self.round)
        if current != self._current:
            self._frozen().load_state_dict(now.target.state_dict())
            self.round.fill_(current)
            self._current = current
        return current

    def _frozen(self) -> Any:
        if self.frozen is None:
            raise ValueError("PFMM has no copy of its student yet: call objective.adopt(student) first, as fit does")
        return self.frozen
