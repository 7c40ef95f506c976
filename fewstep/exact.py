"""Fields in closed form: Gaussian data, Gaussian mixtures, uniform boxes. Teachers that need no training, and the
truth that every objective and sampler is tested against (formulas: ``docs/exact-fields.md``)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.special import log_ndtr

from fewstep.fields import VelocityField
from fewstep.paths import Linear, Path, as_times, expand
from fewstep.solvers import integrate


class ExactField(VelocityField):
    """A field known in closed form, with its flow map and samples of its data."""

    def flow(self, x: Tensor, s: float, t: float, *, tolerance: float = 1e-9) -> Tensor:
        """The exact flow map ``X_{s,t}(x)``, (B, ...): here by an adaptive solve in float64."""
        times = torch.tensor([s, t], dtype=torch.float64, device=x.device)
        return integrate(self, x.double(), times, "adaptive", tolerance=tolerance).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples of the data, (count, ...)."""
        raise NotImplementedError


class GaussianField(ExactField):
    """Data N(mean, cov): ``v = m' + (1/2) C' C^-1 (x - m)`` with ``m_t = a mean``, ``C_t = a^2 cov + s^2``.

    Args:
        mean: (...), any shape of D numbers in all. cov: (D, D), positive definite.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(self, mean: Tensor, cov: Tensor, path: Path | None = None) -> None:
        super().__init__()
        if cov.shape != (mean.numel(), mean.numel()):
            raise ValueError(f"mean has {mean.numel()} numbers, cov shape {tuple(cov.shape)}")
        variances, basis = torch.linalg.eigh(cov)
        if not (variances > 0).all():
            raise ValueError(f"cov is not positive definite: its least eigenvalue is {float(variances[0]):.3g}")
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("variances", variances)
        self.path = path or Linear()

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, s, a_dot, s_dot = (c[:, None] for c in self.path.coefficients(t))
        variance = a * a * self.variances + s * s
        rate = (a * a_dot * self.variances + s * s_dot) / variance
        return a * self.mean.flatten(), a_dot * self.mean.flatten(), torch.stack([variance, rate])

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        mean, mean_dot, (_, rate) = self._moments(as_times(t, x))
        coordinates = (x.flatten(1) - mean) @ self.basis
        return (mean_dot + (rate * coordinates) @ self.basis.T).reshape(x.shape)

    def flow(self, x: Tensor, s: Tensor | float, t: Tensor | float, *, tolerance: float = 0.0) -> Tensor:
        """``m_t + C_t^(1/2) C_s^(-1/2) (x - m_s)``, for times (B,) or numbers."""
        mean_s, _, (variance_s, _) = self._moments(as_times(s, x))
        mean_t, _, (variance_t, _) = self._moments(as_times(t, x))
        coordinates = (x.flatten(1) - mean_s) @ self.basis * (variance_t / variance_s).sqrt()
        return (mean_t + coordinates @ self.basis.T).reshape(x.shape)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, self.mean.numel(), generator=generator, dtype=self.mean.dtype)
        points = self.mean.flatten() + noise * self.variances.sqrt() @ self.basis.T
        return points.reshape(count, *self.mean.shape)

    def on(self, path: Path) -> "GaussianField":
        return GaussianField(self.mean, self.basis * self.variances @ self.basis.T, path)


class MixtureField(ExactField):
    """Data from a mixture of isotropic Gaussians: the components' velocities, weighted by their posteriors.

    Args:
        means: (K, D). scales: standard deviations (K,), positive. weights: (K,), positive; normalised here.
    """

    means: Tensor
    scales: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, scales: Tensor, weights: Tensor, path: Path | None = None) -> None:
        super().__init__()
        if not (len(means) == len(scales) == len(weights)):
            raise ValueError(f"{len(means)} means, {len(scales)} scales, {len(weights)} weights: they must agree")
        if not ((scales > 0).all() and (weights > 0).all()):
            raise ValueError("a mixture needs positive scales and weights")
        self.register_buffer("means", means)
        self.register_buffer("scales", scales)
        self.register_buffer("weights", weights / weights.sum())
        self.path = path or Linear()

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        a, s, a_dot, s_dot = (c[:, None] for c in self.path.coefficients(as_times(t, x)))
        variance = a * a * self.scales**2 + s * s  # (B, K)
        offset = x[:, None] - a[..., None] * self.means  # (B, K, D)
        log_density = -offset.square().sum(-1) / (2 * variance) - 0.5 * x.shape[1] * variance.log()
        posterior = torch.softmax(self.weights.log() + log_density, dim=1)
        rate = (a * a_dot * self.scales**2 + s * s_dot) / variance
        return (posterior[..., None] * (a_dot[..., None] * self.means + rate[..., None] * offset)).sum(1)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.scales[which, None] * noise

    def on(self, path: Path) -> "MixtureField":
        return MixtureField(self.means, self.scales, self.weights, path)


class BoxesField(ExactField):
    """Data uniform over boxes that do not overlap: (K, D, 2), the low and high end of each box on each axis.

    Given x_t the data is a box (a softmax over boxes of ``sum over axes of log(Phi(u) - Phi(l))``) and within it a
    truncated Gaussian on each axis. Computed in float64: its tails span hundreds of orders of magnitude.
    """

    boxes: Tensor

    def __init__(self, boxes: Tensor, path: Path | None = None) -> None:
        super().__init__()
        if boxes.ndim != 3 or boxes.shape[2] != 2 or not (boxes[..., 1] > boxes[..., 0]).all():
            raise ValueError(f"boxes (K, D, 2) with low < high are needed, not shape {tuple(boxes.shape)}")
        self.register_buffer("boxes", boxes.double())
        # The boxes of a board share their sides: the Gaussian integrals are taken once for each distinct side.
        sides = [self.boxes[:, axis].unique(dim=0, return_inverse=True) for axis in range(boxes.shape[1])]
        self._sides = [(pairs, which) for pairs, which in sides]
        self.path = path or Linear()

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        a, s, a_dot, s_dot = (c.double()[:, None] for c in self.path.coefficients(as_times(t, x)))
        point = x.double()
        # At s = 0 the limit is the nearest data; a tiny s finds it without a division by zero.
        s_safe = s.clamp(min=1e-9)
        log_mass, data = 0.0, []
        for axis, (pairs, which) in enumerate(self._sides):
            pairs, which = pairs.to(x.device), which.to(x.device)
            mass, mean = _truncated(point[:, axis, None], pairs, a, s_safe)
            log_mass = log_mass + mass[:, which]
            data.append(mean[:, which])
        posterior = torch.softmax(torch.as_tensor(log_mass), dim=1)[..., None]
        mean = (posterior * torch.stack(data, -1)).sum(1)
        noise = torch.where(s > 0, (point - a * mean) / s_safe, 0.0)
        return (a_dot * mean + s_dot * noise).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """float32, (count, D)."""
        volume = (self.boxes[..., 1] - self.boxes[..., 0]).prod(1)
        box = self.boxes[torch.multinomial(volume, count, replacement=True, generator=generator)].float()
        part = torch.rand(count, box.shape[1], generator=generator)
        return box[..., 0] + part * (box[..., 1] - box[..., 0])

    def on(self, path: Path) -> "BoxesField":
        return type(self)(self.boxes, path)


def _truncated(x: Tensor, sides: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """For data uniform on each interval of ``sides`` (M, 2) and ``x = a data + s noise``, x (B, 1): the log of the
    density of x up to a factor common to all intervals, and the mean of the data given x; both (B, M)."""
    low, high = sides[:, 0], sides[:, 1]
    # The noise that each end would need, u >= l; mirrored where both are positive, as log_ndtr is exact to the left.
    l, u = (x - a * high) / s, (x - a * low) / s
    flip = l + u > 0
    l, u = torch.where(flip, -u, l), torch.where(flip, -l, u)
    log_l, log_u = log_ndtr(l), log_ndtr(u)
    log_mass = log_u + torch.log(-torch.expm1((log_l - log_u).clamp(max=-1e-300)))
    log_norm = log_mass + 0.5 * math.log(2 * math.pi)
    noise = torch.exp(-0.5 * l * l - log_norm) - torch.exp(-0.5 * u * u - log_norm)
    mean = (x - s * torch.where(flip, -noise, noise)) / a.clamp(min=1e-300)
    # Where the data hardly shows (a small), the difference above cancels: the interval's own mean and log-width, and
    # the slope of the density over it.
    middle, width = (low + high) / 2, high - low
    faint = a * width < 1e-3 * s
    slope = a * (x - a * middle) / (s * s)
    log_faint = torch.log(a.clamp(min=1e-300) * width / s) - 0.5 * ((x - a * middle) / s) ** 2 - 0.5 * math.log(2 * math.pi)
    mean = torch.where(faint, middle + width * width / 12 * slope, mean)
    return torch.where(faint, log_faint, log_mass), torch.maximum(torch.minimum(mean, high), low)


def checkerboard_boxes() -> Tensor:
    """The 8 filled cells of a 4 x 4 board, scaled to a standard deviation of 1 on each axis: (8, 2, 2), float64."""
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    corners = torch.tensor(cells, dtype=torch.float64) - 2
    return torch.stack([corners, corners + 1], dim=-1) * (math.sqrt(3) / 2)


class CheckerboardField(BoxesField):
    """The checkerboard of :func:`checkerboard_boxes`: sharp edges, many modes, an exact teacher."""

    def __init__(self, boxes: Tensor | None = None, path: Path | None = None) -> None:
        super().__init__(checkerboard_boxes() if boxes is None else boxes, path)
