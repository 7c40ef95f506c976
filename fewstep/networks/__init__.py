"""An MLP, networks for signals and tokens, a continuous U-Net, the families of diffusers, and a second time.

For images take a network of diffusers': the continuous U-Net is there to compare with."""

from fewstep.networks.continuous import ContinuousUNet
from fewstep.networks.critics import ConvCritic, MLPCritic
from fewstep.networks.families import (
    FAMILIES,
    LTX,
    SD3,
    STUDENTS,
    AnyFlow,
    AuraFlow,
    Chroma,
    CogVideoX,
    ConditionalUNet,
    DiT,
    Flux,
    Flux2,
    HunyuanImage,
    Lumina2,
    PixArt,
    QwenImage,
    Sana,
    StableAudio,
    TwoTimeUNet,
    UNet,
    UNet1D,
    Wan,
    WanExperts,
    ZImage,
    stock_model,
    two_time_model,
)
from fewstep.networks.families.base import EndNetwork, OfDiffusers, TwoTimeNetwork
from fewstep.networks.mlp import MLP
from fewstep.networks.noise_encoder import NoiseEncoder
from fewstep.networks.parallel_times import FourierLayer, ParallelTimes
from fewstep.networks.second_time import SecondTime, sinusoidal
from fewstep.networks.sequence import SequenceTransformer
from fewstep.networks.signal import Conv1dNet
from fewstep.networks.students import gains_second_time, new_parts, with_second_time
from fewstep.networks.two_times.base import SECOND_TIMES

__all__ = [
    "FAMILIES",
    "LTX",
    "MLP",
    "SD3",
    "SECOND_TIMES",
    "STUDENTS",
    "AnyFlow",
    "AuraFlow",
    "Chroma",
    "CogVideoX",
    "ConditionalUNet",
    "ContinuousUNet",
    "Conv1dNet",
    "ConvCritic",
    "DiT",
    "EndNetwork",
    "Flux",
    "Flux2",
    "FourierLayer",
    "HunyuanImage",
    "Lumina2",
    "MLPCritic",
    "NoiseEncoder",
    "OfDiffusers",
    "ParallelTimes",
    "PixArt",
    "QwenImage",
    "Sana",
    "SecondTime",
    "SequenceTransformer",
    "StableAudio",
    "TwoTimeNetwork",
    "TwoTimeUNet",
    "UNet",
    "UNet1D",
    "Wan",
    "WanExperts",
    "ZImage",
    "gains_second_time",
    "new_parts",
    "sinusoidal",
    "stock_model",
    "two_time_model",
    "with_second_time",
]
