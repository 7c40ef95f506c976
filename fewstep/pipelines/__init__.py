"""The diffusers pipeline that an export carries, and the way to load an export without running code from its folder."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, FlowMapEulerDiscreteScheduler, UNet2DModel, VQModel

from fewstep.networks import class_time_unet
from fewstep.pipelines import flow_map

_VAES: dict[str, Any] = {vae.__name__: vae for vae in (AutoencoderKL, AutoencoderTiny, VQModel)}


def has_vae(index: dict[str, Any]) -> bool:
    """Whether a ``model_index.json`` names a VAE; diffusers writes a pair of nulls for none."""
    return (index.get("vae") or (None, None))[1] is not None


def load_unet(folder: Path, index: dict[str, Any], **kwargs: Any) -> Any:
    """The network of an export, whose ``model_index.json`` has been read."""
    model: Any = getattr(class_time_unet, index["unet"][1], UNet2DModel)
    return model.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False, **kwargs)


class FlowMapPipeline(flow_map.FlowMapPipeline):
    """The pipeline of an export; see ``fewstep.pipelines.flow_map``, whose copy the export carries."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "FlowMapPipeline":
        """An export, with fewstep's own classes: no ``trust_remote_code``, as nothing in the folder is run.

        Args:
            pretrained_model_name_or_path: the folder.
            kwargs: of diffusers' ``from_pretrained`` for models, such as ``torch_dtype``.
        """
        folder = Path(pretrained_model_name_or_path)
        index = json.loads((folder / "model_index.json").read_text())
        scheduler: Any = FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        vae = None
        if has_vae(index):
            options = {"use_safetensors": True, "low_cpu_mem_usage": False, **kwargs}
            vae = _VAES[index["vae"][1]].from_pretrained(folder / "vae", **options)
        options = {key: index[key] for key in ("gamma", "guidance") if key in index}
        return cls(load_unet(folder, index, **kwargs), scheduler, index["diffusion"], vae=vae, **options)


__all__ = ["FlowMapPipeline"]
