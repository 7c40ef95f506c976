"""Denoising: how diffusion models are trained, on the schedule and in the terms that they were made with."""

from typing import Any

import torch

from fewstep.common.randomness import Generators, uniform
from fewstep.flows.fields import NetworkField
from fewstep.flows.tabulated import Tabulated
from fewstep.objectives.base import Batch, Loss, Objective, noise_of, squared_error


class Denoising(Objective):
    """``E |F(x_k, k) - target|^2`` at the steps k of a diffusion schedule, each as likely (arXiv 2006.11239).

    Trains the network of a ``NetworkField`` as a diffusion model, on its native path: the target is the noise, the
    data, v (arXiv 2202.00512) or EDM's -v, whichever it predicts (``Path.prediction``). So a diffusion model is trained
    from data, or goes on as it began: what fine-tuning by :class:`FlowMatching` is held against. Paths that are no
    table have their times uniform.
    """

    sources = ("2006.11239", "2202.00512")
    trains_field = True

    def __init__(self) -> None:  # no teacher
        super().__init__()

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
        native = student.native
        noise, u = noise_of(batch, generator), uniform(len(batch), generator).to(batch.data)
        if isinstance(native, Tabulated):
            last = native.steps - 1
            t = torch.floor(u * (last + 1)).clamp(max=last) / last
        else:
            low, high = native.hold_range(student.prediction)
            t = low + (high - low) * u
        x, _ = native.sample(noise, batch.data, t)
        prediction = student.network(x, native.network_time(t), **batch.cond)
        loss = squared_error(prediction, native.prediction(noise, batch.data, t, student.prediction)).mean()
        return Loss(loss, {"denoising": loss.detach()}, {"denoising": t[:, None].expand(-1, 2)})

    def check_student(self, student: Any) -> None:
        name = type(student).__name__
        if not isinstance(student, NetworkField):
            raise ValueError(f"Denoising trains the network of a NetworkField, not a {name}: DiffusionField(net, ...)")
        if student.prediction not in ("noise", "data", "v", "edm"):
            raise ValueError(
                f"Denoising trains a network that predicts noise, data or v, this one predicts {student.prediction}: "
                "train it by FlowMatching"
            )
