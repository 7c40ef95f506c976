"""Data that is one array: in memory or memory-mapped, gathered a batch at a time."""

import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.common.randomness import uniform
from fewstep.data.batch import Batch


class ArrayData:
    """Rows of an array (N, ...), images as uint8 until the moment they are used.

    uint8 arrays are images: they stay as they are and the gathered rows alone become floats in [-1, 1]. All other
    numbers pass through as float32, or with ``normalize`` as ``(value - mean) / std`` over the whole array.

    Args:
        array: (N, ...), at least two axes; a numpy array, a memory map (which stays one) or a CPU tensor.
        cond: conditions by name, each of N rows. ``class_labels`` are whole numbers from 0, (N,), or floats, (N,)
            or (N, D), for a model that embeds those; in ``vector`` NaN is a number that is not known; images (uint8 of
            three axes or more) come as floats in [-1, 1].
        flip: turn each gathered row left to right (its last axis) with probability 1/2, and conditions that are
            images of the same size with it.
        normalize: bring the values to mean 0 and standard deviation 1; ``denormalize`` maps samples back.
        classes: what the class labels mean, where that is known.
        name: what to call it in errors, such as its file.

    Raises:
        ValueError: no rows, values that are not numbers, not finite or too large for float32, conditions of another
            length.
    """

    def __init__(
        self,
        array: np.ndarray | Tensor,
        cond: Mapping[str, np.ndarray | Tensor] | None = None,
        flip: bool = False,
        normalize: bool = False,
        classes: Sequence[str] = (),
        name: str = "data",
    ) -> None:
        self.array, self.name = np.asarray(array), name
        _check_numbers(name, self.array)
        if self.array.ndim < 2:
            raise ValueError(f"{name} of shape {self.array.shape} has no axis beside its rows: reshape it to (N, 1)")
        _check_range(name, self.array, np.float64 if normalize else np.float32)
        if flip and self.array.ndim < 3:
            raise ValueError(
                f"flip turns images over, the rows of {name} have the shape {self.array.shape[1:]}: drop flip"
            )
        self.size: int | None = len(self.array)
        self.shape: tuple[int, ...] = self.array.shape[1:]
        self.cond = {name: self._condition(name, np.asarray(value)) for name, value in (cond or {}).items()}
        self.flip = flip
        self.classes = tuple(classes)

        self._is_picture = self.array.dtype == np.uint8
        if normalize and self._is_picture:
            raise ValueError(
                f"{name} is uint8, which is always brought to [-1, 1]: drop normalize, or give it as floats"
            )
        # 0 and 255 become -1 and 1 to the last bit.
        self.mean, self.std = (127.5, 127.5) if self._is_picture else (0.0, 1.0)
        if normalize:
            self.mean, self.std = _moments(name, self.array)

    def _condition(self, key: str, value: np.ndarray) -> Tensor:
        name = f"condition {key!r} of {self.name}"
        if value.shape[:1] != (self.size,):
            raise ValueError(f"{name} has shape {value.shape}, but the data has {self.size} rows")
        _check_numbers(name, value)
        is_real = value.dtype.kind == "f"
        if key == "class_labels" and (value.ndim > 2 or (value.ndim == 2 and not is_real)):
            raise ValueError(
                f"{name} are whole numbers, one a row, or a vector of floats for a model that embeds them, got "
                f"{value.dtype} of shape {value.shape}"
            )
        known = np.where(np.isnan(value), 0, value) if key == "vector" and is_real else value  # NaN: it is not known
        _check_range(name, known, np.float32)
        if key == "vector" and (most := float(np.abs(known).max())) > 10:
            warnings.warn(f"{name} goes up to {most:.4g}: bring each number to about -1 to 1", stacklevel=3)
        if key == "class_labels" and not is_real and value.min() < 0:
            raise ValueError(f"{name} count from 0, got {value.min()}: drop those rows, or the labels")
        if value.dtype == np.uint8 and value.ndim > 2:
            return torch.from_numpy(value.astype(np.float32)).sub_(127.5).div_(127.5)
        return torch.from_numpy(value.astype(np.float32 if is_real else np.int64))

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """The rows of ``index`` (n,) as float32 (n, ...), their conditions beside them; flips from the generator."""
        picked = self.array[index.numpy()]
        if self.moments is not None:
            # In float64: a small spread around a large mean would not survive in less.
            picked = (picked.astype(np.float64) - self.mean) / self.std
        data = torch.from_numpy(np.ascontiguousarray(picked, dtype=None if self._is_picture else np.float32))
        cond = {name: value[index] for name, value in self.cond.items()}
        if self.flip:
            turned = (uniform(len(index), generator) < 0.5).view(-1, *[1] * len(self.shape))
            data = torch.where(turned, data.flip(-1), data)
            alike = {n: v for n, v in cond.items() if v.ndim == data.ndim and v.shape[-2:] == data.shape[-2:]}
            cond |= {name: torch.where(turned, value.flip(-1), value) for name, value in alike.items()}
        if self._is_picture:
            data = data.float().sub_(self.mean).div_(self.std)
        return Batch(data, cond)

    @property
    def moments(self) -> tuple[float, float] | None:
        """Mean and standard deviation, where ``normalize`` brought them to 0 and 1."""
        return None if self._is_picture or (self.mean, self.std) == (0, 1) else (self.mean, self.std)

    def denormalize(self, data: Tensor) -> Tensor:
        """Samples (B, ...) back in the units of the array: 0 to 255 for images, not rounded or clipped."""
        return data * self.std + self.mean


def channels_first(array: np.ndarray, channels_last: bool | None, name: str) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, C) as a view (N, C, H, W); arrays that are no images as they are.

    Only uint8 arrays are taken for images. ``channels_last=None`` refuses one whose channels seem to come last;
    True moves the last axis of any array, False leaves it.
    """
    if channels_last:
        return np.moveaxis(array, -1, 1)
    if array.dtype != np.uint8:
        return array
    if array.ndim == 3:
        return array[:, None]
    if channels_last is None and array.ndim == 4 and array.shape[-1] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {array.shape}, which looks like images with their channels last: "
            "say channels_last: true to move them, or false to leave them"
        )
    return array


# What arrays hold that are none of real numbers, by the kind of their dtype.
_OTHERS = {
    "O": "rows of unequal shapes?",
    "c": "give real and imaginary parts as channels",
    "V": "give one of its fields",
    "M": "give times as numbers",
    "m": "give times as numbers",
}


def _check_numbers(name: str, array: np.ndarray) -> None:
    if (kind := array.dtype.kind) not in "fiub":
        hint = f" ({_OTHERS[kind]})" if kind in _OTHERS else ""
        raise ValueError(f"{name} has dtype {str(array.dtype)[:80]}, which is no array of real numbers{hint}")
    if not array.size:
        raise ValueError(f"{name} of shape {array.shape} is empty")


def _check_range(name: str, array: np.ndarray, held_as: type[np.floating]) -> None:
    """That all values are finite, and stay so in the type that they will have; whole numbers in int64."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and (top := array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} has the value {top}, which no int64 holds: give smaller numbers")
    if array.dtype.kind != "f":
        return
    most = min(np.finfo(held_as).max, np.finfo(array.dtype).max)
    bad, first, start = 0, 0, 0
    for part in _parts(array):
        is_bad = ~(np.abs(part) <= part.dtype.type(most))  # so for NaN too
        if is_bad.any():
            first = first if bad else start + int(np.nonzero(is_bad)[0][0])
            bad += int(is_bad.sum())
        start += len(part)
    if not bad:
        return
    row = np.ravel(array[first])
    value = row[~(np.abs(row) <= row.dtype.type(most))][0]
    if np.isfinite(value):
        raise ValueError(
            f"{name} has {bad} values that are too large for {held_as.__name__}, the first, {value:.3g}, in row "
            f"{first} of {len(array)}: scale the data (normalize: true does)"
        )
    raise ValueError(
        f"{name} has {bad} values that are not finite (NaN or infinite), the first in row {first} of "
        f"{len(array)}: drop or fill those rows"
    )


def _moments(name: str, array: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all values, in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = sum(float(part.sum(dtype=np.float64)) for part in _parts(array)) / array.size
        squares = sum(float(np.square(part.astype(np.float64) - mean).sum()) for part in _parts(array))
    if not np.isfinite(squares):
        raise ValueError(f"the values of {name} are too large for a standard deviation in float64: scale them down")
    if not squares:
        raise ValueError(f"all values of {name} are {mean}: there is nothing to normalize")
    return mean, (squares / array.size) ** 0.5


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The rows a few million values at a time, so that a memory map of any length fits."""
    step = max(1, (1 << 22) * len(array) // array.size)
    return (array[start : start + step] for start in range(0, len(array), step))
