"""One number a sample: times (B,) beside samples (B, ...), so that neither broadcasts against the other by accident."""

import torch
from torch import Tensor

_FULL = (torch.float32, torch.float64)


def as_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times as a tensor (B,) beside x (B, ...): a number or 0-d tensor is repeated; float32 at least, float64 with x.

    Raises:
        ValueError: if t has a shape other than () or (B,), or is a number outside [0, 1] (tensors are not looked into:
            that would stall a GPU).
    """
    if isinstance(t, Tensor) and t.dtype is x.dtype in _FULL and t.shape == x.shape[:1] and t.device == x.device:
        return t
    if isinstance(t, int | float) and not 0 <= t <= 1:
        raise ValueError(f"the time {t} is outside [0, 1]: t = 0 is noise and t = 1 is data")
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=x.device)
    if t.ndim == 0:
        return t.expand(len(x))
    if t.shape != x.shape[:1]:
        raise ValueError(f"times have shape {tuple(t.shape)}, samples {tuple(x.shape)}: one time a sample is needed")
    return t


def expand(t: Tensor, x: Tensor) -> Tensor:
    """A value per sample (B,) shaped to multiply samples x (B, ...): (B, 1, ..., 1), in the type of x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
