"""When tokens are decided: the time change for large vocabularies (arXiv 2506.10892, 2602.16813).

On the straight path the largest component of ``x_t = t E_y + (1 - t) noise`` is y with the probability
``P(t) = int phi(u) Phi(u + t / (1 - t))^(V-1) du``. Of ``a(t) = (V P - 1) / (V - 1)``, the share of the way from a
guess to certainty, most lies near t = 1 where V is large. Times at which a rises evenly spread the work.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.flows.paths import Linear

_KNOTS = 4096


@lru_cache(maxsize=16)
def _table(size: int) -> tuple[Tensor, Tensor]:
    """Times (N,) from 0 to 1, and a at them, (N,), in float64."""
    t = torch.sin(torch.linspace(0, torch.pi / 2, _KNOTS, dtype=torch.float64)) ** 0.5  # finer towards 1
    t[0], t[-1] = 0, 1
    u = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    density = torch.exp(-u.square() / 2) / (2 * torch.pi) ** 0.5 * (u[1] - u[0])
    ratio = (t / (1 - t).clamp(min=1e-12))[:, None]
    chance = (torch.special.log_ndtr(u + ratio) * (size - 1)).exp() @ density
    share = ((size * chance - 1) / (size - 1)).clamp(0, 1)
    share[0], share[-1] = 0, 1
    # Rising to the very end, so that there is a way back, and 1 is decided at 1.
    return t, torch.lerp(torch.cummax(share, 0).values, t, 1e-6)


def decided(t: Tensor, size: int) -> Tensor:
    """``a(t)``, how far tokens of a vocabulary of ``size`` are decided at times of any shape."""
    times, share = _table(size)
    return _interpolated(t, times, share)


def time_decided(share: Tensor, size: int) -> Tensor:
    """The time at which tokens are so far decided: the inverse of :func:`decided`."""
    times, known = _table(size)
    return _interpolated(share, known, times)


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    xs, ys, at = xs.to(x.device), ys.to(x.device), x.double()
    right = torch.searchsorted(xs, at.contiguous()).clamp(1, len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    part = ((at - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(ys[right - 1], ys[right], part).to(x.dtype)


@dataclass(frozen=True)
class Deciding(Linear):
    """The straight path for networks that are told ``a(t)``, how far the tokens of a vocabulary of ``size`` are
    decided, in the place of t.

    Raises:
        ValueError: fewer than two tokens.
    """

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"a vocabulary of {shown(self.size)}: two tokens at least")

    def network_time(self, t: Tensor) -> Tensor:
        return decided(t, self.size)
