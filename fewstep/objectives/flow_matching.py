"""Flow matching: how teachers are trained."""

from typing import Any

from fewstep.errors import unknown
from fewstep.objectives.base import Batch, Loss, Objective, noise_of, squared_error
from fewstep.randomness import Generators
from fewstep.times import DISTRIBUTIONS, draw_times


class FlowMatching(Objective):
    """``E |v(x_t, t) - dx_t|^2`` (arXiv 2210.02747, 2303.08797): a velocity field from data alone.

    Trains a ``VelocityField``, or the diagonal of a ``FlowMap``.

    Args:
        times: uniform, or logit-normal, which images prefer (arXiv 2403.03206).
    """

    def __init__(self, times: str = "uniform") -> None:
        super().__init__()
        if times not in DISTRIBUTIONS:
            raise unknown("distribution of times", times, DISTRIBUTIONS)
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
        noise = noise_of(batch, generator)
        t = draw_times(len(batch), generator, self.times).to(batch.data.device)
        x, dx = student.path.sample(noise, batch.data, t)
        loss = squared_error(student.velocity(x, t, **batch.cond), dx).mean()
        return Loss(loss, {"velocity": loss.detach()}, {"velocity": t[:, None].expand(-1, 2)})

    def check_student(self, student: Any) -> None:
        """Anything with a ``path`` and a ``velocity`` will do."""
