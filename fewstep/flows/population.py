"""Weighted populations of samples: their weights, and systematic resampling.

Particles x^1 ... x^n with weights w^1 ... w^n stand for a law in which ``E f`` is ``sum w f(x) / sum w``. Where few of
them have all the weight, they are resampled: n are drawn by weight, the weights become equal again, and the mean weight
goes into the normaliser (arXiv 2007.11936 is an introduction). Nothing here waits for a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.randomness import Generators, uniform


@dataclass(frozen=True)
class Particles:
    """What ``fewstep.steer`` returns: populations of n weighted samples each, of B rows in all.

    Attributes:
        x: the samples (B, ...); rows 0 to n - 1 are the first population.
        log_weights: (B,), in each population the logarithms of weights that sum to 1.
        ess: effective sample sizes ``1 / sum w^2`` (steps, groups), from 1 to n: after each step, before it resamples.
            The last row is that of ``log_weights``.
        ancestors: (B,), the row of the noise that each sample comes from; ``cond[ancestors]`` are its conditions.
        log_normalizer: (groups,), an estimate of the logarithm of the mass of the target: ``log E_q e^r`` of a reward,
            ``log of the integral of prod q_i^b_i`` of mixed fields. (Its exponential is unbiased.)
    """

    x: Tensor
    log_weights: Tensor
    ess: Tensor
    ancestors: Tensor
    log_normalizer: Tensor

    @property
    def groups(self) -> int:
        """How many populations."""
        return len(self.log_normalizer)

    @property
    def unique(self) -> Tensor:
        """How many different ancestors each population has left, (groups,)."""
        rows = self.ancestors.reshape(self.groups, -1).sort(1).values
        return 1 + (rows.diff(dim=1) != 0).sum(1)

    def mean(self, values: Tensor) -> Tensor:
        """The weighted mean of values (B, ...) in each population, (groups, ...)."""
        shape = (self.groups, -1, *values.shape[1:])
        weights = self.log_weights.exp().to(values.dtype).reshape(self.groups, -1, *[1] * (values.ndim - 1))
        return (weights * values.reshape(shape)).sum(1)

    def draw(self, generator: Generators | None = None) -> Tensor:
        """One sample of each population by weight, (groups, ...).

        Args:
            generator: where the draw is from, torch's global one if not given; a list with one a population, or one a
                row, of which the first of each population counts.
        """
        u = group_uniform(self.groups, generator).to(self.log_weights)
        rows = systematic(self.log_weights.reshape(self.groups, -1), u, count=1)[:, 0]
        return self.x[rows + torch.arange(self.groups, device=rows.device) * (len(self.x) // self.groups)]


class Population:
    """Populations of n particles on their way: the weights that they have gathered, and who comes from whom.

    Args:
        rows, groups: of all populations together, and how many there are.
        least: they are resampled below this share of n effective particles.
        like: a tensor of the samples' type and device.
    """

    def __init__(self, rows: int, groups: int, least: float, like: Tensor, generator: Generators | None) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.n, self.least, self.generator = rows // groups, least, generator
        self.log_weights = torch.zeros(groups, self.n, dtype=dtype, device=like.device)
        self.log_normalizer = self.log_weights.new_zeros(groups)
        self.ancestors = torch.arange(rows, device=like.device)
        self.ess: list[Tensor] = []

    def weigh(self, log_ratio: Tensor) -> None:
        """Multiply the weights by ``exp(log_ratio)`` (B,), and note the effective sample sizes."""
        self.log_weights = self.log_weights + log_ratio.reshape(self.log_weights.shape).to(self.log_weights)
        self.ess.append(torch.softmax(self.log_weights, 1).square().sum(1).reciprocal())

    def resample(self) -> Tensor:
        """The rows (B,) that go on: all as they are in populations that have enough effective particles."""
        groups = len(self.log_weights)
        u = group_uniform(groups, self.generator).to(self.log_weights)
        few, stay = self.ess[-1] < self.least * self.n, torch.arange(self.n, device=u.device)
        rows = torch.where(few[:, None], systematic(self.log_weights, u), stay)
        self.log_normalizer = self.log_normalizer + torch.where(few, self._log_mean(), 0.0)
        self.log_weights = torch.where(few[:, None], 0.0, self.log_weights)
        rows = (rows + self.n * torch.arange(groups, device=u.device)[:, None]).flatten()
        self.ancestors = self.ancestors[rows]
        return rows

    def particles(self, x: Tensor) -> Particles:
        """Samples x (B, ...) with their weights."""
        log_weights = torch.log_softmax(self.log_weights, 1).flatten()
        normalizer = self.log_normalizer + self._log_mean()
        return Particles(x, log_weights, torch.stack(self.ess), self.ancestors, normalizer)

    def _log_mean(self) -> Tensor:
        return torch.logsumexp(self.log_weights, 1) - math.log(self.n)


def systematic(log_weights: Tensor, u: Tensor, count: int | None = None) -> Tensor:
    """Systematic resampling: for weights (groups, n) and one uniform number u (groups,) each, the indices
    (groups, count) of those that go on, each ``count w`` times on average and that rounded up or down at most."""
    n = log_weights.shape[1]
    count = count or n
    ends = torch.softmax(log_weights, 1).cumsum(1)
    places = (torch.arange(count, device=u.device) + u[:, None]) / count * ends[:, -1:]
    return torch.searchsorted(ends, places, right=True).clamp(max=n - 1)


def group_uniform(groups: int, generator: Generators | None) -> Tensor:
    """A uniform number for each population, (groups,), by the generator of its first row where each row has one."""
    generator = torch.default_generator if generator is None else generator
    if isinstance(generator, Sequence) and len(generator) > groups:
        generator = generator[:: len(generator) // groups]
    return uniform(groups, generator)
