"""Fields in closed form: Gaussian data, Gaussian mixtures, uniform boxes. Teachers that need no training, and the
truth that every objective and sampler is tested against (formulas: ``docs/guides/exact-fields.md``)."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import erfcx

from fewstep.common.randomness import generator, normal
from fewstep.data import densities
from fewstep.data.densities import Boxes, Mixture
from fewstep.flows.broadcasting import as_times
from fewstep.flows.fields import VelocityField
from fewstep.flows.paths import Linear, Path
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated


class ExactField(VelocityField):
    """A field known in closed form, with its flow map and samples of its data."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's; those below know it without numbers too, on torch's ``meta`` device."""
        return tuple(self.data(1, generator(0)).shape[1:])

    def flow(self, x: Tensor, s: float, t: float, *, tolerance: float = 1e-9) -> Tensor:
        """The exact flow map ``X_{s,t}(x)``, (B, ...): here by an adaptive solve in float64.

        On a tabulated path, whose rates jump at every step, it is solved on the straight one, which goes through the
        same states up to their scale at the times of the same alpha / sigma.
        """
        times = torch.tensor([s, t], dtype=torch.float64, device=x.device)
        if not isinstance(self.path, Tabulated):
            return integrate(self, x.double(), times, "adaptive", tolerance=tolerance, space=self.space).to(x.dtype)
        straight, alpha, sigma = Linear(), self.path.alpha(times), self.path.sigma(times)
        at = straight.time_of(alpha, sigma)
        scale = torch.hypot(straight.alpha(at), straight.sigma(at)) / torch.hypot(alpha, sigma)
        end = integrate(self.on(straight), x.double() * scale[0], at, "adaptive", tolerance=tolerance) / scale[1]
        return end.to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples of the data, (count, ...)."""
        raise NotImplementedError


def check_boxes(boxes: Tensor) -> None:
    """That boxes are (K, D, 2), the low and high end of each on each axis.

    Raises:
        ValueError: they are not.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 2 or not (boxes[..., 1] > boxes[..., 0]).all():
        raise ValueError(f"boxes (K, D, 2) with low < high are needed, not shape {tuple(boxes.shape)}")


def _columns(path: Path, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma, alpha_dot, sigma sigma_dot) at t (B,), each (B, 1)."""
    return path.alpha(t)[:, None], path.sigma(t)[:, None], path.alpha_dot(t)[:, None], path.noise_rate(t)[:, None]


class GaussianField(ExactField):
    """Data N(mean, cov): ``v = m' + (1/2) C' C^-1 (x - m)`` with ``m_t = a mean``, ``C_t = a^2 cov + s^2``.

    Args:
        mean: (...), any shape of D numbers in all.
        cov: (D, D), positive definite.
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
        self.register_buffer("mean", mean.to(cov))
        self.register_buffer("basis", basis)
        self.register_buffer("variances", variances)
        self.path = path or Linear()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At times (B,): m, m' (B, D), and C and (1/2) C' C^-1 on the axes of ``basis``, (2, B, D)."""
        a, s, a_dot, noise_rate = _columns(self.path, t)
        variance = a * a * self.variances + s * s
        rate = (a * a_dot * self.variances + noise_rate) / variance
        return a * self.mean.flatten(), a_dot * self.mean.flatten(), torch.stack([variance, rate])

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        mean, mean_dot, (_, rate) = self._moments(as_times(t, x))
        basis = self.basis.to(mean)
        coordinates = (x.flatten(1) - mean) @ basis
        return (mean_dot + (rate * coordinates) @ basis.T).reshape(x.shape).to(x.dtype)

    def flow(self, x: Tensor, s: Tensor | float, t: Tensor | float, *, tolerance: float = 0.0) -> Tensor:
        """``m_t + C_t^(1/2) C_s^(-1/2) (x - m_s)``, for times (B,) or numbers."""
        mean_s, _, (variance_s, _) = self._moments(as_times(s, x))
        mean_t, _, (variance_t, _) = self._moments(as_times(t, x))
        basis = self.basis.to(mean_s)
        coordinates = (x.flatten(1) - mean_s) @ basis * (variance_t / variance_s).sqrt()
        return (mean_t + coordinates @ basis.T).reshape(x.shape).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        noise = normal(self.mean.new_empty(count, self.mean.numel()), generator)
        points = self.mean.flatten() + noise * self.variances.sqrt() @ self.basis.T
        return points.reshape(count, *self.mean.shape)

    def on(self, path: Path) -> "GaussianField":
        return GaussianField(self.mean, self.basis * self.variances @ self.basis.T, path)


class MixtureField(ExactField):
    """Data from a mixture of isotropic Gaussians: the components' velocities, weighted by their posteriors.

    Args:
        means: (K, D).
        scales: standard deviations (K,), positive.
        weights: (K,), positive; normalised here.
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

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        a, s, a_dot, noise_rate = _columns(self.path, as_times(t, x))
        variance = a * a * self.scales**2 + s * s  # (B, K)
        offset = x[:, None] - a[..., None] * self.means  # (B, K, D)
        log_density = -offset.square().sum(-1) / (2 * variance) - 0.5 * x.shape[1] * variance.log()
        posterior = torch.softmax(self.weights.log() + log_density, dim=1)
        rate = (a * a_dot * self.scales**2 + noise_rate) / variance
        velocity = (posterior[..., None] * (a_dot[..., None] * self.means + rate[..., None] * offset)).sum(1)
        return velocity.to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        return Mixture(self.means, self.scales, self.weights).draw(count, generator)

    def on(self, path: Path) -> "MixtureField":
        return MixtureField(self.means, self.scales, self.weights, path)


class BoxesField(ExactField):
    """Data uniform over boxes that do not overlap: (K, D, 2), the low and high end of each box on each axis.

    Given x_t the data is a box (a softmax over boxes of ``sum over axes of log(Phi(u) - Phi(l))``) and within it a
    truncated Gaussian on each axis. Computed in float64, to a few of its last digits for any x and t.
    """

    boxes: Tensor

    def __init__(self, boxes: Tensor, path: Path | None = None) -> None:
        super().__init__()
        check_boxes(boxes)
        self.register_buffer("boxes", boxes.double())
        # The boxes of a board share their sides: the Gaussian integrals are taken once for each distinct side.
        self._sides = [self.boxes[:, axis].unique(dim=0, return_inverse=True) for axis in range(boxes.shape[1])]
        self.path = path or Linear()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.boxes.shape[1],)

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        a, s, a_dot, s_dot = (c[:, None] for c in self.path.coefficients(as_times(t, x).double()))
        log_density, means = torch.zeros((), dtype=torch.float64), []
        for axis, (sides, which) in enumerate(self._sides):
            # At s = 0 the limit is the nearest data; a tiny s finds it without a division by zero.
            log, *mean = truncated(x[:, axis, None].double(), sides.to(x.device), a, s.clamp(min=1e-9))
            which = which.to(x.device)
            log_density = log_density + log[:, which]
            means.append(torch.stack(mean)[..., which])
        posterior = torch.softmax(log_density, dim=1)
        data, noise = torch.stack([(posterior * mean).sum(-1) for mean in means], dim=-1)
        return (a_dot * data + torch.where(s > 0, s_dot, 0.0) * noise).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """float32, (count, D)."""
        return Boxes(self.boxes).draw(count, generator)

    def inside(self, points: Tensor) -> Tensor:
        """Whether each of points (N, D) lies where the data do, (N,)."""
        return Boxes(self.boxes).inside(points)

    def on(self, path: Path) -> "BoxesField":
        return type(self)(self.boxes, path)


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(6)


def truncated(x: Tensor, sides: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For data uniform on each interval of ``sides`` (M, 2) and ``x = a data + s noise``, x (B, 1): the log of the
    density of x times the interval's width, up to a term common to all, and the means of data and of noise given x;
    each (B, M)."""
    low, high = sides.unbind(1)
    middle, width = (low + high) / 2, high - low
    # The noise that the middle would need, and the interval's width in units of the noise.
    z, d = (x - a * middle) / s, a * width / s
    l, u = (x - a * high) / s, (x - a * low) / s
    # Where the interval is narrow the differences of the wide form would cancel: few rows, but near t = 0.
    narrow = (d < 0.02) & (d * z.abs() < 2)
    # Where only shapes are counted (torch's meta device), no row is.
    if x.is_meta or not len(rows := narrow.any(1).nonzero().flatten()):
        log, data, noise = _wide(l, u, z, d, middle, width)
    elif narrow.all():
        log, data, noise = _narrow(z, d, middle, width)
    else:
        log, data, noise = _wide(l.where(~narrow, -1.0), u.where(~narrow, 0.0), z, d.where(~narrow, 1.0), middle, width)
        some = narrow[rows]
        parts = _narrow(z[rows].where(some, 0.0), d[rows].where(some, 0.0), middle, width)
        for whole, part in zip((log, data, noise), parts, strict=True):
            whole[rows] = torch.where(some, part, whole[rows])
    return width.log() + log, data.clamp(low, high), noise


def _narrow(z: Tensor, d: Tensor, middle: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``truncated`` where data = middle + width y has a density exp(d z y - d^2 y^2 / 2) on [-1/2, 1/2], so smooth
    that six Gauss-Legendre nodes are exact."""
    nodes, weights = z.new_tensor(_NODES) / 2, z.new_tensor(_NODE_WEIGHTS) / 2
    tilt, bend = ((d * z)[..., None], (d * d)[..., None])
    density = torch.exp((tilt - 0.5 * bend * nodes) * nodes)
    mass = density @ weights
    y = density @ (weights * nodes) / mass
    return mass.log() - 0.5 * z * z - 0.5 * math.log(2 * math.pi), middle + width * y, z - d * y


def _wide(l: Tensor, u: Tensor, z: Tensor, d: Tensor, middle: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``truncated`` where the noise is a Gaussian between l and u: mirrored so that l + u <= 0, where all is a finite
    multiple of phi(u), Phi(u) = scaled phi(u) sqrt(pi / 2). Beyond u = 9 it is 1, and the clamp keeps ``scaled``
    finite."""
    flip = l + u > 0
    l, u = torch.where(flip, -u, l), torch.where(flip, -l, u)
    log_rise = 0.5 * (u - l) * (u + l)  # log phi(l) / phi(u)
    top = u.clamp(max=9.0)
    scaled = erfcx(-top / math.sqrt(2))
    below = torch.exp(log_rise) * erfcx(-l / math.sqrt(2)) / scaled  # Phi(l) / Phi(u)
    noise = math.sqrt(2 / math.pi) / scaled * torch.expm1(log_rise) / (1 - below)
    noise = torch.where(flip, -noise, noise)
    log = torch.log(scaled / 2) - 0.5 * top * top + torch.log1p(-below) - d.log()
    return log, middle + width * (z - noise) / d, noise


class CheckerboardField(BoxesField):
    """The checkerboard of ``fewstep.data.densities``: sharp edges, many modes, an exact teacher."""

    def __init__(self, boxes: Tensor | None = None, path: Path | None = None) -> None:
        super().__init__(densities.checkerboard().sides if boxes is None else boxes, path)
        self.source = "checkerboard" if boxes is None else None


def eight_gaussians() -> MixtureField:
    """The field of ``fewstep.data.densities.eight_gaussians``."""
    return _named("eight-gaussians", densities.eight_gaussians())


def spiral() -> MixtureField:
    """The field of ``fewstep.data.densities.spiral``."""
    return _named("spiral", densities.spiral())


def _named(name: str, density: Mixture) -> MixtureField:
    """The field of a density under the name that a recipe gives it."""
    field = MixtureField(density.means, density.scales, density.weights)
    field.source = name
    return field
