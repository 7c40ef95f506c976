"""Paths from noise to data, and the algebra between all that a network may predict along one.

Time runs from t = 0 (noise) to t = 1 (data) everywhere in fewstep. An affine path is ``x_t = a_t x1 + s_t x0`` with
noise ``x0`` and data ``x1``; its conditional velocity is ``dx_t = a'_t x1 + s'_t x0``. Times are tensors of shape
(B,) against samples of shape (B, ...), and nothing here broadcasts one against the other by accident.

A network predicts one of seven *kinds* of thing about ``x_t``:

==========  =============================  ====================================================
velocity    ``a' x1 + s' x0``              flow matching
data        ``x1``                         "sample" in diffusers, "x0" in most diffusion papers
noise       ``x0``                         "epsilon"
v           ``a x0 - s x1``                arXiv 2202.00512 ("v_prediction")
score       ``-x0 / s``                    the score of p_t in expectation
flow        ``-(a' x1 + s' x0)``           diffusers' flow-match models, whose time runs from data to noise
edm         ``s x1 - a x0``                -v, on the path of EDM (arXiv 2206.00364)
==========  =============================  ====================================================
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.common.errors import unknown
from fewstep.networks.held import HOLD

KINDS = ("velocity", "data", "noise", "v", "score", "flow", "edm")


_FULL = (torch.float32, torch.float64)


def as_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times as a tensor (B,) beside x (B, ...): a number or 0-d tensor is repeated; float32 at least, float64 with x.

    Raises:
        ValueError: if t has a shape other than () or (B,), or is a number outside [0, 1] (tensors are not looked into:
            that would stall a GPU).
    """
    if isinstance(t, Tensor) and t.dtype is x.dtype in _FULL and t.shape == x.shape[:1] and t.device == x.device:
        return t
    if isinstance(t, int | float) and not 0 <= t <= 1:
        raise ValueError(f"the time {t} is outside [0, 1]: t = 0 is noise and t = 1 is data")
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=x.device)
    if t.ndim == 0:
        return t.expand(len(x))
    if t.shape != x.shape[:1]:
        raise ValueError(f"times have shape {tuple(t.shape)}, samples {tuple(x.shape)}: one time a sample is needed")
    return t


def expand(t: Tensor, x: Tensor) -> Tensor:
    """A value per sample (B,) shaped to multiply samples x (B, ...): (B, 1, ..., 1), in the type of x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Path:
    """An affine path ``x_t = alpha(t) x1 + sigma(t) x0``; subclasses give the coefficients, for times of any shape.

    ``data_scale`` is the deviation d of the data for which v is meant: with ``A = d alpha`` it is
    ``A x0 - sigma x1 / d``, and orthogonal to x_t as it is with d = 1.
    """

    data_scale: ClassVar[float] = 1.0

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

    def sample(self, noise: Tensor, data: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The state and conditional velocity at t: ``(x_t, dx_t)``, each (B, ...).

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
        if kind == "velocity":
            return prediction
        t = as_times(t, x)
        data, noise = self._split(prediction, x, t, kind)
        velocity = expand(self.alpha_dot(t), x) * data + expand(self.sigma_dot(t), x) * noise
        return self._finite(velocity, t, f"velocity from a {kind} prediction")

    def from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor | float, kind: str) -> Tensor:
        """The inverse of :meth:`to_velocity`: what a network of this kind would have predicted, (B, ...)."""
        if kind not in KINDS:
            raise unknown("prediction kind", kind, KINDS)
        if kind in ("velocity", "flow"):
            return velocity if kind == "velocity" else -velocity
        t = as_times(t, x)
        data, noise = self._split(velocity, x, t, "velocity")
        return self._finite(self.prediction(noise, data, t, kind), t, f"{kind} from a velocity")

    def prediction(self, noise: Tensor, data: Tensor, t: Tensor | float, kind: str) -> Tensor:
        """What a network of this kind is to predict of noise and data (B, ...) at t: its target in training."""
        t = as_times(t, data)
        a, s, a_dot, s_dot = (expand(c, data) for c in self.coefficients(t))
        d = self.data_scale
        match kind:
            case "data" | "noise":
                return data if kind == "data" else noise
            case "v" | "edm":
                v = d * a * noise - s / d * data
                return v if kind == "v" else -v
            case "score":
                return -noise / s
            case "velocity" | "flow":
                velocity = a_dot * data + s_dot * noise
                return velocity if kind == "velocity" else -velocity
        raise unknown("prediction kind", kind, KINDS)

    def _split(self, prediction: Tensor, x: Tensor, t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """(data, noise) expected at (x, t)."""
        coefficients = _split_coefficients(self, t, kind)
        data_x, data_f, noise_x, noise_f = (expand(c, x) for c in coefficients)
        return data_x * x + data_f * prediction, noise_x * x + noise_f * prediction

    def _finite(self, value: Tensor, t: Tensor, what: str) -> Tensor:
        good = value.flatten(1).isfinite().all(1)
        if not good.all():
            raise ValueError(
                f"{self}: the {what} is not finite at t = {float(t[~good][0]):.6g}; if the network's output is finite "
                "there, keep t away from that end"
            )
        return value


@lru_cache(maxsize=256)
def _hold_range(path: Path, kind: str) -> tuple[float, float]:
    lo, hi = path.reach
    lo = max(lo, -HOLD) if kind in ("noise", "score") else lo
    hi = min(hi, HOLD) if kind == "data" else hi
    ends = path.time_at(torch.tensor([lo, hi], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _split_coefficients(path: Path, t: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four numbers (B,) in ``data = p x + q F``, ``noise = r x + w F`` for a prediction F of this kind."""
    a, s = path.alpha(t), path.sigma(t)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    match kind:
        case "data":
            return zero, one, 1 / s, -a / s
        case "noise":
            return 1 / a, -s / a, zero, one
        case "score":
            return 1 / a, s * s / a, zero, -s
        case "v" | "edm":
            d, sign = path.data_scale, 1 if kind == "v" else -1
            a = d * a
            power = a * a + s * s
            return d * a / power, -sign * d * s / power, s / power, sign * a / power
        case "velocity" | "flow":
            a_dot, s_dot = path.alpha_dot(t), path.sigma_dot(t)
            det = a_dot * s - a * s_dot
            sign = 1 if kind == "velocity" else -1
            return -s_dot / det, sign * s / det, a_dot / det, -sign * a / det
        case _:
            raise unknown("prediction kind", kind, KINDS)


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

    def same_as(self, other: Path) -> bool:
        return isinstance(other, Linear)

    def sample(self, noise: Tensor, data: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        if noise.shape != data.shape:
            return super().sample(noise, data, t)
        t = expand(as_times(t, data), data)
        return t * data + (1 - t) * noise, data - noise


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


@dataclass(frozen=True)
class Tabulated(Path):
    """A diffusion schedule given at discrete steps k = 0 (least noise) to K - 1 (most), as schedulers hold it.

    ``log_ratios[k] = log(alpha_k / sigma_k)``, falling. Time is linear in the step, ``t = 1 - k / (K - 1)``; between
    the steps the log-ratio is linear. Networks trained on it are asked at the (continuous) step k. Outside the table
    there is nothing: conversions hold its ends.

    Args:
        log_ratios: those of the steps with a signal.
        ends_in_noise: whether one step more stands behind them, of noise alone (zero terminal SNR, arXiv 2305.08891):
            K = len(log_ratios) + 1. Before it the ratio itself is linear.

    Raises:
        ValueError: if the table does not fall, is not finite or has fewer than two steps.
    """

    log_ratios: tuple[float, ...]
    ends_in_noise: bool = False

    def __post_init__(self) -> None:
        table = torch.tensor(self.log_ratios, dtype=torch.float64)
        if len(table) < 2 or not table.isfinite().all() or not (table.diff() < 0).all():
            raise ValueError("a tabulated path needs two or more finite log-ratios, each below the one before it")
        # At once: made at the first call, inside a derivative, it would be that derivative's, and no student with it
        # could be copied.
        vars(self)["_rising"] = table.flip(0)
        vars(self)["_hash"] = hash((self.log_ratios, self.ends_in_noise))

    def __hash__(self) -> int:
        return vars(self)["_hash"]  # a thousand numbers are looked at once

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "Tabulated":
        """From ``alpha_k^2`` of a variance-preserving schedule, shape (K,), as diffusers' schedulers hold it; the last
        may be 0."""
        power = alphas_cumprod.detach().double().cpu()
        ends_in_noise = bool(power[-1] == 0)
        power = power[:-1] if ends_in_noise else power
        return cls(tuple((0.5 * (power.log() - (-power).log1p())).tolist()), ends_in_noise)

    def __repr__(self) -> str:
        first, last = self.log_ratios[0], -math.inf if self.ends_in_noise else self.log_ratios[-1]
        return f"Tabulated({self.steps} steps, log-ratios {first:.3g} to {last:.3g})"

    @property
    def steps(self) -> int:
        """K."""
        return len(self.log_ratios) + self.ends_in_noise

    @property
    def _table(self) -> Tensor:
        """The log-ratios, rising, (K,) in float64."""
        return vars(self)["_rising"]

    def _log_ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log(alpha / sigma) at t and its derivative, where there is a signal at the step before."""
        table = self._table.to(t.device)
        place = t.double() * (self.steps - 1) - int(self.ends_in_noise)
        index = place.floor().long().clamp(0, len(table) - 2)
        rise = table[index + 1] - table[index]
        return (table[index] + (place - index) * rise).to(t.dtype), (rise * (self.steps - 1)).to(t.dtype)

    def _from_noise(self, t: Tensor) -> tuple[Tensor, Tensor, float]:
        """Whether t lies between the step of noise alone and that before it, and alpha / sigma and its rate there."""
        rate = math.exp(self.log_ratios[-1]) * (self.steps - 1)
        return t < 1 / (self.steps - 1), rate * t, rate

    def alpha(self, t: Tensor) -> Tensor:
        alpha = torch.sigmoid(2 * self._log_ratio(t)[0]).sqrt()
        if not self.ends_in_noise:
            return alpha
        is_last, ratio, _ = self._from_noise(t)
        return torch.where(is_last, ratio / (1 + ratio * ratio).sqrt(), alpha)

    def sigma(self, t: Tensor) -> Tensor:
        sigma = torch.sigmoid(-2 * self._log_ratio(t)[0]).sqrt()
        if not self.ends_in_noise:
            return sigma
        is_last, ratio, _ = self._from_noise(t)
        return torch.where(is_last, 1 / (1 + ratio * ratio).sqrt(), sigma)

    def alpha_dot(self, t: Tensor) -> Tensor:
        alpha_dot = self.alpha(t) * self.sigma(t) ** 2 * self._log_ratio(t)[1]
        if not self.ends_in_noise:
            return alpha_dot
        is_last, _, rate = self._from_noise(t)
        return torch.where(is_last, rate * self.sigma(t) ** 3, alpha_dot)

    def sigma_dot(self, t: Tensor) -> Tensor:
        sigma_dot = -self.sigma(t) * self.alpha(t) ** 2 * self._log_ratio(t)[1]
        if not self.ends_in_noise:
            return sigma_dot
        is_last, _, rate = self._from_noise(t)
        return torch.where(is_last, -rate * self.alpha(t) * self.sigma(t) ** 2, sigma_dot)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        time = self._time_in_table(alpha.log() - sigma.log())
        return self._before_table(time, alpha / sigma) if self.ends_in_noise else time

    def time_at(self, log_ratio: Tensor) -> Tensor:
        time = self._time_in_table(log_ratio)
        return self._before_table(time, log_ratio.exp()) if self.ends_in_noise else time

    def _time_in_table(self, log_ratio: Tensor) -> Tensor:
        table = self._table.to(log_ratio.device)
        value = log_ratio.double().clamp(table[0], table[-1])
        index = self.place_in(table, value).clamp(0, len(table) - 2)
        part = (value - table[index]) / (table[index + 1] - table[index])
        return ((index + part + int(self.ends_in_noise)) / (self.steps - 1)).to(log_ratio.dtype)

    def place_in(self, table: Tensor, value: Tensor) -> Tensor:
        """The index of the last entry of a rising table that is not above the value."""
        return torch.searchsorted(table, value, right=True) - 1

    def _before_table(self, time: Tensor, ratio: Tensor) -> Tensor:
        """The time of a ratio alpha / sigma, ``time`` where the table has it."""
        share = ratio / math.exp(self.log_ratios[-1])
        return torch.where(share < 1, share / (self.steps - 1), time)

    def network_time(self, t: Tensor) -> Tensor:
        return (1 - t) * (self.steps - 1)

    @property
    def reach(self) -> tuple[float, float]:
        return -math.inf if self.ends_in_noise else self.log_ratios[-1], self.log_ratios[0]


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
    def data_scale(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
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


@dataclass(frozen=True)
class Scaling:
    """How a network's output F becomes a velocity: ``v = skip x + out F(into x, time)``, all (B,); see ``scaling``."""

    into: Tensor
    time: Tensor
    skip: Tensor
    out: Tensor


def scaling(native: Path, kind: str, path: Path, t: Tensor) -> Scaling:
    """A network that predicts ``kind`` on its ``native`` path, as a velocity on another ``path`` at times t (B,).

    Two affine paths reach the same marginals up to a scale where their alpha/sigma agree, so the network is asked at
    the native time of that ratio and at the state rescaled to the native power; its prediction gives data and noise,
    and these the velocity wanted (arXiv 2506.02221 for a diffusion schedule and the linear path; methods in
    ``docs/guides/diff2flow.md``). Where the native path does not reach, the network is asked at its last time and what
    stays determined there is held: the data estimate towards noise, the noise estimate towards data. So all
    coefficients are finite, and smooth enough for a forward derivative, wherever the wanted path's velocity is.

    Raises:
        ValueError: at t = 1 on a variance-preserving path, where the velocity is infinite.
    """
    # A sampler asks for one time at all rows, and for the same times again: there that of one row is kept. On a GPU
    # the number would have to be waited for.
    is_plain = not torch.is_grad_enabled() and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
    if is_plain and t.device.type == "cpu" and t.stride() == (0,) and len(t):
        kept = _scaling_at(native, kind, path, float(t[0]), t.dtype)
        return Scaling(*(value.expand(len(t)) for value in (kept.into, kept.time, kept.skip, kept.out)))
    return _scaling(native, kind, path, t)


@lru_cache(maxsize=4096)
def _scaling_at(native: Path, kind: str, path: Path, t: float, dtype: torch.dtype) -> Scaling:
    return _scaling(native, kind, path, torch.tensor([t], dtype=dtype))


def _scaling(native: Path, kind: str, path: Path, t: Tensor) -> Scaling:
    same = native.same_as(path)
    if same and kind in ("velocity", "flow"):
        one = torch.ones_like(t)
        return Scaling(one, native.network_time(t), torch.zeros_like(t), one if kind == "velocity" else -one)
    dtype = t.dtype
    t = t.double() if t.device.type != "mps" else t
    a, s, a_dot, s_dot = path.coefficients(t)
    # Only where it can happen: looking into a tensor stalls a GPU.
    if isinstance(path, VariancePreserving) and not s_dot.isfinite().all():
        raise ValueError(f"{path}: the velocity is infinite at t = 1; end the grid before it, or use .on(Linear())")
    lo, hi = native.hold_range(kind)
    native_t = t if same else native.time_of(a, s)
    low, high = native_t <= lo, native_t >= hi
    native_t = native_t.clamp(lo, hi)
    into = torch.hypot(native.alpha(native_t), native.sigma(native_t)) / torch.hypot(a, s)

    data_x, data_f, noise_x, noise_f = _split_coefficients(native, native_t, kind)
    data_x, noise_x = data_x * into, noise_x * into  # now in terms of x on the wanted path
    if lo > 0 or not same:
        noise_x = torch.where(low, (1 - a * data_x) / s, noise_x)
        noise_f = torch.where(low, -a * data_f / s, noise_f)
    if hi < 1 or not same:
        data_x = torch.where(high, (1 - s * noise_x) / a, data_x)
        data_f = torch.where(high, -s * noise_f / a, data_f)
    return Scaling(
        into.to(dtype),
        native.network_time(native_t).to(dtype),
        (a_dot * data_x + s_dot * noise_x).to(dtype),
        (a_dot * data_f + s_dot * noise_f).to(dtype),
    )
