"""Frozen linear layers kept in bfloat16, half of their memory, and computed with in the type of what they meet."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HalfLinear(nn.Linear):
    """A linear layer whose weight is in bfloat16 and whose input is in any type: the output is in that of the input.
    Under autocast the weight goes in as it is; else a copy of it is made for each call."""

    takes_any_type = True

    def forward(self, input: Tensor) -> Tensor:
        if input.is_meta:  # of a plan, which knows no autocast: without a copy, as under it
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return functional.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)
        is_cast = torch.is_autocast_enabled(input.device.type)
        weight = self.weight if is_cast else self.weight.to(input.dtype)
        return functional.linear(input, weight, self.bias)


def halve(*networks: nn.Module) -> None:
    """Keep the weights of the frozen linear layers of networks in bfloat16, in place, and what trains in float32.
    Networks that share their weights go in together, or one of halved layers is a copy of the other."""
    layers: list[Any] = [layer for network in networks for layer in network.modules()]
    for layer in layers:
        for weight in layer.parameters(recurse=False):
            if weight.requires_grad and weight.dtype == torch.bfloat16:  # new, and begun as a copy of what is halved
                weight.data = weight.data.float()
        if type(layer) in (nn.Linear, HalfLinear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
            layer.__class__ = HalfLinear


def unhalve(network: nn.Module) -> None:
    """The same weights in float32 again, as plain layers, in place."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, HalfLinear)]
    for layer in layers:
        layer.weight.data = layer.weight.data.float()
        layer.__class__ = nn.Linear
