"""What a step of a training does and holds, counted on tensors of torch's ``meta`` device, which have shapes and types
but no numbers: nothing is computed and no memory is taken, however large the model.

Counted is what a GPU would do: attention by its fused kernels, which keep no attention matrix, and under autocast the
types that CUDA's autocast gives each operation. The meta device has neither, so :class:`LikeAGpu` brings them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.evaluation.memory import Allocations, dropping_gradients
from fewstep.objectives import Objective
from fewstep.planning.remembered import Remembered
from fewstep.training.shares import default_chunk
from fewstep.training.step import Step

# By the names of the functions, as CUDA's autocast sorts them (torch.amp's table of operations).
_IN_HALF = frozenset(
    {
        "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm",
        "einsum", "prelu", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "scaled_dot_product_attention",
    }
)  # fmt: skip
_IN_FULL = frozenset(
    {
        "layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "logsumexp", "exp", "expm1", "log", "log1p",
        "pow", "__pow__", "__rpow__", "square", "rsqrt", "reciprocal", "softplus", "tan", "norm", "cumsum", "cumprod",
        "prod", "sum", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cosine_similarity", "interpolate",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """A forward and backward pass on ``rows`` rows.

    ``flops``: of matrix products, convolutions and attention, a multiplication and an addition being two. ``held``:
    bytes that the forward pass keeps for the backward. ``peak``: the most bytes at once, the weights and their
    gradients left out.
    """

    rows: int
    flops: int
    held: int
    peak: int


def count_step(
    student: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    target: nn.Module | None = None,
    precision: torch.dtype | None = None,
    chunk: int | None = None,
) -> Counted:
    """The step of one micro-batch, as ``fit`` makes it; everything on the meta device.

    Args:
        student: in train mode. target: the slow copy that the objective wants.
        precision: the autocast type, None for none.
        chunk: rows that share a generator, as in ``fit``.

    Raises:
        ValueError: as the objective does.
    """
    model, rows = Step(student, objective), len(batch)
    noise = [generator(index) for index in range(rows // (chunk or default_chunk(rows)))]
    with ExitStack() as stack:
        stack.enter_context(dropping_gradients(student, objective))
        done, made = stack.enter_context(_counting(precision))
        loss = model(batch, noise, target, 0.5, 0)[0]
        held = made.now
        # What loss.backward() calls. Inside that itself, a function, the mode is off, and checkpoints recompute there.
        Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        del loss
        return Counted(rows, done.flops, held, made.peak)


def count_call(model: Any, x: Tensor, times: tuple[float, ...], cond: dict[str, Tensor]) -> int:
    """The FLOPs of a call without gradients: ``model(x, *times, **cond)``, x (B, ...) on the meta device."""
    with torch.no_grad(), _counting(None) as (done, _):
        model(x, *times, **cond)
        return done.flops


@contextmanager
def _counting(precision: torch.dtype | None) -> Iterator[tuple["_Operations", Allocations]]:
    with ExitStack() as stack:
        stack.enter_context(Remembered())
        made = stack.enter_context(Allocations())
        done = stack.enter_context(_Operations())
        gpu = stack.enter_context(LikeAGpu(precision))
        stack.enter_context(gpu.heard())
        yield done, made


class LikeAGpu(TorchFunctionMode):
    """Operations on the meta device with the types and the kernels that they have on a CUDA GPU.

    Args:
        precision: the autocast type, None for none.
    """

    def __init__(self, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.precision is not None and (name in _IN_HALF or name in _IN_FULL):
            dtype = self.precision if name in _IN_HALF else torch.float32
            args = [_as(value, dtype) for value in args]
            kwargs = {key: _as(value, dtype) for key, value in kwargs.items()}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """``torch.autocast("meta", ...)``, which torch does not know, switches this one on and off inside."""
        torchs = torch.autocast

        @contextmanager
        def switched(precision: torch.dtype | None) -> Iterator[None]:
            before, self.precision = self.precision, precision
            try:
                yield
            finally:
                self.precision = before

        def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
            if device_type != "meta":
                return torchs(device_type, dtype, enabled, **options)
            return switched((dtype or torch.bfloat16) if enabled else None)

        torch.autocast = autocast  # pyright: ignore
        try:
            yield
        finally:
            torch.autocast = torchs  # pyright: ignore


def _as(value: Any, dtype: torch.dtype) -> Any:
    """An argument with the type that autocast gives it; einsum's are in a list."""
    if isinstance(value, list | tuple):
        return type(value)([_as(one, dtype) for one in value])
    is_cast = isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the flash kernel for half precision without a mask, else by the memory-efficient one, as torch chooses; by
    plain products where only they are allowed, as under a forward-mode derivative."""
    is_half, cuda = query.dtype in (torch.float16, torch.bfloat16), torch.backends.cuda
    if query.is_meta and query.ndim == 4 and not enable_gqa:
        if is_half and attn_mask is None and query.shape[-1] <= 256 and cuda.flash_sdp_enabled():
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if cuda.mem_efficient_sdp_enabled():
            if attn_mask is not None:
                mask = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
                attn_mask = mask.expand(*query.shape[:3], key.shape[2])
            needs_sums = torch.is_grad_enabled()
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs_sums, dropout_p, is_causal, scale=scale
            )[0]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Operations(TorchDispatchMode):
    """Counts FLOPs by torch's own table, and answers questions about numbers that are not there with yes, which is the
    dearer way: guidance asks whether any time lies in its interval.

    Not torch's ``FlopCounterMode``: its hooks keep what checkpoints recompute, and the peak would be of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result
