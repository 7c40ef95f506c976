"""Lagrangian methods: the derivative of the map in its end time is the velocity at its end point.

``d_t X_{s,t}(x) = u + (t - s) d_t u`` comes from one forward-mode pass in t alone, and the loss's gradient goes
backward through it. The methods differ in whose velocity it is.
"""

import torch
from torch import Tensor

from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import check_decay
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime


class _Lagrangian(TwoTime):
    term = "lagrangian"
    velocity_at = "t"

    def residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        end, end_dot = self.time_derivative(lambda t: student(rows.x, rows.s, t, **rows.cond), rows.t)
        return end_dot - self.end_velocity(student, end, rows, now)

    def end_velocity(self, student: FlowMap, end: Tensor, rows: Rows, now: Now) -> Tensor:
        raise NotImplementedError


class LMD(_Lagrangian):
    """``E |d_t X_{s,t}(x_s) - v_t(X_{s,t}(x_s))|^2`` (arXiv 2406.07507, 2505.18825), and ``u = v`` on the diagonal.

    A backward pass through a derivative is dear in time and memory, and rules out fused attention and checkpointing.

    Args:
        teacher: the frozen field.
        through_teacher: let the gradient run through v_t (the first paper) or stop it there (the second, the default:
            better at every step count in the measured tables, and cheaper).
        starts, adaptive, diagonal, times, ends, options: see :class:`TwoTime`.
    """

    sources = ("2406.07507", "2505.18825")

    def __init__(
        self,
        teacher: VelocityField,
        through_teacher: bool = False,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
        starts: str = "data",
        adaptive: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        super().__init__(
            teacher, diagonal=diagonal, times=times, ends=ends, adaptive=adaptive, error_in=error_in, jvp=jvp,
            starts=starts,
        )  # fmt: skip
        self.through_teacher = through_teacher

    def end_velocity(self, student: FlowMap, end: Tensor, rows: Rows, now: Now) -> Tensor:
        with torch.set_grad_enabled(self.through_teacher):
            return self.teacher(end if self.through_teacher else end.detach(), rows.t, **rows.cond)


class LSD(_Lagrangian):
    """Lagrangian self-distillation: ``E |d_t X_{s,t}(x_s) - sg[u(X_{s,t}(x_s), t, t)]|^2`` (arXiv 2505.18825).

    The student's own diagonal, learned beside it from the data (or a teacher), is the velocity; current weights.

    Args:
        teacher: where there is one, its velocity teaches the diagonal.
        diagonal, times, ends, learned, options: see :class:`TwoTime`.
    """

    sources = ("2505.18825",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        diagonal: float = 0.75,
        times: str = "uniform",
        ends: float = 0.0,
        learned: bool = False,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        super().__init__(
            teacher, diagonal=diagonal, times=times, ends=ends, learned=learned, error_in=error_in, jvp=jvp
        )

    @torch.no_grad()
    def end_velocity(self, student: FlowMap, end: Tensor, rows: Rows, now: Now) -> Tensor:
        return student.velocity(end, rows.t, **rows.cond)


class TVM(_Lagrangian):
    """Terminal velocity matching: ``E |d_t X_{s,t}(x_s) - sg[u^-(X_{s,t}(x_s), t, t)]|^2`` (arXiv 2511.19797).

    As :class:`LSD`, with the velocity of an EMA copy u^-.

    Args:
        teacher: where there is one, its velocity teaches the diagonal.
        ema: decay of that copy.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    sources = ("2511.19797",)

    def __init__(
        self,
        teacher: VelocityField | None = None,
        ema: float = 0.99,
        diagonal: float = 0.5,
        times: str = "uniform",
        ends: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, error_in=error_in, jvp=jvp)
        self.ema = check_decay("TVM", ema)

    @torch.no_grad()
    def end_velocity(self, student: FlowMap, end: Tensor, rows: Rows, now: Now) -> Tensor:
        return now.target.velocity(end, rows.t, **rows.cond)
