"""When: how training draws its times, and the grids that sampling steps along."""

import math

import torch
from torch import Tensor

from fewstep.errors import unknown
from fewstep.randomness import Generators, uniform

DISTRIBUTIONS = ("uniform", "logit-normal")
GRIDS = ("uniform", "shifted", "quadratic")


def draw_times(rows: int, generators: Generators, distribution: str = "uniform") -> Tensor:
    """Times in [0, 1), shape (rows,): uniform, or logit-normal (arXiv 2403.03206: most of the weight in the middle).

    Raises:
        ValueError: if the distribution is not known.
    """
    u = uniform(rows, generators)
    if distribution == "uniform":
        return u
    if distribution == "logit-normal":
        return torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999)))
    raise unknown("distribution of times", distribution, DISTRIBUTIONS)


def draw_pairs(
    rows: int, generators: Generators, distribution: str = "uniform", ends: float = 0.0, longest: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Pairs s <= t, each (rows,): two draws, sorted.

    Args:
        ends: with this probability s becomes 0, and with this one (of its own) t becomes 1: the times of one-step
            sampling, which otherwise have probability 0.
        longest: the strip ``t - s <= longest``: intervals shrink by this factor, and their places spread to fill it.
            (Of two sorted uniform numbers, s is uniform on [0, 1 - (t - s)], and stays so.) Ends then go as far as
            the strip reaches.
    """
    first, second = (draw_times(rows, generators, distribution) for _ in range(2))
    s, t = torch.minimum(first, second), torch.maximum(first, second)
    if longest < 1:
        length = longest * (t - s)
        s = s * (1 - length) / (1 - (t - s)).clamp(min=1e-9)
        t = s + length
    if ends > 0:
        first = (t - longest).clamp(min=0.0) if longest < 1 else 0.0
        s = torch.where(uniform(rows, generators) < ends, first, s)
        last = (s + longest).clamp(max=1.0) if longest < 1 else 1.0
        t = torch.where(uniform(rows, generators) < ends, last, t)
    return s, t


def step_grid(steps: int, kind: str = "uniform", shift: float = 3.0) -> Tensor:
    """``steps + 1`` times from 0 to 1, float64.

    * uniform;
    * shifted: ``u / (u + shift (1 - u))`` of uniform u: steps crowd at the noise for ``shift > 1`` (arXiv 2403.03206);
    * quadratic: ``1 - (1 - u)^2``: steps crowd at the data.

    Raises:
        ValueError: if steps is not positive or the kind is not known.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least one is needed")
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    match kind:
        case "uniform":
            return u
        case "shifted":
            return u / (u + shift * (1 - u))
        case "quadratic":
            return 1 - (1 - u) ** 2
    raise unknown("step grid", kind, GRIDS)
