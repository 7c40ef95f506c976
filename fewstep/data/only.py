"""Some classes of a data set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.data.batch import Batch, has_classes
from fewstep.data.buckets import Bucket, buckets_of, usual


class Only:
    """The rows of some classes of a data set, by number or name: ``{name: mnist, only: [3]}``.

    Labels stay what they were.

    Raises:
        ValueError: data without class labels, a class that is not known, or of which there are no rows.
    """

    def __init__(self, data: Any, only: Sequence[int | str]) -> None:
        cond = getattr(data, "cond", {})
        if data.size is None or not has_classes(cond):
            raise ValueError(f"only: {list(only)} chooses among classes, and these data have no class labels")
        labels, names = cond["class_labels"], tuple(getattr(data, "classes", None) or ())
        wanted = [_number(one, names, int(labels.max()) + 1) for one in only]
        self._index = torch.isin(labels, torch.tensor(wanted)).nonzero().flatten()
        if not len(self._index):
            raise ValueError(f"only: {list(only)} leaves no rows")
        self._data, self.shape, self.size = data, tuple(data.shape), len(self._index)
        # The index rises, so that what is left of each bucket stays together.
        if found := buckets_of(data):
            ends = torch.tensor([bucket.first for bucket in found] + [data.size])
            first = torch.searchsorted(self._index, ends).tolist()
            left = [Bucket(b.shape, i, j - i) for b, i, j in zip(found, first, first[1:], strict=False) if j > i]
            self.buckets, self.shape = tuple(left), usual(left).shape
        self.cond = {name: value[self._index] for name, value in cond.items()}
        self.classes, self.moments = getattr(data, "classes", None), getattr(data, "moments", None)

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,), counted among those that are left."""
        return self._data.rows(self._index[index], generator)

    def denormalize(self, rows: Tensor) -> Tensor:
        """Rows in the units of the data; as they are where these were not changed."""
        undo = getattr(self._data, "denormalize", None)
        return rows if undo is None else undo(rows)


def _number(one: int | str, names: Sequence[str], classes: int) -> int:
    if isinstance(one, str) and one in names:
        return names.index(one)
    if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < classes:
        return one
    raise unknown("class", str(one), names or [f"0 to {classes - 1}"])
