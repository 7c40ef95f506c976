"""Where samples start at t = 0: from normal noise, from a box, or from the rows of a data set."""

import json
from functools import cached_property
from math import log, pi
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.common.randomness import Generators, normal, uniform
from fewstep.data.batch import Data
from fewstep.data.between import draw_rows
from fewstep.data.given import as_data


class Source(Protocol):
    """Draws the x at t = 0: ``sample(shape, generators)`` of shape (B, ...), sample by sample."""

    def sample(self, shape: tuple[int, ...], generators: Generators) -> Tensor: ...


class Normal:
    """Standard normal noise, which every other path starts from."""

    def sample(self, shape: tuple[int, ...], generators: Generators) -> Tensor:
        """float32, (B, ...)."""
        return normal(torch.empty(shape), generators)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log of the density at x (B, ...), (B,)."""
        x = x.flatten(1)
        return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * log(2 * pi)


class Uniform:
    """Uniform in a box: what reflected flow matching and flows on a torus start from.

    Args:
        low, high: the ends of every component.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def sample(self, shape: tuple[int, ...], generators: Generators) -> Tensor:
        """float32, (B, ...)."""
        return self.low + (self.high - self.low) * uniform(tuple(shape), generators)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log of the density at x (B, ...), (B,): minus infinity outside."""
        is_inside = ((x >= self.low) & (x <= self.high)).flatten(1).all(1)
        size = x[0].numel() * log(self.high - self.low)
        return torch.where(is_inside, -size, -torch.inf).to(x.dtype)


class RowsOf:
    """Rows of a data set at random: the source of a flow between two of them.

    Args:
        data: as :func:`fewstep.fit` takes it, or what opens it when it is first asked for. Copies of a model share it.
    """

    def __init__(self, data: Any) -> None:
        self._given = data

    @cached_property
    def data(self) -> Data:
        return as_data(self._given() if callable(self._given) else self._given)

    def sample(self, shape: tuple[int, ...], generators: Generators) -> Tensor:
        """Rows (B, ...). Raises ValueError for another shape than theirs."""
        if tuple(shape[1:]) != tuple(self.data.shape):
            raise ValueError(f"the model takes samples of shape {tuple(shape[1:])}, its source has {self.data.shape}")
        if isinstance(generators, torch.Generator):
            return draw_rows(self.data, shape[0], generators)
        each = shape[0] // len(generators)
        return torch.cat([draw_rows(self.data, each, one) for one in generators])

    def __deepcopy__(self, _: Any) -> "RowsOf":
        return self


def starting_points(model: Any, shape: tuple[int, ...], generators: Generators) -> Tensor:
    """Where samples of a model start, (B, ...): from noise, or from its source.

    Raises:
        ValueError: it goes from one data set to another, and it is not known from which.
    """
    return _source_of(model).sample(shape, generators)


def source_facts(model: Any) -> dict[str, Any] | None:
    """What tells the source of a model from others, as JSON keeps it: the name and options that it was loaded by, how
    many rows it has, and one of them; None for normal noise. Errors as those of :func:`starting_points`."""
    source = _source_of(model)
    if not isinstance(source, RowsOf):
        return None
    said, row = getattr(source.data, "source", None), draw_rows(source.data, 1, torch.Generator().manual_seed(0))
    name = None if said is None else json.loads(json.dumps(said, default=str))
    return {"name": name, "rows": source.data.size, "row": row.flatten()[:8].tolist()}


def _source_of(model: Any) -> Source:
    source: Source | None = getattr(model, "starts_from", None)
    if source is None and model.path.two_sided and model.space.source is None:
        raise ValueError(
            "this model goes from one data set to another, and its source is not known here: fewstep sample, reflow "
            "and diagnose take --source DATA; from Python, model.starts_from = RowsOf(fewstep.load_data(DATA))"
        )
    return source or getattr(getattr(model, "space", None), "source", None) or Normal()
