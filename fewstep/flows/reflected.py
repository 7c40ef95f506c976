"""Reflected diffusion: data diffuse in a box until they are uniform in it, and its walls send them back on the way
(arXiv 2304.04740).

Noise grows as in a variance-exploding diffusion, ``x_t = reflect(x1 + sigma_t z)``, and what such a diffusion knows of
velocities holds here too, with the score S of the law of x_t: ``v = -sigma sigma' S`` is its probability-flow ODE, and
``D = x + sigma^2 S`` lies in the box.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.heat import heat_kernel, reflect
from fewstep.flows.paths import Path


@dataclass(frozen=True)
class Reflected(Path):
    """``x_t = reflect(x1 + sigma_t z)`` in the cube [low, high]^n of width w, with
    ``sigma_t = w sigma_min (sigma_max / sigma_min)^(1 - t)`` (arXiv 2304.04740, whose time runs the other way).

    Given x1 the velocity is ``dx_t = L sigma_t^2 grad log K(x_t | x1)`` with the heat kernel K and
    ``L = log(sigma_max / sigma_min)``: finite at all times, and along the walls. At t = 0 the law is uniform, up to
    ``2 exp(-pi^2 sigma_max^2 / 2)``, 3e-5 here. The authors' sigma_max is 5: there a fifth of the times goes by where
    all is uniform, and what a network gets wrong of the noise is 31 times as much of the velocity. At t = 1 the law is
    that of the data with a last sigma_min. What networks predict is ``noise``, -sigma_t times the score, the ``score``,
    the velocity, or ``data``, which is D. x0 has no part in x_t.

    Args:
        low, high: the ends of the cube, those of the space ``Box(low, high)``.
        sigma_min, sigma_max: the least and the most noise, in units of the width.
        time_scale: of the times that networks on it are asked at: 1000 for those of diffusers.

    Raises:
        ValueError: low is not below high, or sigma_min not between 0 and sigma_max.
    """

    low: float = -1.0
    high: float = 1.0
    sigma_min: float = 0.01
    sigma_max: float = 1.5
    time_scale: float = 1.0

    two_sided: ClassVar[bool] = True
    has_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf and 0 < self.sigma_min < self.sigma_max < math.inf):
            raise ValueError(f"{self}: low is below high, and 0 < sigma_min < sigma_max, such as 0.01 and 1.5")

    @property
    def has_latent(self) -> bool:
        return True

    @property
    def width(self) -> float:
        """w."""
        return self.high - self.low

    @property
    def rate(self) -> float:
        """L, at which log sigma falls."""
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.width * self.sigma_min * torch.exp(self.rate * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.rate * self.sigma(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (1 - torch.log(sigma / alpha / (self.width * self.sigma_min)) / self.rate).clamp(0, 1)

    def hold_range(self, kind: str) -> tuple[float, float]:
        return 0.0, 1.0

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def same_as(self, other: Path) -> bool:
        return isinstance(other, Reflected) and replace(self, time_scale=other.time_scale) == other

    def in_unit(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) as places in [0, 1], in float32 at least, and ``tau = sigma^2 / 2`` there at t (B,)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x - self.low) / self.width, expand((self.sigma(t) / self.width).square() / 2, x)

    def sample(
        self, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state and conditional velocity at t, ``(x_t, dx_t)``; ``latent`` is z, normal, (B, ...) each.

        Raises:
            ValueError: no latent is given, or one of another shape.
        """
        if latent is None or latent.shape != data.shape:
            raise ValueError(f"{self} draws from its kernel: pass z, latent=torch.randn_like(data)")
        y, tau = self.in_unit(data, as_times(t, data))
        x = reflect(y + (2 * tau).sqrt() * latent)
        dx = self.rate * 2 * tau * heat_kernel(x, y, tau)[1]
        return (self.low + self.width * x).to(data.dtype), (self.width * dx).to(data.dtype)
