"""Paths between any two data sets, with a latent: stochastic interpolants (arXiv 2303.08797).

Where ``x0`` is normal noise of its own, an affine path needs none of this: the latent would only make its noise larger.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, normal
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.fields import VelocityField, checked
from fewstep.flows.paths import Linear, Path, Trigonometric
from fewstep.flows.stochastic import Eps, strength

# Of each latent: g, its rate g', and g g', which is finite where g' is not.
_Number = Callable[[Tensor], Tensor]
_LATENTS: dict[str, tuple[_Number, _Number, _Number]] = {
    "none": (torch.zeros_like, torch.zeros_like, torch.zeros_like),
    "quadratic": (lambda t: t * (1 - t), lambda t: 1 - 2 * t, lambda t: t * (1 - t) * (1 - 2 * t)),
    "brownian": (
        lambda t: (t * (1 - t)).clamp(min=0).sqrt(),  # adaptive solvers try times beyond the end
        lambda t: (1 - 2 * t) / (2 * (t * (1 - t)).sqrt()),
        lambda t: (1 - 2 * t) / 2,
    ),
    "sine": (
        lambda t: torch.sin(math.pi * t) ** 2,
        lambda t: math.pi * torch.sin(2 * math.pi * t),
        lambda t: math.pi * torch.sin(2 * math.pi * t) * torch.sin(math.pi * t) ** 2,
    ),
}
LATENTS = tuple(_LATENTS)
_BASES: dict[str, Path] = {"linear": Linear(), "trigonometric": Trigonometric()}
SHAPES = (*_BASES, "encoding-decoding", "mirror")


_EDGE = 1e-3


def _inner(t: Tensor) -> Tensor:
    """Times no nearer to the ends than 0.001, where what is infinite there is held."""
    return t.clamp(_EDGE, 1 - _EDGE)


@dataclass(frozen=True)
class Interpolant(Path):
    """``x_t = a_t x1 + s_t x0 + g_t z`` from one data set, x0, to another, x1, with a latent z ~ N(0, I) of its own.

    Its velocity is ``b = E[a' x1 + s' x0 + g' z given x_t]``, a flow between the two like any other: every objective of
    flow maps learns it. It says neither data nor noise nor a score: those of a field with a denoiser do
    (:class:`DenoisedField`).

    Args:
        shape: of a and s: ``linear``; ``trigonometric``; ``encoding-decoding``, where each data set fades into the
            latent and out of it, so that x_(1/2) is z alone where g is 1; ``mirror``, ``x_t = x1 + g z``, from the
            data to themselves.
        latent: g: ``none``; ``quadratic``, t (1 - t); ``brownian``, ``sqrt(t (1 - t))``, whose rate is infinite at both
            ends (here held at that of 0.001), so that :class:`StochasticInterpolant`, which learns the velocity in two
            parts, is to be preferred; ``sine``, ``sin^2(pi t)``.
        scale: a factor of g.
        time_scale: of the times that networks on it are asked at: 1000 for those of diffusers.

    Raises:
        ValueError: a shape or latent that is not known, a scale that is not above 0, a mirror without a latent.
    """

    shape: str = "linear"
    latent: str = "none"
    scale: float = 1.0
    time_scale: float = 1.0

    two_sided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown("shape of an interpolant", self.shape, SHAPES)
        if self.latent not in LATENTS:
            raise unknown("latent", self.latent, LATENTS)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of a latent is {self.scale}: it is above 0")
        if self.shape == "mirror" and self.latent == "none":
            raise ValueError("a mirror without a latent stands still: say latent: quadratic, brownian or sine")

    @property
    def has_latent(self) -> bool:
        return self.latent != "none"

    @property
    def is_straight(self) -> bool:
        return self.shape == "linear" and not self.has_latent

    def alpha(self, t: Tensor) -> Tensor:
        match self.shape:
            case "encoding-decoding":
                return torch.where(t > 0.5, torch.cos(math.pi * t) ** 2, 0.0)
            case "mirror":
                return torch.ones_like(t)
        return _BASES[self.shape].alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        match self.shape:
            case "encoding-decoding":
                return torch.where(t < 0.5, torch.cos(math.pi * t) ** 2, 0.0)
            case "mirror":
                return torch.zeros_like(t)
        return _BASES[self.shape].sigma(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        match self.shape:
            case "encoding-decoding":
                return torch.where(t > 0.5, -math.pi * torch.sin(2 * math.pi * t), 0.0)
            case "mirror":
                return torch.zeros_like(t)
        return _BASES[self.shape].alpha_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        match self.shape:
            case "encoding-decoding":
                return torch.where(t < 0.5, -math.pi * torch.sin(2 * math.pi * t), 0.0)
            case "mirror":
                return torch.zeros_like(t)
        return _BASES[self.shape].sigma_dot(t)

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def same_as(self, other: Path) -> bool:
        return isinstance(other, Interpolant) and replace(self, time_scale=other.time_scale) == other

    def gamma(self, t: Tensor) -> Tensor:
        """g, the weight of the latent."""
        return self.scale * _LATENTS[self.latent][0](t)

    def gamma_dot(self, t: Tensor) -> Tensor:
        """g', infinite at the ends of ``brownian``."""
        return self.scale * _LATENTS[self.latent][1](t)

    def gamma_rate(self, t: Tensor) -> Tensor:
        """``g g'``, finite everywhere."""
        return self.scale**2 * _LATENTS[self.latent][2](t)

    def between(self, start: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state at t, and the part ``a' x1 + s' x0`` of its velocity that is not the latent's, (B, ...) each."""
        x, dx = super().sample(start, data, t)
        if not self.has_latent:
            return x, dx
        if latent is None:
            raise ValueError(f"{self} has a latent z: pass it, latent=torch.randn_like(data)")
        return x + expand(self.gamma(as_times(t, data)), data) * latent, dx

    def sample(
        self, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state and conditional velocity at t, ``(x_t, dx_t)``; ``noise`` is x0, ``latent`` z, each (B, ...)."""
        x, dx = self.between(noise, data, t, latent)
        if latent is None or not self.has_latent:
            return x, dx
        return x, dx + expand(self.gamma_dot(_inner(as_times(t, data))), data) * latent

    def hold_range(self, kind: str) -> tuple[float, float]:
        return 0.0, 1.0

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise ValueError(_NO_NOISE.format(path=self, what="no time of its own for a ratio of data to noise"))

    def to_velocity(self, prediction: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
        self._check_kind(kind)
        return super().to_velocity(prediction, x, t, kind)

    def from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
        self._check_kind(kind)
        return super().from_velocity(velocity, x, t, kind)

    def _check_kind(self, kind: str) -> None:
        if kind not in ("velocity", "flow"):
            raise ValueError(_NO_NOISE.format(path=self, what=f"no {kind}"))


class DenoisedField(VelocityField):
    """The velocity between two data sets in two parts, ``b = v + g' eta``, with the score ``-eta / g``.

    ``v(x, t) = E[a' x1 + s' x0 given x_t]`` and ``eta(x, t) = E[z given x_t]``, the denoiser, are networks of one kind
    (arXiv 2303.08797). So a latent whose rate is infinite at the ends can be learned, and an SDE between the two data
    sets be sampled.

    Args:
        network: v, called ``network(x, t, **cond)``.
        denoiser: eta, called alike.
        path: with a latent.

    Raises:
        ValueError: a path without a latent.
    """

    has_denoiser = True
    path: Interpolant

    def __init__(self, network: nn.Module, denoiser: nn.Module, path: Interpolant) -> None:
        super().__init__()
        if not isinstance(path, Interpolant) or not path.has_latent:
            raise ValueError(f"a denoiser knows the latent of a path, and {path} has none: Interpolant(latent='sine')")
        self.network, self.denoiser = network, denoiser
        self.path = path  # pyright: ignore[reportIncompatibleVariableOverride]

    def heads(self, x: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Tensor]:
        """v and eta, (B, ...) each."""
        time = self.path.network_time(as_times(t, x))
        return (
            checked(self.network(x, time, **cond), x, self.network),
            checked(self.denoiser(x, time, **cond), x, self.denoiser),
        )

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """b, (B, ...). Within 0.001 of both ends g' is that of 0.001."""
        inner = _inner(as_times(t, x))
        v, eta = self.heads(x, t, **cond)
        return v + expand(self.path.gamma_dot(inner), x) * eta

    def score(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """``-eta / g``, (B, ...); within 0.001 of both ends, where g vanishes, g is that of 0.001."""
        inner = _inner(as_times(t, x))
        time = self.path.network_time(as_times(t, x))
        eta = checked(self.denoiser(x, time, **cond), x, self.denoiser)
        return -eta / expand(self.path.gamma(inner), x)

    def on(self, path: Path) -> "DenoisedField":
        if path.same_as(self.path):
            return self
        raise ValueError(f"a field on {self.path} is no velocity on {path}: between two data sets no path is another")


def check_between(eps: Eps, path: Interpolant, solver: str, last_step: str) -> None:
    """That :func:`sample_between` takes these.

    Raises:
        ValueError: it does not.
    """
    if solver != "euler":
        raise ValueError(f"solver={solver!r}: an SDE between two data sets is solved by euler (Euler-Maruyama)")
    if eps == "kappa":
        raise ValueError("eps='kappa' is the noise of a path from noise to data; between two data sets say a number")
    if last_step not in ("euler", "mean", "none"):
        raise ValueError(f"last_step={last_step!r}: between two data sets it is euler, mean or none")
    strength(eps, path, torch.linspace(0, 1, 65, dtype=torch.float64))


@torch.no_grad()
def sample_between(
    field: DenoisedField,
    x: Tensor,
    times: Tensor,
    eps: Eps,
    *,
    last_step: str = "euler",
    generator: Generators | None = None,
    **cond: Any,
) -> Tensor:
    """``dx = (b + eps S) dt + sqrt(2 eps) dW`` by Euler-Maruyama, from x (B, ...) at the first of the rising times.

    For every ``eps >= 0`` it has the law of the flow at every time (arXiv 2303.08797). Where the latent vanishes, as at
    t = 0, the score is infinite, and a step goes without noise: any eps does, and there it is 0.

    Args:
        last_step: ``euler``, of the ODE; ``mean``, without noise; ``none``, as the others.
    """
    generator = torch.default_generator if generator is None else generator
    grid = times.detach().double().cpu()
    has_score = (field.path.gamma(grid) > 0).tolist()
    strengths, steps = strength(eps, field.path, grid).tolist(), grid.diff().tolist()
    at = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
    for i, h in enumerate(steps):
        is_last = i == len(steps) - 1
        amount = strengths[i] if has_score[i] and not (is_last and last_step == "euler") else 0.0
        v, eta = field.heads(x, at[i], **cond)
        inner = _inner(as_times(at[i], x))
        # b + eps S = v + (g' - eps / g) eta
        x_next = x + h * (v + expand(field.path.gamma_dot(inner) - amount / field.path.gamma(inner), x) * eta)
        is_noisy = amount > 0 and not (is_last and last_step != "none")
        x = x_next + (2 * amount * h) ** 0.5 * normal(x, generator) if is_noisy else x_next
    return x


_NO_NOISE = (
    "{path} goes from one data set to another: its velocity says {what}, as one from independent normal noise does"
)
