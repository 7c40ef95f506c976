"""PSD models: densities that are a formula, such as squares of sums of bumps, as an exact field. No data is needed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import uniform
from fewstep.flows.broadcasting import as_times
from fewstep.flows.exact import ExactField
from fewstep.flows.paths import Linear, Path

_MOST_NUMBERS = 1 << 22  # at once, when boxes are weighed
_TINY = 1e-14  # of the terms of a density, below which their sum is rounding


class PSDField(ExactField):
    """Data of density ``f(x) / Z``, ``f(x) = sum_ij A_ij k(x, c_i) k(x, c_j)`` with A positive semidefinite and
    ``k(x, c) = exp(-eta |x - c|^2)`` (arXiv 2110.10527; reconstructed: the formulas of the model and of its boxes are
    its, its way to fit is not known here).

    f is nowhere negative, and may vanish where a Gaussian mixture cannot. Products of two bumps are one, so f is a
    mixture of Gaussians with signs, of means ``m_ij = (c_i + c_j) / 2``, weights ``W_ij = A_ij exp(-eta |c_i - c_j|^2 /
    2)`` and the variance ``1 / (4 eta)``. With noise it is one again, and with ``v_ij`` the velocity of a component

        ``v = sum W_ij N_ij v_ij / sum W_ij N_ij``

    Computed in float64, the largest exponent of each row taken out before. For data of few dimensions: M^2 / 2
    components are weighed for each point.

    Args:
        centres: c, (M, D).
        weights: A, (M, M), symmetric; or (M,), for ``A = a a'``: then f is the square of a sum of bumps.
        eta: how narrow the bumps are, above 0.

    Raises:
        ValueError: an A that is not symmetric or has negative eigenvalues (the density would be negative somewhere), no
            mass at all, shapes that do not agree.
    """

    centres: Tensor
    weights: Tensor
    means: Tensor
    signed: Tensor

    def __init__(self, centres: Tensor, weights: Tensor, eta: float, path: Path | None = None) -> None:
        super().__init__()
        centres, weights = centres.double(), weights.double()
        if weights.ndim == 1:
            weights = weights[:, None] * weights
        if centres.ndim != 2 or weights.shape != (len(centres), len(centres)):
            raise ValueError(f"centres {tuple(centres.shape)} and weights {tuple(weights.shape)}: (M, D) and (M, M)")
        if not 0 < eta < math.inf:
            raise ValueError(f"eta is {eta:g}: a positive number")
        if not torch.equal(weights, weights.T):
            raise ValueError("the weights of a PSD model are symmetric, and these are not: take (A + A.T) / 2")
        eigenvalues = torch.linalg.eigvalsh(weights)
        if float(eigenvalues[0]) < -1e-10 * float(eigenvalues.abs().max()):
            raise ValueError(
                f"the weights have the eigenvalue {float(eigenvalues[0]):.3g}: their density is negative somewhere"
            )
        i, j = torch.triu_indices(len(centres), len(centres), device=centres.device).unbind()
        twice = torch.where(i == j, 1.0, 2.0)
        self.register_buffer("centres", centres)
        self.register_buffer("weights", weights)
        self.register_buffer("means", (centres[i] + centres[j]) / 2)
        distance = (centres[i] - centres[j]).square().sum(1)
        self.register_buffer("signed", twice * weights[i, j] * (-eta * distance / 2).exp())
        self.eta, self.path = float(eta), path or Linear()
        if not float(self.signed.sum()) > _TINY * float(self.signed.abs().sum()):
            raise ValueError(
                "the weights leave no mass: the density is 0, or rounding of large weights (of a fit: raise ridge)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.centres.shape[1:])

    @property
    def variance(self) -> float:
        """Of each component on each axis."""
        return 1 / (4 * self.eta)

    @property
    def normalizer(self) -> float:
        """Z, the integral of f."""
        return float(self.signed.sum()) * (math.pi / (2 * self.eta)) ** (self.centres.shape[1] / 2)

    @property
    def covariance(self) -> Tensor:
        """Of the data, (D, D)."""
        share = self.signed / self.signed.sum()
        mean = share @ self.means
        spread = (share[:, None] * self.means).T @ self.means - mean[:, None] * mean
        return spread + self.variance * torch.eye(len(mean)).to(spread)

    def log_prob(self, x: Tensor) -> Tensor:
        """The logarithm of the density of points (B, D), (B,); -inf where it is 0."""
        bumps = (-self.eta * (x.double()[:, None] - self.centres).square().sum(-1)).exp()
        return ((bumps @ self.weights) * bumps).sum(1).clamp(min=0).log() - math.log(self.normalizer)

    def mass(self, low: Tensor, high: Tensor) -> Tensor:
        """The probability of boxes between two corners, (B, D) each: (B,)."""
        rate = math.sqrt(2 * self.eta)
        below, above = (torch.erf(rate * (end.double()[:, None] - self.means)) for end in (low, high))
        return ((above - below) / 2).prod(-1) @ (self.signed / self.signed.sum())

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t = as_times(t, x).double()
        a, s, a_dot, noise_rate = (
            of(t)[:, None] for of in (self.path.alpha, self.path.sigma, self.path.alpha_dot, self.path.noise_rate)
        )
        variance = a * a * self.variance + s * s
        offset = x.double()[:, None] - a[..., None] * self.means
        exponent = -offset.square().sum(-1) / (2 * variance)
        terms = self.signed * (exponent - exponent.amax(1, keepdim=True)).exp()
        # Where the density vanishes the sum is rounding: its least value keeps the velocity finite.
        total = terms.sum(1, keepdim=True).clamp(min=0) + _TINY * terms.abs().sum(1, keepdim=True)
        rate = (a * a_dot * self.variance + noise_rate) / variance
        velocity = a_dot * (terms @ self.means) + rate * (terms[..., None] * offset).sum(1)
        return (velocity / total).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples (count, D), float64: a box with all but 1e-9 of the mass is halved along its longest side, each time
        for the half that a random number falls into, until cells are a thousandth of a bump wide; within it uniform."""
        reach = 6.5 * math.sqrt(self.variance)
        low, high = (end.expand(count, -1).clone() for end in (self.means.amin(0) - reach, self.means.amax(0) + reach))
        whole = self._masses(low, high)
        while float((side := high[0] - low[0]).max()) > 1e-3 * math.sqrt(self.variance):
            axis = int(side.argmax())
            middle = (low[:, axis] + high[:, axis]) / 2
            end = high.clone()
            end[:, axis] = middle
            left = self._masses(low, end).clamp(min=0).minimum(whole)
            is_left = uniform(count, generator).to(whole) * whole < left
            high[:, axis], low[:, axis] = (
                torch.where(is_left, middle, high[:, axis]),
                torch.where(is_left, low[:, axis], middle),
            )
            whole = torch.where(is_left, left, whole - left)
        within = uniform(tuple(low.shape), generator).to(low)
        return low + within * (high - low)

    def on(self, path: Path) -> "PSDField":
        return PSDField(self.centres, self.weights, self.eta, path)

    def _masses(self, low: Tensor, high: Tensor) -> Tensor:
        """:meth:`mass` of many boxes, some at a time."""
        rows = max(1, _MOST_NUMBERS // self.means.numel())
        return torch.cat([self.mass(*ends) for ends in zip(low.split(rows), high.split(rows), strict=True)])

    @classmethod
    def fitted(
        cls,
        density: Callable[[Tensor], Tensor],
        centres: Tensor,
        points: Tensor,
        eta: float,
        ridge: float = 1e-9,
    ) -> "PSDField":
        """The PSD model of rank one for a density known up to a constant, ``f(x) = (sum a_i k(x, c_i))^2``: ridge
        regression of the bumps on the root of the density, ``a = (K'K + n ridge K_c)^-1 K' sqrt(f)``.

        Args:
            density: of points (N, D), (N,), times any constant.
            centres: (M, D).
            points: where the density is asked, (N, D): more than centres, all over where it is not 0.
            eta, ridge: how narrow the bumps are; how much large weights are held back.

        Raises:
            ValueError: a density that is negative or not finite at a point, or 0 at all of them; a wrong shape.

        >>> ring = PSDField.fitted(lambda x: (-8 * (x.norm(dim=1) - 1) ** 2).exp(), centres, points, eta=4.0)
        """
        centres, points = centres.double(), points.double()
        values = density(points).double()
        if values.shape != points.shape[:1]:
            raise ValueError(f"the density gave {tuple(values.shape)} for points {tuple(points.shape)}: one a point")
        for is_wrong, what in ((~values.isfinite(), "not finite"), (values < 0, "negative")):
            if is_wrong.any():
                at = int(is_wrong.nonzero()[0])
                where = ", ".join(f"{number:g}" for number in points[at].tolist())
                raise ValueError(f"the density is {what} at ({where}): {float(values[at]):.3g}")
        if not float(values.max()) > 0:
            raise ValueError("the density is 0 at all points: take points where it is not")

        def bumps(x: Tensor) -> Tensor:
            return (-eta * (x[:, None] - centres).square().sum(-1)).exp()

        kernel, own = bumps(points), bumps(centres)
        matrix = kernel.T @ kernel + len(points) * ridge * own
        weights = torch.linalg.solve(matrix, kernel.T @ (values / values.max()).sqrt())
        return cls(centres, weights, eta)


def orbital(scale: float = 1.0) -> PSDField:
    """Four lobes about the origin, as a d orbital has them: the square of four bumps of which two are negative, so it
    vanishes along both diagonals. ``scale`` is its standard deviation on each axis."""
    corners: Sequence[Sequence[float]] = ((1, 0), (-1, 0), (0, 1), (0, -1))
    centres, signs = torch.tensor(corners, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, -1.0])
    eta = 1.0
    size = scale / math.sqrt(float(PSDField(centres, signs, eta).covariance[0, 0]))
    field = PSDField(centres * size, signs, eta / size**2)
    field.source = "orbital" if scale == 1 else None
    return field
