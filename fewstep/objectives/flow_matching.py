"""Flow matching: how teachers are trained."""

from typing import Any

from fewstep.objectives.base import Batch, Loss, Objective, check_options, noise_of, squared_error
from fewstep.paths import as_times
from fewstep.randomness import Generators
from fewstep.times import draw_times


class FlowMatching(Objective):
    """``E |v(x_t, t) - dx_t|^2`` (arXiv 2210.02747, 2303.08797): a velocity field from data alone.

    Trains a ``VelocityField``, or the diagonal of a ``FlowMap``.

    Args:
        times: uniform, or logit-normal, which images prefer (arXiv 2403.03206).
    """

    def __init__(self, times: str = "uniform") -> None:
        super().__init__()
        check_options("FlowMatching", times)
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
        t = as_times(draw_times(len(batch), generator, self.times), noise)
        x, dx = student.path.sample(noise, batch.data, t)
        loss = squared_error(student.velocity(x, t, **batch.cond), dx).mean()
        return Loss(loss, {"velocity": loss.detach()}, {"velocity": t[:, None].expand(-1, 2)})

    def check_student(self, student: Any) -> None:
        """Anything with a ``path`` and a ``velocity`` will do."""
        if not (hasattr(student, "path") and hasattr(student, "velocity")):
            name = type(student).__name__
            raise ValueError(f"FlowMatching trains a VelocityField or a FlowMap, not a {name}: NetworkField(network)")
