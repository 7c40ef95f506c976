"""The gap between two densities that are drawn."""

import torch

N = 100_000


# The largest gap between an empirical and a true distribution function exceeds this once in 1e7 (Kolmogorov).
GAP = 2.9 / N**0.5


def gap(values, distribution):
    """The largest distance of the empirical distribution function from the true one."""
    u = distribution(values.double().sort().values)
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    return float(torch.maximum((steps[1:] - u).abs(), (u - steps[:-1]).abs()).max())
