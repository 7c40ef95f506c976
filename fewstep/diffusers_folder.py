"""diffusers folders: a pipeline, or a bare model and its scheduler, as a velocity field on the linear path."""

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewstep.distilled import distilled_as
from fewstep.errors import refused, shortened
from fewstep.fields import DiffusionField, schedule_of
from fewstep.latents import Latents
from fewstep.model_files import WEIGHT_FILES, WEIGHTS, check_numbers, class_names_in, load_weights, read_json
from fewstep.networks import FAMILIES, Flux
from fewstep.prompts import Prompts, knows_prompts

BY_HAND = "wrap it by hand: DiffusionField(network, scheduler), or NetworkField(network, path, prediction)"
# What is fetched of a model on the hub, after its configurations: weights as safetensors alone, without variants.
HUB_FILES = (
    *(f"{folder}{file}" for folder in ("", "unet/", "transformer/", "vae/", "vqvae/") for file in WEIGHT_FILES),
    *(f"text_encoder{n}/{file.replace(WEIGHTS, 'model')}" for n in ("", "_2", "_3") for file in WEIGHT_FILES),
    *(f"tokenizer{n}/*" for n in ("", "_2", "_3")),
)
# How the first DiTs and PixArts were saved: a class for both, told apart by its norm.
_REMAPPED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


@dataclass(frozen=True)
class Found:
    """What a diffusers folder holds by its configurations; no weights are read for it."""

    model: Path
    class_name: str
    scheduler: Any
    latents: Latents | None
    text: Prompts | None
    distilled: str


def load_field(folder: Path) -> DiffusionField:
    """The model of a diffusers folder as a velocity on the linear path (arXiv 2506.02221).

    Raises:
        FileNotFoundError, ValueError: as :func:`look_into`, or weights that are missing, damaged or not the model's.
    """
    import diffusers

    found = look_into(folder)
    if found.latents is not None:
        found.latents.check()
    model = load_weights(getattr(diffusers, found.class_name), found.model)
    field = DiffusionField(FAMILIES[found.class_name](model), found.scheduler)
    field.latents, field.text, field.class_names = found.latents, found.text, class_names_in(folder)
    field.distilled = found.distilled
    if found.distilled:
        warnings.warn(
            f"the model in {folder} is {found.distilled}. It is read as a velocity here, and is none: draw from it "
            "with diffusers and its own scheduler, and distil the model that it was made from",
            stacklevel=3,
        )
    return field


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
        for name in ("unet", "transformer", "scheduler", "vae", "vqvae"):
            if name in parts:
                parts[name].save_config(folder / name)
        found = look_into(folder)
    model = parts.get("unet") or parts["transformer"]
    field = DiffusionField(FAMILIES[found.class_name](model), parts["scheduler"])
    if found.latents is not None:
        field.latents = Latents(parts.get("vae") or parts["vqvae"])
    home = Path(str(pipeline.config.get("_name_or_path") or ""))
    if (home / "model_index.json").is_file():
        field.text = Prompts(home) if knows_prompts(home) else None
        field.class_names = class_names_in(home)
    return field


def look_into(folder: Path) -> Found:
    """What is in a diffusers folder, known to fit together, before any weights are touched.

    Raises:
        FileNotFoundError: no model, no scheduler, or a VAE that the folder's index names and that is not there.
        ValueError: a model, scheduler or VAE that fewstep does not know, or a VAE with latents of other channels.
    """
    # In their own folders, or beside each other as in early repositories of diffusers.
    models = [f for f in (folder / "unet", folder / "transformer", folder) if (f / "config.json").is_file()]
    if not models:
        raise FileNotFoundError(
            f"no model in {folder}: a diffusers folder has unet/config.json, transformer/config.json or config.json, "
            "a run of fewstep's has recipe.yaml and checkpoints/"
        )
    class_name, config = _model_config(models[0])
    scheduler = find_scheduler(folder)
    schedule_of(scheduler)
    latents = _latents(folder, models[0], class_name, config)
    text = Prompts(folder) if knows_prompts(folder) else None
    distilled = distilled_as(folder, models[0], scheduler)
    return Found(models[0], class_name, scheduler, latents, text, distilled)


def _model_config(model: Path) -> tuple[str, dict[str, Any]]:
    """The class of a model and its config, with the defaults of the class, once it is clear that it will do."""
    import diffusers

    config = read_json(model / "config.json")
    name = config.get("_class_name", "of no class")
    if name == "Transformer2DModel":
        name = _REMAPPED.get(config.get("norm_type", ""), name)
    if name not in FAMILIES:
        raise ValueError(f"the model in {model} is a {name}, and fewstep.load knows {', '.join(FAMILIES)}: {BY_HAND}")
    defaults = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    config = {**{p.name: p.default for p in defaults if p.default is not p.empty}, **config}
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional":
        raise ValueError(f"the {name} in {model} has a {embedding} time embedding, not a positional: {BY_HAND}")
    channels = config["in_channels"]
    given = config["out_channels"] or channels
    # A U-Net may take an image beside the state.
    if given not in (channels, 2 * channels) and not (name.startswith("UNet2D") and given < channels):
        raise ValueError(
            f"the {name} in {model} takes {channels} channels and gives {given}, so it takes more than the sample: "
            f"{BY_HAND} with a network that adds the other channels itself"
        )
    return name, config


def find_scheduler(folder: Path) -> Any:
    import diffusers

    folders = [f for f in (folder / "scheduler", folder) if (f / "scheduler_config.json").is_file()]
    if not folders:
        raise FileNotFoundError(
            f"no scheduler in {folder}: scheduler_config.json says what the model was trained on. Save the scheduler "
            f"there (scheduler.save_pretrained({str(folder)!r})), or {BY_HAND}"
        )
    config = read_json(folders[0] / "scheduler_config.json")
    check_numbers(config, str(folders[0] / "scheduler_config.json"))
    name = config.get("_class_name", "of no class")
    scheduler_class = getattr(diffusers, str(name), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise ValueError(
            f"the scheduler in {folders[0]} is a {shortened(str(name), 60)}, which diffusers does not have: {BY_HAND}"
        )
    made: Any = scheduler_class
    with refused(f"diffusers cannot make a {name} of {folders[0] / 'scheduler_config.json'}", "fetch it again"):
        return made.from_pretrained(folders[0])


def _latents(folder: Path, model: Path, class_name: str, config: dict[str, Any]) -> Latents | None:
    """The latent space of a pipeline, once it is clear that the model lives in it; None for a model of images."""
    index = read_json(folder / "model_index.json")
    for name in ("vae", "vqvae"):
        library, named = index.get(name) or (None, None)
        if (folder / name / "config.json").is_file():
            latents = Latents(folder / name)
        elif library is not None:
            raise FileNotFoundError(
                f"no VAE in {folder / name}: the model works on the latents of the {named} that model_index.json "
                f"names. Save it there (vae.save_pretrained({str(folder / name)!r}))"
            )
        else:
            continue
        # An image may go in beside the state, and a variance come out: the state has the fewer of both.
        channels = min(config["in_channels"], config["out_channels"] or config["in_channels"])
        channels = channels // 4 if FAMILIES[class_name] is Flux else channels
        if latents.channels != channels:
            raise ValueError(
                f"the {class_name} in {model} is for {channels} channels, and the VAE in {folder / name} has latents "
                f"of {latents.channels}: they do not belong together"
            )
        return latents
    return None
