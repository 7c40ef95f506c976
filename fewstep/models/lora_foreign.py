"""Adapters as other tools write them (ComfyUI, kohya's scripts, the makers of a model), whose layers have other names
than those of diffusers, or are cut otherwise: brought to its names by diffusers' own code."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.common.errors import refused
from fewstep.common.model_files import quietly

# What reads adapters of a model in diffusers, by the class of the model.
_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "ChromaTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "AuraFlowTransformer2DModel": "AuraFlowLoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "AnyFlowTransformer3DModel": "WanLoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
    "CogVideoXTransformer3DModel": "CogVideoXLoraLoaderMixin",
}


def as_of_diffusers(tensors: dict[str, Tensor], network: nn.Module, file: Path) -> dict[str, Any] | None:
    """The weights of an adapter by diffusers' names, and the alphas that are not in them yet; None for a model of which
    diffusers reads no other names.

    Raises:
        ValueError: weights that it cannot make an adapter of this model of.
    """
    from diffusers import loaders

    name = type(network).__name__.removeprefix("TwoTime")
    loader: Any = getattr(loaders, _LOADERS.get(name, ""), None)
    if loader is None:
        return None
    config: Any = getattr(network, "config", None)
    told = {"unet_config": config} if name == "UNet2DConditionModel" else {}
    with refused(f"the adapter in {file} is not one of this {name}: diffusers cannot read it"), quietly():
        found = loader.lora_state_dict(dict(tensors), **told)
    weights, alphas = found[:2] if isinstance(found, tuple) else (found, None)
    return {**weights, **(alphas or {})}
