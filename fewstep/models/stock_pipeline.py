"""A velocity field of a family of diffusers as the pipeline that it came from: the stock model, trained on, and all
the other parts as they were."""

from pathlib import Path
from typing import Any

from fewstep.common.model_files import class_of
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Reversed
from fewstep.flows.preconditioned import Cosine
from fewstep.flows.signature import image_channels
from fewstep.latents.vae import VAE_FOLDERS
from fewstep.models.own_maps import scheduler_of_map
from fewstep.models.stock_steps import drawn_as, scheduler_of, shift_config, steps_of
from fewstep.models.wan_experts import boundary_said, models_of
from fewstep.models.writing import (
    copy_part,
    is_whole_part,
    parts_in,
    pipeline_of,
    save_part,
    variant_of,
    write_json,
    write_vae,
)
from fewstep.networks import CogVideoX, ConditionalUNet, DiT, PixArt, StableAudio, UNet1D

_CODE = """\
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{missing})
{named} = pipe({given}, {steps}).{drawn}"""


def check_stock(field: NetworkField) -> None:
    """That diffusers has a scheduler for what the network predicts.

    Raises:
        ValueError: it has none.
    """
    is_flow = isinstance(field.native, Reversed) and field.prediction == "flow"
    is_of_flows = not isinstance(field.network, CogVideoX | ConditionalUNet | DiT | PixArt | StableAudio)
    if not isinstance(field, DiffusionField) and not (is_flow and is_of_flows):
        raise ValueError(
            f"a {type(field.network).__name__} that predicts {field.prediction} on {field.native} has no pipeline in "
            "diffusers: `fewstep convert MODEL --out FOLDER` writes it with the code that it needs"
        )


def write_stock(field: NetworkField, folder: Path) -> str:
    """Write the folder; returns the code of its model card, for a ``{name}``: empty where its pipeline is not known, or
    is called with more."""
    import diffusers

    scheduler = getattr(field, "scheduler", None) or diffusers.FlowMatchEulerDiscreteScheduler(**shift_config(field))
    return _write(field, scheduler, "num_inference_steps=50", folder)


def write_end(model: FlowMap, folder: Path) -> str:
    """Write the folder of a map that is told no second time, as a stock pipeline runs it."""
    return _write(model, scheduler_of(model), steps_of(model), folder)


def write_own_map(model: FlowMap, folder: Path) -> str:
    """Write the folder of a map that its model is by itself, as the pipeline that it came from."""
    return _write(model, scheduler_of_map(model), "num_inference_steps=4", folder)


def _write(field: Any, scheduler: Any, steps: str, folder: Path) -> str:
    import diffusers

    models = models_of(field.network.model)
    for name, one in models.items():
        save_part(one, folder / name)
    save_part(scheduler, folder / "scheduler")
    source, index = pipeline_of(field)
    if isinstance(field.network, UNet1D) and isinstance(field.native, Cosine | Reversed):  # whose steps it takes
        index["_class_name"] = "DanceDiffusionPipeline"
    others = parts_in(index)
    whole = [] if source is None else [name for name in others if is_whole_part(source / name)]
    for name in whole:
        copy_part(source / name, folder / name, source, variant=variant_of(field))  # pyright: ignore
    if field.latents is not None and not any(name in whole for name in VAE_FOLDERS):
        index["vae"] = write_vae(field.latents, folder / "vae")
    kind = getattr(diffusers, class_of(index), None)
    if kind is None:
        return ""
    gone = [name for name in others if name not in whole and name != "vae"]
    index |= boundary_said(field.network.model, scheduler)
    index |= {name: [None, None] for name in gone if name in kind._optional_components}
    if "safety_checker" in gone:
        index["requires_safety_checker"] = False
    classes = {name: ["diffusers", type(one).__name__] for name, one in {**models, "scheduler": scheduler}.items()}
    version = {"_class_name": kind.__name__, "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", {**index, **version, **classes})
    missing = "".join(f", {name}=..." for name in gone if name not in kind._optional_components)
    if image_channels(field):
        return ""
    words = drawn_as(field)
    given = f'"{words.pop("prompt")}"' if field.text is not None else "class_labels=[0, 1]"
    given = "batch_size=4" if isinstance(field.network, UNet1D) else given
    return _CODE.format(name="{name}", missing=missing, given=given, steps=steps, **words)
