"""Directional derivatives of a network: one forward-mode pass, or differences where a kernel has no forward mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewstep.common.randomness import same_draws
from fewstep.flows.broadcasting import expand

MODES = ("forward", "float32", "difference")


def derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], mode: str = "forward"
) -> tuple[Tensor, Tensor]:
    """``(f(at), d/dh f(at + h along))`` at h = 0, row by row. Under ``no_grad`` it keeps nothing for a backward pass.

    Args:
        function: of as many arguments as ``at`` has: states (B, ...), or times (B,) in [0, 1].
        along: the direction of each, of its shape.
        mode: ``forward``, one forward-mode pass; ``float32``, the same outside autocast, for networks whose
            derivative half precision spoils; ``difference``, two plain calls 4e-4 apart (2e-5 in float64), as timestep
            embeddings turn by up to 1000 rad over [0, 1], with the same dropout, outside autocast as well: for kernels
            without a forward derivative. The value is then the mean of the two, and both are of second order, except
            at the ends of time, where the step is one-sided. Weights in half precision are too coarse for it.
    """
    with nullcontext() if mode == "forward" else torch.autocast(at[0].device.type, enabled=False):
        if mode == "difference":
            return _difference(function, at, along)
        with forward_mode():
            return torch.func.jvp(function, at, along)  # pyright: ignore[reportReturnType]


def time_derivative(function: Callable[[Tensor], Tensor], t: Tensor, mode: str = "forward") -> tuple[Tensor, Tensor]:
    """``(f(t), df/dt)`` row by row, t (B,)."""
    return derivative(function, (t,), (torch.ones_like(t),), mode)


def _difference(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    size = 1e-5 if at[0].dtype == torch.float64 else 2e-4
    low, high = at[0].new_full((len(at[0]),), -size), at[0].new_full((len(at[0]),), size)
    for time, direction in zip(at, along, strict=True):
        if time.ndim == 1:  # no time leaves [0, 1]
            moving = direction.abs().clamp(min=1e-12)
            low = torch.maximum(low, torch.where(direction > 0, -time, time - 1) / moving)
            high = torch.minimum(high, torch.where(direction > 0, 1 - time, time) / moving)
    again = same_draws(at[0].device)
    behind = function(*(x + expand(low, x) * dx for x, dx in zip(at, along, strict=True)))
    again()
    ahead = function(*(x + expand(high, x) * dx for x, dx in zip(at, along, strict=True)))
    return (ahead + behind) / 2, (ahead - behind) / expand(high - low, ahead)


@contextmanager
def forward_mode() -> Iterator[None]:
    """Networks can be differentiated forward inside: attention runs on the MATH kernel, the only one with a forward
    derivative (CPU included), and what torch does badly there is done well."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), _ForwardMode():
        yield


class _ForwardMode(TorchFunctionMode):
    """Group norms get contiguous inputs, without which theirs fails; layers that are linear in x act on the value and
    the tangent in turn, where torch would also multiply x by the zero tangent of the weights: a third of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.group_norm, torch.group_norm):
            return func(args[0].contiguous(), *args[1:], **kwargs)
        if func in (functional.linear, torch.conv2d) and len(args) >= 2:
            x, weight, *rest = args
            bias = rest.pop(0) if rest else kwargs.pop("bias", None)
            value, tangent = unpack_dual(x)
            if tangent is not None and all(w is None or unpack_dual(w).tangent is None for w in (weight, bias)):
                ahead = func(tangent, weight, None, *rest, **kwargs)
                return make_dual(func(value, weight, bias, *rest, **kwargs), ahead)
            return func(x, weight, bias, *rest, **kwargs)
        return func(*args, **kwargs)
