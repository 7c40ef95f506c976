"""Reflected diffusion: a score that is learned between the walls of a box."""

from typing import Any

from torch import Tensor

from fewstep.flows.reflected import Reflected
from fewstep.objectives.flow_matching import FlowMatching


class ReflectedDiffusion(FlowMatching):
    """``E sigma_t^2 |s(x_t, t) - grad log K(x_t | x1)|^2``: denoising score matching with the heat kernel K between the
    walls of a box (arXiv 2304.04740).

    Trains a field on a :class:`~fewstep.flows.reflected.Reflected` path, whose score s follows from whatever its
    network predicts; of one that predicts ``noise`` this is the plain squared error. It is :class:`FlowMatching` on
    that path, with the errors of the velocity ``v = L sigma_t^2 s`` weighed by ``1 / (L sigma_t)^2``.

    Args:
        times: see :func:`fewstep.flows.times.draw_times`.
    """

    sources = ("2304.04740",)

    def __init__(self, times: str = "uniform") -> None:
        super().__init__(times)

    def weigh(self, student: Any, error: Tensor, t: Tensor) -> Tensor:
        return error / student.path.sigma_dot(t).square()

    def check_student(self, student: Any) -> None:
        super().check_student(student)
        if not isinstance(student.path, Reflected):
            raise ValueError(
                f"ReflectedDiffusion trains a field on a Reflected path, not on {student.path}: NetworkField(network, "
                "Reflected(low, high), 'noise'), or in a recipe student.path: reflected and student.space: {name: box, "
                "low: LOW, high: HIGH}"
            )
