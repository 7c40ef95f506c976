"""The paths of diffusion schedules that are given step by step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.flows.paths import Path


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
