"""Flow matching: how teachers are trained."""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, chunk_rows
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.change_of_path import scaling
from fewstep.flows.fields import VelocityField
from fewstep.flows.paths import Path
from fewstep.flows.spaces import Tokens
from fewstep.flows.times import draw_times
from fewstep.objectives.base import (
    Batch,
    Loss,
    Objective,
    check_options,
    latent_of,
    noise_of,
    squared_error,
    student_space,
    tokens_of,
)
from fewstep.objectives.native import check_native, moved_natively
from fewstep.objectives.two_time import ERRORS


class FlowMatching(Objective):
    """``E |v(x_t, t) - dx_t|^2`` (arXiv 2210.02747, 2303.08797): a velocity field from data alone.

    Trains a ``VelocityField``, or the diagonal of a ``FlowMap``.

    Args:
        times: uniform, or logit-normal, which images prefer (arXiv 2403.03206), or see
            ``fewstep.flows.times.draw_times``; ``native logit-normal(0, 1)`` moves them as the model's scheduler does.
        error_in: velocity, data, tokens or auto, as in :class:`TwoTime`: the velocity of a network that predicts data
            is its output over 1 - t, and the rows near t = 1 would drown all others.
    """

    sources = ("2210.02747", "2303.08797")
    trains_field = True
    any_space = True

    def __init__(self, times: str = "uniform", error_in: str = "auto") -> None:
        super().__init__()
        check_options(type(self).__name__, times)
        if error_in not in ERRORS:
            raise unknown(f"error_in of {type(self).__name__}", error_in, ERRORS)
        self.times, self.error_in = times, error_in

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
        space = student_space(student)
        noise = noise_of(batch, generator, space)
        t = as_times(draw_times(len(batch), generator, self.times), noise)
        t = moved_natively(self.times, student, t, noise)
        latent = latent_of(student.path, noise, generator)
        x, dx = space.between(student.path, noise, batch.data, t, latent)
        if (tokens := tokens_of(self, student)) is not None:
            aim = batch.data if isinstance(tokens, Tokens) else tokens.aim(dx, x, t)
            loss = tokens.error(student.end(x, t, t, **batch.cond), aim).mean()
            return Loss(loss, {"tokens": loss.detach()}, {"tokens": t[:, None].expand(-1, 2)})
        velocity = student.velocity(x, t, **batch.cond)
        terms = {"velocity": self.weigh(student, squared_error(velocity, dx), t).mean()}
        chunk = chunk_rows(len(batch), generator)
        terms |= self.more_terms(velocity, student.path, noise, batch.data, t, chunk, batch.cond)
        total = torch.stack(list(terms.values())).sum()
        times = dict.fromkeys(terms, t[:, None].expand(-1, 2))
        return Loss(total, {name: term.detach() for name, term in terms.items()}, times)

    def weigh(self, student: Any, error: Tensor, t: Tensor) -> Tensor:
        """The errors of the velocity at times t, (B,) each, with their weights."""
        if self.error_in == "data" or (self.error_in == "auto" and getattr(student, "prediction", None) == "data"):
            return (1 - t).square() * error  # that of x + (1 - t) v
        return error

    def more_terms(
        self, velocity: Tensor, path: Path, noise: Tensor, data: Tensor, t: Tensor, chunk: int, cond: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What else is in the loss, scalars, of the velocity (B, ...) at these states; ``chunk`` rows draw together."""
        return {}

    def check_student(self, student: Any) -> None:
        """Anything with a ``path`` and a ``velocity`` will do."""
        check_native(self.times, student)
        if not (hasattr(student, "path") and hasattr(student, "velocity")):
            own, name = type(self).__name__, type(student).__name__
            raise ValueError(f"{own} trains a VelocityField or a FlowMap, not a {name}: NetworkField(network)")


class ContrastiveFlowMatching(FlowMatching):
    """``E |v(x_t, t) - dx_t|^2 - l |v(x_t, t) - dx~_t|^2``, dx~ that of another row's noise and data at this t
    (arXiv 2506.05350): pushes the velocities of different data (of different conditions, above all) apart.

    What it learns is ``(E[dx given x] - l E[dx]) / (1 - l)``, not the velocity: :class:`Recentred` undoes that.

    Args:
        weight: l, in [0, 1).
        times: see :class:`FlowMatching`.
        null: the class label that stands for none: rows that have it are not contrasted, as in the authors' code.
        other_classes: whether dx~ is of a row of another class; rows without one in their chunk are not contrasted.
    """

    sources = ("2506.05350", "2210.02747")
    any_space = False

    def __init__(
        self, weight: float = 0.05, times: str = "uniform", null: int | None = None, other_classes: bool = False
    ) -> None:
        super().__init__(times, error_in="velocity")
        if not 0 <= weight < 1:
            raise ValueError(f"ContrastiveFlowMatching's weight is {weight}: it lies in [0, 1)")
        self.weight, self.null, self.other_classes = weight, null, other_classes

    def more_terms(
        self, velocity: Tensor, path: Path, noise: Tensor, data: Tensor, t: Tensor, chunk: int, cond: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if chunk == 1:
            raise ValueError("ContrastiveFlowMatching sets rows of a chunk against each other, and chunks have one row")
        # The next row of the same chunk, the same on any number of processes; at this row's time.
        if self.null is None and not self.other_classes:
            noise, data = (x.reshape(-1, chunk, *x.shape[1:]).roll(1, dims=1).reshape(x.shape) for x in (noise, data))
            _, other = path.sample(noise, data, t)
            return {"contrast": -self.weight * squared_error(velocity, other).mean()}
        if "class_labels" not in cond:
            raise ValueError("ContrastiveFlowMatching with null or other_classes needs data with class_labels")
        labels = cond["class_labels"]
        negative, kept = _negatives(labels, chunk, self.other_classes)
        if self.null is not None:
            kept = kept & (labels != self.null)
        _, other = path.sample(noise[negative], data[negative], t)
        errors = squared_error(velocity, other) * kept
        return {"contrast": -self.weight * errors.sum() / kept.sum().clamp(min=1)}


def _negatives(labels: Tensor, chunk: int, other_classes: bool) -> tuple[Tensor, Tensor]:
    """For each row the row before it in its chunk, or the nearest of another class, (B,); and whether there is one."""
    rows = torch.arange(len(labels), device=labels.device)
    start = rows - rows % chunk
    negative, found = rows.clone(), torch.zeros_like(rows, dtype=torch.bool)
    for back in range(1, chunk if other_classes else 2):
        candidate = start + (rows - start - back) % chunk
        fits = ~found & (labels[candidate] != labels) if other_classes else ~found
        negative, found = torch.where(fits, candidate, negative), found | fits
    return negative, found


class Recentred(VelocityField):
    """The velocity of a field that was trained with contrast: ``v = (1 - l) u + l E[dx_t]`` (arXiv 2506.05350).

    Args:
        field: what :class:`ContrastiveFlowMatching` trained, noise and data of mean 0 and ``mean``.
        weight: its l.
        mean: the mean of the data that it was set against: one sample's shape, or with ``other_classes``
            (classes, ...), for each class the mean of the others.
        trained_on: the path of the training, that of the field if not given.
    """

    mean: Tensor

    def __init__(self, field: VelocityField, weight: float, mean: Tensor, *, trained_on: Path | None = None) -> None:
        super().__init__()
        self.known_as(field)
        self.field, self.weight, self.path = field, weight, field.path
        self.trained_on, self.source = trained_on or field.path, None
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t = as_times(t, x)
        mean = self.mean.to(x)
        mean = mean[cond["class_labels"]] if mean.ndim == x.ndim else mean
        return (1 - self.weight) * self.field(x, t, **cond) + self.weight * self._drift(x, t, mean)

    def _drift(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """``E[dx_t]`` as a velocity on the path: a velocity on another becomes ``skip x + out`` times itself."""
        native = self.trained_on
        if native.same_as(self.path):
            return expand(native.alpha_dot(t), x) * mean
        c = scaling(native, "velocity", self.path, t)
        low, high = native.hold_range("velocity")
        time = native.time_of(self.path.alpha(t), self.path.sigma(t)).clamp(low, high)
        return expand(c.skip, x) * x + expand(c.out * native.alpha_dot(time), x) * mean

    def on(self, path: Path) -> "Recentred":
        return Recentred(self.field.on(path), self.weight, self.mean, trained_on=self.trained_on)
