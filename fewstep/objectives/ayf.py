"""Align Your Flow and continuous consistency models: the Eulerian equation as a normalised, warmed-up tangent."""

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import check_decay, check_options
from fewstep.objectives.compositions import near_the_end
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import ToTheEnd, TwoTime
from fewstep.objectives.weights import BOUNDS, bounded, warmed

VARIANTS = ("EMD", "LMD")


class _Tangent(TwoTime):
    """``E |u - sg[u] + g|^2`` with ``g = bounded((u - v) - r (t - s) Du)``."""

    goal_has_u = True
    bound = "norm"

    def tangent_goal(self, student: FlowMap, rows: Rows, velocity: Tensor, ramp: float) -> Tensor:
        """``sg[u] - g``, (n, ...)."""
        u, u_dot = self.along_flow(student.average_velocity, rows, velocity)
        return u - bounded(u - velocity - ramp * expand(rows.t - rows.s, u) * u_dot, self.bound)

    def _take_bound(self, bound: str) -> None:
        if bound not in BOUNDS:
            raise unknown(f"bound of {type(self).__name__}", bound, BOUNDS)
        self.bound = bound


class AYF(_Tangent):
    """Align Your Flow (arXiv 2506.14603), in both its forms:

    * ``EMD``: ``g = sg[(u - v) - r (t - s) Du]``, normalised per row to ``g / (rms(g) + 0.1)``, in
      ``E |u - sg[u] + g|^2``; r rises from 0 to ``ramp`` over the first ``warmup`` of the training. With r < 1 the
      fixed point is off by the order of 1 - r.
    * ``LMD``: ``X_{s,t}(x_s)`` against one Heun step of the teacher, of length ``step_size`` at most, from the EMA
      copy's ``X^-_{s,t-e}(x_s)``.

    The paper autoguides the teacher with strengths drawn from 1 to 3, and tells the student: ``Guided(..., weak=)`` and
    :class:`fewstep.data.Strengths`.

    Args:
        teacher: the frozen field.
        variant: ``EMD`` or ``LMD``.
        warmup, ramp: of the tangent, in ``EMD``.
        step_size, ema: in ``LMD``.
        bound: of the tangent, in ``EMD``: ``norm``, the row's, or ``clamp``, each number of it cut off at -1 and 1 as
            in FACM (arXiv 2507.03738).
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    term = "ayf"
    sources = ("2506.14603",)

    def __init__(
        self,
        teacher: VelocityField,
        variant: str = "EMD",
        warmup: float = 0.1,
        ramp: float = 0.99,
        step_size: float = 0.05,
        ema: float = 0.99,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
        bound: str = "norm",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, error_in=error_in, jvp=jvp)
        self._take_bound(bound)
        if variant not in VARIANTS:
            raise unknown("variant of AYF", variant, VARIANTS)
        check_options("AYF", times, warmup=warmup, ramp=ramp, step_size=step_size)
        self.variant, self.warmup, self.ramp, self.step_size = variant, warmup, ramp, step_size
        if variant == "LMD":
            if step_size == 0:
                raise ValueError("AYF's step_size is 0: a step of no length teaches nothing, take 0.05")
            self.ema, self.velocity_at, self.goal_has_u = check_decay("AYF", ema), None, False

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        if self.variant == "EMD":
            ramp = self.ramp * warmed(now.progress, self.warmup)
            return self.tangent_goal(student, rows, self.velocity(rows), ramp)
        return near_the_end(now.target, self.teacher, rows, torch.maximum(rows.s, rows.t - self.step_size))

    def weigh(self, error: Tensor, s: Tensor, t: Tensor, now: Now) -> Tensor:
        # The error of X rather than of u, off the diagonal.
        return error * torch.where(t > s, (t - s).square(), 1.0) if self.variant == "LMD" else error


class SCM(ToTheEnd, _Tangent):
    """Continuous-time consistency models: the tangent of :class:`AYF` with t = 1 (arXiv 2410.11081), as sCD from a
    teacher or as sCT from data, with the learned weight. The students know ``X_{s,1}`` alone.

    On the trigonometric path this g is the paper's at r = 1, up to the factor cos(theta) 2 / pi with which it scales
    each time (reconstructed from memory, and checked against the closed form).

    Args:
        teacher: the frozen field, or None to train from data.
        warmup, ramp: r rises from 0 to ``ramp`` over this share of the training.
        bound: as for :class:`AYF`.
        times, learned, options: see :class:`TwoTime`.
    """

    sources = ("2410.11081",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        warmup: float = 0.1,
        ramp: float = 1.0,
        times: str = "uniform",
        learned: bool = True,
        error_in: str = "auto",
        jvp: str = "forward",
        bound: str = "norm",
    ) -> None:
        super().__init__(teacher, diagonal=0.0, times=times, learned=learned, error_in=error_in, jvp=jvp)
        self._take_bound(bound)
        check_options("SCM", times, warmup=warmup, ramp=ramp)
        self.warmup, self.ramp = warmup, ramp

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        ramp = self.ramp * warmed(now.progress, self.warmup)
        return self.tangent_goal(student, rows, self.velocity(rows), ramp)
