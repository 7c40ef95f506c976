"""An MLP, a transformer for tokens, a continuous U-Net, the families of diffusers, and a second time for one's own.

For images take a network of diffusers': the continuous U-Net is there to compare with."""

from fewstep.networks.continuous import ContinuousUNet
from fewstep.networks.critics import ConvCritic, MLPCritic
from fewstep.networks.families import (
    FAMILIES,
    SD3,
    STUDENTS,
    ConditionalUNet,
    DiT,
    Flux,
    PixArt,
    TwoTimeUNet,
    UNet,
    Wan,
    two_time_model,
)
from fewstep.networks.families.base import OfDiffusers, TwoTimeNetwork
from fewstep.networks.mlp import MLP
from fewstep.networks.noise_encoder import NoiseEncoder
from fewstep.networks.second_time import SecondTime, sinusoidal
from fewstep.networks.sequence import SequenceTransformer
from fewstep.networks.students import gains_second_time, new_parts, with_second_time
from fewstep.networks.two_times.base import SECOND_TIMES

__all__ = [
    "FAMILIES",
    "MLP",
    "SD3",
    "SECOND_TIMES",
    "STUDENTS",
    "ConditionalUNet",
    "ContinuousUNet",
    "ConvCritic",
    "DiT",
    "Flux",
    "MLPCritic",
    "NoiseEncoder",
    "OfDiffusers",
    "PixArt",
    "SecondTime",
    "SequenceTransformer",
    "TwoTimeNetwork",
    "TwoTimeUNet",
    "UNet",
    "Wan",
    "gains_second_time",
    "new_parts",
    "sinusoidal",
    "two_time_model",
    "with_second_time",
]
