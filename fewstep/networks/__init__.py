"""Networks: a small MLP, the adapters of diffusers models, those that give them a second time, and the piece that
gives it to networks of one's own. There is no U-Net or transformer of fewstep's own."""

from torch import nn

from fewstep.networks.families import FAMILIES, SD3, ConditionalUNet, DiT, Flux, PixArt
from fewstep.networks.mlp import MLP
from fewstep.networks.second_time import SecondTime, sinusoidal
from fewstep.networks.unet import TwoTimeUNet, UNet


def with_second_time(network: nn.Module, guidance: bool = False) -> nn.Module:
    """A copy of a field's network with a second time that is silent: ``net(x, s, t) == network(x, s)`` to the bit; with
    ``guidance``, also with an input for its strength, the condition ``guidance`` (B,), as silent.

    Raises:
        ValueError: for a network that is not of fewstep's families; the message shows the way by hand.
    """
    make = getattr(network, "with_second_time", None)
    if make is None:
        raise ValueError(
            f"{type(network).__name__} has no second time and fewstep cannot add one: write a copy of its class that "
            "takes (x, s, t), adds SecondTime(dim)(t) to its time embedding, and pass an instance as "
            "FlowMap.from_field(field, network=...); the teacher's weights are loaded by name. Of diffusers' models, "
            "UNet2DModel is the one that fewstep gives a second time so far"
        )
    return make(guidance=True) if guidance else make()


__all__ = [
    "FAMILIES",
    "MLP",
    "SD3",
    "ConditionalUNet",
    "DiT",
    "Flux",
    "PixArt",
    "SecondTime",
    "TwoTimeUNet",
    "UNet",
    "sinusoidal",
    "with_second_time",
]
