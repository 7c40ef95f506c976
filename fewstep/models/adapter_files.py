"""Adapters in files: those of diffusers and of peft, written and read."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.common.errors import briefly, refused, unknown
from fewstep.common.model_files import check_file, read_json
from fewstep.common.write_errors import cannot_write
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.expert_adapters import apart, places_of, read_both
from fewstep.models.lora import check_bare, has_lora, import_peft, inject, inner_network, trained_in_full
from fewstep.models.lora_keys import KEYS, layers_of, prefix_of, read_adapter, to_kohya
from fewstep.models.own_maps import is_own_map
from fewstep.models.stock_steps import write_scheduler
from fewstep.pipelines.adapters import SECOND_TIME

if TYPE_CHECKING:
    from peft import LoraConfig

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What an adapter may say of itself: how its layers are found, and what they compute.
_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "bias", "lora_bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "modules_to_save",
)  # fmt: skip
_OF_NO_MATTER = (
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "init_lora_weights",
)  # fmt: skip


def save_adapter(model: NetworkField | FlowMap, folder: str | Path, keys: str | None = None) -> Path:
    """Write the adapter of a model, as safetensors; returns the folder, which :func:`load_adapter` reads.

    * A field of a model that diffusers loads adapters for (``UNet2DConditionModel``, SD3, Flux):
      ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights(folder)``. So for a flow map that is told
      no second time (``second_time="none"``), with the scheduler that draws with it in ``scheduler``. Of two experts
      (Wan 2.2) the adapter of the second is in ``transformer_2``, for ``load_into_transformer_2=True``.
    * Any other, and every other flow map: peft's ``adapter_model.safetensors`` and ``adapter_config.json``, for
      ``peft.PeftModel.from_pretrained(network, folder)``. What trains in full beside the adapter is in it, as peft's
      ``modules_to_save``.
    * A flow map with a second time, of such a model and with ``keys``: the file of the first kind, and
      ``second_time.safetensors`` with what trains in full. The pipeline of an export loads both
      (``load_lora_weights(folder)``), and adapters of its base beside them.

    Args:
        keys: the names of the weights: ``diffusers``; ``peft``; or ``kohya``, which older tools want of a U-Net
            of Stable Diffusion: ``lora_unet_..._to_q.lora_down.weight`` and an ``alpha`` a layer. Of transformers
            ComfyUI reads the names of diffusers. If not given, as above.

    Raises:
        ValueError: the model has no adapter, or none that these keys are for.
    """
    if not has_lora(model):
        raise ValueError(f"this {type(model).__name__} has no adapter to save: add_lora gives it one")
    network, folder = inner_network(model), Path(folder).expanduser()
    if keys not in (None, *KEYS):
        raise unknown("keys of an adapter", keys, KEYS)
    is_stock = not isinstance(model, FlowMap) or model.ends_alone or is_own_map(model)
    is_read, name = hasattr(network, "load_lora_adapter"), type(network).__name__
    if keys == "kohya" and not (is_read and name.removeprefix("TwoTime") == "UNet2DConditionModel"):
        raise ValueError(f"keys: kohya are for the U-Nets of Stable Diffusion, and this is a {name}: leave keys out")
    if keys == "diffusers" and not is_read:
        raise ValueError(f"keys: diffusers are for models that diffusers adapts, and a {name} is none: leave keys out")
    for_diffusers = is_read and (is_stock if keys is None else keys != "peft")
    with cannot_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _save(network, folder, for_diffusers, keys)
        if for_diffusers and not is_stock:
            save_file(_in_full(network), folder / SECOND_TIME, metadata={"format": "pt"})
        if for_diffusers and isinstance(model, FlowMap) and model.ends_alone:
            write_scheduler(model, folder)
    return folder


def _save(network: Any, folder: Path, for_diffusers: bool, keys: str | None) -> None:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, adapter_name="default")
    options = _describe(network.peft_config["default"])
    if keys == "kohya":
        scales = {layer: float(network.get_submodule(layer).scaling["default"]) for layer in layers_of(weights)}
        save_file(to_kohya(weights, scales), folder / DIFFUSERS_FILE, metadata={"format": "pt"})
        return
    if for_diffusers:
        files = places_of(network, folder, DIFFUSERS_FILE)
        each = {prefix_of(network): (options, weights)} if len(files) == 1 else apart(network, weights)
        for part, (said, own) in each.items():
            files[part].parent.mkdir(exist_ok=True)
            _save_stock(files[part], prefix_of(network), said, own)
        return
    whole = network.peft_config["default"].modules_to_save or []
    weights |= _in_full(network)
    state = {f"base_model.model.{name}": _plain(value) for name, value in weights.items()}
    save_file(state, folder / PEFT_FILE, metadata={"format": "pt"})
    options = {"peft_type": "LORA", **options, "modules_to_save": whole or None}
    (folder / PEFT_CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")


def _in_full(network: Any) -> dict[str, Tensor]:
    """The weights that train in full beside an adapter, by their names."""
    whole = network.peft_config["default"].modules_to_save or []
    named = {name: network.get_submodule(name).state_dict() for name in whole}
    return {f"{name}.{key}": _plain(value) for name, state in named.items() for key, value in state.items()}


def _save_stock(file: Path, prefix: str, options: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """As diffusers' ``save_lora_weights`` writes it; the metadata has the alpha, which the weights do not tell."""
    metadata = json.dumps({f"{prefix}.{key}": value for key, value in options.items()}, indent=2, sort_keys=True)
    state = {f"{prefix}.{name}": _plain(value) for name, value in weights.items()}
    save_file(state, file, metadata={"format": "pt", "lora_adapter_metadata": metadata})


def load_adapter(model: NetworkField | FlowMap, folder: str | Path) -> None:
    """Give a model the adapter of a folder, or of one file of diffusers' form, in place: its base frozen, the adapter
    as it was saved, and trainable.

    Reads what :func:`save_adapter` writes, and adapters of diffusers' and peft's own in the same files, by whatever
    names a version of diffusers gave their weights (``fewstep.models.lora_keys``), or other tools that diffusers reads.

    Raises:
        FileNotFoundError: no adapter in the folder.
        ValueError: an adapter of another model, or one that is there already.
        ImportError: peft is not installed.
    """
    check_bare(model)
    peft, network, folder = import_peft(), inner_network(model), Path(folder).expanduser()
    file = _file_in(folder)
    files = places_of(network, folder, DIFFUSERS_FILE)
    if len(files) > 1 and folder.is_file():
        raise ValueError(
            f"{folder} is one file, and this network has two experts, each with an adapter of its own: put that of the "
            f"first into a folder as {DIFFUSERS_FILE}, that of the second into transformer_2/ there"
        )
    if len(files) > 1 and any(one.is_file() for one in files.values()):
        options, weights = read_both(network, files)
        config = _config(options, folder)
    elif file.is_file() and file.suffix == ".safetensors":
        check_file(file)
        options, weights = read_adapter(file, network)
        config = _config(options, file)
    elif (folder / PEFT_FILE).is_file() and (folder / PEFT_CONFIG).is_file():
        config = _config(read_json(folder / PEFT_CONFIG), folder / PEFT_CONFIG)
        weights = load_file(folder / PEFT_FILE)
    else:
        is_pickle = file.suffix == ".bin" or file.with_suffix(".bin").is_file()
        way = ". A .bin can run code when it is opened: load it with diffusers, and save it anew" if is_pickle else ""
        there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:4])
        there = f", and there are {there}: name one of these files" if there else ""
        raise FileNotFoundError(
            f"no adapter in {folder}: {DIFFUSERS_FILE}, or {PEFT_FILE} and {PEFT_CONFIG}{there}{way}"
        )
    if file.name == DIFFUSERS_FILE and (file.parent / SECOND_TIME).is_file():
        check_file(file.parent / SECOND_TIME)
        weights = {**weights, **load_file(file.parent / SECOND_TIME)}
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    whole = {name: weights.pop(name) for name in list(weights) if ".lora_" not in name}
    wrong = f"the adapter in {folder} is not one of this {type(network).__name__}"
    layers, own = dict(network.named_modules()), dict(network.named_parameters())
    for name in (name.partition(".lora_")[0] for name in weights):
        if name not in layers:
            raise ValueError(f"{wrong}, which has no layer {name}")
    for name, value in whole.items():
        if name not in own or own[name].shape != value.shape:
            raise ValueError(f"{wrong}, which has no weight {name} of shape {tuple(value.shape)}")
    # Targets go by the ends of names, and what fewstep added has names that end like others: it has no adapter.
    added = [
        f"{name}.{inner}" for name, part in trained_in_full(model).items() for inner, _ in part.named_modules() if inner
    ]
    if added and not isinstance(config.exclude_modules, str):
        config.exclude_modules = [*(config.exclude_modules or ()), *added]
    try:
        inject(model, config)
    except (re.error, TypeError, KeyError, AttributeError) as error:  # patterns that are none, ranks that are words
        raise ValueError(f"{wrong}: peft cannot add it ({briefly(error)})") from None
    if missing := peft.get_peft_model_state_dict(network, adapter_name="default").keys() - weights.keys():
        raise ValueError(f"{wrong}: it lacks {len(missing)} weights, one is {min(missing)}")
    try:
        peft.set_peft_model_state_dict(network, weights, adapter_name="default")
    except RuntimeError as error:
        raise ValueError(f"{wrong}: {briefly(error)}") from None
    network.load_state_dict(whole, strict=False)


def _file_in(folder: Path) -> Path:
    """The file of an adapter of diffusers' form: in a folder of one file, that one, whatever it is called."""
    usual = folder / DIFFUSERS_FILE
    if folder.is_file() or usual.is_file() or (folder / PEFT_FILE).is_file():
        return folder if folder.is_file() else usual
    alone = [path for path in folder.glob("*.safetensors") if path.name != SECOND_TIME]
    return alone[0] if len(alone) == 1 else usual


def _config(options: dict[str, Any], file: Path) -> "LoraConfig":
    """The configuration of an adapter, of the options that say what its layers compute.

    Raises:
        ValueError: another option that is not as it is by default: some change the weights that are adapted, and some
            name a module that peft would import.
    """
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for key in options.keys() - {*_OPTIONS, *_OF_NO_MATTER}:
        if key in usual and options[key] not in (usual[key], None, False):
            raise ValueError(f"{file} has {key}: {str(options[key])[:60]}, and fewstep reads {', '.join(_OPTIONS)}")
    if (start := options.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise ValueError(f"{file} has init_lora_weights: {str(start)[:60]}, which changes the weights it is added to")
    with refused(f"peft cannot make an adapter of what {file} says", "save it anew"):
        return LoraConfig(**{key: options[key] for key in _OPTIONS if key in options})


def _describe(config: "LoraConfig") -> dict[str, Any]:
    """What of a configuration is not as it is by default, so that other versions of peft read it too."""
    usual = type(config)().to_dict()
    kept = ("r", "lora_alpha", "lora_dropout", "target_modules")
    left_out = ("peft_type", "inference_mode", "base_model_name_or_path", "modules_to_save")
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name in kept or (value != usual.get(name) and name not in left_out)
    }


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()
