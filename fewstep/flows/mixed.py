"""Products of powers of what several fields sample: guidance, products, annealing, exact in the limit of many steps.

Take q_i on one path, all of them N(0, 1) at t = 0, with powers b_i that sum to 1, and ask for ``p_t`` proportional to
``prod q_i^b_i`` at all times. From ``d_t q_i = -div(v_i q_i)``, with ``v = sum b_i v_i`` and the score S = sum b_i S_i,

    ``dx = (v + eps S) dt + sqrt(2 eps) dW``,  ``dlog w = -sum b_i |v_i - v|^2 / kappa dt``

has p_t as its weighted law, for any eps; kappa is the path's own diffusion, ``(1 - t) / t`` on the linear path
(arXiv 2503.02819 in velocities; its ``kappa (|S|^2 - sum b_i |S_i|^2)`` is this, as the terms in x cancel). No score is
needed for the weight. For guidance, b = (w, 1 - w), it is ``w (w - 1) |v_1 - v_2|^2 / kappa``.

Powers of another sum B are brought to 1 by a Gaussian: N(0, scale^2) with the power 1 - B is one more of the q_i, its
velocity known, and what it takes away at t = 1 is given back by weights ``t (B - 1) log N_t(x)`` on the way. (Without
it p_0 is N(0, 1/B), and both drift and weight are infinite at t = 0.)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.flows.broadcasting import as_times
from fewstep.flows.fields import VelocityField, check_field
from fewstep.flows.guided import Guided, replaced
from fewstep.flows.kernels import Cond, sde_step
from fewstep.flows.stochastic import Eps, Place, places_along


@dataclass(frozen=True, eq=False)
class Mixed:
    """The target ``prod q_i^b_i`` of fields on one path, for ``steer`` with 50 steps or more.

    Args:
        powers: ``{field: power}``. ``{strong: w, weak: 1 - w}`` is what guidance by w means to sample,
            ``{one: 1, other: 1}`` the product of two, ``{field: 2}`` a field at half the temperature. Powers below 0
            are allowed; that the product can be normalised is yours to know.
        scale: where the powers do not sum to 1, the deviation of a Gaussian that stands in, about that of the data.

    Raises:
        ValueError: no fields, a flow map, fields on different paths, powers that are no finite numbers or sum to 0 or
            less.

    >>> fewstep.steer(field, noise, 100, fewstep.Mixed({field: 1.0, other: 1.0}))
    """

    powers: Mapping[VelocityField, float]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.powers, Mapping) or not self.powers:
            raise ValueError(f"Mixed takes fields and their powers, {{field: 2.0}}, not {shown(self.powers)}")
        for field, power in self.powers.items():
            if hasattr(field, "average_velocity"):
                raise ValueError(
                    "Mixed is for velocity fields in many steps: a flow map has no density in its few steps. Name the "
                    "field that it was made from"
                )
            check_field(field, "a part of Mixed")
            if isinstance(power, bool) or not isinstance(power, int | float) or not math.isfinite(power):
                raise ValueError(f"Mixed: the power {shown(power)} is no finite number")
        path = self.path
        for field in self.powers:
            if not field.path.same_as(path):
                raise ValueError(f"Mixed: fields on {path} and on {field.path}: bring them together, field.on(path)")
        if not self.total > 0:
            raise ValueError(f"Mixed: the powers sum to {self.total:g}: a density needs a sum above 0")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"Mixed: scale is {self.scale}: a deviation above 0 is needed")

    @classmethod
    def of(cls, guided: Guided) -> "Mixed":
        """What a guided field means to sample: ``field^w weak^(1 - w)``.

        Raises:
            ValueError: it is guided between some times alone, so that the target would jump at the ends of these.

        >>> guided = fewstep.Guided(field, 3.0, null={"class_labels": 10})
        >>> fewstep.steer(guided, noise, 100, fewstep.Mixed.of(guided), class_labels=labels)
        """
        if guided.interval != (0.0, 1.0):
            raise ValueError(
                f"Mixed.of: guidance on the interval {guided.interval} has no one target, it jumps at the ends: take "
                "(0, 1)"
            )
        if guided.scale_2 is not None:
            raise ValueError("Mixed.of: guidance with a scale_2 has no one target, it jumps from expert to expert")
        weak = Blank(guided.field if guided.weak is None else guided.weak, guided.null)
        return cls({guided.field: guided.scale, weak: 1 - guided.scale})

    @property
    def path(self) -> Any:
        return next(iter(self.powers)).path

    @property
    def total(self) -> float:
        """B, the sum of the powers."""
        return math.fsum(self.powers.values())


class Blank(VelocityField):
    """A field whose conditions are replaced by those that say nothing."""

    def __init__(self, field: VelocityField, null: dict[str, Any]) -> None:
        super().__init__()
        self.known_as(field)
        self.field, self.null, self.path = field, null, field.path

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        return self.field(x, as_times(t, x), **replaced(cond, self.null))


class MixedWalk:
    """Steps of a mixture along a grid, with what each adds to the weights."""

    def __init__(self, mixed: Mixed, times: Tensor, eps: Eps, like: Tensor) -> None:
        self.mixed, self.grid, self.excess = mixed, places_along(mixed.path, times, eps, like), mixed.total - 1

    def advance(
        self, i: int, x: Tensor, known: dict[str, Tensor], cond: Cond, draw: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        here, there = self.grid[i : i + 2]
        v, rate = self.velocity_and_rate(here, x, cond)
        mean, std = sde_step(here, there, x, v)
        x_next = mean + std * draw(x) if std else mean
        log_ratio = (there.t - here.t) * rate
        if self.excess:
            log_ratio = log_ratio + self.given_back(there, x_next) - self.given_back(here, x)
        return x_next, {}, log_ratio

    def check(self) -> None:
        """Nothing that could be wrong on the way but the numbers themselves."""

    def velocity_and_rate(self, here: Place, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """``v = sum b_i v_i`` (B, ...), and ``dlog w / dt`` (B,)."""
        parts = [(power, here.velocity(partial(field, **cond), x)) for field, power in self.mixed.powers.items()]
        if self.excess:
            parts.append((-self.excess, self._gaussian_rate(here) * x))
        v = sum_of(power * velocity for power, velocity in parts)
        spread = sum_of(power * norm2(velocity - v) for power, velocity in parts)
        return v, -spread / here.kappa  # 0 at t = 0, where kappa is infinite

    def given_back(self, place: Place, x: Tensor) -> Tensor:
        """``t (B - 1) log N(x; 0, a^2 scale^2 + s^2)``, (B,)."""
        variance = self._variance(place)
        size = x[0].numel()
        log_density = -norm2(x) / (2 * variance) - size / 2 * math.log(2 * math.pi * variance)
        return place.t * self.excess * log_density

    def _variance(self, place: Place) -> float:
        return (place.alpha * self.mixed.scale) ** 2 + place.sigma**2

    def _gaussian_rate(self, place: Place) -> float:
        """The velocity of N(0, scale^2) is this times x."""
        a, s = place.alpha, place.sigma
        return (a * place.alpha_dot * self.mixed.scale**2 + s * place.sigma_dot) / self._variance(place)


def norm2(x: Tensor) -> Tensor:
    """``|x|^2`` of each sample, (B,), in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().reshape(len(x), -1).sum(1)


def sum_of(parts: Any) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
