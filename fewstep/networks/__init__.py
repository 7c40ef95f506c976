"""Networks: a small MLP, the adapters of diffusers models, those that give them a second time, and the piece that
gives it to networks of one's own. There is no U-Net or transformer of fewstep's own."""

from fewstep.networks.families import FAMILIES, SD3, ConditionalUNet, DiT, Flux, PixArt, UNet, Wan
from fewstep.networks.mlp import MLP
from fewstep.networks.second_time import SecondTime, sinusoidal
from fewstep.networks.students import (
    SECOND_TIMES,
    STUDENTS,
    TwoTimeNetwork,
    TwoTimeUNet,
    gains_second_time,
    new_parts,
    with_second_time,
)

__all__ = [
    "FAMILIES",
    "MLP",
    "SD3",
    "SECOND_TIMES",
    "STUDENTS",
    "ConditionalUNet",
    "DiT",
    "Flux",
    "PixArt",
    "SecondTime",
    "TwoTimeNetwork",
    "TwoTimeUNet",
    "UNet",
    "Wan",
    "gains_second_time",
    "new_parts",
    "sinusoidal",
    "with_second_time",
]
