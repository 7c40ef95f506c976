"""No data: a shape, and classes drawn at random, for methods that learn from a teacher and noise alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch


class Prior:
    """What the rows of a batch say where there is no data: their shape (they are zeros) and, with ``classes``,
    ``class_labels`` drawn uniformly below that. For objectives that learn from noise alone (``starts: prior``); others
    refuse it.

    Raises:
        ValueError: a shape without numbers, or a number below 1 in it; fewer than no classes.

    >>> fit(student, LMD(teacher, starts="prior"), Prior((3, 32, 32), classes=10), steps=20_000)
    """

    is_prior = True

    def __init__(self, shape: Sequence[int], classes: int = 0) -> None:
        if not shape or min(shape) < 1 or classes < 0:
            raise ValueError(
                f"data: prior of shape {list(shape)} and {classes} classes: sides of 1 at least are needed"
            )
        self.shape: tuple[int, ...] = tuple(shape)
        self.size: int | None = None
        self.cond: dict[str, Tensor] = {"class_labels": torch.arange(classes)} if classes else {}
        self.source: dict[str, Any] = {"name": "prior", "shape": list(shape), "classes": classes}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """As many rows as ``index`` (n,) has; the labels come from the generator."""
        labels = {
            name: torch.randint(len(value), (len(index),), generator=generator) for name, value in self.cond.items()
        }
        return Batch(torch.zeros(len(index), *self.shape), labels)
