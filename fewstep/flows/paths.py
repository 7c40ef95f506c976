"""Paths from noise to data.

Time runs from t = 0 (noise) to t = 1 (data) everywhere in fewstep. An affine path is ``x_t = a_t x1 + s_t x0`` with
noise ``x0`` and data ``x1``; its conditional velocity is ``dx_t = a'_t x1 + s'_t x0``. Times are tensors of shape
(B,) against samples of shape (B, ...), and nothing here broadcasts one against the other by accident.

Here are the continuous ones. Those of diffusion schedules are in ``tabulated``, EDM's is in ``preconditioned``; what a
network predicts along a path is in ``predictions``, and how a network of one path is used on another in
``change_of_path``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.flows import predictions
from fewstep.flows.broadcasting import as_times, expand
from fewstep.networks.held import HOLD


@dataclass(frozen=True)
class Path:
    """An affine path ``x_t = alpha(t) x1 + sigma(t) x0``; subclasses give the coefficients, for times of any shape.

    ``two_sided``: x0 is no normal noise of its own, but of another data set (``fewstep.flows.interpolants``).
    ``has_score``: its velocity tells the score all the same.
    ``has_latent``: the state has noise beside x0, which ``sample`` is given as ``latent``.
    ``is_affine``: it is one; else states are those of an ODE alone (``fewstep.flows.chained``).
    """

    two_sided: ClassVar[bool] = False
    is_affine: ClassVar[bool] = True
    has_score: ClassVar[bool] = False

    @property
    def has_latent(self) -> bool:
        return False

    @property
    def is_straight(self) -> bool:
        """Whether it is ``t x1 + (1 - t) x0``, and nothing beside."""
        return False

    def check_noise(self, what: str, way: str = "") -> None:
        """That x0 is normal noise, as ``what`` needs it; the ``way`` out where it is not.

        Raises:
            ValueError: it is another data set.
        """
        if self.two_sided:
            raise ValueError(
                f"{what} needs a path that starts from normal noise, and {self} starts from other data"
                + (f": {way}" if way else "")
            )

    @property
    def data_scale(self) -> float:
        """The deviation d of the data for which v is meant: with ``A = d alpha`` it is ``A x0 - sigma x1 / d``, and
        orthogonal to x_t as it is with d = 1."""
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """The weight of the data."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """The weight of the noise."""
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        raise NotImplementedError

    def noise_rate(self, t: Tensor) -> Tensor:
        """sigma sigma_dot, half the rate of the noise's power: finite even where sigma_dot is not."""
        return self.sigma(t) * self.sigma_dot(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time at which alpha : sigma is as given, up to a common factor; either may be 0. Smooth there, as the
        logarithm of the ratio is not."""
        raise NotImplementedError

    def time_at(self, log_ratio: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) has this value (half the log-SNR); -inf and inf are allowed."""
        return self.time_of(torch.sigmoid(log_ratio), torch.sigmoid(-log_ratio))

    def network_time(self, t: Tensor) -> Tensor:
        """The time as networks trained on this path want it."""
        return t

    def same_as(self, other: "Path") -> bool:
        """Whether both have the same coefficients at the same times."""
        return self == other

    @property
    def quarters(self) -> list[float]:
        """alpha and sigma at t = 1/4, 1/2 and 3/4, to five digits: by these a file says which path it is on."""
        t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        return [round(float(value), 5) for value in torch.cat([self.alpha(t), self.sigma(t)])]

    @property
    def reach(self) -> tuple[float, float]:
        """The log(alpha / sigma) between which networks of this path are trained."""
        return -math.inf, math.inf

    def hold_range(self, kind: str) -> tuple[float, float]:
        """The times between which networks of this path are trained, and a prediction of this kind determines both
        noise and data."""
        return _hold_range(self, kind)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, alpha_dot, sigma_dot) at t."""
        return self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t)

    def sample(
        self, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state and conditional velocity at t: ``(x_t, dx_t)``, each (B, ...). Only a path that ``has_latent``
        takes a ``latent``.

        >>> x, dx = Linear().sample(torch.zeros(2, 3), torch.ones(2, 3), 0.25)
        >>> float(x[0, 0]), float(dx[0, 0])
        (0.25, 1.0)
        """
        if noise.shape != data.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, data {tuple(data.shape)}: they must agree")
        a, s, a_dot, s_dot = (expand(c, data) for c in self.coefficients(as_times(t, data)))
        return a * data + s * noise, a_dot * data + s_dot * noise

    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
        """The velocity (B, ...) that a prediction of this kind, made at ``(x, t)``, stands for.

        Raises:
            ValueError: where the prediction does not determine it, such as a noise prediction where there is no data.
        """
        return predictions.to_velocity(self, prediction, x, t, kind)

    def from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
        """The inverse of :meth:`to_velocity`: what a network of this kind would have predicted, (B, ...)."""
        return predictions.from_velocity(self, velocity, x, t, kind)

    def prediction(self, noise: Tensor, data: Tensor, t: Tensor | float, kind: str) -> Tensor:
        """What a network of this kind is to predict of noise and data (B, ...) at t: its target in training."""
        return predictions.target(self, noise, data, t, kind)


@lru_cache(maxsize=256)
def _hold_range(path: Path, kind: str) -> tuple[float, float]:
    lo, hi = path.reach
    lo = max(lo, -HOLD) if kind in ("noise", "score") else lo
    hi = min(hi, HOLD) if kind == "data" else hi
    ends = path.time_at(torch.tensor([lo, hi], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


@dataclass(frozen=True)
class Linear(Path):
    """``x_t = t x1 + (1 - t) x0``: flow matching and rectified flow (arXiv 2210.02747, 2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha / (alpha + sigma)

    @property
    def is_straight(self) -> bool:
        return True

    def same_as(self, other: Path) -> bool:
        return isinstance(other, Linear)

    def sample(
        self, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if noise.shape != data.shape:
            return super().sample(noise, data, t)
        t = expand(as_times(t, data), data)
        return t * data + (1 - t) * noise, data - noise


@dataclass(frozen=True)
class Reversed(Linear):
    """The linear path for networks asked at ``scale (1 - t)``: diffusers' flow-match models, scale 1000 mostly."""

    scale: float = 1000.0

    def network_time(self, t: Tensor) -> Tensor:
        return (1 - t) * self.scale


@dataclass(frozen=True)
class Forward(Linear):
    """The linear path for networks asked at ``scale t``: diffusers' flow-match models with inverted sigmas."""

    scale: float = 1000.0

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.scale


@dataclass(frozen=True)
class Trigonometric(Path):
    """``x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0``: unit power throughout; the cosine diffusion schedule without its
    offset, and the path of sCM (arXiv 2209.15571, 2410.11081)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        # cos(pi t / 2) would leave 6e-17 at t = 1; this form is exactly 0 there.
        return torch.sin((1 - t) * (math.pi / 2))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.sigma(t) * (math.pi / 2)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.alpha(t) * (-math.pi / 2)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(alpha, sigma) * (2 / math.pi)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """The continuous diffusion ``dx = -(1/2) b x dtau + sqrt(b) dw``, tau = 1 - t, with b linear from ``beta_min`` to
    ``beta_max`` (arXiv 2011.13456): ``alpha^2 + sigma^2 = 1``.

    Its noise does not quite reach pure noise (alpha(0) = 0.0066 by default). At t = 1 the velocity of a network on it
    is infinite, as sigma falls like sqrt(tau): conversions from it hold the last finite ratio, those to it raise there.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _integral(self, t: Tensor) -> Tensor:
        tau = 1 - t
        return self.beta_min * tau + 0.5 * (self.beta_max - self.beta_min) * tau * tau

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * (1 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def noise_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t) ** 2

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        integral = torch.log1p((sigma / alpha) ** 2).clamp(max=(self.beta_min + self.beta_max) / 2)
        slope = self.beta_max - self.beta_min
        return 1 - 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))

    @property
    def reach(self) -> tuple[float, float]:
        return -math.inf, HOLD  # beyond, its velocity grows without bound
