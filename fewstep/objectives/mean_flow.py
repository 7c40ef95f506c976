"""Mean-flow methods: the average velocity by its own equation, ``u = v_s + (t - s) Du``, as a regression.

``Du = d_s u + (grad u) v_s`` is the derivative of u along ``(v_s, 1)`` in ``(x, s)``, taken without grad.
"""

import math

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime


def default_power(teacher: VelocityField | None) -> float:
    """The power of the adaptive weight: 1 with a teacher; 0 without, where the goal is noisy and the weight, which goes
    with the noise, was measured to do harm."""
    return 0.0 if teacher is None else 1.0


class BaseMeanFlow(TwoTime):
    """What all of them have in common."""

    term = "mean"

    def mean_goal(self, student: FlowMap, rows: Rows, velocity: Tensor, tangent: Tensor) -> Tensor:
        """``velocity + (t - s) Du``, Du along ``tangent``."""
        _, u_dot = self.along_flow(student.average_velocity, rows, tangent)
        return velocity + expand(rows.t - rows.s, rows.x) * u_dot


class MeanFlow(BaseMeanFlow):
    """``E w |u(x_s, s, t) - sg[v_s + (t - s) Du]|^2`` (arXiv 2505.13447), v the teacher's velocity or, without a
    teacher, the conditional velocity, along which Du is taken too.

    Args:
        teacher: the frozen field, or None to train from data.
        adaptive: see :class:`TwoTime`; by default 1 (the paper's) with a teacher and 0 without.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    sources = ("2505.13447",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        diagonal: float = 0.75,
        times: str = "uniform",
        ends: float = 0.0,
        adaptive: float | None = None,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        power = default_power(teacher) if adaptive is None else adaptive
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, adaptive=power, error_in=error_in, jvp=jvp)

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        velocity = self.velocity(rows)
        return self.mean_goal(student, rows, velocity, velocity)


class AlphaFlow(BaseMeanFlow):
    """``E a^-1 |u(x_s, s, t) - sg[a v_s + (1 - a) u(x_m, m, t)]|^2`` with ``m = s + a (t - s)`` and
    ``x_m = x_s + (m - s) v_s`` (arXiv 2510.20771): from flow matching (a = 1) to MeanFlow (its limit as a -> 0).

    a falls as a sigmoid of the progress, held at 1 at first and 0 at last, where the derivative takes over. Between,
    the goal is one Euler step off: biased by an error of order a. Current weights make the goal: an EMA copy there
    diverges as a -> 0.

    Args:
        teacher: the frozen field, or None to train from data.
        schedule: ``sigmoid``, or ``exponential``: a falls as ``last^progress`` from 1, never to 0, so that no
            derivative is taken (as in SoFlow, arXiv 2512.15657).
        last: a at the end of the exponential schedule.
        sharpness: how fast a falls around half of the training; 25 has it within 0.005 of its ends for the first and
            the last 29 %.
        adaptive: as for :class:`MeanFlow`.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    goal_has_u = True
    sources = ("2510.20771", "2505.13447")

    def __init__(
        self,
        teacher: VelocityField | None = None,
        sharpness: float = 25.0,
        schedule: str = "sigmoid",
        last: float = 3e-4,
        diagonal: float = 0.5,
        times: str = "uniform",
        ends: float = 0.0,
        adaptive: float | None = None,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        power = default_power(teacher) if adaptive is None else adaptive
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, adaptive=power, error_in=error_in, jvp=jvp)
        if sharpness <= 0:
            raise ValueError(f"AlphaFlow's sharpness is {sharpness}: it is more than 0")
        if schedule not in ("sigmoid", "exponential"):
            raise unknown("schedule of AlphaFlow", schedule, ("sigmoid", "exponential"))
        if not 0 < last <= 1:
            raise ValueError(f"AlphaFlow's last is {last}: it lies in (0, 1]")
        self.sharpness, self.schedule, self.last = sharpness, schedule, last

    def alpha(self, progress: float) -> float:
        """a at this progress of the training: exactly 1 at first, and with a sigmoid 0 at last."""
        if self.schedule == "exponential":
            return self.last**progress
        a = 1 / (1 + math.exp(self.sharpness * (progress - 0.5)))
        return 1.0 if a > 0.995 else 0.0 if a < 0.005 else a

    def goal(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        velocity, a = self.velocity(rows), self.alpha(now.progress)
        if a == 0:
            return self.mean_goal(student, rows, velocity, velocity)
        if a == 1:
            return velocity
        m = rows.s + a * (rows.t - rows.s)
        near = rows.x + expand(m - rows.s, rows.x) * velocity
        return a * velocity + (1 - a) * student.average_velocity(near, m, rows.t, **rows.cond)

    def weigh(self, error: Tensor, s: Tensor, t: Tensor, now: Now) -> Tensor:
        # |u - goal| is a times MeanFlow's residual, up to the order of a: so is the size that the weight goes by.
        a = torch.where(t > s, self.alpha(now.progress) or 1.0, 1.0)
        weight = ((error.detach() / a.square()) + 1e-3) ** -self.adaptive if self.adaptive else 1.0
        return error / a * weight
