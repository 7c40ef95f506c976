"""A field drawn towards data or noise of choice: the control of RF inversion."""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import moved
from fewstep.flows.paths import Path


class Controlled(VelocityField):
    """A field drawn towards data, or towards noise: ``v + eta (w - v)``, with w the straight way there (RF inversion,
    arXiv 2410.10792).

    Towards ``data`` y, for sampling, ``w = (y - x) / (1 - t)``; towards ``noise`` y0, for inversion,
    ``w = (x - y0) / t``: those of the linear path, and on another the conditional velocities of its own. Both have no
    value where they arrive, so that the control ends before t = 1, and before t = 0 on the way back.

    Any eta > 0 that lasts to its end arrives at y, or at y0, in exact arithmetic: what else survives is the error of
    the steps. So the result depends on their number, which belongs to eta as a setting does.

    Args:
        strength: eta, their gamma on the way back: 0 is the field, 1 goes straight.
        data, noise: (B, ...), one of the two, of as many rows as x.
        interval: the times between which it acts, towards data without the later one, towards noise without the
            earlier.

    Raises:
        ValueError: neither data nor noise, or both; a strength or an interval outside [0, 1].

    >>> start = fewstep.invert(Controlled(field, 0.5, noise=torch.randn_like(y)), y, 28, solver="euler").state
    >>> edited = fewstep.sample(Controlled(field, 0.9, data=y, interval=(0, 0.25)), start, 28, class_labels=labels)
    """

    end: Tensor

    def __init__(
        self,
        field: VelocityField,
        strength: float,
        *,
        data: Tensor | None = None,
        noise: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if not isinstance(field, VelocityField):
            raise ValueError(
                f"a field is controlled, and this is a {type(field).__name__}: a map has no velocity to bend"
            )
        end = noise if data is None else data
        if end is None or (data is not None and noise is not None):
            raise ValueError("control leads to data= (sampling) or to noise= (inversion): give one of them")
        if not 0 <= strength <= 1:
            raise ValueError(f"the strength of control is {shown(strength)}: 0 is none, 1 the straight way")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"the interval of control {interval} is not within [0, 1]")
        self.field, self.strength, self.interval = field, strength, interval
        self.leads_to = "noise" if data is None else "data"
        self.register_buffer("end", check_data(end), persistent=False)
        self.known_as(field)
        self.path, self.source = field.path, None

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        if len(x) != len(self.end):
            raise ValueError(
                f"control leads {len(x)} rows to {len(self.end)} rows of {self.leads_to}: as many are needed"
            )
        t = as_times(t, x)
        velocity = self.field(x, t, **cond)
        low, high = self.interval
        acts = (t >= low) & (t < high) if self.leads_to == "data" else (t > low) & (t <= high)
        straight = torch.where(acts.reshape(-1, *[1] * (x.ndim - 1)), self._straight(x, t), velocity)
        return velocity + self.strength * (straight - velocity)

    def on(self, path: Path) -> "Controlled":
        low, high = (moved(t, self.path, path) for t in self.interval)
        return Controlled(self.field.on(path), self.strength, **{self.leads_to: self.end}, interval=(low, high))

    def _straight(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x of the trajectory that goes through x and has this end."""
        a, s, a_dot, s_dot = (expand(c, x) for c in self.path.coefficients(t))
        if self.leads_to == "data":
            return a_dot * self.end + s_dot * (x - a * self.end) / s
        return a_dot * (x - s * self.end) / a + s_dot * self.end

    def extra_repr(self) -> str:
        return f"strength={self.strength}, leads_to={self.leads_to!r}, interval={self.interval}"


def uncontrolled(model: Any) -> Any:
    """The field inside a controlled one; any other model as it is."""
    while isinstance(model, Controlled):
        model = model.field
    return model


def check_data(data: Tensor) -> Tensor:
    if not data.is_floating_point() or not data.isfinite().all():
        what = f"of type {data.dtype}" if not data.is_floating_point() else "not finite (NaN or infinity)"
        raise ValueError(
            f"the data, of shape {tuple(data.shape)}, are {what}: finite floats in the model's units are needed"
        )
    return data
