"""Models from disk: a diffusers folder or an export of fewstep's, as a velocity field or a flow map."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fewstep.common.disk import put_right
from fewstep.common.errors import unknown
from fewstep.common.model_files import check_file, check_weights, class_names_in, class_of, put_in, read_json
from fewstep.common.trust import check_folder, trusting
from fewstep.flows.described import AGAIN
from fewstep.flows.description import check_description, code_named, made_again
from fewstep.flows.fields import DiffusionField, NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Forward, Linear, Reversed
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.schedules import PREDICTION_TYPES
from fewstep.flows.shifts import shift_said
from fewstep.flows.tabulated import Tabulated
from fewstep.latents.prompts import Prompts
from fewstep.latents.vae import Latents
from fewstep.models.converted import is_converted, load_converted
from fewstep.models.diffusers_configs import look_into
from fewstep.models.diffusers_pipeline import field_of_pipeline, hub_files, lack_weights, load_field
from fewstep.models.manifests import Diffusion, read_map_index, read_timesteps
from fewstep.models.own_maps import strength_in
from fewstep.models.writing import check_text, knowing
from fewstep.networks import FAMILIES, STUDENTS
from fewstep.training.run_files import is_run

_PLAIN_WEIGHTS = "model.safetensors"


def load_folder(
    source: Any, *, trust: bool = False, variant: str | None = None, base: str = "float32"
) -> VelocityField | FlowMap:
    """A model from a folder that is no run, from the hub, or from a pipeline in memory, in evaluation mode: all that
    :func:`fewstep.load` takes but runs. Arguments and errors are its own; ``base`` is that of :func:`load_field`."""
    if not isinstance(source, str | Path):
        return field_of_pipeline(source).eval()
    folder = _find(source, variant=variant)
    if variant is not None and (_map_index(folder) or _plain_config(folder) or is_converted(folder)):
        raise has_one_variant(source, variant)
    if index := _map_index(folder):
        model = _load_map(folder, index)
    elif config := _plain_config(folder):
        with trusting(trust):
            model = _load_plain(folder, config)
    elif is_converted(folder):
        model = load_converted(folder)
    else:
        model = _own_map(load_field(folder, variant, base), folder)
    knowing(model, folder)
    model.source = str(folder.resolve()) if Path(source).expanduser().is_dir() else str(source)
    return model.eval()


def has_one_variant(source: str | Path, variant: str) -> ValueError:
    """What to raise where a variant of weights is asked for, and there are none."""
    return ValueError(f"variant {variant!r}: {source} has its weights once, and is no folder of diffusers' alone")


def find_configurations(source: str | Path) -> Path | None:
    """The folder of a diffusers model, of which the configurations alone are sure to be there: nothing else of a model
    on the hub is fetched. None for what is none (a run, an export, a converted model).

    Raises:
        FileNotFoundError: no such folder or hub model.
    """
    folder = _find(source, weights=False)
    others = is_run(folder), _map_index(folder), _plain_config(folder), is_converted(folder)
    return None if any(others) else folder


def _find(source: str | Path, weights: bool = True, variant: str | None = None) -> Path:
    name = str(source)
    folder = Path(source).expanduser()
    if name.startswith("fewstep:"):
        shipped = Path(__file__).parents[1] / "pretrained"
        known = [f.name for f in shipped.glob("*/")]
        if name.removeprefix("fewstep:") not in known:
            raise unknown("packaged model", name.removeprefix("fewstep:"), known)
        return shipped / name.removeprefix("fewstep:")
    if not folder.exists():
        put_right(folder)  # a process may have been killed while it replaced it
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file: a model is loaded from its folder")
    if isinstance(source, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"no folder {name}")
    if (above := folder.parent).is_dir() or above.name == "runs":  # meant as a path, not as a name on the hub
        beside = sorted(other.name for other in above.glob("*/")) if above.is_dir() else []
        near = get_close_matches(folder.name, beside, n=1, cutoff=0.5)
        holds = f"{above} holds {', '.join(beside[:8]) or 'no folders'}"
        raise FileNotFoundError(f"no folder {name}: {f'did you mean {above / near[0]}?' if near else holds}")
    # The configurations first: what fewstep cannot use is refused before its weights are fetched.
    configurations = _from_hub(name, "*.json")
    if not weights:
        return configurations
    if _plain_config(configurations):
        return _from_hub(name, "*.json", _PLAIN_WEIGHTS)
    if not is_converted(configurations) and not _map_index(configurations):
        look_into(configurations)
    folder = _from_hub(name, "*.json", *hub_files(variant))
    if lack_weights(folder):  # not of this variant: of any other, or the plain ones
        others = hub_files("*" if variant is None else None)
        folder = _from_hub(name, "*.json", *hub_files(variant), *others)
    return folder


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


def _map_index(folder: Path) -> dict[str, Any]:
    """The index of an export of a flow map; empty for any other folder."""
    index = read_json(folder / "model_index.json")
    return index if class_of(index) == "FlowMapPipeline" else {}


def _plain_config(folder: Path) -> dict[str, Any]:
    """The configuration of an export of a network that diffusers does not have; empty for any other folder."""
    config = read_json(folder / "config.json")
    return config if "_fewstep_version" in config else {}


def _load_map(folder: Path, index: dict[str, Any]) -> FlowMap:
    """An export of a flow map of one of diffusers' families; no code of the folder is run."""
    from fewstep.models.exported import has_part, load_network, network_folder

    said = read_map_index(folder)
    check_weights(folder / network_folder(index))
    if said.text:
        text = Prompts(folder)
        check_text(text)
    else:
        text = None
    native, prediction = _spoken(said.diffusion, read_timesteps(folder))
    network = _student(load_network(folder, index))
    if hasattr(network, "size") and said.shape:
        # What the config of the model does not say.
        network.size = said.shape[1] if len(said.shape) == 3 else said.shape[1:]
    model = FlowMap(network, native, prediction, path=Linear())
    model.gamma, model.guidance, model.text = said.gamma, said.guidance, text
    model.grid, model.shift = said.grid, None if said.shift is None else shift_said(said.shift.model_dump())
    model.class_names = class_names_in(folder)
    if has_part(index, "vae"):
        model.latents = Latents(folder / "vae")
        model.latents.check()
    return model


def _own_map(field: DiffusionField, folder: Path) -> DiffusionField | FlowMap:
    """The flow map that a model of diffusers is by itself, where it is one (HunyuanImage as distilled, AnyFlow)."""
    network: Any = field.network
    if not network.has_second_time:
        return field
    model = FlowMap(_student(network.model), field.native, field.prediction, path=field.path)
    model.latents, model.text, model.class_names = field.latents, field.text, field.class_names
    model.shift = field.shift
    model.guidance = strength_in(folder) if model.network.takes_guidance else None  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _student(model: Any) -> Any:
    """The network of a flow map around its model."""
    return STUDENTS[FAMILIES[type(model).__name__.removeprefix("TwoTime")]](model)


def _spoken(diffusion: Diffusion | None, timesteps: float) -> tuple[Trajectory, str]:
    """The native path of an export's network, and what it predicts there; ``fewstep.models.export.diffusion_of`` writes
    it."""
    if diffusion is None:
        return Reversed(timesteps), "flow"
    kind = diffusion.prediction_type
    if kind == "velocity":
        return Forward(timesteps), "velocity"
    if diffusion.sigma_data and diffusion.sigma_min and diffusion.sigma_max:
        native = Preconditioned(diffusion.sigma_data, diffusion.sigma_min, diffusion.sigma_max)
        return native, "v" if kind == "v_prediction" else "edm"
    kinds = {name: kind for kind, name in PREDICTION_TYPES.items()}
    if diffusion.right_angle is not None:
        return Cosine(diffusion.right_angle), kinds[kind]
    if diffusion.timesteps is not None:
        return Reversed(diffusion.timesteps), kinds[kind]
    if diffusion.log_ratios is None:
        raise ValueError(f"diffusion in model_index.json has no log_ratios, timesteps, right_angle or sigmas: {AGAIN}")
    return Tabulated(tuple(diffusion.log_ratios), diffusion.ends_in_noise), kinds[kind]


def _beside(folder: Path, name: str) -> str:
    """A name of code in a file of the folder, with the whole path."""
    file, _, inside = name.rpartition(":")
    return f"{folder.resolve() / file}:{inside}" if file.endswith(".py") else name


def _load_plain(folder: Path, config: dict[str, Any]) -> FlowMap | NetworkField:
    """An export of a network that diffusers does not have."""
    where = str(folder / "config.json")
    check_description(config, where)
    config = {
        **config,
        **{key: {**config[key], "name": _beside(folder, name)} for key, name in code_named(config).items()},
    }
    check_folder(folder, folder / "config.json", code_named(config))
    model = made_again(config, where)
    check_file(folder / _PLAIN_WEIGHTS)
    weights = load_file(folder / _PLAIN_WEIGHTS)
    put_in(model.network, weights, f"the weights in {folder} are not those of its config.json")
    return model
