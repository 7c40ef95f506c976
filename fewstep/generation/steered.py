"""Samples that are steered: each is one of a population of its own, drawn by weight."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.options import find_object
from fewstep.flows.rewards import Reward
from fewstep.flows.signature import Model
from fewstep.flows.steering import steer

# Fewer effective particles than this say that hardly any was good.
FEW = 2.0


@dataclass
class Steered:
    """The place of ``fewstep.sample`` in drawing: ``particles`` for each sample, and what became of them.

    Args:
        reward: looks at samples as they are written: images in [-1, 1], or in the units of the data.

    Raises:
        ValueError: fewer than two particles.
    """

    reward: Reward
    particles: int = 16
    ess: list[Tensor] = field(default_factory=list)
    unique: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.particles < 2:
            raise ValueError(f"particles is {self.particles}: steering needs two or more for each sample")

    def seen(self, finished: Callable[[Tensor], Tensor]) -> "Steered":
        """The same, of a model whose samples are made into what is written by ``finished``."""
        return Steered(replace(self.reward, decode=finished), self.particles, self.ess, self.unique)

    def __call__(
        self, model: Model, noise: Tensor, steps: int, *, generator: list[torch.Generator], **options: Any
    ) -> Tensor:
        """One sample of each population, (B / particles, ...)."""
        groups = len(noise) // self.particles
        particles = steer(model, noise, steps, self.reward, groups=groups, generator=generator, **options)
        self.ess.append(particles.ess.min(0).values.cpu())
        self.unique.append(particles.unique.cpu())
        return particles.draw(generator)

    @property
    def counts(self) -> tuple[float, float, int]:
        """The least effective sample sizes and the ancestors that are left, summed over samples, and their number."""
        if not self.ess:
            return 0.0, 0.0, 0
        ess, unique = torch.cat(self.ess), torch.cat(self.unique)
        return float(ess.sum()), float(unique.sum()), len(ess)


def load_reward(spec: str, strength: float = 1.0, gradient: bool = False) -> Reward:
    """The reward that ``FILE.py:NAME`` or ``MODULE:NAME`` stands for, a function of samples (B, ...) that gives (B,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing of that name, or no function.
    """
    if ":" not in spec:
        raise ValueError(f"{spec!r} names no reward: FILE.py:NAME is needed, a function of samples (B, ...)")
    function = find_object(spec, Tensor)
    if isinstance(function, type):
        raise ValueError(f"{spec!r} is a class, and a reward is a function of samples (B, ...)")
    return Reward(function, strength=strength, gradient=gradient)


def contents(spec: str) -> str | None:
    """A hash of the file that a reward stands in; None for one of a module."""
    import hashlib

    file = Path(spec.rpartition(":")[0]).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.suffix == ".py" else None
