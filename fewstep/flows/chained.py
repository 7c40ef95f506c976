"""Velocity fields one after the other: each has a stretch of the time from noise to data to itself, as the blocks of
local flow matching have (arXiv 2410.02548)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from fewstep.common.errors import shown
from fewstep.flows.broadcasting import as_times
from fewstep.flows.fields import VelocityField, check_field, check_velocity
from fewstep.flows.paths import Path
from fewstep.flows.spaces import Euclid

_SLACK = 1e-6  # of times in float32 that are meant to be an edge


@dataclass(frozen=True)
class ChainedPath(Path):
    """What is between the noise and the data of a :class:`Chained`: the states of its ODE, and no ``a_t x1 + s_t x0``.

    Args:
        edges: of the blocks. time_scale: of the times that networks on it are asked at: 1000 for those of diffusers.

    Raises:
        ValueError: edges that do not rise from 0 to 1; where coefficients are asked for.
    """

    edges: tuple[float, ...]
    time_scale: float = 1.0

    is_affine: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rises = all(a + 10 * _SLACK < b for a, b in pairwise(self.edges))  # of a NaN it does not
        if len(self.edges) < 2 or (self.edges[0], self.edges[-1]) != (0, 1) or not rises:
            raise ValueError(f"the edges of a chain are {shown(list(self.edges))}: they rise from 0 to 1")

    def alpha(self, t: Tensor) -> NoReturn:
        raise ValueError(
            "a chain of blocks has no path but its ODE: no score, no prediction of noise or data, no other path. "
            "Sample it, or distill it from states of its ODE (fewstep reflow CHAIN --states 8)"
        )

    sigma = alpha_dot = sigma_dot = alpha

    def time_of(self, alpha: Tensor, sigma: Tensor) -> NoReturn:
        self.alpha(alpha)

    @property
    def quarters(self) -> list[float]:
        """The edges, by which a file says which chain its states are of."""
        return [round(edge, 5) for edge in self.edges]

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t

    def same_as(self, other: Path) -> bool:
        return isinstance(other, ChainedPath) and replace(self, time_scale=other.time_scale) == other


class Chained(VelocityField):
    """Fields in a row, ``v_t(x) = v^n(x, (t - e_n) / h_n) / h_n`` for t from e_n to e_n + h_n.

    Its ODE is that of the first field, from normal noise, then of the second, and so on; the last ends in data. The
    velocity jumps at the edges: steps should end there (equal blocks: a multiple of their number), and Heun, which asks
    at the end of a step, is of first order across an edge; ``midpoint`` is of second everywhere.

    Args:
        fields: from noise to data. What is known of the last beside its numbers is known of the chain.
        edges: (N + 1,), rising from 0 to 1; blocks of equal length if not given.

    Raises:
        ValueError: no fields, something that is no velocity in R^n, edges that do not fit.

    >>> images = fewstep.sample(Chained([from_noise, to_data]), torch.randn(64, 3, 32, 32), steps=8)
    """

    def __init__(self, fields: Sequence[VelocityField], edges: Sequence[float] | None = None) -> None:
        super().__init__()
        for field in fields:
            check_field(field, "a part of a chain")
            check_velocity(field, "a part of a chain")
            if not isinstance(field.space, Euclid):
                raise ValueError(f"a chain is of fields in R^n, and one of them lives in a {field.space}")
        count = len(fields)
        self.edges = tuple(map(float, [n / max(count, 1) for n in range(count + 1)] if edges is None else edges))
        if not fields or len(self.edges) != count + 1:
            raise ValueError(f"a chain has fields, and one edge more: here are {count}, and {len(self.edges)} edges")
        self.fields = nn.ModuleList(fields)
        self.known_as(fields[-1])
        self.path, self.source, self.starts_from, self.coupling = ChainedPath(self.edges), None, None, ""

    @property
    def blocks(self) -> list[tuple[VelocityField, float, float]]:
        """Each field, and where its stretch begins and ends."""
        return [(field, a, b) for field, (a, b) in zip(self.fields, pairwise(self.edges), strict=True)]  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t, velocity = as_times(t, x), torch.zeros_like(x)
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=t.device) - _SLACK
        which = torch.bucketize(t.double(), inner, right=True)
        for n in which.unique().tolist():
            (field, a, b), rows = self.blocks[n], (which == n).nonzero().flatten()
            some = {key: c[rows] if isinstance(c, Tensor) and c.ndim else c for key, c in cond.items()}
            v = field(x[rows], ((t[rows] - a) / (b - a)).clamp(0, 1), **some) / (b - a)
            velocity = velocity.index_copy(0, rows, v.to(velocity))
        return velocity

    def on(self, path: Path) -> "Chained":
        if not self.path.same_as(path):
            self.path.alpha(torch.zeros(()))
        return self
