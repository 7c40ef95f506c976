"""AdamW whose two moments take a byte a number each, and a scale for each 256 of them: that of bitsandbytes (arXiv
2110.02861)."""

from typing import Any

import torch
from torch import nn

from fewstep.common.errors import unknown

OPTIMIZERS = ("adamw", "adamw8bit")
_LEAST = 4096  # numbers: the moments of smaller weights stay in float32
_BLOCK = 256  # numbers that share a scale
_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def is_eight_bit(optimizer: str | None, shard: str | None) -> bool:
    """Whether a training keeps moments in 8 bits, None for AdamW as torch has it.

    Raises:
        ValueError: it is no optimizer here, or does not go with shards.
    """
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    if optimizer == "adamw8bit" and shard is not None:
        raise ValueError(
            f"optimizer: adamw8bit does not go with shard: {shard}: its moments share scales across the rows that "
            "processes share out; leave one of them out (sharded moments are shared out already)"
        )
    return optimizer == "adamw8bit"


def check_eight_bits(*parts: nn.Module) -> None:
    """That what trains in these can be moved so.

    Raises:
        ImportError: bitsandbytes is not installed. ValueError: weights that it would round.
    """
    _library()
    for part in parts:
        for name, weight in part.named_parameters():
            if weight.requires_grad and weight.dtype not in _KINDS:
                raise ValueError(
                    f"optimizer: adamw8bit computes in float32, and {name} of the {type(part).__name__} is in "
                    f"{str(weight.dtype).removeprefix('torch.')}: take adamw, or weights in float32"
                )


def adamw8bit(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The optimizer, with the options of AdamW."""
    return _library().AdamW8bit(parameters, min_8bit_size=_LEAST, **options)


def bytes_of_moments(numbers: int) -> int:
    """What both moments of so many numbers take."""
    return 2 * 4 * numbers if numbers < _LEAST else 2 * (numbers + 4 * -(-numbers // _BLOCK))


def _library() -> Any:
    try:
        from bitsandbytes import optim  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            "optimizer: adamw8bit needs bitsandbytes, which is not installed: pip install 'fewstep[quantised]'"
        ) from None
    return optim
