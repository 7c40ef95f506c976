"""A second output of a student's network that says the velocity where the first says the average velocity."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.flows.broadcasting import expand
from fewstep.flows.change_of_path import scaling
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP, ConditionalUNet, ContinuousUNet, Conv1dNet, DiT, UNet
from fewstep.networks.channels import mean_part


def last_layer(network: nn.Module) -> nn.Module | None:
    """The layer that makes a network's output of what it knows; None for networks whose last one is not known."""
    match network:
        case MLP() | Conv1dNet() | ContinuousUNet():
            return network.output
        case UNet() | ConditionalUNet():
            return network.model.conv_out
        case DiT():
            return network.model.proj_out_2
    return None


class VelocityHead(nn.Module):
    """A copy of a student's last layer, which sees what that sees and says ``v(x, s)`` where that says ``u(x, s, t)``:
    both in one call (arXiv 2512.02012).

    Training asks for it, sampling does not, so it belongs to the objective: it trains and is checkpointed with that,
    and the student is exported as it is without one. It begins by saying what u says.

    Args:
        student: the map whose last layer it is like.

    Raises:
        ValueError: a network whose last layer is not known.
    """

    def __init__(self, student: FlowMap) -> None:
        super().__init__()
        self.layer = deepcopy(check_place(student)).requires_grad_(True)

    def forward(
        self, student: FlowMap, x: Tensor, s: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``u(x, s, t)`` and ``v(x, s)``, (n, ...) each, by one call of the student's network."""
        with _seen_by(check_place(student)) as seen:
            u = student.average_velocity(x, s, t, **cond)
        prediction = _as_state(student.network, self.layer(seen[-1]), x)
        if student.bare:
            return u, prediction
        c = scaling(student.native, student.prediction, student.path, s)
        return u, expand(c.skip, x) * x + expand(c.out, x) * prediction


def check_place(student: FlowMap) -> nn.Module:
    """The last layer of a student.

    Raises:
        ValueError: it is not known, or not to be seen in a compiled network.
    """
    layer = last_layer(student.network)
    if layer is None:
        raise ValueError(
            f"a {type(student.network).__name__} has no place for a velocity head, as MLPs, Conv1dNets, U-Nets and "
            "DiTs have: say head: false, for one more call"
        )
    if getattr(student.network, "_compiled_call_impl", None) is not None:
        raise ValueError("a velocity head sees nothing inside a compiled network: say head: false, or compile: false")
    return layer


@contextmanager
def _seen_by(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer is called with."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _as_state(network: Any, output: Tensor, x: Tensor) -> Tensor:
    """What a last layer gave, as the network gives it on states like x."""
    if isinstance(network, DiT):  # rows of patches (n, h w, p p c)
        p, side = network.model.config["patch_size"], round(output.shape[1] ** 0.5)
        patches = output.reshape(len(x), side, side, p, p, -1)
        output = torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), -1, side * p, side * p)
    return output if isinstance(network, MLP) else mean_part(output, x)
