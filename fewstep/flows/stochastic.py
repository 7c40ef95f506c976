"""Samples of a velocity field by an SDE, with as much noise as one likes.

Where the noise x0 is Gaussian and independent of the data, a velocity knows the score S of p_t, and for every
``eps_t >= 0``

    ``dx = (v + eps S) dt + sqrt(2 eps) dW``

has the same marginals p_t as the ODE ``dx = v dt`` (arXiv 2303.08797; 2401.08740 for images); backwards in
time the drift is ``v - eps S``. With an exact v all eps are one law. With a learned one the noise forgets errors that
the ODE carries to the end, and costs steps. ``eps = kappa``, the path's own diffusion, is DDPM's.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.common.errors import shown, unknown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.paths import Path
from fewstep.flows.solvers import EUCLID, Velocity
from fewstep.flows.spaces import Space

# How strong the noise is: a name of STRENGTHS, a number, or a function of times (K,), float64 on the CPU.
Eps = str | float | Callable[[Tensor], Tensor | float]

SDE_SOLVERS = ("euler", "heun", "ancestral")
LAST_STEPS = ("tweedie", "euler", "mean", "none")


def kappa(path: Path, t: Tensor) -> Tensor:
    """The path's own diffusion ``s^2 (a'/a - s'/s)`` at times of any shape; ``(1 - t) / t`` on the linear path. It is
    infinite where there is no data, as at t = 0."""
    return path.sigma(t) ** 2 * path.alpha_dot(t) / path.alpha(t) - path.noise_rate(t)


# The named strengths, most of them those of SiT (its "diffusion forms", arXiv 2401.08740, in our direction of time).
STRENGTHS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "kappa": kappa,  # DDPM's, SiT's SBDM
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
}

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


class Place(NamedTuple):
    """One time of the grid: a tensor () where the samples are, and what is known there, numbers."""

    time: Tensor
    t: float
    alpha: float
    sigma: float
    alpha_dot: float
    sigma_dot: float
    eps: float
    keeps: float  # the share of its noise that ``ancestral`` keeps on the way from here to the next time

    @property
    def is_known(self) -> bool:
        """Whether the strength and the score are finite."""
        return self.sigma > 0 and math.isfinite(self.eps)

    @property
    def kappa(self) -> float:
        """The path's own diffusion, infinite where there is no data."""
        return self.sigma**2 * self.alpha_dot / self.alpha - self.sigma * self.sigma_dot if self.alpha else math.inf

    @property
    def det(self) -> float:
        return self.alpha_dot * self.sigma - self.alpha * self.sigma_dot

    def score(self, x: Tensor, v: Tensor) -> Tensor:
        """``grad log p_t(x) = (a v - a' x) / (s (a' s - a s'))``."""
        scale = self.sigma * self.det
        return (self.alpha / scale) * v - (self.alpha_dot / scale) * x

    def data(self, x: Tensor, v: Tensor) -> Tensor:
        """``E[x1 | x_t = x]``."""
        return (self.sigma / self.det) * v - (self.sigma_dot / self.det) * x

    def noise(self, x: Tensor, v: Tensor) -> Tensor:
        """``E[x0 | x_t = x]``."""
        return (self.alpha_dot / self.det) * x - (self.alpha / self.det) * v

    def velocity(self, velocity: Velocity, x: Tensor) -> Tensor:
        return velocity(x, self.time.expand(len(x)))

    def drift(self, velocity: Velocity, x: Tensor, sign: float) -> Tensor:
        """``v + eps S``, and backwards in time ``v - eps S``."""
        v = self.velocity(velocity, x)
        return v + (sign * self.eps) * self.score(x, v) if self.eps and self.is_known else v


Draw = Callable[[Tensor], Tensor]


def euler_step(velocity: Velocity, x: Tensor, here: Place, there: Place, draw: Draw) -> Tensor:
    """Euler-Maruyama, weak order 1, one call. Without noise where strength or score are infinite at the start of the
    step: any eps does, and there it is 0."""
    h, eps = there.t - here.t, here.eps if here.is_known else 0.0
    drift = here.drift(velocity, x, math.copysign(1, h))
    return x + h * drift + (math.sqrt(2 * eps * abs(h)) * draw(x) if eps else 0.0)


def heun_step(velocity: Velocity, x: Tensor, here: Place, there: Place, draw: Draw) -> Tensor:
    """Stochastic Heun, weak order 2, two calls: the same noise in the predictor and in the step. (Noise that is added
    before both, as in arXiv 2206.00364, leaves it at order 1.) Euler's where the end of the step cannot be asked."""
    if not (here.is_known and there.is_known):
        return euler_step(velocity, x, here, there, draw)
    h, power = there.t - here.t, abs(there.t - here.t) * (here.eps + there.eps)
    sign = math.copysign(1, h)
    noise = math.sqrt(power) * draw(x) if power else 0.0
    first = here.drift(velocity, x, sign)
    second = there.drift(velocity, x + h * first + noise, sign)
    return x + (h / 2) * (first + second) + noise


def ancestral_step(velocity: Velocity, x: Tensor, here: Place, there: Place, draw: Draw) -> Tensor:
    """The SDE solved exactly with the data D = E[x1 | x] held over the step, one call; for eps = kappa DDPM's ancestral
    step, for 0 DDIM's. With N = E[x0 | x]: ``x <- a' D + s' (c N + sqrt(1 - c^2) z)``, c = exp(-integral of eps / s^2).
    Of any length, from t = 0 too. It makes the variance too small by the first order in the length of the steps."""
    v, c = here.velocity(velocity, x), here.keeps
    step = there.alpha * here.data(x, v) + (there.sigma * c) * here.noise(x, v)
    fresh = there.sigma * math.sqrt(1 - c * c)
    return step + fresh * draw(x) if fresh else step


def quiet_step(kind: str, velocity: Velocity, x: Tensor, here: Place, there: Place) -> Tensor:
    """A step without noise."""
    h = there.t - here.t
    if kind == "mean":
        return x + h * here.drift(velocity, x, math.copysign(1, h))
    v = here.velocity(velocity, x)
    return here.data(x, v) if kind == "tweedie" else x + h * v


STEPS = {"euler": euler_step, "heun": heun_step, "ancestral": ancestral_step}


@torch.no_grad()
def integrate_sde(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    path: Path,
    eps: Eps,
    solver: str = "euler",
    *,
    last_step: str = "none",
    generator: Generators | None = None,
    space: Space = EUCLID,
) -> Tensor:
    """A sample of the SDE at the last of ``times``, from ``x`` (B, ...) at the first; without grad.

    Args:
        velocity: called with samples (B, ...) and times (B,).
        times: the grid, 1-D and monotone: rising it goes from noise to data, falling it adds noise again, along the
            very law of the paths that the rising one has.
        path: that of the velocity.
        eps: the strength of the noise, at least 0: ``kappa``, ``sigma``, ``linear`` (1 - t), ``decreasing``,
            ``increasing-decreasing`` (sin^2 pi t), a number, or a function of times (K,), float64 on the CPU.
        solver: euler, heun or ancestral.
        last_step: ``none``: as the others. Without noise: ``tweedie``, the data estimate; ``euler``, a step of the ODE;
            ``mean``, the drift of the SDE.
        generator: where the noise is from, torch's global one if not given; a list with one a sample fixes each.
        space: whose walls, where it has some, reflect each step, and hold one without noise (arXiv 2304.04740).

    Raises:
        ValueError: a solver, a strength or a last step that is not known, a strength below 0 or not a number, or
            infinite at the last time for a solver other than ancestral; a grid that is not monotone.
    """
    check_sde(eps, path, solver, last_step)
    if times.ndim != 1 or len(times) < 2 or not ((d := times.diff()) * d[0] > 0).all():
        raise ValueError(f"a grid of two or more times is needed that rises or falls, not {shown(times.tolist())}")
    generator = torch.default_generator if generator is None else generator
    places = places_along(path, times, eps, x)
    if math.isinf(places[-1].eps) and solver != "ancestral":  # the last steps would be too long, however short
        raise ValueError(
            f"eps={shown(eps)} is infinite at t = {places[-1].t:g}, where this grid ends: take solver='ancestral', or "
            "end before it"
        )
    *before, (here, end) = pairwise(places)
    step = STEPS[solver]

    def draw(x: Tensor) -> Tensor:
        return normal(x, generator)

    for a, b in before:
        x = space.reflect(step(velocity, x, a, b, draw))
    if last_step == "none":
        return space.reflect(step(velocity, x, here, end, draw))
    x = quiet_step(last_step, velocity, x, here, end)
    return x if space is EUCLID else space.move(x, torch.zeros_like(x))


def check_sde(eps: Eps, path: Path, solver: str = "euler", last_step: str = "none") -> None:
    """That there is such a sampler.

    Raises:
        ValueError: there is not; see :func:`integrate_sde`.
    """
    if solver not in SDE_SOLVERS:
        raise unknown("solver of an SDE", solver, SDE_SOLVERS)
    if last_step not in LAST_STEPS:
        raise unknown("last step", last_step, LAST_STEPS)
    strength(eps, path, torch.linspace(0, 1, 65, dtype=torch.float64))


def strength(eps: Eps, path: Path, t: Tensor) -> Tensor:
    """eps at times t, float64 on the CPU; infinite at t = 0 or 1 at most.

    Raises:
        ValueError: it is not known, below 0, NaN, infinite between the ends, or of another shape than t.
    """
    if isinstance(eps, str):
        if eps not in STRENGTHS:
            raise unknown("strength of noise eps", eps, STRENGTHS)
        return STRENGTHS[eps](path, t)
    if isinstance(eps, bool) or not (callable(eps) or isinstance(eps, int | float)):
        raise ValueError(f"eps is {shown(eps)}: a number, a function of times, or one of {', '.join(STRENGTHS)}")
    value = torch.as_tensor(eps(t) if callable(eps) else eps, dtype=torch.float64, device="cpu").detach()
    if value.ndim == 0:
        value = value.expand(t.shape)
    what = "eps(t)" if callable(eps) else f"eps={eps}"
    if value.shape != t.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)} at {len(t)} times: one number a time is needed")
    bad = ~(value >= 0) | (value.isinf() & (t > 0) & (t < 1))  # NaN is not at least 0 either
    if bad.any():
        raise ValueError(
            f"{what} is {float(value[bad][0]):g} at t = {float(t[bad][0]):.3g}: the strength of the noise is a number "
            f"from 0 (the ODE) on, or one of {', '.join(STRENGTHS)}"
        )
    return value


def places_along(path: Path, times: Tensor, eps: Eps, x: Tensor) -> list[Place]:
    """All that is known of the grid before the first call, so that nothing is waited for on the way."""
    grid = times.detach().double().cpu()
    here = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
    known = [value.tolist() for value in (grid, *path.coefficients(grid), strength(eps, path, grid))]
    keeps = [*torch.exp(-_forgets(path, grid, eps)).tolist(), 0.0]
    return [Place(*values) for values in zip(here, *known, keeps, strict=True)]


def _forgets(path: Path, grid: Tensor, eps: Eps) -> Tensor:
    """The integral of eps / s^2 over each step, (K - 1,); for kappa it is that of d log(a / s)."""
    if eps == "kappa":
        return (path.alpha(grid) / path.sigma(grid)).log().diff().abs()
    middle, half = (grid[1:] + grid[:-1]) / 2, grid.diff().abs() / 2
    nodes = middle[:, None] + half[:, None] * torch.from_numpy(_NODES)
    rate = strength(eps, path, nodes.flatten()).reshape(nodes.shape) / path.sigma(nodes) ** 2
    return half * (rate @ torch.from_numpy(_NODE_WEIGHTS))
