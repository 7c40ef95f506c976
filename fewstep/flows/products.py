"""Products of spaces: samples of which some numbers are places, some angles and some tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import Generators
from fewstep.flows.paths import Path
from fewstep.flows.sources import Normal, Source
from fewstep.flows.spaces import Space, Tokens


@dataclass(frozen=True)
class Product(Space):
    """Several spaces at one time, side by side in a flat sample (B, D): a molecule's places, torsions and kinds.

    The network predicts the velocity, and of tokens the logits of the data, so that these are trained by their
    cross-entropy; the errors of the parts, a mean each, are added up. (A box has no sigmoid here: its steps are
    projected back.)

    Args:
        parts: each a space and the shape of a sample in it; together they have D numbers, in this order.

    >>> Product(((Euclid(), (4, 3)), (Torus(), (6,)), (Tokens(5), (4, 5))))  # D = 12 + 6 + 20
    """

    parts: tuple[tuple[Space, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a product of no spaces: give it (space, shape) pairs")

    @property
    def shape(self) -> tuple[int]:
        """(D,), of one sample."""
        return (sum(math.prod(shape) for _, shape in self.parts),)

    @property
    def source(self) -> Source:
        return _Sources(self)

    @property
    def predicts(self) -> str:
        return "velocity"

    @property
    def tokens(self) -> bool:
        """Whether there are tokens among the parts."""
        return any(isinstance(one, Tokens) or (isinstance(one, Product) and one.tokens) for one, _ in self.parts)

    def split(self, x: Tensor) -> list[Tensor]:
        """x (B, D) as one tensor (B, ...) a part.

        Raises:
            ValueError: another D than that of the parts.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"a sample of shape {tuple(x.shape[1:])}: the parts of this product have {self.shape}")
        sizes = [math.prod(shape) for _, shape in self.parts]
        return [part.reshape(len(x), *shape) for part, (_, shape) in zip(x.split(sizes, 1), self.parts, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of :meth:`split`, (B, D)."""
        return torch.cat([part.flatten(1) for part in parts], 1)

    def between(
        self, path: Path, noise: Tensor, data: Tensor, t: Tensor | float, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        found = [
            space.between(path, some_noise, some_data, t) for space, some_noise, some_data in self._each(noise, data)
        ]
        return self.join([x for x, _ in found]), self.join([dx for _, dx in found])

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        return self.join([space.move(some, by) for space, some, by in self._each(x, step)])

    def inside(self, prediction: Tensor) -> Tensor:
        return self.said(prediction)

    def said(self, output: Tensor) -> Tensor:
        return self.join([space.said(some) for space, some in self._each(output)])

    def velocity(self, said: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.join([space.velocity(some, own, t) for space, some, own in self._each(said, x)])

    def aim(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.join([space.aim(some, own, t) for space, some, own in self._each(velocity, x)])

    def error(self, said: Tensor, aim: Tensor) -> Tensor:
        return torch.stack([space.error(some, wanted) for space, some, wanted in self._each(said, aim)]).sum(0)

    def _each(self, *states: Tensor) -> Iterator[tuple[Any, ...]]:
        """The space of each part, and its share of some states."""
        return zip((space for space, _ in self.parts), *map(self.split, states), strict=True)

    def encode(self, data: Any) -> Tensor:
        """(B, D) of one batch of data a part, each as its space takes it.

        Raises:
            ValueError: data of another number of parts, of other shapes, or outside their space.
        """
        if len(data) != len(self.parts):
            raise ValueError(f"data of {len(data)} parts for a product of {len(self.parts)}: give one tensor each")
        found = [space.encode(some).float() for (space, _), some in zip(self.parts, data, strict=True)]
        for i, ((space, shape), some) in enumerate(zip(self.parts, found, strict=True)):
            if some.shape[1:] != shape or len(some) != len(found[0]):
                raise ValueError(
                    f"part {i}, {space}, was given {tuple(some.shape)}: ({len(found[0])}, "
                    f"{', '.join(map(str, shape))}) is needed"
                )
            space.check(some)
        return self.join(found)

    def decode(self, x: Tensor) -> list[Any]:
        """The data of each part."""
        return [space.decode(some) for space, some in self._each(x)]

    def check(self, data: Tensor) -> None:
        for space, some in self._each(data):
            space.check(some)


class _Sources:
    """The sources of the parts of a product, side by side."""

    def __init__(self, space: Product) -> None:
        self.space = space

    def sample(self, shape: tuple[int, ...], generators: Generators) -> Tensor:
        parts = [
            (space.source or Normal()).sample((shape[0], *own), generators).flatten(1)
            for space, own in self.space.parts
        ]
        return torch.cat(parts, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        pairs: Any = zip(self.space.parts, self.space.split(x), strict=True)
        return sum(((space.source or Normal()).log_prob(some) for (space, _), some in pairs), x.new_zeros(len(x)))
