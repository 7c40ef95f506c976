"""Data that Python gives: tensors, arrays, and the data sets of ``torch.utils.data``, as a :class:`Data`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fewstep.data.arrays import ArrayData, channels_first
from fewstep.data.batch import Batch, Data

_TAKEN = (
    "a tensor or numpy array (N, ...) of rows, a TensorDataset, a map-style Dataset or the DataLoader of one, whose "
    "items are a tensor, or (tensor, label), and what fewstep.load_data gives"
)


def as_data(data: Any) -> Data:
    """What :func:`fewstep.fit` and :func:`fewstep.evaluate` take for data.

    Of a ``DataLoader`` the data set alone is used: batches, their order and their sharing among processes are those of
    ``fit``. A second item of a row is its class label.

    Raises:
        ValueError: something else; says what is taken.
    """
    match data:
        case Tensor():
            return ArrayData(data)
        case np.ndarray():
            return ArrayData(channels_first(data, None, "the array"))
        case DataLoader():
            return as_data(data.dataset)
        case TensorDataset():
            rows, *labels = data.tensors
            if len(labels) > 1:
                raise ValueError(f"a TensorDataset of {len(data.tensors)} tensors: (rows) or (rows, labels) is needed")
            return ArrayData(rows, {"class_labels": labels[0]} if labels else None)
        case IterableDataset():
            pass  # its rows have no numbers, by which the steps of a training that goes on find them again
        case _ if isinstance(data, Data):
            return data
        case list() | tuple() | dict() | str():
            pass
        case _ if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return Items(data)
    raise ValueError(f"the data are a {type(data).__name__}, and {_TAKEN} can be trained on")


class Items:
    """The rows of a map-style data set of torch: ``dataset[i]`` is a tensor, or (tensor, label).

    What it draws itself (a random crop) comes from torch's global generator, and is not repeated bit for bit.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.size = dataset, len(dataset)
        if not self.size:
            raise ValueError(f"the {type(dataset).__name__} is empty")
        row, self._is_labelled = self._row(0)[0], self._row(0)[1] is not None
        self.shape: tuple[int, ...] = tuple(row.shape)

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as float32 (n, ...), with their labels."""
        rows = [self._row(i) for i in index.tolist()]
        data = torch.stack([row for row, _ in rows]).float()
        return Batch(data, {"class_labels": torch.tensor([label for _, label in rows])} if self._is_labelled else {})

    def _row(self, index: int) -> tuple[Tensor, int | None]:
        item = self.dataset[index]
        row, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
        if not isinstance(row, Tensor | np.ndarray):
            raise ValueError(
                f"item {index} of the {type(self.dataset).__name__} is a {type(item).__name__}: a tensor, or (tensor, "
                "label), is needed (of images, torchvision's ToTensor() and Normalize(0.5, 0.5) make one)"
            )
        return torch.as_tensor(row), None if label is None else int(label)


class Around:
    """Data around other data: what it does not have itself (``cond``, ``classes``, ``denormalize``) is the other's."""

    def __init__(self, data: Any) -> None:
        data = as_data(data)
        self.data, self.shape, self.size = data, data.shape, data.size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "data":  # copying looks for such names before ``data`` is there
            raise AttributeError(name)
        return getattr(self.data, name)
