"""Diff-Tuning: fine-tuning that adapts near the noise and keeps what the model knows near the data."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, uniform
from fewstep.common.randomness import generator as seeded
from fewstep.data import load_data
from fewstep.data.batch import Batch, Data
from fewstep.data.conditions import blank
from fewstep.data.given import as_data
from fewstep.flows.broadcasting import as_times
from fewstep.flows.fields import VelocityField
from fewstep.flows.sampling import sample
from fewstep.flows.signature import classes_of, needed_conditions, shape_of
from fewstep.flows.times import draw_times
from fewstep.objectives.base import Loss, Objective, latent_of, noise_of, rows_of, split_rows, squared_error

RETAINED = ("samples", "velocity")
_AT_ONCE = 250


class DiffTuning(Objective):
    """``E |v(x_t, t) - dx_t|^2`` of new data at times of density ~ (1 - t)^c, and ``weight`` times the same of samples
    that the model made before, at times of density ~ t^c (arXiv 2406.00773).

    What a pretrained model does near the data, the last denoising, serves new data too, and is kept (retention); what
    it does near the noise says which images there are, and adapts (reconsolidation). Of each chunk of rows a ``share``
    is replaced by the samples. As the labels of both differ, those train the conditions for none alone.

    Args:
        samples: a number: so many are drawn from the model as it begins, once, by ``steps`` Heun steps, with classes at
            random; or what ``fewstep.load_data`` reads; or rows (N, ...). They are kept in memory.
        share: of the rows, that are samples.
        weight: of their loss.
        power: c.
        null: the conditions that stand for none, such as ``{"class_labels": 10}``; samples are trained with these.
        retain: ``samples``; or ``velocity``: the goal on them is the velocity of the model as it began, under the
            classes that they were drawn with. That has no noise in it, and costs a copy and a call on these rows.
        steps: of Heun, that draw the samples.
        seed: decides them.

    Raises:
        ValueError: an option out of its range, a model with classes and no null, samples of another shape.
    """

    needs_whole = "it draws from the model as it was, which it keeps beside: leave shard out"
    sources = ("2406.00773", "2210.02747")
    trains_field = True

    def __init__(
        self,
        samples: int | str | Tensor | Data = 2000,
        share: float = 0.2,
        weight: float = 0.1,
        power: float = 1.0,
        null: Mapping[str, int] | None = None,
        retain: str = "samples",
        steps: int = 25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if retain not in RETAINED:
            raise unknown("retain of DiffTuning", retain, RETAINED)
        if not 0 < share < 1:
            raise ValueError(f"DiffTuning's share is {share:g}: it lies in (0, 1)")
        if not (0 < power < float("inf") and 0 < weight < float("inf")):
            raise ValueError(f"DiffTuning's power is {power:g} and its weight {weight:g}: both are positive numbers")
        if isinstance(samples, int) and (samples < 1 or steps < 1):
            raise ValueError(f"DiffTuning draws {samples} samples in {steps} steps: both are at least 1")
        self.samples, self.share, self.weight, self.power, self.retain = samples, share, weight, power, retain
        self.null, self.steps, self.seed = dict(null or {}), steps, seed
        self._rows: Batch | None = None
        # In a tuple, nn.Module does not see it: it is neither trained nor checkpointed.
        self._before: tuple[VelocityField, ...] = ()

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
        if self._rows is None:
            raise ValueError("DiffTuning has no samples yet: call adopt(student) first, as fit does")
        device, rows = batch.data.device, len(batch)
        parts = split_rows(rows, {"retained": self.share, "": 1 - self.share}, generator, device)
        kept, new = parts["retained"], parts[""]
        which = (uniform(rows, generator) * len(self._rows)).long().clamp(max=len(self._rows) - 1)
        data, cond = batch.data.clone(), {name: value.clone() for name, value in batch.cond.items()}
        which = which.to(self._rows.data.device)[kept]
        data[kept] = self._rows.data[which].to(data)
        for name, value in self.null.items():
            cond[name][kept] = blank(name, value, cond[name][kept])
        noise = noise_of(batch, generator)
        t = as_times(draw_times(rows, generator, f"mirrored-power({self.power})"), noise).clone()
        t[kept] = as_times(draw_times(rows, generator, f"power({self.power})"), noise)[kept]
        x, dx = student.path.sample(noise, data, t, latent_of(student.path, noise, generator))
        if self._before:
            drawn = {name: value.to(device) for name, value in rows_of(self._rows.cond, which).items()}
            with torch.no_grad():
                dx[kept] = self._before[0](x[kept], t[kept], **drawn).to(dx)
        error = squared_error(student.velocity(x, t, **cond), dx)
        terms = {"velocity": error[new].mean(), "retained": error[kept].mean()}
        times = {name: t[part][:, None].expand(-1, 2) for name, part in (("velocity", new), ("retained", kept))}
        total = terms["velocity"] + self.weight * terms["retained"]
        return Loss(total, {name: term.detach() for name, term in terms.items()}, times)

    def adopt(self, student: nn.Module) -> None:
        assert isinstance(student, VelocityField)  # check_student saw to it
        was = student.training
        if self._rows is None:
            self._rows = self._drawn(student.eval()) if isinstance(self.samples, int) else self._given(self.samples)
        if self.retain == "velocity":
            self._before = (deepcopy(student).eval().requires_grad_(False),)
        student.train(was)

    def check_student(self, student: Any) -> None:
        if not isinstance(student, VelocityField):
            raise ValueError(f"DiffTuning fine-tunes a VelocityField, not a {type(student).__name__}: fewstep.load")
        if classes_of(student) and "class_labels" not in self.null:
            raise ValueError(
                f"DiffTuning: the model has {classes_of(student)} classes, and its samples are trained without one: "
                f"say which label stands for none, such as null: {{class_labels: {classes_of(student) - 1}}}"
            )
        if not isinstance(self.samples, int):
            return
        shape_of(student)
        if others := sorted({*needed_conditions(student)} - {"class_labels"}):
            raise ValueError(
                f"DiffTuning draws samples of classes alone, and the model needs {', '.join(others)}: draw them with "
                "fewstep sample, and say samples: FILE.npz"
            )

    def check_data(self, data: Any, student: Any) -> None:
        super().check_data(data, student)
        if not isinstance(self.samples, int):
            self._rows = self._given(self.samples)
            if tuple(self._rows.data.shape[1:]) != tuple(data.shape):
                shape = tuple(self._rows.data.shape[1:])
                raise ValueError(f"DiffTuning: samples of shape {shape} beside data of shape {tuple(data.shape)}")
            if self.retain == "velocity" and classes_of(student) and "class_labels" not in self._rows.cond:
                raise ValueError(
                    "DiffTuning's retain: velocity asks the model what it said of its samples, and these have no "
                    "class_labels: give some, say samples: 2000, or retain: samples"
                )
        known = getattr(data, "cond", None)
        if known is not None and (missing := sorted(set(self.null) - set(known))):
            raise ValueError(
                f"DiffTuning's null names the condition {missing[0]!r}, which the data do not have: they have "
                f"{', '.join(known) or 'none'}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "DiffTuning":
        for field in self._before:
            field._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _given(self, samples: str | Tensor | Data) -> Batch:
        """All rows of the samples that were handed in."""
        data = load_data(samples) if isinstance(samples, str) else as_data(samples)
        if data.size is None:
            raise ValueError("DiffTuning's samples are a density without end: a file or rows of samples are needed")
        return data.rows(torch.arange(data.size), seeded(self.seed))

    def _drawn(self, student: VelocityField) -> Batch:
        """Samples of the model as it begins, with the classes that they were drawn for."""
        count, draw, none = int(self.samples), seeded(self.seed), self.null.get("class_labels")  # pyright: ignore[reportArgumentType]
        noise = torch.randn(count, *shape_of(student), generator=draw)
        cond: dict[str, Any] = {}
        if classes := [label for label in range(classes_of(student)) if label != none]:
            cond = {"class_labels": torch.tensor(classes)[torch.randint(len(classes), (count,), generator=draw)]}
        made = [
            sample(
                student,
                noise[i : i + _AT_ONCE],
                self.steps,
                solver="heun",
                **{k: v[i : i + _AT_ONCE] for k, v in cond.items()},
            )
            for i in range(0, count, _AT_ONCE)
        ]
        return Batch(torch.cat(made).cpu(), cond)
