"""What a data set is to the rest of fewstep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows for one step: ``data`` (B, ...), conditions as keyword tensors of B rows each, and, where data and noise
    come in pairs (a coupling, reflow), the ``noise`` of each row; otherwise the objective draws it. Where more is known
    of the trajectory from the noise to the data, ``states`` (B, K, ...) at ``times`` (B, K), rising within (0, 1)."""

    data: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None
    states: Tensor | None = None
    times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device | str) -> "Batch":
        def move(x: Tensor | None) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        cond = {name: move(value) for name, value in self.cond.items()}
        return Batch(move(self.data), cond, move(self.noise), move(self.states), move(self.times))


def with_ends(times: Tensor) -> Tensor:
    """Times (B, K) within (0, 1) with 0 before and 1 after them, (B, K + 2)."""
    ends = torch.nn.functional.pad(times, (1, 1))
    ends[:, -1] = 1
    return ends


def has_classes(cond: Mapping[str, Any]) -> bool:
    """Whether the rows of these conditions are of classes: ``class_labels`` that are vectors or times are a condition
    like any other."""
    if cond.get("class_labels") is None:
        return False
    labels = torch.as_tensor(cond["class_labels"])
    return labels.ndim < 2 and not labels.is_floating_point()


def is_prior(data: Any) -> bool:
    """Whether data is none, but says what a sample's shape and conditions are (:class:`fewstep.data.Prior`)."""
    return bool(getattr(data, "is_prior", False))


@runtime_checkable
class Data(Protocol):
    """A data set or density.

    ``shape`` is one sample's. ``size`` is the number of rows, None for a density that never ends. ``rows`` gathers
    the rows of ``index`` (n,) as floats with their conditions; what is random about it (flips, the draw from a
    density, which ignores the index) comes from the generator.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int | None: ...

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch: ...
