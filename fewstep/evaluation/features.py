"""Distances between sets of images, through the features of an extractor (``fewstep.evaluation.extractor``).

Plain functions of feature matrices (N, F). A Frechet distance is called FID only with the features of the Inception
network that the name stands for; with any other it is "FD" with the extractor's name beside it, since the numbers of
two extractors cannot be compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.randomness import generator

# Rows compared at once: 1024 x 50,000 distances in float64 are 400 MB.
_ROWS = 1024


@dataclass(eq=False)
class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in float64: all that is kept of any number of rows.

    Parts made by several processes add up to the statistics of the whole (``merge``), whatever the split. The scatter
    is about the mean, so that no digits are lost where features are far from 0 (Chan, Golub and LeVeque 1983, eq. 2.1).

    >>> statistics = FeatureStatistics.of(features[:500]).merge(FeatureStatistics.of(features[500:]))

    Attributes:
        count: how many rows.
        mean: (F,).
        scatter: the sum of ``(x - mean) (x - mean)'`` over rows, (F, F).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, num_features: int) -> "FeatureStatistics":
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        return cls(0, zeros[0].clone(), zeros)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of one matrix (N, F)."""
        return cls.empty(features.shape[1]).update(features)

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor, count: int = 2) -> "FeatureStatistics":
        """Statistics with this mean (F,) and covariance (F, F), such as published ones."""
        return cls(count, mean.to("cpu", torch.float64), (count - 1) * cov.to("cpu", torch.float64))

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Add the rows of ``features`` (N, F), from any device."""
        rows = features.detach().to("cpu", torch.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"features must have shape (N, {len(self.mean)}), not {tuple(rows.shape)}")
        _check_finite(rows, "features")
        if len(rows):
            mean = rows.mean(dim=0)
            added = self.merge(FeatureStatistics(len(rows), mean, (rows - mean).T @ (rows - mean)))
            self.count, self.mean, self.scatter = added.count, added.mean, added.scatter
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets of rows together; neither part changes."""
        if len(self.mean) != len(other.mean):
            raise ValueError(f"statistics of {len(self.mean)} and of {len(other.mean)} features cannot be merged")
        count, apart = self.count + other.count, other.mean - self.mean
        share = other.count / max(count, 1)
        scatter = self.scatter + other.scatter + self.count * share * torch.outer(apart, apart)
        return FeatureStatistics(count, self.mean + share * apart, scatter)

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance (divided by N - 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of two Gaussians, ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})`` (the formula of
    FID, arXiv 1706.08500).

    Exact for covariances without full rank too (fewer rows than features). Estimates from few rows are too large, by
    an amount that falls like 1/N: compare at equal N only.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared")
    if a.count > b.count:
        a, b = b, a  # the root is taken of the smaller set, whose rank may be lower
    cov_a, cov_b = a.cov, b.cov
    # With C_a = R R', the matrix C_a C_b has the eigenvalues of R' C_b R, which is symmetric: no complex residue.
    root = _factor(cov_a)
    eigenvalues = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0)
    trace = cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + trace))


def kid(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel inception distance (arXiv 1801.01401): the unbiased squared MMD with the kernel ``(x . y / F + 1)^3``.

    Returns its mean and standard deviation over ``subsets`` random subsets of ``size`` rows of each set. Unlike a
    Frechet distance it has no bias at small N, and may be slightly negative.
    """
    if subsets < 1 or not 2 <= size <= min(len(real), len(fake)):
        raise ValueError(
            f"kid: {subsets} subsets of {size} rows cannot be drawn from {len(real)} real and {len(fake)} fake rows"
        )
    real, fake = _pair(real, fake)
    draw = generator(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x = real[torch.randperm(len(real), generator=draw)[:size].to(real.device)]
        y = fake[torch.randperm(len(fake), generator=draw)[:size].to(fake.device)]
        within = _cubic(x, x).fill_diagonal_(0).sum() + _cubic(y, y).fill_diagonal_(0).sum()
        values[i] = within / (size * (size - 1)) - 2 * _cubic(x, y).mean()
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the share of fake rows that lie within the ball of some real row, whose radius is the distance to its
    k-th nearest real neighbour (not itself): is what the model makes realistic? Recall swaps the sets: does it make
    all there is? Compare at equal numbers of rows only.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k = {k} neighbours cannot be found among {len(real)} real and {len(fake)} fake rows")
    real, fake = _pair(real, fake)
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre  # distances by matrix products keep more digits near the origin
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _factor(cov: Tensor) -> Tensor:
    """R with ``R R' = cov``, (F, rank): Cholesky where it exists, since it is several times faster than ``eigh``."""
    triangle, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return triangle
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values[-1].clamp(min=0) * len(cov) * torch.finfo(cov.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th nearest other row."""
    radii = []
    for start in range(0, len(x), _ROWS):
        distances = _distances(x[start : start + _ROWS], x)
        distances.diagonal(offset=start).fill_(torch.inf)  # a row is no neighbour of itself
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of rows of x that lie in at least one ball."""
    hits = sum(int((_distances(block, centres) <= radii).any(dim=1).sum()) for block in x.split(_ROWS))
    return hits / len(x)


def _pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, F) with one F, not {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.detach().double(), fake.detach().to(real.device, torch.float64)
    _check_finite(real, "real features")
    _check_finite(fake, "fake features")
    return real, fake


def _check_finite(rows: Tensor, name: str) -> None:
    bad = int((~rows.isfinite().all(dim=1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(rows)} rows of {name} are not finite: the samples diverged")
