"""Models to disk, in a form that others load: diffusers reads an export of a U-Net without fewstep installed.

The module is not called ``export``, as importing it would then hide the function of that name in ``fewstep``.
"""

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import fewstep
from fewstep.drawing import image_channels
from fewstep.fields import DiffusionField, NetworkField, VelocityField
from fewstep.loading import NETWORKS, load
from fewstep.lora import has_lora, merge_lora, save_adapter
from fewstep.maps import FlowMap
from fewstep.model_card import card
from fewstep.networks import TwoTimeUNet, UNet
from fewstep.paths import Forward, Linear, Preconditioned, Reversed, Tabulated
from fewstep.paths import Path as Trajectory
from fewstep.schedules import PREDICTION_TYPES
from fewstep.writing import aside, check_target, save_part, vae_config, write_json, write_vae


def export(
    model: FlowMap | VelocityField | str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    method: str | None = None,
    quality: str | None = None,
    adapter: bool = False,
) -> Path:
    """Write a model as a folder, and return the folder.

    * A flow map of a ``UNet2DModel``: a diffusers pipeline that carries its own code,
      ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.
    * A velocity field of a ``UNet2DModel``: the stock model and scheduler, as a stock pipeline where one of diffusers
      can run it; the model card says where none can.
    * One of an ``MLP``: weights and a configuration for :func:`fewstep.load`.

    Those of a latent model have its VAE. :func:`fewstep.load` reads each of them. The folder appears whole or not at
    all.

    Args:
        model: the model, or the folder of a run or of anything else that ``fewstep.load`` takes.
        overwrite: whether an export that is there already is replaced.
        method: the objective it was trained by, for the model card; a run knows its own.
        quality: a Markdown table for the model card.
        adapter: write the adapter of a LoRA alone (``fewstep.lora.save_adapter``), not the model that it is added to.

    Raises:
        ValueError: a model that cannot be exported, or ``folder`` is something else than an export.
        FileNotFoundError: the VAE of a latent model is gone.
        FileExistsError: there is an export already, and overwrite is not set.

    >>> fewstep.export(student, "fast-pipeline", method="ITVM")
    """
    folder = Path(folder).expanduser().resolve()
    check_target(folder, overwrite)
    if adapter:
        from fewstep.runs import open_run

        model = open_run(model).model if isinstance(model, str | Path) else model
        with aside(folder) as part:
            save_adapter(model, part)  # pyright: ignore[reportArgumentType]
        return folder
    if isinstance(model, str | Path):
        method = method or _method_of(Path(model).expanduser())
        model = load(model)
    if has_lora(model):
        model = merge_lora(model)
    write = _writer(model)
    with aside(folder) as part:
        write(model, part)
        reason = no_pipeline(model) if write is _write_field else ""  # pyright: ignore[reportArgumentType]
        (part / "README.md").write_text(card(model, folder.name, method, quality, reason))
    return folder


def _writer(model: FlowMap | VelocityField) -> Any:
    """The function that writes such a model, once it is clear that it can be written."""
    if not isinstance(model, FlowMap | NetworkField):
        raise ValueError(f"a {type(model).__name__} has no network of its own to export: export the field inside it")
    name = type(model.network).__name__
    if name in NETWORKS:
        return _write_plain
    if not isinstance(model.network, TwoTimeUNet if isinstance(model, FlowMap) else UNet):
        raise ValueError(
            f"a {type(model).__name__} of a {name} cannot be exported, one of {', '.join(NETWORKS)} or of a diffusers "
            "UNet2DModel can: keep model.network.state_dict(), and the checkpoints of its run"
        )
    if not model.path.same_as(Linear()):
        raise ValueError(f"a U-Net is exported on the linear path, this one is on {model.path}")
    if model.latents is not None:
        model.latents.check()
    if isinstance(model, FlowMap):
        diffusion_of(model)
        return _write_map
    if isinstance(model, DiffusionField) or (isinstance(model.native, Reversed) and model.prediction == "flow"):
        return _write_field
    raise _no_counterpart(model)


def _no_counterpart(model: FlowMap | NetworkField) -> ValueError:
    return ValueError(
        f"a U-Net that predicts {model.prediction} on {model.native} has no counterpart in diffusers: to be exported "
        "it is trained as NetworkField(network, Reversed(), 'flow'), or started from a diffusion model"
    )


def diffusion_of(model: FlowMap | NetworkField) -> dict[str, Any] | None:
    """What the network of a model speaks, for the code that carries it (``fewstep.pipelines.flow_map``,
    ``fewstep.networks.flow_model``); None where that is diffusers' flow.

    Raises:
        ValueError: neither knows it.
    """
    match model.native, model.prediction:
        case Reversed(), "flow":
            return None
        case Forward(), "velocity":
            return {"prediction_type": "velocity"}
        case Tabulated(log_ratios=table), ("noise" | "data" | "v") as kind:
            return {"prediction_type": PREDICTION_TYPES[kind], "log_ratios": table}
        case Preconditioned(sigma_data=data, sigma_min=least, sigma_max=most), ("edm" | "v") as kind:
            kind = "epsilon" if kind == "edm" else "v_prediction"
            return {"prediction_type": kind, "sigma_data": data, "sigma_min": least, "sigma_max": most}
    raise _no_counterpart(model)


def _write_map(model: FlowMap, folder: Path) -> None:
    """A pipeline that carries its code, and the code of its model where diffusers has none."""
    import diffusers

    from fewstep.networks import class_time_unet
    from fewstep.pipelines import flow_map

    unet = _unet(model)
    save_part(unet, folder / "unet")
    shutil.copyfile(flow_map.__file__, folder / "pipeline.py")
    library = "diffusers"
    if type(unet).__module__ == class_time_unet.__name__:
        library = "class_time_unet"
        shutil.copyfile(class_time_unet.__file__, folder / "unet" / f"{library}.py")

    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=_timesteps(model.native))
    save_part(scheduler, folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "FlowMapPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": [library, type(unet).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "diffusion": diffusion_of(model),
        "gamma": model.gamma,
        "guidance": model.guidance,
    }
    if model.latents is not None:
        index["vae"] = write_vae(model.latents, folder / "vae")
    write_json(folder / "model_index.json", index)


def _write_field(model: NetworkField, folder: Path) -> None:
    """A stock model and scheduler; as a stock pipeline too, where diffusers has one that can run them."""
    import diffusers

    unet, scheduler = _unet(model), _scheduler(model)
    save_part(unet, folder / "unet")
    save_part(scheduler, folder / "scheduler")
    is_pipeline, vae = not no_pipeline(model), {}
    if model.latents is not None:
        name = "vqvae" if is_pipeline else "vae"
        vae = {name: write_vae(model.latents, folder / name)}
    if is_pipeline:
        write_json(
            folder / "model_index.json",
            {
                "_class_name": "LDMPipeline" if vae else "DDPMPipeline",
                "_diffusers_version": diffusers.__version__,
                **vae,
                "unet": ["diffusers", type(unet).__name__],
                "scheduler": ["diffusers", type(scheduler).__name__],
            },
        )


def _scheduler(model: NetworkField) -> Any:
    import diffusers

    if isinstance(model, DiffusionField):
        return model.scheduler
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=_timesteps(model.native))


def no_pipeline(model: NetworkField, scheduler: Any = None) -> str:
    """Why diffusers has no pipeline that samples this field of a ``UNet2DModel``; empty where it has one:
    ``DDPMPipeline``, or ``LDMPipeline`` for a latent model.

    Args:
        scheduler: the one that it is to run with; by default the one that is exported.
    """
    scheduler = _scheduler(model) if scheduler is None else scheduler
    if image_channels(model):
        return "none gives it the image that it takes beside the state"
    if model.network.classes:  # pyright: ignore[reportAttributeAccessIssue]
        return "none tells it its class"
    if not isinstance(_unet(model).config["sample_size"], int):
        return "none knows the size of its samples"
    # Both pipelines begin at standard noise, but for what the scheduler tells the second.
    level = getattr(scheduler, "init_noise_sigma", None)
    if model.latents is None:
        takes = inspect.signature(scheduler.step).parameters
        runs = "generator" in takes and (level is None or float(level) == 1)
        return "" if runs else f"DDPMPipeline does not go with its {type(scheduler).__name__}"
    config = vae_config(model.latents)
    if config.get("shift_factor") or config.get("latents_mean"):
        return "LDMPipeline does not bring latents into the units of its VAE"
    return "" if level is not None else f"LDMPipeline does not go with its {type(scheduler).__name__}"


def _write_plain(model: FlowMap | NetworkField, folder: Path) -> None:
    """Weights and a configuration, for fewstep alone."""
    from safetensors.torch import save_file

    network: Any = model.network
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "_class_name": "FlowMap" if isinstance(model, FlowMap) else "NetworkField",
            "_fewstep_version": fewstep.__version__,
            "network": {"name": type(network).__name__, "options": network.config},
            "native": _describe(model.native),
            "prediction": model.prediction,
            "path": _describe(model.path),
            **({"gamma": model.gamma, "guidance": model.guidance} if isinstance(model, FlowMap) else {}),
        },
    )


def _unet(model: FlowMap | NetworkField) -> Any:
    network: Any = model.network
    return network.model


def _timesteps(native: Trajectory) -> int:
    """How many timesteps of diffusers there are from data to noise."""
    return round(native.scale) if isinstance(native, Reversed | Forward) else 1000


def _describe(path: Trajectory) -> dict[str, Any]:
    return {"name": type(path).__name__, "options": dataclasses.asdict(path)}


def _method_of(run: Path) -> str | None:
    """The objective in a run's recipe; None for a folder that is no run."""
    import yaml

    recipe = run / "recipe.yaml"
    return yaml.safe_load(recipe.read_text())["objective"]["name"] if recipe.is_file() else None
