"""Flow map matching without a teacher: a map and its inverse, from data alone."""

import torch
from torch import Tensor

from fewstep.common.randomness import Generators, uniform
from fewstep.flows.maps import FlowMap
from fewstep.flows.times import draw_pairs
from fewstep.objectives.base import Index, check_options, squared_error
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.two_time import TwoTime
from fewstep.objectives.weights import warmed


class FMM(TwoTime):
    """``E [ |d_t X_{s,t}(X_{t,s}(x_t)) - dx_t|^2 + |X_{s,t}(X_{t,s}(x_t)) - x_t|^2 ]`` (arXiv 2406.07507).

    s and t come in either order: the map is learned in both directions. The strip ``|t - s| <= longest`` widens from
    ``first`` to 1 over the first ``widening`` of the training, as long maps build on short ones. Both terms weigh
    alike.

    Args:
        first: the first width of the strip, 1/K in the paper.
        widening: the share of the training over which it widens.
        times, ends, options: see :class:`TwoTime`.
    """

    term = "lagrangian"
    moves_pairs = False
    sources = ("2406.07507",)

    def __init__(
        self,
        first: float = 0.1,
        widening: float = 0.5,
        times: str = "uniform",
        ends: float = 0.0,
        jvp: str = "forward",
    ) -> None:
        super().__init__(diagonal=0.0, times=times, ends=ends, error_in="velocity", jvp=jvp)
        check_options("FMM", times, first=first, widening=widening)
        if first == 0:
            raise ValueError("FMM's first is 0: a strip of no width teaches nothing, take 0.1")
        self.first, self.widening = first, widening

    def longest(self, progress: float) -> float:
        """The width of the strip at this progress."""
        return self.first + (1 - self.first) * warmed(progress, self.widening)

    def pairs(self, rows: int, generator: Generators, now: Now) -> tuple[Tensor, Tensor]:
        s, t = draw_pairs(rows, generator, self.times, self.ends, self.longest(now.progress))
        is_swapped = uniform(rows, generator) < 0.5
        return torch.where(is_swapped, t, s), torch.where(is_swapped, s, t)

    def errors(self, student: FlowMap, rows: Rows, parts: dict[str, Index], now: Now) -> dict[str, Tensor]:
        # The rows are drawn at s; here the path is at t.
        x, dx = student.path.sample(rows.noise, rows.data, rows.t, rows.latent)
        start = student(x, rows.t, rows.s, **rows.cond)
        end, end_dot = self.time_derivative(lambda t: student(start, rows.s, t, **rows.cond), rows.t)
        return {"lagrangian": squared_error(end_dot, dx), "inverse": squared_error(end, x)}
