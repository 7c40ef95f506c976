"""A model where and as it is to be sampled: its device, the type of its numbers, compiled or not."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import shortened, unknown
from fewstep.flows.calls import networks_of
from fewstep.flows.signature import Model

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place(model: Model, device: torch.device, dtype: str = "float32", compiled: bool = False) -> Model:
    """The model on a device, changed in place.

    Args:
        dtype: of the weights and of what the networks compute: float32, bf16 or fp16. The state between their calls,
            the times and a VAE stay in float32.
        compiled: compile the networks (``torch.compile``); this happens at their first call.

    Raises:
        ValueError: an unknown type, one that the device lacks, or a model without a network; at the first call, a
            network that cannot be compiled.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if dtype == "fp16" and device.type == "cpu":
        raise ValueError("dtype fp16 needs a GPU, and the device is the CPU: take bf16, which that has too")
    if dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16: take fp16 or float32")
    model = model.to(device)
    networks = [network for network in networks_of(model) if network is not model]
    if not networks and (compiled or dtype != "float32"):
        raise ValueError(f"a {type(model).__name__} has no network: leave out its dtype, and do not compile it")
    for network in networks:
        if compiled:
            _compile(network)
        if dtype != "float32":
            _cast(network, DTYPES[dtype])
    if dtype == "bf16" and model.text is not None:
        model.text.dtype = torch.bfloat16
    return model


def _cast(network: Any, dtype: torch.dtype) -> None:
    """Weights in half precision; what comes in and goes out is in float32, as in the pipeline of an export."""
    network.to(dtype)
    inner = network.forward

    def forward(x: Tensor, *times: Tensor, **cond: Any) -> Tensor:
        # Short conditions are sizes, strengths and labels, which half precision would round.
        halved = {name: v.to(dtype) if v.is_floating_point() and v.ndim > 2 else v for name, v in cond.items()}
        with torch.autocast(x.device.type, dtype):
            return inner(x.to(dtype), *times, **halved).float()

    _replace(network, forward)


def _compile(network: Any) -> None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    inner = network.forward
    fast = torch.compile(inner)

    def forward(*args: Any, **cond: Any) -> Tensor:
        try:
            return fast(*args, **cond)
        except (TorchDynamoException, InductorError) as error:
            reason = shortened(str(error).partition("Set TORCH")[0], 200)
            raise ValueError(
                f"torch could not compile {_name(network)} ({reason}): leave --compile out, or see what "
                "it lacks here (a C++ compiler on a CPU, Triton on a GPU)"
            ) from error

    _replace(network, forward)


def _replace(network: Any, forward: Callable[..., Tensor]) -> None:
    """Another forward, which says that it takes what the first one takes."""
    said: Any = forward
    said.__signature__ = inspect.signature(network.forward)
    network.forward = said


def _name(network: nn.Module) -> str:
    return type(getattr(network, "model", network)).__name__
