"""Fields in closed form outside R^n: rows of tokens, and boxes within a box. (In R^n: ``fewstep.flows.exact``.)"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.data.densities import Boxes
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.exact import ExactField, check_boxes, truncated
from fewstep.flows.heat import SWITCH
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.paths import Linear, Path
from fewstep.flows.reflected import Reflected
from fewstep.flows.spaces import Box, Tokens

_LATE = 0.995  # by then a row of tokens is decided


class TokensField(ExactField):
    """Data that are some rows of tokens with their probabilities: the flow of one-hot vectors from normal noise.

    ``D_t(x) = sum_y softmax_y(log p(y) + t <x, E_y> / (1 - t)^2) E_y`` is the posterior mean, on the straight path
    (a mixture of Gaussians of no width), and ``v = (D_t(x) - x) / (1 - t)``.

    Args:
        sequences: (K, L), whole numbers below V.
        probabilities: (K,), positive; normalised here.
        space: the vocabulary.

    Raises:
        ValueError: numbers beyond the vocabulary, or probabilities that are none.
    """

    states: Tensor
    log_weights: Tensor

    def __init__(self, sequences: Tensor, probabilities: Tensor, space: Tokens, path: Path | None = None) -> None:
        super().__init__()
        if len(sequences) != len(probabilities):
            raise ValueError(f"{len(sequences)} sequences and {len(probabilities)} probabilities: one each is needed")
        if not (probabilities > 0).all():
            raise ValueError(f"the probability {float(probabilities.min()):g} of a sequence: leave it out")
        if not (path is None or path.is_straight):
            raise ValueError(f"a TokensField is on the straight path, not on {path}")
        self.space, self.vocabulary, self.path = space, space, path or Linear()
        self.register_buffer("states", space.encode(sequences).double())
        self.register_buffer("log_weights", (probabilities / probabilities.sum()).double().log())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.states.shape[1:])

    def end(self, x: Tensor, s: Tensor | float, t: Tensor | float | None = None, **cond: Any) -> Tensor:
        """``D_s(x)``, the mean of the data given x at s, (B, L, V): the probabilities of tokens."""
        s = as_times(s, x).double()
        rate = (s / (1 - s).clamp(min=1e-9).square())[:, None]
        states = self.states.flatten(1).double()
        posterior = torch.softmax(self.log_weights.double() + rate * (x.double().flatten(1) @ states.T), dim=1)
        return (posterior @ states).reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t = as_times(t, x)
        return (self.end(x, t) - x) / expand((1 - t).clamp(min=1e-6), x)

    def flow(self, x: Tensor, s: float, t: float, *, tolerance: float = 1e-9) -> Tensor:
        """``X_{s,t}(x)``; at t = 1 the tokens themselves, which are decided a little before."""
        if t < 1:
            return super().flow(x, s, t, tolerance=tolerance)
        late = super().flow(x, s, max(s, _LATE), tolerance=max(tolerance, 1e-6))
        return one_hot(self.end(late, max(s, _LATE)).argmax(-1), x.shape[-1]).to(x.dtype)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """float32, (count, L, V)."""
        rows = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        return self.states[rows].float()

    def on(self, path: Path) -> "TokensField":
        return (
            self
            if path.same_as(self.path)
            else TokensField(self.states.argmax(-1), self.log_weights.exp(), self.vocabulary, path)
        )


class BoxesInBoxField(ExactField):
    """Data uniform on boxes inside a box, and noise uniform in that box: a flow that never leaves it.

    Given ``x = t y + (1 - t) z`` the data y is uniform on the part of each of its boxes from which a z in the box leads
    to x; boxes weigh as the shares of them that this part is. On a ``Reflected`` path x is y after diffusion between
    the walls, and v the probability-flow ODE of reflected diffusion. All is exact, in float64.

    Args:
        boxes: (K, D, 2), the low and high end of each on each axis; they do not overlap.
        space: the box around them.
        weights: (K,), the probability of each; as large as their volumes if not given.
        labels: (K,), the class of each from 0 on: ``class_labels`` (B,) then choose, and one beyond the last is all.
        path: ``Interpolant()`` if not given, or the ``Reflected`` one of this box.

    Raises:
        ValueError: boxes that are none, or reach beyond the space; another path.
    """

    boxes: Tensor
    log_weights: Tensor
    labels: Tensor | None

    def __init__(
        self,
        boxes: Tensor,
        space: Box,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        check_boxes(boxes)
        space.check(boxes)
        self.space, self.box, self.path = space, space, path or Interpolant()
        if isinstance(self.path, Reflected):
            space.check_network(self.path, self.path, "velocity")
        elif not (self.path.is_straight and self.path.two_sided):
            raise ValueError(f"noise in a box is on Interpolant() or Reflected(low, high), not on {path}")
        weights = (boxes[..., 1] - boxes[..., 0]).prod(1) if weights is None else weights
        self.register_buffer("boxes", boxes.double())
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())
        self.register_buffer("labels", labels)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.boxes.shape[1],)

    @property
    def classes(self) -> int:
        """How many classes there are, and one for none; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 2

    def end(self, x: Tensor, s: Tensor | float, t: Tensor | float | None = None, **cond: Any) -> Tensor:
        """The mean of the data given x at s, on the straight path, (B, D)."""
        times = as_times(s, x).double().clamp(1e-9, 1 - 1e-9)[:, None, None]
        low, high = self.boxes.unbind(-1)  # (K, D)
        x64 = x.double()[:, None]
        # From where a z of the box leads to x: no lower than this, and no higher.
        first = torch.maximum(low, (x64 - (1 - times) * self.box.high) / times)
        last = torch.minimum(high, (x64 - (1 - times) * self.box.low) / times)
        share = (last - first) / (high - low)  # below 0 where no z does
        log = torch.where(share > 0, share.clamp(min=1e-300).log(), 1e3 * (share - 1)).sum(-1)
        middle = ((first + last) / 2).clamp(low, high)
        return (self._posterior(log, cond) * middle).sum(1).to(x.dtype)

    def _posterior(self, log: Tensor, cond: dict[str, Any]) -> Tensor:
        """How likely each box is, (B, K, 1), of the logs of the densities that they have at x, (B, K)."""
        log = log + self.log_weights
        if self.labels is not None and "class_labels" in cond:
            asked = cond["class_labels"][:, None].to(self.labels)
            log = log.masked_fill((asked != self.labels) & (asked != self.classes - 1), -torch.inf)
        return torch.softmax(log, dim=1)[..., None]

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t = as_times(t, x)
        if isinstance(path := self.path, Reflected):
            unit, tau = path.in_unit(x.double(), t.double())
            sides = (self.boxes - path.low) / path.width
            axes = [heat_of_intervals(unit[:, i], sides[:, i], tau[:, 0]) for i in range(x.shape[1])]
            log, score = (torch.stack(parts, -1) for parts in zip(*axes, strict=True))  # (B, K, D)
            score = (self._posterior(log.sum(-1), cond) * score).sum(1)
            return (path.width * path.rate * 2 * tau * score).to(x.dtype)
        return (self.end(x, t, **cond) - x) / expand((1 - t).clamp(min=1e-9), x)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """float32, (count, D)."""
        rows = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        low, high = self.boxes[rows].unbind(-1)
        return (low + (high - low) * torch.rand(low.shape, generator=generator, dtype=low.dtype)).float()

    def inside(self, points: Tensor) -> Tensor:
        """Whether each of points (N, D) lies where the data do, (N,)."""
        return Boxes(self.boxes).inside(points)

    def on(self, path: Path) -> "BoxesInBoxField":
        if path.same_as(self.path):
            return self
        return BoxesInBoxField(self.boxes, self.box, self.log_weights.exp(), self.labels, path)


def heat_of_intervals(x: Tensor, sides: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The integral of the heat kernel: the log of the density at x (B,) of data uniform on intervals (K, 2) of [0, 1]
    after the times tau (B,) between mirrors, and its derivative in x, (B, K) each. By eigenfunctions where tau is
    large, else by the images of the intervals."""
    x, tau, width = x[:, None], tau[:, None], sides[:, 1] - sides[:, 0]
    k = math.pi * torch.arange(1, 9, dtype=x.dtype, device=x.device)
    means = torch.sin(k * sides[..., None]).diff(dim=1)[:, 0] / (k * width[:, None])
    decay = 2 * torch.exp(-k * k * tau.clamp(min=SWITCH))
    density, slope = 1 + (decay * torch.cos(k * x)) @ means.T, -(decay * k * torch.sin(k * x)) @ means.T

    sigma, m = (2 * tau.clamp(max=SWITCH)).sqrt(), torch.arange(-4, 5, 2, dtype=x.dtype, device=x.device)[:, None]
    images = torch.cat([sides[:, None] + m, m - sides[:, None].flip(-1)], 1)
    log, _, noise = truncated(x, images.flatten(0, 1), torch.ones_like(sigma), sigma)
    log, noise = (value.reshape(len(x), *images.shape[:2]) for value in (log, noise))
    early, early_score = log.logsumexp(-1) - (sigma * width).log(), -(log.softmax(-1) * noise).sum(-1) / sigma
    return torch.where(tau > SWITCH, density.log(), early), torch.where(tau > SWITCH, slope / density, early_score)
