"""Where the pipelines of flow-match models take their steps: times moved towards the noise, further for larger images.

Noise levels ``sigma = 1 - t`` of equal steps become ``a sigma / (1 + (a - 1) sigma)`` (arXiv 2403.03206, eq. 23). The
strength a is one number, or follows the number of tokens of a sample, ``a = exp(mu)`` with mu on a line through two
points that the scheduler's config has. It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# How Flux.2's pipeline has mu: lines in the number of tokens for 10 and 200 steps, and between them one in the steps
# (black-forest-labs/flux2, sampling.py; past 4300 tokens the line of 200 steps alone).
_AT_10, _AT_200, _MOST = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


@dataclass(frozen=True)
class Shift:
    """How a scheduler moves times.

    Attributes:
        factor: the strength, where it is one number.
        line: mu at two numbers of tokens, ``((tokens, mu), (tokens, mu))``, where it follows them.
        kind: how mu becomes the strength: exponential, or linear (mu itself).
        terminal: the last noise level before 0 of a grid of steps, to which the others are stretched.
        least: the last noise level before it is moved, those of all steps evenly down to it; where nothing is said they
            go evenly on to ``after``.
        most, after: before it is moved, the noise level of the first step (which begins at pure noise all the same),
            and the one that would follow the last.
        by_steps: whether mu is that of Flux.2, which follows the number of steps too.
        side: how many numbers of a sample along each side are one token; None where its pipeline counts channels.
    """

    factor: float = 1.0
    line: tuple[tuple[float, float], tuple[float, float]] | None = None
    kind: str = "exponential"
    terminal: float | None = None
    least: float | None = None
    most: float = 1.0
    after: float = 0.0
    by_steps: bool = False
    side: int | None = 1

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Of how many tokens the pipeline takes a sample of this shape (C, ...) to be."""
        return shape[0] if self.side is None else math.prod(shape[1:]) // self.side**2

    def strength(self, tokens: int, steps: int | None = None) -> float:
        """a, for samples of so many tokens.

        Raises:
            ValueError: Flux.2's, which is that of a number of steps.
        """
        if self.line is None:
            return self.factor
        if self.by_steps:
            if steps is None:
                raise ValueError("native times are those of a number of steps for Flux.2: name times without native")
            mu = _flux2(tokens, steps)
        else:
            (few, low), (many, high) = self.line
            mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if self.kind == "exponential" else mu

    def moved(self, t: Tensor, tokens: int) -> Tensor:
        """Times in [0, 1], moved towards the noise: ``t / (t + a (1 - t))``; the ends stay.

        Raises:
            ValueError: as :meth:`strength`.
        """
        return t / (t + self.strength(tokens) * (1 - t))

    def grid(self, steps: int, tokens: int) -> Tensor:
        """The times (steps + 1,) of a pipeline's steps, float64, from 0 to 1."""
        last = self.after + (self.most - self.after) / steps if self.least is None else self.least
        sigma, a = torch.linspace(self.most, last, steps, dtype=torch.float64), self.strength(tokens, steps)
        rest = 1 - a * sigma / (1 + (a - 1) * sigma)
        if self.terminal and steps > 1:
            rest = rest * (1 - self.terminal) / rest[-1]
        rest[0] = 0
        return torch.cat([rest, rest.new_ones(1)])


def _flux2(tokens: int, steps: int) -> float:
    at_10, at_200 = (slope * tokens + start for slope, start in (_AT_10, _AT_200))
    return at_200 if tokens > _MOST else at_200 + (at_200 - at_10) / 190 * (steps - 200)
