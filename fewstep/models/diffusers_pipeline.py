"""diffusers folders: a pipeline, or a bare model and its scheduler, as a velocity field on the linear path."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewstep.common.model_files import (
    ENCODER_WEIGHTS,
    WEIGHTS,
    class_names_in,
    has_weights,
    load_weights,
    variant_in,
    weight_files,
)
from fewstep.flows.fields import DiffusionField
from fewstep.latents.prompts import Prompts, knows_prompts
from fewstep.latents.vae import VAE_FOLDERS, Latents
from fewstep.models.diffusers_configs import Found, look_into, mended
from fewstep.models.wan_experts import SECOND
from fewstep.networks import WanExperts
from fewstep.networks.configs import experts, keep_facts
from fewstep.networks.frozen_base import keeping
from fewstep.pipelines.stock_prompts import PROJECTION

# The parts of a pipeline that have weights of diffusers' own.
_WEIGHED = ("unet", "transformer", SECOND, *VAE_FOLDERS, PROJECTION)


def hub_files(variant: str | None = None) -> list[str]:
    """What is fetched of a model on the hub, after its configurations: weights of one variant, as safetensors alone."""
    models, texts = weight_files(WEIGHTS, variant), weight_files(ENCODER_WEIGHTS, variant)
    return [
        *(f"{folder}{file}" for folder in ("", *(f"{part}/" for part in _WEIGHED)) for file in models),
        *(f"text_encoder{n}/{file}" for n in ("", "_2", "_3") for file in texts),
        *(f"tokenizer{n}/*" for n in ("", "_2", "_3")),
    ]


def lack_weights(folder: Path) -> bool:
    """Whether a part of a pipeline is there without its weights."""
    parts = [*_WEIGHED, *(f"text_encoder{n}" for n in ("", "_2", "_3"))]
    return any((folder / part / "config.json").is_file() and not has_weights(folder / part) for part in parts)


def load_field(folder: Path, variant: str | None = None, base: str = "float32") -> DiffusionField:
    """The model of a diffusers folder as a velocity on the linear path (arXiv 2506.02221).

    Args:
        variant: of the weights, such as fp16; parts that have it not are read as they are.
        base: what its linear layers are kept in, as they are read: see ``fewstep.networks.frozen_base.keep_base``.

    Raises:
        FileNotFoundError, ValueError: as :func:`look_into`, or weights that are missing, damaged or not the model's.
    """
    found = look_into(folder, variant)
    for place in found.models:
        if variant is not None and variant_in(place, wanted=variant) != variant:
            there = ", ".join(file.name for file in sorted(place.glob("*.safetensors"))[:4]) or "no safetensors"
            raise FileNotFoundError(f"no variant {variant} of the weights in {place}, which has {there}: leave it out")
    if found.latents is not None:
        found.latents.check()
    meta: Any = found.network.model
    kind = type(meta.transformer if isinstance(found.network, WanExperts) else meta)
    loaded = [load_weights(kind, place, variant, keeping(base), **mended(place)) for place in found.models]
    field = DiffusionField(_network(found, loaded), found.scheduler)
    field.latents, field.text, field.class_names = found.latents, found.text, class_names_in(folder)
    field.distilled = found.distilled
    if found.distilled and not found.network.has_second_time:
        warnings.warn(
            f"the model in {folder} is {found.distilled}. It is read as a velocity here, and is none: draw from it "
            "with diffusers and its own scheduler, and distil the model that it was made from",
            stacklevel=3,
        )
    return field


def _network(found: Found, models: list[Any]) -> Any:
    """The network that was found, of these models."""
    meta = found.network.model
    model = models[0] if len(models) == 1 else experts(models[0], models[1], meta.config["boundary_timestep"])
    keep_facts(model, meta)
    return type(found.network)(model)


def field_of_pipeline(pipeline: Any) -> DiffusionField:
    """The model of a pipeline of diffusers in memory, as :func:`load_field` reads one from its folder. Its prompts are
    encoded where the pipeline was loaded from a folder.

    Raises:
        ValueError: no pipeline, or one that :func:`look_into` would refuse.
    """
    import diffusers

    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise ValueError(
            f"a {type(pipeline).__name__} is no folder, name or pipeline: of a model and a scheduler, "
            "DiffusionField(network, scheduler) makes a field"
        )
    parts: dict[str, Any] = {name: part for name, part in pipeline.components.items() if part is not None}
    with TemporaryDirectory() as place:
        folder = Path(place)
        pipeline.save_config(folder)
        for name in ("scheduler", *_WEIGHED):
            if name in parts:
                parts[name].save_config(folder / name)
        found = look_into(folder)
    field = DiffusionField(_network(found, [parts[place.name] for place in found.models]), parts["scheduler"])
    if found.latents is not None:
        field.latents = Latents(next(parts[name] for name in VAE_FOLDERS if name in parts))
    home = Path(str(pipeline.config.get("_name_or_path") or ""))
    if (home / "model_index.json").is_file():
        field.text = Prompts(home) if knows_prompts(home) else None
        field.class_names = class_names_in(home)
    return field
