"""The trigonometric path as networks of diffusion are asked on it: by an angle, or under the scaling of EDM."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.flows.paths import Trigonometric


@dataclass(frozen=True)
class Cosine(Trigonometric):
    """The trigonometric path for networks asked at ``scale (1 - t)``, the angle between data and noise, a right one of
    which is ``scale``: the continuous cosine schedule of v-diffusion (arXiv 2202.00512, appendix D), on which Stable
    Audio and Dance Diffusion were trained."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"{self}: 0 < scale is needed")

    def network_time(self, t: Tensor) -> Tensor:
        return (1 - t) * self.scale


@dataclass(frozen=True)
class Preconditioned(Trigonometric):
    """EDM's scaling of ``x1 + n x0`` (arXiv 2206.00364, table 1): what the network is given is that divided by
    ``sqrt(n^2 + sigma_data^2)``, with the time ``log(n) / 4``. Its own output is of the kind ``edm``.

    Args:
        sigma_data: the deviation of the data. sigma_min, sigma_max: the noise n that it was trained between; beyond
            there is nothing, and conversions hold the ends.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and 0 < self.sigma_data < math.inf):
            raise ValueError(f"{self}: 0 < sigma_min < sigma_max and 0 < sigma_data are needed")

    @property
    def data_scale(self) -> float:
        return self.sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t) / self.sigma_data

    def alpha_dot(self, t: Tensor) -> Tensor:
        return super().alpha_dot(t) / self.sigma_data

    def sigma_dot(self, t: Tensor) -> Tensor:
        return super().alpha(t) * (-math.pi / 2)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return super().time_of(self.sigma_data * alpha, sigma)

    def network_time(self, t: Tensor) -> Tensor:
        t = t.clamp(*self.hold_range("edm"))  # no noise, or nothing else, has no finite logarithm
        return (self.sigma(t) / self.alpha(t)).log() / 4

    @property
    def reach(self) -> tuple[float, float]:
        low, high = (-torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64).log()).tolist()
        return low, high
