"""Discrete consistency methods: two states of one trajectory, a step apart, have one end point. No derivative."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import same_draws
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.solvers import euler_step, heun_step
from fewstep.objectives.base import Index, check_decay, check_options, squared_error
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import ToTheEnd, TwoTime

_STEPS = {"heun": heun_step, "euler": euler_step}


class _Consistency(ToTheEnd):
    """``X_{s,1}(x_s)`` against ``X^-_{s',1}(x_{s'})``, by a distance d."""

    huber: float
    per_component = False

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The pseudo-Huber distance ``sqrt(error + c^2) - c`` of the mean squared error, or that error for c = 0:
        (n,). ``per_component``: the mean of that distance over the components, each by itself."""
        if self.per_component and self.huber:
            dtype = torch.promote_types(x.dtype, torch.float32)
            square = (x.to(dtype) - y.to(dtype)).square()
            return ((square + self.huber**2).sqrt() - self.huber).flatten(1).mean(1)
        error = squared_error(x, y)
        return (error + self.huber**2).sqrt() - self.huber if self.huber else error


class ConsistencyDistillation(_Consistency):
    """``E d(X_{s,1}(x_s), X^-_{s',1}(x_{s'}))``, ``x_{s'}`` one Heun step of the teacher on (arXiv 2303.01469).

    ``s' = s + (1 - s) gap``: a finite step, whose error of order gap^3 adds up to gap^2. The options from ``longest``
    on are those of SCFlow (arXiv 2412.16906), which has all of them, and an adversarial term around it.

    Args:
        teacher: the frozen field.
        gap: the step, as a share of the way to t = 1.
        ema: decay of the copy ``X^-``.
        huber: c of the pseudo-Huber distance, 0 for the squared error.
        times: of s, see :class:`TwoTime`.
        longest: steps of random length in the place of ``gap``, uniform up to this and to the end of time.
        solver: of the teacher's step: ``heun``, or ``euler``, whose error of order gap^2 adds up to gap.
        truncate: where ``1 - s'`` is less than this, the goal is the data that the row is made of. At 1 it always is,
            and what is learned is the mean of the data that can have led to x_s.
        backward: the weight of the same distance to the end point of ``x_{s''}``, a step towards noise.
        reflow: the weight of ``|X_{s,1}(z_s) - sg[y]|^2``, on the chord z_s from noise z to its own ``y = X_{0,1}(z)``.
        per_component: the pseudo-Huber distance of each component by itself, and their mean.
        begin: the share of the training after which ``backward`` and ``reflow`` begin.
    """

    sources = ("2303.01469", "2412.16906")

    def __init__(
        self,
        teacher: VelocityField,
        gap: float = 0.1,
        ema: float = 0.99,
        huber: float = 0.0,
        times: str = "uniform",
        longest: float | None = None,
        solver: str = "heun",
        truncate: float = 0.0,
        backward: float = 0.0,
        reflow: float = 0.0,
        per_component: bool = False,
        begin: float = 0.0,
    ) -> None:
        super().__init__(teacher, diagonal=0.0, times=times)
        check_options("ConsistencyDistillation", times, gap=gap, huber=huber, truncate=truncate, begin=begin)
        check_options("ConsistencyDistillation", times, **({} if longest is None else {"longest": longest}))
        if gap == 0 or longest == 0:
            name = "longest" if longest == 0 else "gap"
            raise ValueError(f"ConsistencyDistillation's {name} is 0: a step of no length teaches nothing, take 0.1")
        if solver not in _STEPS:
            raise unknown("solver of ConsistencyDistillation", solver, _STEPS)
        if backward < 0 or reflow < 0:
            raise ValueError(
                f"ConsistencyDistillation's backward is {backward}, reflow {reflow}: they are not negative"
            )
        if per_component and not huber:
            raise ValueError("ConsistencyDistillation's per_component is of the pseudo-Huber distance: say huber: 0.01")
        self.gap, self.huber, self.ema = gap, huber, check_decay("ConsistencyDistillation", ema)
        self.longest, self.step, self.truncate, self.begin = longest, _STEPS[solver], truncate, begin
        self.per_component, self.beside = per_component, {"backward": backward, "reflow": reflow}

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        x, s, one, cond = rows.x, rows.s, rows.t, rows.cond
        with torch.no_grad():
            near = self._moved(s, 1 - s, rows.fraction)
            end = now.target(self._stepped(rows, near), near, one, **cond)
            if self.truncate:
                end = torch.where(expand(1 - near < self.truncate, end).bool(), rows.data.to(end), end)
        mine = student(x, s, one, **cond)
        errors = {self.term: self.distance(mine, end)}
        begun = now.progress >= self.begin
        if begun and self.beside["backward"]:
            with torch.no_grad():
                near = self._moved(s, -s, rows.fraction)
                end = now.target(self._stepped(rows, near), near, one, **cond)
            errors["backward"] = self.distance(mine, end)
        if begun and self.beside["reflow"]:
            errors["reflow"] = self._off_the_chord(student, rows)
        return errors

    def _moved(self, s: Tensor, way: Tensor, fraction: Tensor) -> Tensor:
        """s, and a step of the way that is left in its direction."""
        if self.longest is None:
            return s + self.gap * way
        return s + (1 - fraction) * way.clamp(-self.longest, self.longest)

    def _stepped(self, rows: Rows, near: Tensor) -> Tensor:
        """The state after a step of the teacher."""
        return self.step(lambda x, t: self.teacher(x, t, **rows.cond), rows.x, rows.s, near)

    def _off_the_chord(self, student: FlowMap, rows: Rows) -> Tensor:
        """``|X_{s,1}(z_s) - y|^2`` of each row (n,)."""
        with torch.no_grad():
            y = student(rows.noise, torch.zeros_like(rows.s), rows.t, **rows.cond)
            chord, _ = student.path.sample(rows.noise, y, rows.s, rows.latent)
        return squared_error(student(chord, rows.s, rows.t, **rows.cond), y)


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
            x, _ = student.path.sample(rows.noise, rows.data, near, rows.latent)
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
