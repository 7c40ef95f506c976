"""Reflected diffusion: a score that is learned between the walls of a box."""

from typing import Any

from fewstep.common.randomness import Generators
from fewstep.flows.broadcasting import as_times
from fewstep.flows.reflected import Reflected
from fewstep.flows.times import draw_times
from fewstep.objectives.base import Batch, Loss, Objective, check_options, latent_of, squared_error

_LAST = 1 - 1e-5  # of the times, as in the authors' code


class ReflectedDiffusion(Objective):
    """``E sigma_t^2 |s(x_t, t) - grad log K(x_t | x1)|^2``: denoising score matching with the heat kernel K between the
    walls of a box (arXiv 2304.04740).

    Trains a field on a :class:`~fewstep.flows.reflected.Reflected` path, whose score s follows from whatever its
    network predicts; for one that predicts ``noise`` this is the plain squared error of what it says. The errors of the
    velocity ``v = L sigma_t^2 s`` are weighed by ``1 / (L sigma_t)^2``. :class:`FlowMatching` on the same path weighs
    them all alike.

    Args:
        times: see :func:`fewstep.flows.times.draw_times`.
    """

    sources = ("2304.04740",)
    trains_field = True
    any_space = True

    def __init__(self, times: str = "uniform") -> None:
        super().__init__()
        check_options(type(self).__name__, times)
        self.times = times

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
        path: Reflected = student.path
        t = _LAST * as_times(draw_times(len(batch), generator, self.times), batch.data)
        x, dx = path.sample(batch.data, batch.data, t, latent_of(path, batch.data, generator))
        error = squared_error(student.velocity(x, t, **batch.cond), dx)
        loss = (error / path.sigma_dot(t).square()).mean()
        return Loss(loss, {"score": loss.detach()}, {"score": t[:, None].expand(-1, 2)})

    def check_student(self, student: Any) -> None:
        if not (isinstance(getattr(student, "path", None), Reflected) and hasattr(student, "velocity")):
            raise ValueError(
                f"ReflectedDiffusion trains a field on a Reflected path, not a {type(student).__name__} on "
                f"{getattr(student, 'path', 'none')}: NetworkField(network, Reflected(low, high), 'noise'), or in a "
                "recipe student.path: reflected, with student.space: {name: box, low: LOW, high: HIGH}"
            )
