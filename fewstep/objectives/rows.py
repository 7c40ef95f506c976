"""Rows of a batch on the path, and where the training is: what a method of flow maps is given."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fewstep.objectives.base import (
    Index,
    rows_of,
)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch on the path: ``x`` is x_s (n, ...), ``dx`` its conditional velocity, made of ``noise`` and
    ``data``, and of ``latent`` on a path that has one; ``s`` and ``t`` (n,) the times; ``fraction`` (n,) uniform in
    [0, 1), for a time between them; ``cond`` the conditions; ``part`` the term that these rows belong to."""

    part: str
    x: Tensor
    dx: Tensor
    s: Tensor
    t: Tensor
    noise: Tensor
    data: Tensor
    fraction: Tensor
    cond: dict[str, Tensor]
    latent: Tensor | None = None

    def take(self, part: str, index: Index) -> "Rows":
        """Some of the rows."""
        numbers = (self.x, self.dx, self.s, self.t, self.noise, self.data, self.fraction)
        latent = None if self.latent is None else self.latent[index]
        return Rows(part, *(values[index] for values in numbers), cond=rows_of(self.cond, index), latent=latent)

    def put(self, index: Index, some: "Rows") -> "Rows":
        """These rows, with ``some`` others in the places of an index."""

        def put(all_rows: Tensor, few: Tensor) -> Tensor:
            changed = all_rows.clone()
            changed[index] = few.to(changed.dtype)
            return changed

        names = ("x", "dx", "s", "t", "noise", "data")
        numbers = {name: put(getattr(self, name), getattr(some, name)) for name in names}
        cond = {name: put(value, some.cond[name]) for name, value in self.cond.items()}
        return replace(self, **numbers, cond=cond)

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Now:
    """Where the training is: ``progress`` in [0, 1], ``step``, and the EMA copy ``target`` where there is one."""

    target: Any = None
    progress: float = 0.0
    step: int = 0
