"""Stochastic interpolants: velocity and denoiser between any two data sets."""

from typing import Any

import torch

from fewstep.common.randomness import Generators
from fewstep.data.batch import Batch
from fewstep.flows.broadcasting import as_times
from fewstep.flows.interpolants import DenoisedField
from fewstep.flows.times import draw_times
from fewstep.objectives.base import Loss, Objective, check_options, latent_of, noise_of, squared_error
from fewstep.objectives.native import check_native, moved_natively


class StochasticInterpolant(Objective):
    """``E |v(x_t, t) - (a' x1 + s' x0)|^2 + E |eta(x_t, t) - z|^2``, ``x_t = a x1 + s x0 + g z`` (arXiv 2303.08797).

    Trains a :class:`~fewstep.flows.interpolants.DenoisedField`, whose velocity is ``v + g' eta`` and whose score is
    ``-eta / g``, so that the SDEs between the two data sets can be sampled as well as the ODE.

    Args:
        antithetic: each row is taken with its latent z and with -z, at one time: twice the calls, and much less noise
            in the gradient where g is small.
        times: see :func:`fewstep.flows.times.draw_times`.
    """

    sources = ("2303.08797",)
    trains_field = True
    trains_denoiser = True

    def __init__(self, antithetic: bool = True, times: str = "uniform") -> None:
        super().__init__()
        check_options("StochasticInterpolant", times)
        self.antithetic, self.times = antithetic, times

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
        noise, data, cond = noise_of(batch, generator), batch.data, batch.cond
        t = as_times(draw_times(len(batch), generator, self.times), noise)
        t = moved_natively(self.times, student, t, noise)
        z = latent_of(student.path, noise, generator)
        assert z is not None  # check_student saw to it
        if self.antithetic:
            noise, data, t, z = (
                torch.cat([noise, noise]),
                torch.cat([data, data]),
                torch.cat([t, t]),
                torch.cat([z, -z]),
            )
            cond = {name: torch.cat([value, value]) for name, value in cond.items()}
        x, dx = student.path.between(noise, data, t, z)
        v, eta = student.heads(x, t, **cond)
        terms = {"velocity": squared_error(v, dx).mean(), "denoiser": squared_error(eta, z).mean()}
        times = dict.fromkeys(terms, t[:, None].expand(-1, 2))
        total = terms["velocity"] + terms["denoiser"]
        return Loss(total, {name: term.detach() for name, term in terms.items()}, times)

    def check_student(self, student: Any) -> None:
        if not isinstance(student, DenoisedField):
            raise ValueError(
                f"StochasticInterpolant trains a DenoisedField, not a {type(student).__name__}: DenoisedField(network, "
                "denoiser, Interpolant(latent='sine')), or in a recipe student.kind: denoised"
            )
        check_native(self.times, student)
