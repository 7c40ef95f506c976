"""Models to disk, in a form that others load: diffusers reads an export of its models without fewstep installed.

The module is not called ``export``, as importing it would then hide the function of that name in ``fewstep``.
"""

import inspect
from dataclasses import asdict
from pathlib import Path
from shutil import copyfile
from typing import Any

from fewstep.common.errors import briefly
from fewstep.common.model_files import read_json
from fewstep.common.version import __version__
from fewstep.flows.chained import Chained
from fewstep.flows.description import NETWORKS, code_named, describe
from fewstep.flows.fields import DiffusionField, NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Forward, Linear, Reversed
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.schedules import PREDICTION_TYPES
from fewstep.flows.signature import image_channels, rate_of
from fewstep.flows.tabulated import Tabulated
from fewstep.models.folders import load_folder
from fewstep.models.own_maps import is_own_map
from fewstep.models.stock_steps import scheduler_of, shift_config
from fewstep.models.writing import (
    check_text,
    save_part,
    vae_config,
    write_json,
    write_text,
    write_vae,
)
from fewstep.networks import FAMILIES, EndNetwork, OfDiffusers, TwoTimeNetwork, UNet


def writer_of(model: FlowMap | VelocityField) -> Any:
    """The function that writes such a model, once it is clear that it can be written."""
    if isinstance(model, Chained):
        raise ValueError("a chain of blocks is kept as its folder, which fewstep.load takes: export a map of it")
    if not isinstance(model, FlowMap | NetworkField):
        raise ValueError(f"a {type(model).__name__} has no network of its own to export: export the field inside it")
    name = type(model.network).__name__
    if name in NETWORKS:
        return write_plain
    if not isinstance(model.network, OfDiffusers):
        if model.latents is not None or model.text is not None:
            raise ValueError(f"a {name} of one's own on the latents of a VAE cannot be exported: keep its run")
        try:
            describe(model)
        except ValueError as error:
            raise ValueError(f"this {type(model).__name__} cannot be exported: {error}") from None
        return write_plain
    known = (TwoTimeNetwork, EndNetwork) if isinstance(model, FlowMap) else tuple(FAMILIES.values())
    if not isinstance(model.network, known):
        raise ValueError(
            f"a {type(model).__name__} of a {name} cannot be exported, one of {', '.join(NETWORKS)} or of a model of "
            f"diffusers can ({', '.join(FAMILIES)}): keep model.network.state_dict(), and the checkpoints of its run"
        )
    if not model.path.same_as(Linear()):
        way = ": sample it from its run, or export it as a program (--format onnx)" if model.path.two_sided else ""
        raise ValueError(f"a model of diffusers is exported on the linear path, this one is on {model.path}{way}")
    if model.latents is not None:
        model.latents.check()
    if model.text is not None:
        check_text(model.text)
    if isinstance(model, FlowMap) and model.ends_alone:
        from fewstep.models.stock_pipeline import write_end

        if isinstance(model.network, UNet):
            raise ValueError("no pipeline of diffusers draws with a U-Net of images that is told no second time: say t")
        scheduler_of(model)
        return write_end
    if is_own_map(model):
        from fewstep.models.stock_pipeline import write_own_map

        return write_own_map
    if isinstance(model, FlowMap):
        diffusion_of(model)
        return _write_map
    if not isinstance(model.network, UNet):
        from fewstep.models.stock_pipeline import check_stock, write_stock

        check_stock(model)
        return write_stock
    if isinstance(model, DiffusionField) or (isinstance(model.native, Reversed) and model.prediction == "flow"):
        return write_field
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
        case Reversed(scale=scale), ("noise" | "data") as kind:
            return {"prediction_type": PREDICTION_TYPES[kind], "timesteps": scale}
        case Cosine(scale=scale), ("noise" | "data" | "v") as kind:
            return {"prediction_type": PREDICTION_TYPES[kind], "right_angle": scale}
        case Tabulated(log_ratios=table), ("noise" | "data" | "v") as kind:
            ends = {"ends_in_noise": True} if model.native.ends_in_noise else {}
            return {"prediction_type": PREDICTION_TYPES[kind], "log_ratios": table, **ends}
        case Preconditioned(sigma_data=data, sigma_min=least, sigma_max=most), ("edm" | "v") as kind:
            kind = "epsilon" if kind == "edm" else "v_prediction"
            return {"prediction_type": kind, "sigma_data": data, "sigma_min": least, "sigma_max": most}
    raise _no_counterpart(model)


def _write_map(model: FlowMap, folder: Path) -> None:
    """A pipeline that carries its code, and the code of its model where diffusers has none."""
    import diffusers

    from fewstep.networks.two_times.base import TwoTimes
    from fewstep.pipelines import flow_map
    from fewstep.pipelines.flow_map import CARRIED
    from fewstep.pipelines.source import whole

    network: Any = model.network
    part = "unet" if "UNet" in type(network.model).__name__ else "transformer"
    save_part(network.model, folder / part)
    (folder / "pipeline.py").write_text(whole(flow_map.__file__))
    library = "diffusers"
    if isinstance(network.model, TwoTimes):
        library = CARRIED
        (folder / part / f"{CARRIED}.py").write_text(whole(inspect.getfile(type(network.model))))

    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=_timesteps(model.native))
    save_part(scheduler, folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "FlowMapPipeline"],
        "_diffusers_version": diffusers.__version__,
        part: [library, type(network.model).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "diffusion": diffusion_of(model),
        "gamma": model.gamma,
        "grid": model.grid,
        "shift": None if model.shift is None else asdict(model.shift),
        "guidance": model.guidance,
        "shape": _shape(network),
        "needs": ", ".join(network.needed),
        "id2label": {str(number): name for number, name in enumerate(model.class_names) if name} or None,
    }
    if (rate := rate_of(model)) is not None:
        index["rate"] = rate
    if model.latents is not None:
        index |= {"vae": write_vae(model.latents, folder / "vae"), "factor": model.latents.factor}
    if model.text is not None:
        index |= write_text(model.text, folder)
    write_json(folder / "model_index.json", index)


def _shape(network: Any) -> list[int] | None:
    """That of one state; None where its config has no size."""
    return list(network.shape) if network.has_size else None


def write_field(model: NetworkField, folder: Path) -> None:
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
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=_timesteps(model.native), **shift_config(model)
    )


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
    size = _unet(model).config["sample_size"]
    if size is None or (model.latents is not None and not isinstance(size, int)):
        return "none knows the size of its samples" if size is None else "LDMPipeline draws squares alone"
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


def write_plain(model: FlowMap | NetworkField, folder: Path) -> None:
    """Weights and a configuration, for fewstep alone."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.network.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"_fewstep_version": __version__, **_carried(describe(model), folder)})
    if code_named(read_json(folder / "config.json")):
        try:
            again = load_folder(folder, trust=True)
        except (ImportError, ValueError, TypeError, RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"the code of the {type(model.network).__name__} does not make it again where it stands alone "
                f"({briefly(error)}): an export carries the file of its class alone, with "
                "imports of what is installed"
            ) from None
        del again


def _carried(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A description whose files of code are copied into the folder, and named as they are there."""
    copied: dict[str, str] = {}
    for key, name in code_named(config).items():
        file, _, inside = name.rpartition(":")
        if not file.endswith(".py"):
            continue
        if file not in copied:
            copied[file] = f"network{len(copied) + 1 if copied else ''}.py"
            copyfile(file, folder / copied[file])
        config = {**config, key: {**config[key], "name": f"{copied[file]}:{inside}"}}
    return config


def _unet(model: FlowMap | NetworkField) -> Any:
    network: Any = model.network
    return network.model


def _timesteps(native: Trajectory) -> int:
    """How many timesteps of diffusers there are from data to noise."""
    return round(native.scale) if isinstance(native, Reversed | Forward) else 1000
