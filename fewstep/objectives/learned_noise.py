"""Learned noise: each datum gets noise of its own, so that the lines of flow matching cross less."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.common.options import arguments
from fewstep.common.randomness import Generators, normal
from fewstep.data.batch import Batch
from fewstep.data.couplings import Coupled
from fewstep.data.given import Around
from fewstep.flows.signature import shape_of
from fewstep.networks import NoiseEncoder
from fewstep.objectives.base import Loss, Objective
from fewstep.objectives.flow_matching import FlowMatching

_NARROW = 0.9  # noise of a smaller mean square is warned of
_MEMORY = 0.95  # of the running mean of it


class LearnedNoise(Objective):
    """``base + beta KL(q(x0 | x1) || N(0, I)) / D``, the base's noise drawn from ``q = N(mu(x1), diag s(x1)^2)`` (arXiv
    2301.12003).

    The encoder (mu, s) trains with the velocity: the loss of flow matching is large where lines from noise to data
    cross, so it learns noise whose lines cross less, and the trajectories bend less. Its gradient runs through both the
    state and the goal. Both terms are means over the D numbers of a sample. Sampling starts from N(0, I) and needs no
    encoder.

    It is biased: ``KL > 0`` means that noise differs from N(0, I) on the whole, mostly by its spread, which is below 1.
    ``noise_square`` in the log is its mean square, which is 1 for N(0, I), and half way through the training it warns
    of less than 0.9. A large beta leaves noise as it is, a small one gives the lowest loss and the worst samples.

    Args:
        base: ``FlowMatching()``, or ``ContrastiveFlowMatching(...)``.
        encoder: ``auto``, a :class:`fewstep.networks.NoiseEncoder`; a mapping with options of it, ``{"width": 32}``; or
            a module ``encoder(x) -> (mean, logarithm of the variance)``, each of the shape of x. It trains with the
            rate of the student.
        beta: the weight of the KL.

    Raises:
        ValueError: a beta that is not positive, another base, data that bring noise of their own.
    """

    sources = ("2301.12003",)
    trains_field = True
    around = "FlowMatching"

    def __init__(
        self, base: Objective, encoder: str | Mapping[str, Any] | nn.Module = "auto", beta: float = 20.0
    ) -> None:
        super().__init__()
        if not isinstance(base, FlowMatching):
            raise ValueError(
                f"LearnedNoise stands around FlowMatching, whose goal is of the data, not {type(base).__name__}: "
                "train a field with it, and distill that"
            )
        if not 0 < beta < float("inf"):
            raise ValueError(f"LearnedNoise's beta is {beta:g}: it is a positive number")
        self.base, self.beta = base, beta
        self.sources = tuple(dict.fromkeys((*type(self).sources, *base.sources)))
        self.wanted: dict[str, Any] = {}
        self.encoder: nn.Module | None = encoder if isinstance(encoder, nn.Module) else None
        if isinstance(encoder, Mapping):
            self.wanted = arguments("objective.encoder", NoiseEncoder, {"shape": (), **encoder})
        elif isinstance(encoder, str) and encoder != "auto":
            raise unknown("encoder of LearnedNoise", encoder, ("auto", "{width: 64, depth: 3}"))
        self._square: Tensor | None = None
        self._told = False

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
        if self.encoder is None:
            raise ValueError("LearnedNoise has no encoder yet: call adopt(student) first, as fit does")
        if batch.noise is not None:
            raise _has_noise()
        mean, log_variance = self.encoder(batch.data)
        noise = mean + (log_variance / 2).exp() * normal(batch.data, generator)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        batch = replace(batch, noise=noise.to(batch.data))
        loss = self.base(student, batch, target=target, progress=progress, step=step, generator=generator)
        square = noise.detach().square().mean()
        self._watch(square, progress)
        terms = {**loss.terms, "kl": kl.detach(), "noise_square": square}
        return Loss(loss.total + self.beta * kl, terms, loss.times, loss.others)

    def adopt(self, student: nn.Module) -> None:
        self.base.adopt(student)
        self._settle(student)

    def check_student(self, student: Any) -> None:
        self.base.check_student(student)
        self._settle(student)

    def check_data(self, data: Any, student: Any) -> None:
        inner = data
        while isinstance(inner, Around) and not isinstance(inner, Coupled):
            inner = inner.data
        if isinstance(inner, Coupled) or getattr(inner, "brings_noise", False):
            raise _has_noise()
        super().check_data(data, student)
        self.base.check_data(data, student)

    def _settle(self, student: Any) -> None:
        """Make the encoder, for the samples of this student and in the type of its weights."""
        if self.encoder is not None:
            return
        options = dict(self.wanted)
        try:
            shape = tuple(options.pop("shape", ())) or shape_of(student)
        except ValueError as error:
            raise ValueError(f"LearnedNoise makes no encoder: {error}, or encoder: {{shape: [1, 28, 28]}}") from None
        self.encoder = NoiseEncoder(shape, **options).to(next(student.parameters()).dtype)

    def _watch(self, square: Tensor, progress: float) -> None:
        """Say once, half way, that the noise has become narrower than that which sampling draws."""
        if self._told:
            return
        self._square = square if self._square is None else torch.lerp(square, self._square, _MEMORY)
        if progress < 0.5:
            return
        self._told = True
        if (mean := float(self._square)) < _NARROW:
            warnings.warn(
                f"the learned noise has a mean square of {mean:.2g}, and sampling draws 1: samples are biased. Raise "
                f"beta, which is {self.beta:g}",
                stacklevel=2,
            )


def _has_noise() -> ValueError:
    return ValueError(
        "LearnedNoise draws the noise of each row, and the data bring their own (a coupling, pairs or a source): say "
        "coupling: independent, and leave pairs and source out"
    )
