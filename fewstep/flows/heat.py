"""The heat kernel of [0, 1] between mirrors: with ``tau = sigma^2 / 2`` the law of ``reflect(y + sigma z)``, z normal.

Two series are it exactly (arXiv 2304.04740 and its code). One converges fast for large tau, the other for small:

    ``K(x | y) = 1 + 2 sum_{k > 0} e^(-k^2 pi^2 tau) cos(k pi x) cos(k pi y)``
    ``K(x | y) = sum_{m even} phi(m + x - y) + phi(m + x + y)``, phi the density of N(0, 2 tau)

All here is elementwise: x, y and tau broadcast against each other.
"""

import math

import torch
from torch import Tensor

# From here on eight eigenfunctions are exact to the last digit of float64. The authors' code changes over at 0.01 and
# takes twenty: there, in float32, the sum of cosines loses all digits where the kernel is below 1e-6.
SWITCH = 0.1


def reflect(x: Tensor) -> Tensor:
    """x brought to [0, 1] by mirrors at both ends, as often as it takes."""
    return 1 - (1 - torch.remainder(x, 2)).abs()


def by_eigenfunctions(x: Tensor, y: Tensor, tau: Tensor, count: int = 20) -> tuple[Tensor, Tensor]:
    """``log K(x | y)`` and its derivative in x, the score, by the first ``count`` eigenfunctions."""
    k = math.pi * torch.arange(1, count + 1, dtype=x.dtype, device=x.device)
    x, weight = x[..., None], 2 * torch.exp(-k * k * tau[..., None]) * torch.cos(k * y[..., None])
    density = 1 + (weight * torch.cos(k * x)).sum(-1)
    log = density.clamp(min=torch.finfo(x.dtype).tiny).log()  # too few of them may sum to less than 0
    return log, -(weight * k * torch.sin(k * x)).sum(-1) / density


def by_images(x: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """``log K(x | y)`` and the score by the ten nearest images of y in the mirrors; no tail underflows."""
    m = torch.arange(-4, 5, 2, dtype=x.dtype, device=x.device)
    away = torch.cat([(x - y)[..., None] + m, (x + y)[..., None] + m], -1)
    log = -away.square() / (4 * tau[..., None])
    score = -(log.softmax(-1) * away).sum(-1) / (2 * tau)
    return log.logsumexp(-1) - 0.5 * torch.log(4 * math.pi * tau), score


def heat_kernel(x: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """``log K(x | y)`` and the score, at each tau by the series that is exact there, in float32 too."""
    late, early = by_eigenfunctions(x, y, tau.clamp(min=SWITCH), 8), by_images(x, y, tau.clamp(max=SWITCH))
    return torch.where(tau > SWITCH, late[0], early[0]), torch.where(tau > SWITCH, late[1], early[1])
