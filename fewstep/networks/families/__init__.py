"""The families of diffusers as networks, one file each: of a field, ``net(x, timestep, **cond) -> prediction``, both
(B, C, H, W), and of a flow map, ``net(x, s, t, **cond)``.

Each wraps a model of diffusers and calls it as the pipelines of its family do. Timesteps (B,) are in the units of the
model's scheduler, 0 to 1000 mostly. Conditions keep the names of the model's own arguments, and the entries of
``added_cond_kwargs`` come as conditions of their own. Of a model that also predicts a variance, the mean is kept.

A family is a file here, with its two networks; a file of the same name in ``fewstep.networks.two_times``, with the code
that an export carries; and a line below.
"""

from typing import Any

from fewstep.networks.families.anyflow import AnyFlow, TwoTimeAnyFlow
from fewstep.networks.families.auraflow import AuraFlow, TwoTimeAuraFlow
from fewstep.networks.families.base import EndNetwork
from fewstep.networks.families.chroma import Chroma, TwoTimeChroma
from fewstep.networks.families.cogvideox import CogVideoX, TwoTimeCogVideoX
from fewstep.networks.families.dit import DiT, TwoTimeDiT
from fewstep.networks.families.flux import Flux, TwoTimeFlux
from fewstep.networks.families.flux2 import Flux2, TwoTimeFlux2
from fewstep.networks.families.hunyuanimage import HunyuanImage, TwoTimeHunyuanImage
from fewstep.networks.families.ltx import LTX, TwoTimeLTX
from fewstep.networks.families.lumina2 import Lumina2, TwoTimeLumina2
from fewstep.networks.families.pixart import PixArt, TwoTimePixArt
from fewstep.networks.families.qwenimage import QwenImage, TwoTimeQwenImage
from fewstep.networks.families.sana import Sana, TwoTimeSana
from fewstep.networks.families.sd3 import SD3, TwoTimeSD3
from fewstep.networks.families.stable_audio import StableAudio, TwoTimeStableAudio
from fewstep.networks.families.unet1d import TwoTimeUNet1D, UNet1D
from fewstep.networks.families.unet2d import TwoTimeUNet, UNet
from fewstep.networks.families.unet2d_condition import ConditionalUNet, TwoTimeConditionalUNet
from fewstep.networks.families.wan import TwoTimeWan, TwoTimeWanExperts, Wan, WanExperts
from fewstep.networks.families.z_image import TwoTimeZImage, ZImage
from fewstep.networks.two_times import code_of

# The class in diffusers (Wan 2.2 has two models there, which are one here), and what wraps it: as a field, and with a
# second time as a flow map.
_BOTH: dict[str, tuple[type[Any], type[Any]]] = {
    "AnyFlowTransformer3DModel": (AnyFlow, TwoTimeAnyFlow),
    "AuraFlowTransformer2DModel": (AuraFlow, TwoTimeAuraFlow),
    "ChromaTransformer2DModel": (Chroma, TwoTimeChroma),
    "CogVideoXTransformer3DModel": (CogVideoX, TwoTimeCogVideoX),
    "DiTTransformer2DModel": (DiT, TwoTimeDiT),
    "Flux2Transformer2DModel": (Flux2, TwoTimeFlux2),
    "FluxTransformer2DModel": (Flux, TwoTimeFlux),
    "HunyuanImageTransformer2DModel": (HunyuanImage, TwoTimeHunyuanImage),
    "LTXVideoTransformer3DModel": (LTX, TwoTimeLTX),
    "Lumina2Transformer2DModel": (Lumina2, TwoTimeLumina2),
    "PixArtTransformer2DModel": (PixArt, TwoTimePixArt),
    "QwenImageTransformer2DModel": (QwenImage, TwoTimeQwenImage),
    "SD3Transformer2DModel": (SD3, TwoTimeSD3),
    "SanaTransformer2DModel": (Sana, TwoTimeSana),
    "StableAudioDiTModel": (StableAudio, TwoTimeStableAudio),
    "UNet1DModel": (UNet1D, TwoTimeUNet1D),
    "UNet2DConditionModel": (ConditionalUNet, TwoTimeConditionalUNet),
    "UNet2DModel": (UNet, TwoTimeUNet),
    "WanExpertsTransformer3DModel": (WanExperts, TwoTimeWanExperts),
    "WanTransformer3DModel": (Wan, TwoTimeWan),
    "ZImageTransformer2DModel": (ZImage, TwoTimeZImage),
}
FAMILIES = {name: field for name, (field, _) in _BOTH.items()}
# By the class of the network of one time: with a second, and for the way to t = 1 alone.
STUDENTS = dict(_BOTH.values())
ENDS: dict[type[Any], type[Any]] = {kind: type(f"End{kind.__name__}", (EndNetwork, kind), {}) for kind in STUDENTS}


def stock_model(name: str) -> type[Any]:
    """The model of a family without a second time, by the name of its class."""
    import diffusers

    return getattr(diffusers, name, None) or getattr(code_of(FAMILIES[name].code), name)


def two_time_model(name: str) -> type[Any]:
    """The model of this class in diffusers with a second time: ``TwoTime...``, of that class."""
    return getattr(code_of(FAMILIES[name].code), f"TwoTime{name}")
