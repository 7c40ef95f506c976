"""Discrete consistency methods: two states of one trajectory, a step apart, have one end point. No derivative."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.common.randomness import same_draws
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.solvers import heun_step
from fewstep.objectives.base import Index, check_decay, check_options, squared_error
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import ToTheEnd, TwoTime


class _Consistency(ToTheEnd):
    """``X_{s,1}(x_s)`` against ``X^-_{s',1}(x_{s'})``, by a distance d."""

    huber: float

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The pseudo-Huber distance ``sqrt(error + c^2) - c`` of the mean squared error, or that error for c = 0."""
        error = squared_error(x, y)
        return (error + self.huber**2).sqrt() - self.huber if self.huber else error


class ConsistencyDistillation(_Consistency):
    """``E d(X_{s,1}(x_s), X^-_{s',1}(x_{s'}))``, ``x_{s'}`` one Heun step of the teacher on (arXiv 2303.01469).

    ``s' = s + (1 - s) gap``: a finite step, whose error of order gap^3 adds up to gap^2.

    Args:
        teacher: the frozen field.
        gap: the step, as a share of the way to t = 1.
        ema: decay of the copy ``X^-``.
        huber: c of the pseudo-Huber distance, 0 for the squared error.
        times: of s, see :class:`TwoTime`.
    """

    sources = ("2303.01469",)

    def __init__(
        self, teacher: VelocityField, gap: float = 0.1, ema: float = 0.99, huber: float = 0.0, times: str = "uniform"
    ) -> None:
        super().__init__(teacher, diagonal=0.0, times=times)
        check_options("ConsistencyDistillation", times, gap=gap, huber=huber)
        if gap == 0:
            raise ValueError("ConsistencyDistillation's gap is 0: a step of no length teaches nothing, take 0.1")
        self.gap, self.huber, self.ema = gap, huber, check_decay("ConsistencyDistillation", ema)

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        near = rows.s + self.gap * (1 - rows.s)
        with torch.no_grad():
            x = heun_step(lambda x, t: self.teacher(x, t, **rows.cond), rows.x, rows.s, near)
            end = now.target(x, near, rows.t, **rows.cond)
        return {self.term: self.distance(student(rows.x, rows.s, rows.t, **rows.cond), end)}


class ConsistencyTraining(_Consistency):
    """``E d(X_{s,1}(x_s), sg[X_{s',1}(x_{s'})]) / (s' - s)``, both states of the same noise and data (arXiv 2310.14189,
    and easy consistency tuning, arXiv 2406.14548).

    ``s' = s + q^-k (1 - s)``, on the linear path a share of the noise level; k steps up from 1 to ``stages`` in equal
    parts of the training. The bias is of order ``q^-k``. Current weights are the goal, with the same dropout.

    Args:
        stages: the last k.
        q: the base.
        huber: c of the pseudo-Huber distance, 0 for the squared error.
        stretch: steps are ``1 + stretch sigmoid(-n)`` times as long where the noise is n beside the data, and never
            longer than the way to t = 1 (n(t) of easy consistency tuning, where it is 8).
        times: of s, see :class:`TwoTime`; lognormal noise levels are logit-normal times.
    """

    sources = ("2310.14189", "2406.14548", "2303.01469")

    def __init__(
        self, stages: int = 8, q: float = 2.0, huber: float = 0.03, times: str = "uniform", stretch: float = 0.0
    ) -> None:
        super().__init__(diagonal=0.0, times=times)
        check_options("ConsistencyTraining", times, huber=huber)
        if stages < 1 or q <= 1:
            raise ValueError(f"ConsistencyTraining has stages={stages}, q={q}: at least one stage, and q above 1")
        if stretch < 0:
            raise ValueError(f"ConsistencyTraining's stretch is {stretch}: it is not negative")
        self.stages, self.q, self.huber, self.stretch = stages, q, huber, stretch

    def gap(self, progress: float) -> float:
        """``q^-k`` at this progress."""
        return self.q ** -min(1 + int(progress * self.stages), self.stages)

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        gap = self.gap(now.progress) * (1 - rows.s)
        if self.stretch:
            noise = student.path.sigma(rows.s) / student.path.alpha(rows.s).clamp(min=1e-9)
            gap = torch.minimum(gap * (1 + self.stretch * torch.sigmoid(-noise)), 1 - rows.s)
        near, again = rows.s + gap, same_draws(rows.x.device)
        with torch.no_grad():
            x, _ = student.path.sample(rows.noise, rows.data, near)
            end = student(x, near, rows.t, **rows.cond)
        again()
        error = self.distance(student(rows.x, rows.s, rows.t, **rows.cond), end)
        return {self.term: error / gap.clamp(min=1e-4)}


class CTM(TwoTime):
    """Consistency trajectory models: ``X_{s,t}(x_s)`` against ``X^-_{m,t}(x_m)``, m in (s, t], both compared after
    ``X^-_{t,1}`` (arXiv 2310.02279), and ``u = v`` on the diagonal. Its adversarial term is :class:`Adversarial`
    around it.

    ``x_m`` is ``solver_steps`` Heun steps of the teacher from s. The loss's gradient runs through ``X^-_{t,1}``, whose
    weights are fixed.

    Args:
        teacher: the frozen field.
        solver_steps: from s to m.
        ema: decay of the copy ``X^-``.
        diagonal, times, ends: see :class:`TwoTime`.
    """

    term = "trajectory"
    velocity_at = None
    sources = ("2310.02279",)

    def __init__(
        self,
        teacher: VelocityField,
        solver_steps: int = 2,
        ema: float = 0.99,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends)
        if solver_steps < 1:
            raise ValueError(f"CTM's solver_steps are {solver_steps}: at least one is needed")
        self.solver_steps, self.ema = solver_steps, check_decay("CTM", ema)

    def residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        s, t, one = rows.s, rows.t, torch.ones_like(rows.t)
        m = t - rows.fraction * (t - s)  # in (s, t]
        with torch.no_grad():
            x, step = rows.x, (m - s) / self.solver_steps
            velocity: Callable[[Tensor, Tensor], Tensor] = lambda x, t: self.teacher(x, t, **rows.cond)  # noqa: E731
            for k in range(self.solver_steps):
                x = heun_step(velocity, x, s + k * step, s + (k + 1) * step)
            end = now.target(now.target(x, m, t, **rows.cond), t, one, **rows.cond)
        return now.target(student(rows.x, s, t, **rows.cond), t, one, **rows.cond) - end
