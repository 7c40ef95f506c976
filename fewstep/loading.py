"""Models from disk: a diffusers folder, an export or a run of fewstep's, as a velocity field or a flow map."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from fewstep.errors import unknown
from fewstep.fields import DiffusionField, NetworkField, VelocityField, schedule_of
from fewstep.maps import FlowMap
from fewstep.networks import MLP, TwoTimeUNet, UNet
from fewstep.paths import Linear, Reversed, Tabulated, Trigonometric, VariancePreserving
from fewstep.paths import Path as Trajectory

# The names of prediction kinds in diffusers, for networks on a diffusion schedule.
PREDICTION_TYPES = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}
# What an export that is no diffusers folder may be made of.
NETWORKS: dict[str, type[nn.Module]] = {"MLP": MLP}
_TRAJECTORIES: dict[str, type[Any]] = {
    c.__name__: c for c in (Linear, Reversed, Tabulated, Trigonometric, VariancePreserving)
}

_BY_HAND = "wrap it by hand: DiffusionField(network, scheduler), or NetworkField(network, path, prediction)"
_WEIGHTS = "diffusion_pytorch_model"


def load(source: str | Path, *, device: str = "cpu") -> VelocityField | FlowMap:
    """A model from a folder, in evaluation mode.

    Args:
        source: one of

            * a diffusers folder with a ``UNet2DModel`` and a scheduler (a pipeline, or a bare model with
              ``scheduler_config.json`` beside it), as a velocity field on the linear path (arXiv 2506.02221);
            * an export of fewstep's, as what was exported;
            * a run folder, as what was trained;
            * ``fewstep:NAME``, a model that comes with fewstep;
            * ``owner/name``, a diffusers model on the Hugging Face hub.
        device: where it goes.

    Raises:
        FileNotFoundError: no such folder or hub model; a folder without model, scheduler or safetensors weights.
        ValueError: a model or scheduler that fewstep does not know, or a file that cannot be read.

    >>> teacher = fewstep.load("./my-ddpm")
    """
    folder = _find(source)
    if (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir():
        from fewstep.runs import load_run

        model = load_run(folder)
    elif (index := _read(folder / "model_index.json")) and _pipeline_name(index) == "FlowMapPipeline":
        model = _load_map(folder, index)
    elif (config := _read(folder / "config.json")) and "_fewstep_version" in config:
        model = _load_plain(folder, config)
    else:
        model = _load_diffusion(folder)
    return model.to(device).eval()


def _find(source: str | Path) -> Path:
    name = str(source)
    folder = Path(source).expanduser()
    if name.startswith("fewstep:"):
        shipped = Path(__file__).parent / "pretrained"
        known = [f.name for f in shipped.glob("*/")]
        if name.removeprefix("fewstep:") not in known:
            raise unknown("packaged model", name.removeprefix("fewstep:"), known)
        return shipped / name.removeprefix("fewstep:")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file: a model is loaded from its folder")
    if isinstance(source, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"no folder {name}")
    # The configurations first: what fewstep cannot use is refused before its weights are fetched.
    _check_diffusion(_from_hub(name, "*.json"))
    return _from_hub(name, "*.json", f"{_WEIGHTS}*.safetensors", f"unet/{_WEIGHTS}*.safetensors")


def _from_hub(name: str, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError) as error:  # OSError: no network, or offline by choice
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no folder {name} here, and it cannot be had from the Hugging Face hub ({reason}): check the name, or "
            f"fetch it where there is a network (hf download {name} --local-dir FOLDER) and load the folder"
        ) from None


def _load_diffusion(folder: Path) -> DiffusionField:
    """A diffusers model with its scheduler (Diff2Flow)."""
    from diffusers import UNet2DModel

    model, scheduler = _check_diffusion(folder)
    check_weights(model)
    wrong = f"the weights in {model} are not those of its config.json"
    try:
        # The plain way of loading: the other one needs accelerate, and words its errors otherwise.
        loaded: Any = UNet2DModel.from_pretrained(
            model, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except RuntimeError as error:
        raise ValueError(f"{wrong}: {' '.join(str(error).split('. ')[0].split())}") from None
    unet, report = loaded
    # diffusers would leave what is missing as random numbers, with a warning.
    for what in ("missing", "unexpected"):
        if names := report[f"{what}_keys"]:
            raise ValueError(f"{wrong}: {len(names)} are {what}, one is {names[0]!r}")
    return DiffusionField(UNet(unet), scheduler)


def _check_diffusion(folder: Path) -> tuple[Path, Any]:
    """The folder of the model, and the scheduler; without touching any weights."""
    import diffusers

    # In their own folders, or beside each other as in early repositories of diffusers.
    models = [f for f in (folder / "unet", folder / "transformer", folder) if (f / "config.json").is_file()]
    schedulers = [f for f in (folder / "scheduler", folder) if (f / "scheduler_config.json").is_file()]
    if not models:
        raise FileNotFoundError(
            f"no model in {folder}: a diffusers folder has unet/config.json or config.json, a run of fewstep's has "
            "recipe.yaml and checkpoints/"
        )
    config = _read(models[0] / "config.json")
    name = config.get("_class_name", "of no class")
    if name != "UNet2DModel":
        raise ValueError(f"the model in {models[0]} is a {name}, and fewstep.load knows UNet2DModel so far: {_BY_HAND}")
    if (embedding := config.get("time_embedding_type", "positional")) != "positional":
        raise ValueError(
            f"the UNet2DModel in {models[0]} has a {embedding} time embedding, not a positional: {_BY_HAND}"
        )
    if not schedulers:
        raise FileNotFoundError(
            f"no scheduler in {folder}: scheduler_config.json says what the model was trained on. Save the scheduler "
            f"there (scheduler.save_pretrained({str(folder)!r})), or {_BY_HAND}"
        )
    name = _read(schedulers[0] / "scheduler_config.json").get("_class_name", "of no class")
    scheduler_class = getattr(diffusers, name, None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
        raise ValueError(f"the scheduler in {schedulers[0]} is a {name}, which diffusers does not have: {_BY_HAND}")
    scheduler: Any = scheduler_class.from_pretrained(schedulers[0])
    schedule_of(scheduler)
    return models[0], scheduler


def _load_map(folder: Path, index: dict[str, Any]) -> FlowMap:
    """An export of a U-Net's flow map; no code of the folder is run."""
    from fewstep.pipelines import FlowMapPipeline

    check_weights(folder / "unet")
    pipeline = FlowMapPipeline.from_pretrained(folder)
    network = TwoTimeUNet(pipeline.unet)
    diffusion = index["diffusion"]
    if diffusion is None:
        native, prediction = Reversed(float(pipeline.scheduler.config["num_train_timesteps"])), "flow"
    else:
        kinds = {name: kind for kind, name in PREDICTION_TYPES.items()}
        native, prediction = Tabulated(tuple(diffusion["log_ratios"])), kinds[diffusion["prediction_type"]]
    model = FlowMap(network, native, prediction, path=Linear())
    model.gamma = index.get("gamma", 0.0)
    return model


def _load_plain(folder: Path, config: dict[str, Any]) -> FlowMap | NetworkField:
    """An export of a network that diffusers does not have."""
    from safetensors.torch import load_file

    name, options = config["network"]["name"], config["network"]["options"]
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    network = NETWORKS[name](**options)
    _check_file(folder / "model.safetensors")
    network.load_state_dict(load_file(folder / "model.safetensors"))
    native, path = (_trajectory(config[key]) for key in ("native", "path"))
    if config["_class_name"] != "FlowMap":
        return NetworkField(network, native, config["prediction"], path=path)
    model = FlowMap(network, native, config["prediction"], path=path)
    model.gamma = config.get("gamma", 0.0)
    return model


def _trajectory(config: dict[str, Any]) -> Trajectory:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config["options"].items()}
    return _TRAJECTORIES[config["name"]](**options)


def _pipeline_name(index: dict[str, Any]) -> str:
    name = index.get("_class_name", "")
    return name[1] if isinstance(name, list) else name


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or export the model again") from None


def check_weights(model: Path) -> None:
    """That a diffusers model's weights are there, as safetensors, and whole."""
    files = sorted(model.glob(f"{_WEIGHTS}.safetensors")) or sorted(model.glob(f"{_WEIGHTS}-*.safetensors"))
    if not files and list(model.glob("*.bin")):
        raise FileNotFoundError(
            f"{model} has its weights in .bin files only, and a .bin can run code when it is opened: if you trust it, "
            "open it with diffusers and write it anew, model.save_pretrained(folder, safe_serialization=True)"
        )
    if not files:
        raise FileNotFoundError(f"no weights in {model}: {_WEIGHTS}.safetensors is missing")
    for file in files:
        _check_file(file)


def _check_file(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: fetch or export the model again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): fetch or export the model again") from None
