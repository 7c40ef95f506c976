"""How much an error counts: the learned weight, the bounded residual, and what grows with the training."""

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import expand
from fewstep.networks.second_time import sinusoidal

BOUNDS = ("norm", "clamp")


class LearnedWeight(nn.Module):
    """w(s, t) of the weight ``exp(-w) error + w``: at its minimum exp(w) is the mean error at (s, t), so that all times
    weigh alike in the end. Zero at the start. ``forward(s, t)``, each (n,), gives (n,)."""

    def __init__(self, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies = frequencies
        with torch.random.fork_rng([]):  # the same in every process and run
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2 * frequencies, 64), nn.Linear(64, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        features = [sinusoidal(time, self.frequencies, low=0.5, high=10.0) for time in (s, t)]
        hidden = nn.functional.silu(self.first(torch.cat(features, dim=1).to(self.first.weight.dtype)))
        return self.last(hidden)[:, 0]


def warmed(progress: float, warmup: float) -> float:
    """From 0 to 1 over the first ``warmup`` of the training."""
    return min(1.0, progress / warmup) if warmup else 1.0


def normalized(residual: Tensor) -> Tensor:
    """``g / (rms(g) + 0.1)`` for each row: bounded by 1, so that no row can throw the training off (arXiv 2410.11081;
    with the root mean square for their norm, 0.1 does not depend on the dimension)."""
    rms = residual.flatten(1).square().mean(1).sqrt()
    return residual / expand(rms + 0.1, residual)


def bounded(residual: Tensor, bound: str) -> Tensor:
    """A residual (n, ...) that no row can throw the training off with: ``norm``, :func:`normalized`; ``clamp``, each
    number cut off at -1 and 1, and as it is between (arXiv 2507.03738).

    Raises:
        ValueError: another bound.
    """
    match bound:
        case "norm":
            return normalized(residual)
        case "clamp":
            return residual.clamp(-1, 1)
    raise unknown("bound", bound, BOUNDS)
