"""The heat kernel of [0, 1] between mirrors: the law, at the time ``tau``, of what diffuses from y and is reflected.

With ``tau = sigma^2 / 2`` it is the law of ``reflect(y + sigma z)``, z ~ N(0, 1). Two series are it exactly (arXiv
2304.04740 and its code); one converges fast where tau is large, the other where it is small:

    ``K(x | y) = 1 + 2 sum_{k > 0} e^(-k^2 pi^2 tau) cos(k pi x) cos(k pi y)``
    ``K(x | y) = sum_{m even} phi(m + x - y) + phi(m + x + y)``, phi the density of N(0, 2 tau)

All functions are elementwise: x, y and tau broadcast against each other.
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
    x, y, tau = x[..., None], y[..., None], tau[..., None]
    weight = 2 * torch.exp(-k * k * tau) * torch.cos(k * y)
    density = 1 + (weight * torch.cos(k * x)).sum(-1)
    log = density.clamp(min=torch.finfo(x.dtype).tiny).log()  # too few of them may sum to less than 0
    return log, -(weight * k * torch.sin(k * x)).sum(-1) / density


def by_images(x: Tensor, y: Tensor, tau: Tensor, reach: int = 4) -> tuple[Tensor, Tensor]:
    """``log K(x | y)`` and the score by the images of y in both mirrors, m from -``reach`` to ``reach``: a mixture of
    Gaussians, summed in logarithms, so that no tail underflows."""
    m = torch.arange(-reach, reach + 1, 2, dtype=x.dtype, device=x.device)
    away = torch.cat([(x - y)[..., None] + m, (x + y)[..., None] + m], -1)
    log = -away.square() / (4 * tau[..., None])
    score = -(torch.softmax(log, -1) * away).sum(-1) / (2 * tau)
    return torch.logsumexp(log, -1) - 0.5 * torch.log(4 * math.pi * tau), score


def heat_kernel(x: Tensor, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """``log K(x | y)`` and the score, at each tau by the series that is exact there, in float32 too.

    >>> log_k, score = heat_kernel(torch.tensor([0.2]), torch.tensor([0.7]), torch.tensor([0.1]))
    >>> float(log_k.exp()), float(score)
    (0.6417..., 1.3680...)
    """
    late = by_eigenfunctions(x, y, tau.clamp(min=SWITCH), 8)
    early = by_images(x, y, tau.clamp(max=SWITCH))
    is_late = tau > SWITCH
    return torch.where(is_late, late[0], early[0]), torch.where(is_late, late[1], early[1])
