"""Several spaces side by side."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import Generators
from fewstep.flows.paths import Path
from fewstep.flows.sources import Normal, Source
from fewstep.flows.spaces import Space


@dataclass(frozen=True)
class Product(Space):
    """Several spaces at one time, side by side in a flat sample (B, D): a molecule's places, torsions and kinds.

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
            space.between(path, some_noise, some_data, t)
            for (space, _), some_noise, some_data in zip(self.parts, self.split(noise), self.split(data), strict=True)
        ]
        return self.join([x for x, _ in found]), self.join([dx for _, dx in found])

    def move(self, x: Tensor, step: Tensor) -> Tensor:
        pairs = zip(self.parts, self.split(x), self.split(step), strict=True)
        return self.join([space.move(some, by) for (space, _), some, by in pairs])

    def encode(self, data: Any) -> Tensor:
        """(B, D) of one batch of data a part, each as its space takes it."""
        return self.join([space.encode(some).float() for (space, _), some in zip(self.parts, data, strict=True)])

    def decode(self, x: Tensor) -> list[Any]:
        """The data of each part."""
        return [space.decode(some) for (space, _), some in zip(self.parts, self.split(x), strict=True)]

    def check(self, data: Tensor) -> None:
        for (space, _), some in zip(self.parts, self.split(data), strict=True):
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
