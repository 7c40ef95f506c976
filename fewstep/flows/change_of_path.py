"""The change of path: a network that was trained along one path, used along another."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.flows.paths import Path, VariancePreserving
from fewstep.flows.predictions import split_coefficients


@dataclass(frozen=True)
class Scaling:
    """How a network's output F becomes a velocity: ``v = skip x + out F(into x, time)``, all (B,); see ``scaling``."""

    into: Tensor
    time: Tensor
    skip: Tensor
    out: Tensor


def scaling(native: Path, kind: str, path: Path, t: Tensor) -> Scaling:
    """A network that predicts ``kind`` on its ``native`` path, as a velocity on another ``path`` at times t (B,).

    Two affine paths reach the same marginals up to a scale where their alpha/sigma agree, so the network is asked at
    the native time of that ratio and at the state rescaled to the native power; its prediction gives data and noise,
    and these the velocity wanted (arXiv 2506.02221 for a diffusion schedule and the linear path; methods in
    ``docs/guides/diff2flow.md``). Where the native path does not reach, the network is asked at its last time and what
    stays determined there is held: the data estimate towards noise, the noise estimate towards data. So all
    coefficients are finite, and smooth enough for a forward derivative, wherever the wanted path's velocity is.

    Raises:
        ValueError: at t = 1 on a variance-preserving path, where the velocity is infinite.
    """
    # A sampler asks for one time at all rows, and for the same times again: there that of one row is kept. On a GPU
    # the number would have to be waited for.
    is_plain = not torch.is_grad_enabled() and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
    if is_plain and t.device.type == "cpu" and t.stride() == (0,) and len(t):
        kept = _scaling_at(native, kind, path, float(t[0]), t.dtype)
        return Scaling(*(value.expand(len(t)) for value in (kept.into, kept.time, kept.skip, kept.out)))
    return _scaling(native, kind, path, t)


@lru_cache(maxsize=4096)
def _scaling_at(native: Path, kind: str, path: Path, t: float, dtype: torch.dtype) -> Scaling:
    return _scaling(native, kind, path, torch.tensor([t], dtype=dtype))


def _scaling(native: Path, kind: str, path: Path, t: Tensor) -> Scaling:
    same = native.same_as(path)
    if same and kind in ("velocity", "flow"):
        one = torch.ones_like(t)
        return Scaling(one, native.network_time(t), torch.zeros_like(t), one if kind == "velocity" else -one)
    dtype = t.dtype
    t = t.double() if t.device.type != "mps" else t
    a, s, a_dot, s_dot = path.coefficients(t)
    # Only where it can happen: looking into a tensor stalls a GPU.
    if isinstance(path, VariancePreserving) and not s_dot.isfinite().all():
        raise ValueError(f"{path}: the velocity is infinite at t = 1; end the grid before it, or use .on(Linear())")
    lo, hi = native.hold_range(kind)
    native_t = t if same else native.time_of(a, s)
    low, high = native_t <= lo, native_t >= hi
    native_t = native_t.clamp(lo, hi)
    into = torch.hypot(native.alpha(native_t), native.sigma(native_t)) / torch.hypot(a, s)

    data_x, data_f, noise_x, noise_f = split_coefficients(native, native_t, kind)
    data_x, noise_x = data_x * into, noise_x * into  # now in terms of x on the wanted path
    if lo > 0 or not same:
        noise_x = torch.where(low, (1 - a * data_x) / s, noise_x)
        noise_f = torch.where(low, -a * data_f / s, noise_f)
    if hi < 1 or not same:
        data_x = torch.where(high, (1 - s * noise_x) / a, data_x)
        data_f = torch.where(high, -s * noise_f / a, data_f)
    return Scaling(
        into.to(dtype),
        native.network_time(native_t).to(dtype),
        (a_dot * data_x + s_dot * noise_x).to(dtype),
        (a_dot * data_f + s_dot * noise_f).to(dtype),
    )
