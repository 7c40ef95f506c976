"""Kernels of torch's meta device, remembered: they are written in Python, take up to a millisecond each, and say the
same for the same shapes. A network has few kinds of layers and calls each many times."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.evaluation.memory import storages

# By what a kernel is given: size, stride and type of each tensor that it makes; None where it has to be asked again.
_Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_MADE: dict[Hashable, tuple[type, list[_Made | None]] | None] = {}
_MOST = 100_000  # of them


class Remembered(TorchDispatchMode):
    """Makes what a kernel of the meta device made of the same shapes, types and numbers before. Views, what is written
    in place and what is not on the meta device go to the kernel each time. Enter it before the modes that count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = None if func._schema.is_mutable else _key((func, torch.get_default_dtype(), *args, *kwargs.items()))
        if key is None:
            return func(*args, **kwargs)
        if key not in _MADE:
            result = func(*args, **kwargs)
            if len(_MADE) >= _MOST:
                _MADE.clear()
            _MADE[key] = _facts(result, {storage._cdata for storage in storages((args, kwargs))})
            return result
        if (known := _MADE[key]) is None:
            return func(*args, **kwargs)
        kind, facts = known
        made = [
            None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in facts
        ]
        return made[0] if kind is Tensor else kind(made)


def _key(value: Any) -> Hashable | None:
    """What a kernel's answer hangs on; None where that is not known."""
    match value:
        case Tensor():
            # As tensors with hooks of their own, and conjugates that are not computed yet, are more than their shape.
            if type(value) not in (Tensor, nn.Parameter) or not value.is_meta or value.is_complex():
                return None
            return Tensor, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        case list() | tuple():
            keys = [_key(one) for one in value]
            return None if None in keys else tuple(keys)
        case torch.Generator():
            return None
        case _:
            return type(value), value  # True, 1 and 1.0 are equal


def _facts(result: Any, given: set[int]) -> tuple[type, list[_Made | None]] | None:
    """What is to be made in the place of a result: nothing where it is seen through a storage that others have too."""
    kind = Tensor if isinstance(result, Tensor) else type(result)
    parts = [result] if kind is Tensor else list(result) if kind in (list, tuple) else None
    if parts is None or not all(part is None or isinstance(part, Tensor) for part in parts):
        return None
    seen, found = set(given), list[_Made | None]()
    for part in parts:
        if part is None:
            found.append(None)
            continue
        storage = part.untyped_storage()
        again = _empty(tuple(part.shape), part.stride(), part.dtype)
        is_plain = type(part) is Tensor and part.is_meta and not part.is_complex() and not part.storage_offset()
        if not is_plain or storage._cdata in seen or storage.nbytes() != again.untyped_storage().nbytes():
            return None
        seen.add(storage._cdata)
        found.append((tuple(part.shape), part.stride(), part.dtype))
    return kind, found


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
