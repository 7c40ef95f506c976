"""One step of a sampler as what it is, a Gaussian: where it goes from x, and how much noise it adds there.

``mean_std`` gives its mean (B, ...) and its deviation, a number; the last step has none. ``ahead`` says where x will
end, at no cost to the law of the samples. What is known at x and may be used again, its velocity, goes with it.
"""

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import beyond
from fewstep.flows.stochastic import Eps, Place, places_along

Known = dict[str, Tensor]
Cond = dict[str, Any]


def sde_step(here: Place, there: Place, x: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Euler-Maruyama of ``dx = (v + eps S) dt + sqrt(2 eps) dW``; of the ODE in the last step, as it has the same
    marginals and leaves no noise, and where eps or S is infinite."""
    h = there.t - here.t
    if there.t == 1 or here.eps == 0 or not here.is_known:
        return x + h * v, 0.0
    return x + h * (v + here.eps * here.score(x, v)), math.sqrt(2 * here.eps * h)


class Kernel(Protocol):
    """What the step of a sampler is to know of itself; whether any of its steps ``renews`` noise."""

    renews: bool

    def mean_std(self, i: int, x: Tensor, known: Known, cond: Cond) -> tuple[Tensor, float]:
        """Step i of x (B, ...): its mean (B, ...) and the deviation of its noise."""
        ...

    def ahead(self, i: int, x: Tensor, cond: Cond) -> tuple[Tensor, Known]:
        """Where x (B, ...) at the beginning of step i ends, (B, ...), and what the step may use again."""
        ...


class FieldKernel:
    """Of a velocity field: a step of its SDE, and the denoiser ``E[x1 | x_t = x]``, one call for both."""

    def __init__(self, field: VelocityField, times: Tensor, eps: Eps, x: Tensor) -> None:
        self.field, self.places = field, places_along(field.path, times, eps, x)
        self.renews = any(place.eps and place.is_known for place in self.places[:-2])

    def mean_std(self, i: int, x: Tensor, known: Known, cond: Cond) -> tuple[Tensor, float]:
        here, there = self.places[i : i + 2]
        v = known["velocity"] if "velocity" in known else here.velocity(partial(self.field, **cond), x)
        return sde_step(here, there, x, v)

    def ahead(self, i: int, x: Tensor, cond: Cond) -> tuple[Tensor, Known]:
        v = self.places[i].velocity(partial(self.field, **cond), x)
        return self.places[i].data(x, v), {"velocity": v}


class MapKernel:
    """Of a flow map: gamma-sampling, and the map itself to t = 1."""

    def __init__(self, model: FlowMap, times: Tensor, gamma: float, x: Tensor) -> None:
        self.model, self.renews, grid = model, gamma > 0, times.detach().cpu().double()
        self.times = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
        inner = [tuple(map(float, beyond(model.path, t, gamma))) if gamma else (float(t), 1.0, 0.0) for t in grid[1:-1]]
        self.steps = [*inner, (1.0, 1.0, 0.0)]  # the last step takes no noise
        self.ends = torch.tensor([r for r, _, _ in self.steps], dtype=grid.dtype).to(self.times)

    def mean_std(self, i: int, x: Tensor, known: Known, cond: Cond) -> tuple[Tensor, float]:
        _, shrink, fresh = self.steps[i]
        return shrink * self.model(x, self.times[i], self.ends[i], **cond), fresh

    def ahead(self, i: int, x: Tensor, cond: Cond) -> tuple[Tensor, Known]:
        return self.model(x, self.times[i], self.times[-1], **cond), {}
