"""What an optimizer keeps of each parameter, as the tensors of a checkpoint, and back: torch's AdamW, or bitsandbytes'
whose moments have 8 bits. A tensor is called ``INDEX.NAME``, the index counting the player's parameters."""

from typing import Any

import torch
from torch import Tensor

from fewstep.common.shards import local, shard_like
from fewstep.objectives.base import Player


def moments_of(optimizer: torch.optim.Optimizer, player: Player) -> dict[str, Tensor]:
    """All that it keeps, sharded as the parameters are; nothing of one that has not moved yet."""
    kept: dict[str, Tensor] = {}
    for index, (own, parameter) in enumerate(zip(_own(optimizer), player.parameters, strict=True)):
        for name, value in optimizer.state.get(own, {}).items():
            tensor = torch.as_tensor(value)  # bitsandbytes counts steps without one
            kept[f"{index}.{name}"] = shard_like(tensor, parameter) if tensor.ndim else tensor
    return kept


def empty_moment(key: str, size: torch.Size, player: Player) -> Tensor:
    """An empty tensor for one of the moments of torch's AdamW.

    Raises:
        ValueError: the player has no parameter of that size there.
    """
    index, _, name = key.partition(".")
    if name == "step":
        return torch.zeros(size)
    parameters = player.parameters
    if not index.isdigit() or int(index) >= len(parameters) or parameters[int(index)].shape != size:
        raise ValueError(f"the moment {key} of shape {tuple(size)} is of no parameter here")
    like = parameters[int(index)]
    return shard_like(torch.zeros_like(local(like)), like)


def give_back(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer back what it kept: the shares of it, where they are sharded.

    Raises:
        ValueError: it is not what this optimizer keeps of these parameters.
    """
    found: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        found.setdefault(int(index), {})[name] = local(value)
    for index, state in found.items():
        kind, empty = _empty(optimizer, index)
        wanted = {name: torch.as_tensor(x).shape for name, x in empty.items()}
        if {name: x.shape for name, x in state.items()} != wanted:
            raise ValueError(f"the moments of parameter {index} are not those that {kind} keeps of it")
        found[index] = {k: int(x) if isinstance(empty[k], int) else x.to(empty[k].dtype) for k, x in state.items()}
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": {**whole["state"], **found}})


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each of its groups is moved by, as JSON."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _own(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _empty(optimizer: Any, index: int) -> tuple[str, dict[str, Any]]:
    """Which optimizer it is, and what has the shapes and types of all that it keeps of a parameter."""
    parameter = _own(optimizer)[index]
    if not hasattr(optimizer, "init_state"):
        return "AdamW", {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)  # bitsandbytes alone knows
    return "adamw8bit", dict(optimizer.state[parameter])
