"""Eulerian methods: the map's end point stays where it is as its start moves along the flow.

``d_s X + (grad X) v_s`` is the derivative of ``X_{s,t}(x)`` along ``(v_s, 1)`` in ``(x, s)``, and it is zero.
"""

import torch
from torch import Tensor

from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime


class _Eulerian(TwoTime):
    term = "eulerian"

    def transport(self, student: FlowMap, rows: Rows, velocity: Tensor) -> Tensor:
        """``d_s X + sg[(grad X) velocity]``, (n, ...): two forward-mode passes, one of them without grad."""
        with torch.no_grad():
            _, moved = self.derivative(lambda x: student(x, rows.s, rows.t, **rows.cond), (rows.x,), (velocity,))
        _, start_dot = self.time_derivative(lambda s: student(rows.x, s, rows.t, **rows.cond), rows.s)
        return start_dot + moved


class EMD(_Eulerian):
    """``E |d_s X_{s,t}(x_s) + (grad X) v_s(x_s)|^2`` (arXiv 2406.07507, 2505.18825), and ``u = v`` on the diagonal.

    Args:
        teacher: the frozen field.
        full: the gradient runs through all of it (the first paper), or not through ``(grad X) v`` (the second), which
            costs less and did not hold: ``docs/methods/emd.md``.
        diagonal, times, ends, options: see :class:`TwoTime`.
    """

    sources = ("2406.07507", "2505.18825")

    def __init__(
        self,
        teacher: VelocityField,
        full: bool = True,
        diagonal: float = 0.25,
        times: str = "uniform",
        ends: float = 0.0,
        error_in: str = "auto",
        jvp: str = "forward",
    ) -> None:
        super().__init__(teacher, diagonal=diagonal, times=times, ends=ends, error_in=error_in, jvp=jvp)
        self.full = full

    def residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        with torch.no_grad():
            velocity = self.teacher(rows.x, rows.s, **rows.cond)
        return self.along_flow(student, rows, velocity)[1] if self.full else self.transport(student, rows, velocity)


class ESD(_Eulerian):
    """Eulerian self-distillation: ``E |d_s X_{s,t}(x_s) + sg[(grad X) u(x_s, s, s)]|^2`` (arXiv 2505.18825).

    The student's own diagonal is the velocity, current weights. Its authors found it unstable on images.

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

    def residual(self, student: FlowMap, rows: Rows, now: Now) -> Tensor:
        with torch.no_grad():
            velocity = student.velocity(rows.x, rows.s, **rows.cond)
        return self.transport(student, rows, velocity)
