"""The way to load an export without running code from its folder."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMapEulerDiscreteScheduler, UNet2DModel

from fewstep.common.errors import unknown
from fewstep.common.model_files import load_weights
from fewstep.latents.vae import KNOWN_VAES
from fewstep.networks import FAMILIES, two_time_model
from fewstep.pipelines import flow_map

# The same before there was one file for all families, and how its models are made now.
_BEFORE = {
    "ClassTimeUNet2DModel": {"second_time": "t", "told_guidance": False},
    "GuidedTimeUNet2DModel": {"second_time": "t", "told_guidance": True},
}


def has_part(index: dict[str, Any], name: str) -> bool:
    """Whether a ``model_index.json`` names a part; diffusers writes a pair of nulls for none."""
    part = index.get(name)
    return isinstance(part, list) and len(part) == 2 and part[1] is not None


def network_folder(index: dict[str, Any]) -> str:
    """The folder of an export's network: ``unet`` or ``transformer``."""
    return "unet" if has_part(index, "unet") else "transformer"


def load_network(folder: Path, index: dict[str, Any], **kwargs: Any) -> Any:
    """The network of an export, whose ``model_index.json`` has been read.

    Raises:
        ValueError: a class that fewstep does not write.
    """
    part = network_folder(index)
    if not has_part(index, part):
        raise ValueError(
            f"{folder / 'model_index.json'} names neither a unet nor a transformer: export the model again"
        )
    name = index[part][1]
    known = {f"TwoTime{stock}": stock for stock, family in FAMILIES.items() if not family.always_map}
    known |= dict.fromkeys(_BEFORE, "UNet2DModel")
    if name not in (*known, "UNet2DModel"):
        raise unknown(f"network in {folder / part}", name, [*known, "UNet2DModel"])
    kind = two_time_model(known[name]) if name in known else UNet2DModel
    return _loaded(kind, folder / part, kwargs, **_BEFORE.get(name, {}))


def _loaded(kind: Any, folder: Path, options: dict[str, Any], **config: Any) -> Any:
    """A model of diffusers with the weights in its folder."""
    options, dtype = _without_dtype(options)
    # Models of every diffusers know this name, and those of old ones no other.
    model = load_weights(kind, folder, **options, torch_dtype=dtype, **config)
    # The plain way of loading leaves some as they are saved.
    return model if dtype is None or model.dtype == dtype else model.to(dtype)


def _without_dtype(options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The options of a ``from_pretrained`` without the type of the weights, and that: ``dtype``, or as older diffusers
    have it ``torch_dtype``."""
    names = ("dtype", "torch_dtype")
    dtype = next((options[name] for name in names if options.get(name) is not None), None)
    return {name: value for name, value in options.items() if name not in names}, dtype


class FlowMapPipeline(flow_map.FlowMapPipeline):
    """The pipeline of an export; see ``fewstep.pipelines.flow_map``, whose copy the export carries."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "FlowMapPipeline":
        """An export, with fewstep's own classes: no ``trust_remote_code``, as nothing in the folder is run.

        Args:
            pretrained_model_name_or_path: the folder.
            kwargs: parts and options of the pipeline in place of the folder's, None for a part that is left out; others
                are those of diffusers' ``from_pretrained`` for models, such as ``dtype`` (``torch_dtype`` will do).
        """
        folder = Path(pretrained_model_name_or_path)
        index = json.loads((folder / "model_index.json").read_text())
        own = [name for name in inspect.signature(cls.__init__).parameters if name in kwargs]
        given = {name: kwargs.pop(name) for name in own}
        parts: dict[str, Any] = {**dict.fromkeys(flow_map.PARTS), **given}
        network = network_folder(index)
        if network not in given:
            parts[network] = load_network(folder, index, **kwargs)
        if has_part(index, "vae") and "vae" not in given:
            name = index["vae"][1]
            if name not in KNOWN_VAES:
                raise unknown("VAE", name, KNOWN_VAES)
            parts["vae"] = _loaded(getattr(diffusers, name), folder / "vae", kwargs)
        if index.get("text"):
            from fewstep.latents.prompts import load_encoders

            wanted = {name: entry for name, entry in index.items() if name not in given}
            options, dtype = _without_dtype(kwargs)
            parts |= load_encoders(folder, wanted, **options, **({"dtype": dtype} if dtype else {}))
        if "scheduler" not in given:
            parts["scheduler"] = FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        if isinstance(index.get("needs"), list):  # of earlier versions
            index["needs"] = ", ".join(index["needs"])
        told = ("diffusion", "gamma", "guidance", "shape", "needs", "id2label", "text", "factor", "rate")
        return cls(**{key: index[key] for key in (*told, "shift", "grid") if key in index} | parts)
