"""Where samples live: R^n, a box, a torus, rows of tokens; products of them are in ``products.py``.

A space says how to go from noise to data (``between``), how a step is taken (``move``), where a prediction of data is
brought to (``inside``), and what data are as states (``encode``, ``decode``). Everything else about flows and flow maps
stays as it is: ``X_{s,t}(x) = move(x, (t - s) u(x, s, t))``. In each space here the tangent space is R^n everywhere, so
average velocities add up as they do in R^n, and every objective without a derivative of the network works unchanged.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import shown
from fewstep.flows.broadcasting import expand
from fewstep.flows.heat import reflect
from fewstep.flows.paths import Path
from fewstep.flows.reflected import Reflected
from fewstep.flows.sources import Source, Uniform

# The least distance to t = 1 that a prediction of data is divided by.
_LAST = 1e-3


@dataclass(frozen=True)
class Space:
    """R^n, and the base of the others, which change what differs from it.

    ``source``: what samples start from, None for normal noise. ``predicts``: what networks are to predict, None for
    anything.
    """

    @property
    def source(self) -> Source | None:
        return None

    @property
    def predicts(self) -> str | None:
        return None

    def between(
        self, path: Path, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state and conditional velocity on the way from noise to data: ``(x_t, dx_t)``, each (B, ...)."""
        return path.sample(noise, data, t, latent)

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        """x (B, ...) after a step (B, ...)."""
        return x + step

    def reflect(self, x: Tensor) -> Tensor:
        """x (B, ...) after a random step, as walls send it back."""
        return x

    def inside(self, prediction: Tensor) -> Tensor:
        """What a network says of the data, brought to where data can be."""
        return prediction

    def said(self, output: Tensor) -> Tensor:
        """What the output of a network says as a part of a product: the velocity; among tokens, the data."""
        return output

    def velocity(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x (B, ...), t (B,) that this stands for; of a flow map, the average one from t on."""
        return said

    def aim(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What is to be said where this is the velocity: the inverse of :meth:`velocity`."""
        return velocity

    def error(self, said: Tensor, aim: Tensor) -> Tensor:
        """How far apart they are, row by row (B,): the mean of squares."""
        return (said - aim).square().flatten(1).mean(1)

    def encode(self, data: Any) -> Tensor:
        """Data as states."""
        return torch.as_tensor(data)

    def decode(self, x: Tensor) -> Any:
        """States as data."""
        return x

    def check_network(self, native: Path, path: Path, prediction: str) -> None:
        """That a network of this path and prediction goes with this space.

        Raises:
            ValueError: it does not.
        """
        name, starts = type(self).__name__, "normal noise" if self.source is None else "noise of its own"
        if not (native.same_as(path) and path.is_straight):
            raise ValueError(
                f"a {name} needs the straight path, Linear() or Interpolant(), not {path} (native: {native})"
            )
        if (self.source is not None) != path.two_sided:
            needed = "Linear()" if self.source is None else "Interpolant()"
            raise ValueError(f"a {name} starts from {starts}: its path is {needed}, not {path}")
        if self.predicts not in (None, prediction):
            raise ValueError(f"prediction {prediction!r}: in a {name} networks predict the {self.predicts}")

    def check(self, data: Tensor) -> None:
        """That rows of data lie in this space.

        Raises:
            ValueError: some do not; says which number, and the way out.
        """


@dataclass(frozen=True)
class Euclid(Space):
    """R^n: a step adds to the state."""

    def check_network(self, native: Path, path: Path, prediction: str) -> None:
        """Any does."""


@dataclass(frozen=True)
class Box(Space):
    """The cube [low, high]^n, which samples cannot leave (reflected flow matching, arXiv 2405.16577, of whose text only
    the abstract was at hand).

    The source is uniform inside. The cube is convex: on the straight path no state leaves it, and the exact velocity
    ``(E[x1 | x] - x) / (1 - t)`` points inwards everywhere. So a step is projected back (``clip``) only where a network
    errs or guidance pushes, as the limit of a reflected ODE is; and a network that predicts data, whose output goes
    through a sigmoid, cannot point outside at all. A random step is sent back by mirrors (``reflect``), as the limit of
    a reflected SDE is: on a ``Reflected`` path.

    Raises:
        ValueError: low is not below high.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a box from {self.low} to {self.high}: low is below high, and both are finite")

    @property
    def source(self) -> Source:
        return Uniform(self.low, self.high)

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        return (x + step).clamp(self.low, self.high)

    def reflect(self, x: Tensor) -> Tensor:
        width = self.high - self.low
        return self.low + width * reflect((x - self.low) / width)

    def inside(self, prediction: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(prediction)

    def check_network(self, native: Path, path: Path, prediction: str) -> None:
        if not isinstance(path, Reflected):
            return super().check_network(native, path, prediction)
        if (path.low, path.high) != (self.low, self.high):
            raise ValueError(f"{path} and {self} are to have the same ends")

    def check(self, data: Tensor) -> None:
        low, high = float(data.min()), float(data.max())
        if low < self.low or high > self.high:
            raise ValueError(
                f"the data go from {low:g} to {high:g}, and the box from {self.low:g} to {self.high:g}: give it the "
                f"range of the data, space: {{name: box, low: {math.floor(low)}, high: {math.ceil(high)}}}"
            )


@dataclass(frozen=True)
class Torus(Space):
    """Angles in radians, [-pi, pi)^n, or numbers of another ``period`` around 0 (flat, as crystals and torsions are).

    The source is uniform. The way to the data is the shorter one around, ``x_t = wrap(x0 + t wrap(x1 - x0))``, and a
    step wraps (the exponential map and its inverse of arXiv 2302.03660 and 2510.21608, on a space without curvature).
    A mean of two angles says nothing, so networks predict the velocity.

    Raises:
        ValueError: a period that is not above 0.
    """

    period: float = 2 * math.pi

    def __post_init__(self) -> None:
        if not (math.isfinite(self.period) and self.period > 0):
            raise ValueError(f"the period of a torus is {self.period}: it is above 0")

    @property
    def source(self) -> Source:
        return Uniform(-self.period / 2, self.period / 2)

    @property
    def predicts(self) -> str:
        return "velocity"

    def wrap(self, x: Tensor) -> Tensor:
        """x in [-period / 2, period / 2)."""
        half = self.period / 2
        return torch.remainder(x + half, self.period) - half

    def between(
        self, path: Path, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        way = self.wrap(data - noise)
        step, velocity = path.sample(torch.zeros_like(way), way, t, latent)
        return self.wrap(noise + step), velocity

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        return self.wrap(x + step)

    def check(self, data: Tensor) -> None:
        half, largest = self.period / 2, float(data.abs().max())
        if largest > half * (1 + 1e-6):
            degrees = abs(self.period - 2 * math.pi) < 1e-6 and 2 * math.pi < largest <= 360
            way = (
                "degrees, as it seems: Torus().wrap(torch.deg2rad(x))"
                if degrees
                else "wrap them first: Torus(p).wrap(x)"
            )
            raise ValueError(f"the angles go up to {largest:g}, and a torus from {-half:g} to {half:g}: {way}")


@dataclass(frozen=True)
class Tokens(Space):
    """Rows of tokens as one-hot vectors (B, L, V), for ordinary flow maps from normal noise (arXiv 2602.16813,
    2602.12233, 2604.09784; only of the first was the code at hand).

    The network predicts data: its outputs are logits, a softmax over V at each place makes of them the endpoint
    ``pi(x, s, t) = x + (1 - s) u``, an average of posterior means, which therefore lies in the simplex like them.
    A sample's tokens are the largest components at t = 1. Unlike chains that draw each token by itself, one call of a
    map can make tokens that depend on each other.

    Args:
        symbols: what the tokens are called, such as characters; or how many there are.

    Raises:
        ValueError: fewer than two, or one twice.
    """

    symbols: tuple[str, ...] | int

    def __post_init__(self) -> None:
        if isinstance(self.symbols, list):
            object.__setattr__(self, "symbols", tuple(self.symbols))
        if isinstance(self.symbols, tuple) and len(set(self.symbols)) < len(self.symbols):
            twice = next(symbol for symbol in self.symbols if self.symbols.count(symbol) > 1)
            raise ValueError(f"the token {twice!r} is twice in the vocabulary")
        if self.size < 2:
            raise ValueError(f"a vocabulary of {self.size}: two tokens at least")

    @property
    def size(self) -> int:
        """V, how many tokens there are."""
        return self.symbols if isinstance(self.symbols, int) else len(self.symbols)

    @property
    def predicts(self) -> str:
        return "data"

    def inside(self, prediction: Tensor) -> Tensor:
        return torch.softmax(prediction.to(torch.promote_types(prediction.dtype, torch.float32)), dim=-1)

    def said(self, output: Tensor) -> Tensor:
        return self.inside(output)

    def velocity(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (said - x) / expand((1 - t).clamp(min=_LAST), x)

    def aim(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x + expand(1 - t, x) * velocity

    def error(self, said: Tensor, aim: Tensor) -> Tensor:
        """The KL divergence of the tokens predicted from those of the goal, in nats, the mean over places, (B,): the
        cross-entropy up to a number that the prediction does not change."""
        aim = aim.to(said.dtype).clamp(min=0)
        logs = (aim.clamp(min=1e-30).log() - said.clamp(min=1e-30).log()) * aim
        return logs.sum(-1).flatten(1).mean(1)

    def encode(self, data: Any) -> Tensor:
        """One-hot states (B, L, V) of whole numbers (B, L), or of texts of one length.

        Raises:
            ValueError: a token that the vocabulary does not have.
        """
        if not isinstance(data, Tensor):
            data = self._numbers(data)
        if data.is_floating_point() or int(data.min()) < 0 or int(data.max()) >= self.size:
            raise ValueError(
                f"tokens from {data.min():g} to {data.max():g} as {data.dtype}: whole numbers from 0 to "
                f"{self.size - 1} are needed, the vocabulary having {self.size}"
            )
        return torch.nn.functional.one_hot(data.long(), self.size).float()

    def decode(self, x: Tensor) -> Tensor:
        """The tokens (B, L) of states (B, L, V), whole numbers."""
        return x.argmax(-1)

    def text(self, x: Tensor) -> list[str]:
        """States (B, L, V) as texts; numbers with spaces between where the tokens have no names."""
        rows = self.decode(x).tolist()
        if isinstance(self.symbols, int):
            return [" ".join(map(str, row)) for row in rows]
        return ["".join(self.symbols[token] for token in row) for row in rows]

    def check(self, data: Tensor) -> None:
        if data.ndim != 3 or data.shape[-1] != self.size or not ((data == 0) | (data == 1)).all():
            raise ValueError(
                f"data of shape {tuple(data.shape[1:])} are no rows of {self.size} tokens, one-hot (L, {self.size}): "
                "Tokens(V).encode(numbers) makes them"
            )

    def _numbers(self, texts: Any) -> Tensor:
        if isinstance(self.symbols, int):
            raise ValueError("these tokens have no names: encode takes their numbers, a tensor (B, L)")
        known = {symbol: i for i, symbol in enumerate(self.symbols)}
        lengths = {len(text) for text in texts}
        if len(lengths) != 1:
            raise ValueError(f"texts of {min(lengths)} to {max(lengths)} characters: all are to have one length")
        strange = sorted({symbol for text in texts for symbol in text} - set(known))
        if strange:
            raise ValueError(f"{shown(strange[0])} is not in the vocabulary of {self.size}")
        return torch.tensor([[known[symbol] for symbol in text] for text in texts])
