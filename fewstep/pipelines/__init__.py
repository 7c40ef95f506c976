"""The diffusers pipeline that an export carries, and the way to load an export without running code from its folder."""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import FlowMapEulerDiscreteScheduler, UNet2DModel

from fewstep.networks import class_time_unet
from fewstep.pipelines import flow_map


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
        model: Any = getattr(class_time_unet, index["unet"][1], UNet2DModel)
        unet: Any = model.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False, **kwargs)
        scheduler: Any = FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        return cls(unet, scheduler, index["diffusion"], index.get("gamma", 0.0))


__all__ = ["FlowMapPipeline"]
