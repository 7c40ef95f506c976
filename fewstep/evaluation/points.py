"""Distances between two clouds of points: what a 2-D run is judged by.

Every function takes rows, (N, D) or (N, ...) with what follows the first axis flattened, computes in float64 and
returns a float. Rows that are not finite are an error: a mean over them would hide what went wrong.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from fewstep.common.randomness import generator

# How many rows and projections are handled at once: bounds memory to about 200 MB at 20,000 points.
_ROWS = 512
_PROJECTIONS = 32


def rmse(x: Tensor, y: Tensor) -> float:
    """Root of the mean squared vector error, ``sqrt(mean_i |x_i - y_i|^2)``: row i against row i.

    The norm sums over all components of a row, so this is ``sqrt(D)`` times the error of one component.
    """
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape")
    x, y = _pair(x, y)
    return float((x - y).square().sum(dim=1).mean().sqrt())


def error_quantiles(x: Tensor, y: Tensor, shares: Sequence[float] = (0.5, 0.99)) -> list[float]:
    """The vector errors ``|x_i - y_i|`` below which these shares of the rows lie: by default the median and the 99 %
    quantile. A few rows beside a separatrix, whose end points part for good, rule the :func:`rmse` and not these."""
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape")
    x, y = _pair(x, y)
    return quantiles((x - y).norm(dim=1), shares)


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Below which values these shares of them lie, linear between two; of any number of values."""
    ordered, places = values.sort().values, [share * (len(values) - 1) for share in shares]
    return [float(torch.lerp(ordered[int(p)], ordered[min(int(p) + 1, len(values) - 1)], p - int(p))) for p in places]


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: the root of the mean, over random directions, of the squared W2 distance of the
    projected clouds (Bonneel et al. 2015; POT). Moving a cloud by d makes it ``|d| / sqrt(D)`` on average.

    The directions come from ``seed`` alone, so that all clouds are compared along the same ones.
    """
    x, y = _pair(x, y)
    directions = torch.randn(x.shape[1], projections, generator=generator(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    total = 0.0
    if len(x) == len(y):  # the i-th smallest goes to the i-th smallest; POT's general case takes five times as long
        for some in directions.T.split(_PROJECTIONS):
            moved = (some @ x.T).sort(dim=1).values - (some @ y.T).sort(dim=1).values
            total += float(moved.square().mean()) * len(some)
        return (total / projections) ** 0.5
    import ot  # a second, and rarely needed

    for some in directions.split(_PROJECTIONS, dim=1):
        distance = cast(Tensor, ot.sliced_wasserstein_distance(x, y, projections=some, p=2))
        total += float(distance) ** 2 * some.shape[1]
    return (total / projections) ** 0.5


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance ``2 E|x - y| - E|x - x'| - E|y - y'|`` (Székely and Rizzo 2013), without a square root.

    The unbiased estimate (a point is never paired with itself): its mean is 0 where both clouds come from one
    distribution, and single values may be slightly negative.
    """
    x, y = _pair(x, y, least=2)
    return _discrepancy(x, y, lambda distance: distance.neg_())


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None) -> float:
    """Squared maximum mean discrepancy with RBF kernels ``exp(-|x - y|^2 / (2 h^2))``, averaged over bandwidths h.

    The unbiased estimate (Gretton et al. 2012, eq. 3): 0 on average at equal distributions, so it may be negative.
    Without ``bandwidths``, h is the median distance between points of the two clouds together, at most 2000 of them.
    """
    x, y = _pair(x, y, least=2)
    if bandwidths is None:
        pool = torch.cat([_thinned(x, 1000), _thinned(y, 1000)])
        bandwidths = [float(torch.pdist(pool).median())]
    if not bandwidths or min(bandwidths) <= 0:
        raise ValueError(f"bandwidths must be positive, not {list(bandwidths)}")

    def kernel(distance: Tensor) -> Tensor:
        squares = distance.square_()
        return torch.stack([(squares * (-0.5 / h**2)).exp_() for h in bandwidths]).mean(dim=0)

    return _discrepancy(x, y, kernel)


def histogram_kl(
    x: Tensor,
    reference: Tensor,
    bins: int = 50,
    range: Sequence[tuple[float, float]] | None = None,
    epsilon: float = 1e-10,
) -> float:
    """KL divergence in nats, ``KL(reference || x)``, of histograms: the protocol of arXiv 2505.18825 (50 x 50 bins,
    64,000 samples of each), for points of few dimensions.

    Each axis of ``range`` (by default the smallest box that holds the reference) has ``bins`` equal bins, and
    everything outside the box is one bin more, so that samples that fly off count against the model. Shares of the
    total are raised by ``epsilon`` and normalised again, then summed as ``p log(p / q)``. An empty model bin where the
    data have share p so costs about ``p log(p / epsilon)``. Two finite samples of one density do not reach 0: the
    value there is near (bins in use) x (1/N_x + 1/N_reference) / 2, to be printed beside a model's.
    """
    x, reference = _pair(x, reference)
    dims = x.shape[1]
    if bins**dims > 10_000_000:
        raise ValueError(f"{bins} bins on each of {dims} axes are too many to fill: project the points to 2-D first")
    if range is None:
        low, high = reference.amin(dim=0), reference.amax(dim=0)
    else:
        low, high = x.new_tensor(range).T
    if low.shape != (dims,) or bool((low >= high).any()):
        box = torch.stack([low, high], dim=-1).tolist()
        raise ValueError(f"range must give low < high for each of the {dims} axes, not {box}")

    def shares(points: Tensor) -> Tensor:
        inside = ((points >= low) & (points <= high)).all(dim=1)
        places = ((points - low) / (high - low) * bins).long().clamp_(0, bins - 1)  # the upper edge is in the last bin
        strides = bins ** torch.arange(dims, device=points.device)
        index = torch.where(inside, (places * strides).sum(dim=1), bins**dims)
        share = torch.bincount(index, minlength=bins**dims + 1).double() / len(points) + epsilon
        return share / share.sum()

    p, q = shares(reference), shares(x)
    return float((p * (p / q).log()).sum())


def outside(x: Tensor, inside: Callable[[Tensor], Tensor]) -> float:
    """The share of points x (N, D) that lie where the data never do; ``inside`` (N, D) -> (N,) says which could be
    data. It sees stray points between the modes, of which an :func:`rmse` says little."""
    return float((~inside(_checked(x, "x"))).double().mean())


def _pair(x: Tensor, y: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both clouds as float64 rows on x's device, checked."""
    x, y = _checked(x, "x"), _checked(y, "y").to(x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} dimensions and y has {y.shape[1]}: they must be equal")
    if min(len(x), len(y)) < least:
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}: at least {least} of each are needed")
    return x, y


def _checked(x: Tensor, name: str) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (N, D), not {tuple(x.shape)}")
    x = x.detach().flatten(1).double()
    bad = int((~x.isfinite().all(dim=1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} rows of {name} are not finite: the samples diverged")
    return x


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """``E k(x, x') + E k(y, y') - 2 E k(x, y)`` over pairs of different points; ``kernel`` acts on distances and may
    write over them."""
    return _mean_within(x, kernel) + _mean_within(y, kernel) - 2 * _sum(x, y, kernel) / (len(x) * len(y))


def _mean_within(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    total = 0.0
    for start in range(0, len(x), _ROWS):
        block, rest = x[start : start + _ROWS], x[start + _ROWS :]
        own = float(kernel(x.new_zeros(()))) * len(block)
        total += _sum(block, block, kernel) - own + 2 * _sum(block, rest, kernel)
    return total / (len(x) * (len(x) - 1))


def _sum(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """The kernel summed over all pairs, a block of rows at a time so that no N x N matrix ever exists."""
    total = 0.0
    for block in x.split(_ROWS):
        # Direct differences: the form by matrix products is off by 1e-8 near zero and no faster in blocks.
        distance = torch.cdist(block, y, compute_mode="donot_use_mm_for_euclid_dist")
        total += float(kernel(distance).sum())
    return total


def _thinned(x: Tensor, rows: int) -> Tensor:
    """At most ``rows`` rows, evenly spaced."""
    return x if len(x) <= rows else x[torch.linspace(0, len(x) - 1, rows).long().to(x.device)]
