"""What a diffusers folder holds, by its configurations alone: no weights are read."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.common.errors import refused, shortened, shown
from fewstep.common.model_files import (
    check_numbers,
    class_of,
    read_json,
)
from fewstep.flows.scheduler_classes import scheduler_class
from fewstep.flows.schedules import schedule_of, todays_config
from fewstep.latents.prompts import Prompts, knows_prompts
from fewstep.latents.vae import VAE_FOLDERS, Latents
from fewstep.models.distilled import distilled_as
from fewstep.models.wan_experts import boundary_of
from fewstep.networks import FAMILIES, Wan, WanExperts, stock_model
from fewstep.networks.channels import given_channels
from fewstep.networks.configs import experts
from fewstep.pipelines.arguments import side_step

BY_HAND = "wrap it by hand: DiffusionField(network, scheduler), or NetworkField(network, path, prediction)"
# How the first DiTs and PixArts were saved: a class for both, told apart by its norm.
_REMAPPED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
# A scheduler that is diffusers' by another name.
_RENAMED = {"FlowMapDiscreteScheduler": "FlowMapEulerDiscreteScheduler"}
# The pipelines that put the image before the state: Marigold's, and GeoWizard's own.
_IMAGE_FIRST = ("Marigold", "DepthNormalEstimation")
# The parts of a pipeline that speak at each step, by the beginnings of their names; a prior is done before the first.
_SPEAKERS = ("transformer", "unet", "controlnet", "adapter", "motion_adapter", "t2i_adapter", "decoder", "super_res")


@dataclass(frozen=True)
class Found:
    """What a diffusers folder holds by its configurations; no weights are read for it.

    ``network`` is that of a field, on the meta device; it has been called there. ``models`` are the folders of its
    weights: two where two experts are one network.
    """

    models: list[Path]
    network: Any
    scheduler: Any
    latents: Latents | None
    text: Prompts | None
    distilled: str


def look_into(folder: Path, variant: str | None = None) -> Found:
    """What is in a diffusers folder, known to fit together and to be callable, before any weights are touched.

    Raises:
        FileNotFoundError: no model, no scheduler, or a VAE that the folder's index names and that is not there.
        ValueError: a model, scheduler or VAE that fewstep does not know, a VAE with latents of other channels, a model
            that cannot be called as its config says, or one of several that sample together.
    """
    index = read_json(folder / "model_index.json")
    # In their own folders, or beside each other as in early repositories of diffusers.
    models = [f for f in (folder / "unet", folder / "transformer", folder) if (f / "config.json").is_file()]
    if not models:
        parts = f", and this {class_of(index)} has {', '.join(_parts(index))}" if _parts(index) else ""
        raise FileNotFoundError(
            f"no model in {folder}: a diffusers folder has unet/config.json, transformer/config.json or config.json"
            f"{parts}; a run of fewstep's has recipe.yaml and checkpoints/"
        )
    class_name, config = _model_config(models[0])
    scheduler = find_scheduler(folder)
    schedule_of(scheduler)
    boundary = boundary_of(folder, index, scheduler) if FAMILIES[class_name] is Wan else None
    models = models[:1] if boundary is None else [models[0], folder / "transformer_2"]
    _check_alone(folder, index, models)
    latents = _latents(folder, index, variant)
    patch = FAMILIES[class_name].patch
    channels = _state_channels(models[0], config, scheduler, latents, patch)
    network = _on_meta(models[0], class_name)
    if boundary is not None:
        if (other := _model_config(models[1])[0]) != class_name:
            raise ValueError(
                f"the models in {models[0]} and {models[1]} are a {class_name} and a {other}, not two of one"
            )
        network = WanExperts(experts(network.model, _on_meta(models[1], class_name).model, boundary))
    if channels != network.channels:
        network.model.register_to_config(_state_channels=patch * channels)
    if class_of(index).startswith(_IMAGE_FIRST) and channels < config["in_channels"]:
        network.model.register_to_config(_image_first=True)
    _check_call(network, models[0])
    text = Prompts(folder, variant=variant) if knows_prompts(folder) else None
    distilled = distilled_as(folder, models[0], scheduler)
    return Found(models, network, scheduler, latents, text, distilled)


def _parts(index: dict[str, Any]) -> list[str]:
    """The parts of a pipeline by its index: those that are not nulls."""
    return [name for name, value in index.items() if isinstance(value, list) and value[:1] not in ([], [None])]


def _check_alone(folder: Path, index: dict[str, Any], models: list[Path]) -> None:
    """That a pipeline samples with these models alone."""
    own = [model.name for model in models]
    more = [name for name in _parts(index) if name.startswith(_SPEAKERS) and name not in own]
    more = [name for name in more if not name.endswith("scheduler")]
    if more:
        raise ValueError(
            f"the {class_of(index)} in {folder} samples with {more[0]} too, and fewstep with one model alone, which "
            f"would be another one: to take {own[0]} by itself all the same, copy {own[0]}/ and scheduler/ to "
            "a folder of their own, without model_index.json"
        )


def _model_config(model: Path) -> tuple[str, dict[str, Any]]:
    """The class of a model and its config, with the defaults of the class, once it is clear that it will do."""
    import diffusers

    config = read_json(model / "config.json")
    name = config.get("_class_name", "of no class")
    if name == "Transformer2DModel":
        name = _REMAPPED.get(config.get("norm_type", ""), name)
    if name == "FAR_Wan_Transformer3DModel" and config.get("init_flowmap_model") and not config.get("init_far_model"):
        name = "AnyFlowTransformer3DModel"  # as its makers call it, without the causal parts
    if name not in FAMILIES:
        known = ", ".join(kind.__name__ for kind in FAMILIES.values())
        raise ValueError(f"the model in {model} is a {name}, and fewstep.load knows those of {known}: {BY_HAND}")
    defaults = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    config = {"_class_name": name, **{p.name: p.default for p in defaults if p.default is not p.empty}, **config}
    for key in ("in_channels", "out_channels"):
        channels = config.get(key)
        if (type(channels) is not int or channels < 1) and (channels is not None or key == "in_channels"):
            raise ValueError(f"{model / 'config.json'}: {key} is {shown(channels)}, and a number is needed")
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional" and name != "UNet1DModel":
        raise ValueError(f"the {name} in {model} has a {embedding} time embedding, not a positional: {BY_HAND}")
    return name, {**config, "_class_name": name}


def _state_channels(model: Path, config: dict[str, Any], scheduler: Any, latents: Latents | None, patch: int) -> int:
    """How many channels the state has, in patches of so many numbers. Where the VAE does not say, the scheduler may: a
    variance that is learned comes out beside the mean.

    Raises:
        ValueError: a model that is not made for it.
    """
    name, takes = config["_class_name"], config["in_channels"]
    gives = given_channels(config)
    is_learned = str(scheduler.config.get("variance_type")).startswith("learned")
    usual = gives // 2 if is_learned and gives % 2 == 0 else min(takes, gives)
    state = usual if latents is None else latents.channels * patch
    # An image may go in beside the state.
    if takes >= state and not (takes - state) % patch and gives in (state, 2 * state):
        return state // patch
    if latents is not None and state != min(takes, gives):
        raise ValueError(
            f"the {name} in {model} is for {min(takes, gives) // patch} channels, and the VAE in {latents.folder} has "
            f"latents of {latents.channels}: they do not belong together"
        )
    raise ValueError(
        f"the {name} in {model} takes {takes} channels and gives {gives}, so it takes more than the sample: {BY_HAND} "
        "with a network that adds the other channels itself"
    )


def _on_meta(model: Path, class_name: str) -> Any:
    """The network of a field by its config alone, on the meta device.

    Raises:
        ValueError: diffusers cannot make it, or its numbers are larger than any model's: of layers without end the
            memory would be full before there is one.
    """
    check_numbers(read_json(model / "config.json"), str(model / "config.json"))
    made = stock_model(class_name)
    cannot = f"diffusers cannot make a {class_name} of {model / 'config.json'}"
    with refused(cannot, "fetch it again"), torch.device("meta"):
        return FAMILIES[class_name](made.from_config(made.load_config(model), **mended(model)).eval())


def mended(model: Path) -> dict[str, Any]:
    """What the config of a model does not say, as its class said it by itself before: of how many waves a Dance
    Diffusion makes its time, which are channels beside the signal."""
    config = read_json(model / "config.json")
    beside = config.get("extra_in_channels")
    is_beside = config.get("_class_name") == "UNet1DModel" and not config.get("use_timestep_embedding") and beside
    return {"time_embedding_dim": beside} if is_beside and config.get("time_embedding_dim") is None else {}


@torch.no_grad()
def _check_call(network: Any, model: Path) -> None:
    """Call a network on the meta device, where nothing is computed, with all that it says it needs.

    Raises:
        ValueError: it cannot be called, or does not give what a field needs.
    """
    name, config = type(network.model).__name__, network.model.config
    step = side_step(config)
    shape = network.shape if network.has_size else (network.channels, 8 * step, 8 * step)
    sides = shape[1:][-2:]
    if any(side % step for side in sides):
        raise ValueError(
            f"the {name} in {model} says that its samples are {' x '.join(map(str, sides))}, and it takes sides "
            f"that are multiples of {step}: write the sample_size that it was trained with into its config.json"
        )
    x, cond = torch.empty(1, *shape, device="meta"), network.blank(shape, 1, 8, "meta")
    try:
        given = tuple(network(x, torch.zeros(1, device="meta"), **cond).shape)
        why = "" if given == (1, *shape) else f"it gives {given[1:]} for a sample {shape}"
    except Exception as error:  # whatever a model's code makes of shapes that do not fit
        why = shortened(f"{type(error).__name__}: {error}", 120)
    if why:
        told = f" with {', '.join(cond)}" if cond else ""
        raise ValueError(f"the {name} in {model} cannot be called{told}, which its config asks for ({why}): {BY_HAND}")


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
    name = _RENAMED.get(config.get("_class_name", "of no class"), config.get("_class_name", "of no class"))
    kind = scheduler_class(str(name))
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(
            f"the scheduler in {folders[0]} is a {shortened(str(name), 60)}, which diffusers does not have: {BY_HAND}"
        )
    made: Any = kind
    with refused(f"diffusers cannot make a {name} of {folders[0] / 'scheduler_config.json'}", "fetch it again"):
        return made.from_config(todays_config(config))


def _latents(folder: Path, index: dict[str, Any], variant: str | None) -> Latents | None:
    """The latent space of a pipeline; None for a model of images.

    Raises:
        FileNotFoundError: the index names a VAE that is not there.
    """
    for name in VAE_FOLDERS:
        library, named = index.get(name) or (None, None)
        if (folder / name / "config.json").is_file():
            return Latents(folder / name, variant)
        if library is not None:
            raise FileNotFoundError(
                f"no VAE in {folder / name}: the model works on the latents of the {named} that model_index.json "
                f"names. Save it there (vae.save_pretrained({str(folder / name)!r}))"
            )
    return None
