"""Guidance: a field pushed away from a weaker one."""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.distributed import anywhere
from fewstep.data.conditions import blank
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.paths import Path


class Guided(VelocityField):
    """A field pushed away from a weaker one: ``weak + w (field - weak)`` for times inside ``interval``.

    With ``null`` conditions this is classifier-free guidance (arXiv 2207.12598), on an interval (arXiv 2404.07724);
    with another ``weak`` field, autoguidance (arXiv 2406.02507). Outside the interval, the field itself.

    Args:
        scale: w; 1 is no guidance. The condition ``guidance`` (B,) of a call, which goes no further, takes its place
            row by row.
        interval: the times (t = 0 noise, 1 data) between which guidance acts.
        null: the conditions of the weak call, a number or one sample's tensor each, such as ``{"class_labels": 10}``;
            the others stay as they are.
        weak: the weaker field; the field itself if not given.
        scale_2: w where the second of two experts answers, as of Wan 2.2 (diffusers' ``guidance_scale_2``); ``scale``
            if not given.

    Raises:
        ValueError: with neither ``null`` nor ``weak``, for an interval outside [0, 1] or a weak field on another path;
            ``scale_2`` for a field without experts; when called without a condition that ``null`` replaces.
    """

    def __init__(
        self,
        field: VelocityField,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        *,
        null: dict[str, Any] | None = None,
        weak: VelocityField | None = None,
        scale_2: float | None = None,
    ) -> None:
        super().__init__()
        if weak is None and not null:
            raise ValueError("guidance needs something weaker: null conditions (null={'class_labels': 10}) or weak=")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"the guidance interval {interval} is not within [0, 1]")
        if weak is not None and not weak.path.same_as(field.path):
            raise ValueError(f"the weak field is on {weak.path}, the field on {field.path}: use weak.on(field.path)")
        if scale_2 is not None and not getattr(unguided(field), "has_experts", False):
            raise ValueError(f"scale_2 is {scale_2:g}: it is for a field of two experts, as Wan 2.2: leave it out")
        self.field, self.weak = field, weak
        self.scale, self.scale_2, self.interval, self.null = scale, scale_2, interval, null or {}
        self.known_as(field)
        self.path, self.source = field.path, None  # the field's own name does not say how it is guided

    def forward(self, x: Tensor, t: Tensor | float, *, guidance: Tensor | None = None, **cond: Any) -> Tensor:
        t = as_times(t, x)
        scale = self._scale_at(t) if guidance is None else guidance.to(t)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        # Asking waits for a GPU, and all times are inside the whole interval.
        if (isinstance(scale, float | int) and scale == 1) or (self.interval != (0, 1) and not anywhere(inside.any())):
            return self.field(x, t, **cond)
        null = replaced(cond, self.null)
        if self.weak is None:  # both calls as one batch
            both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
            strong, weak = self.field(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        else:
            strong, weak = self.field(x, t, **cond), self.weak(x, t, **null)
        # Where w - 1 is 0, outside the interval, this is the field to the last bit.
        return strong + expand((scale - 1) * inside.to(t.dtype), x) * (strong - weak)

    def on(self, path: Path) -> "Guided":
        weak = None if self.weak is None else self.weak.on(path)
        low, high = (moved(t, self.path, path) for t in self.interval)
        return Guided(self.field.on(path), self.scale, (low, high), null=self.null, weak=weak, scale_2=self.scale_2)

    def _scale_at(self, t: Tensor) -> float | Tensor:
        """w at times t (B,)."""
        if self.scale_2 is None:
            return self.scale
        field: Any = unguided(self.field)
        return torch.full_like(t, self.scale).masked_fill(field.is_second(t), self.scale_2)


def replaced(cond: dict[str, Any], null: dict[str, Any]) -> dict[str, Any]:
    """Conditions (B, ...) with those of ``null``, a number or one sample's tensor each, in the place of some.

    Raises:
        ValueError: one that is to be replaced is not there.
    """
    missing = sorted(set(null) - set(cond))
    if missing:
        raise ValueError(f"guidance replaces the condition {missing[0]!r}, which this call does not have: pass it")
    return cond | {name: blank(name, value, cond[name]) for name, value in null.items()}


def moved(t: float, path: Path, wanted: Path) -> float:
    """The time on the wanted path where the noise is to the data as it is at t on ``path``; the ends stay the ends."""
    if t in (0, 1):
        return t
    time = torch.tensor(t, dtype=torch.float64)
    return float(wanted.time_of(path.alpha(time), path.sigma(time)))


def unguided(model: Any) -> Any:
    """The field inside a guided one, however deep; any other model as it is."""
    while isinstance(model, Guided):
        model = model.field
    return model
