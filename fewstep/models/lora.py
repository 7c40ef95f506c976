"""Low-rank adapters (LoRA, arXiv 2106.09685) of fields and flow maps, through peft.

A chosen layer ``W x`` becomes ``W x + (alpha / rank) B A x`` with W frozen, A random and B zero at first, so that a
fresh adapter changes nothing. ``fit`` then trains, averages and checkpoints the adapter alone.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.common.errors import briefly, refused
from fewstep.common.model_files import check_file, read_json
from fewstep.common.write_errors import cannot_write
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.lora_keys import read_adapter
from fewstep.networks import SecondTime, TwoTimeNetwork, new_parts

if TYPE_CHECKING:
    from peft import LoraConfig

Model = TypeVar("Model", bound=nn.Module)

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
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Their fast paths compute with the weights of the layers inside, past any adapter around these.
_CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def add_lora(
    model: NetworkField | FlowMap,
    rank: int = 8,
    alpha: float | None = None,
    targets: list[str] | str | None = None,
    dropout: float = 0.0,
) -> None:
    """Freeze a model and give its network an adapter that trains, in place; the outputs stay the same to the bit.

    What fewstep adds to a network, the second time of a flow map and the strength of guidance, is new and has nothing
    frozen worth keeping: it trains in full, beside the adapter.

    Args:
        model: a field or a flow map with a network.
        rank: r; a linear layer gets ``r (in + out)`` new weights, a convolution ``r (in k k + out)``.
        alpha: the adapter is scaled by ``alpha / rank``; the rank if not given, that is by 1.
        targets: the layers to adapt, by (the end of) their names, or one regular expression for whole names, as peft
            takes them. If not given: the attention projections ``to_q, to_k, to_v, to_out.0`` of large diffusers models
            (transformers, ``UNet2DConditionModel``), as diffusers' own scripts do, and ``conv_in`` where it takes an
            image beside the state; every linear layer and convolution of a ``UNet2DModel``, which has hardly any
            attention, and of any other network.
        dropout: of the adapter's input while training.

    Raises:
        ValueError: no layer of those names (lists what there is), a layer that cannot be adapted, an adapter that is
            there already, a rank, alpha or dropout that cannot be.
        ImportError: peft is not installed.

    >>> field = fewstep.load("./my-ddpm")
    >>> add_lora(field, rank=16)
    >>> fit(field, FlowMatching(), data, steps=2000)
    """
    _check_bare(model)
    if rank < 1:
        raise ValueError(f"the rank of an adapter is {rank}: it is 1 at least")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"the alpha of an adapter is {alpha}: it is more than 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout of an adapter is {dropout}: it lies in [0, 1)")
    peft = _peft()
    chosen, others = _choose(model, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        # peft goes by the ends of names too: what only ends like a chosen name is named here.
        exclude_modules=[name for name in others if any(name.endswith(f".{end}") for end in chosen)] or None,
    )
    _inject(model, config)


def has_lora(model: nn.Module) -> bool:
    """Whether there is an adapter in the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def merge_lora(model: Model) -> Model:
    """A copy of the model with the adapter added into its weights: plain layers, nothing frozen, the same outputs up
    to rounding. Without an adapter, just a copy."""
    model = deepcopy(model).requires_grad_(True)
    if not has_lora(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = _inner(model)
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        above, _, last = name.rpartition(".")
        setattr(network.get_submodule(above), last, layer.get_base_layer())
    del network.peft_config
    if "_hf_peft_config_loaded" in vars(network):
        del network._hf_peft_config_loaded
    return model


def save_adapter(model: NetworkField | FlowMap, folder: str | Path) -> Path:
    """Write the adapter of a model, as safetensors; returns the folder, which :func:`load_adapter` reads.

    * A field of a model that diffusers loads adapters for (``UNet2DConditionModel``, SD3, Flux):
      ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights(folder)``.
    * Any other, and every flow map: peft's ``adapter_model.safetensors`` and ``adapter_config.json``, for
      ``peft.PeftModel.from_pretrained(network, folder)``. What trains in full beside the adapter is in it, as peft's
      ``modules_to_save``.

    Raises:
        ValueError: the model has no adapter.
    """
    if not has_lora(model):
        raise ValueError(f"this {type(model).__name__} has no adapter to save: add_lora gives it one")
    network, folder = _inner(model), Path(folder).expanduser()
    with cannot_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _save(network, folder, for_diffusers=hasattr(network, "load_lora_adapter") and not isinstance(model, FlowMap))
    return folder


def _save(network: Any, folder: Path, for_diffusers: bool) -> None:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, adapter_name="default")
    options = _describe(network.peft_config["default"])
    if for_diffusers:
        prefix = _prefix(network)
        # As diffusers' save_lora_weights writes it; the metadata has the alpha, which the weights do not tell.
        metadata = json.dumps({f"{prefix}.{key}": value for key, value in options.items()}, indent=2, sort_keys=True)
        state = {f"{prefix}.{name}": _plain(value) for name, value in weights.items()}
        save_file(state, folder / DIFFUSERS_FILE, metadata={"format": "pt", "lora_adapter_metadata": metadata})
        return
    whole = network.peft_config["default"].modules_to_save or []
    for name in whole:
        weights |= {f"{name}.{key}": value for key, value in network.get_submodule(name).state_dict().items()}
    state = {f"base_model.model.{name}": _plain(value) for name, value in weights.items()}
    save_file(state, folder / PEFT_FILE, metadata={"format": "pt"})
    options = {"peft_type": "LORA", **options, "modules_to_save": whole or None}
    (folder / PEFT_CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n")


def load_adapter(model: NetworkField | FlowMap, folder: str | Path) -> None:
    """Give a model the adapter of a folder, or of one file of diffusers' form, in place: its base frozen, the adapter
    as it was saved, and trainable.

    Reads what :func:`save_adapter` writes, and adapters of diffusers' and peft's own in the same files, by whatever
    names a version of diffusers gave their weights (``fewstep.models.lora_keys``).

    Raises:
        FileNotFoundError: no adapter in the folder.
        ValueError: an adapter of another model, or one that is there already.
        ImportError: peft is not installed.
    """
    _check_bare(model)
    peft, network, folder = _peft(), _inner(model), Path(folder).expanduser()
    file = folder if folder.is_file() else folder / DIFFUSERS_FILE
    if file.is_file() and file.suffix == ".safetensors":
        check_file(file)
        options, weights = read_adapter(file, dict(network.named_modules()), _prefix(network))
        config = _config(options, file)
    elif (folder / PEFT_FILE).is_file() and (folder / PEFT_CONFIG).is_file():
        config = _config(read_json(folder / PEFT_CONFIG), folder / PEFT_CONFIG)
        weights = load_file(folder / PEFT_FILE)
    else:
        is_pickle = file.suffix == ".bin" or file.with_suffix(".bin").is_file()
        way = ". A .bin can run code when it is opened: load it with diffusers, and save it anew" if is_pickle else ""
        raise FileNotFoundError(f"no adapter in {folder}: {DIFFUSERS_FILE}, or {PEFT_FILE} and {PEFT_CONFIG}{way}")
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
    added = [f"{name}.{inner}" for name, part in _in_full(model).items() for inner, _ in part.named_modules() if inner]
    if added and not isinstance(config.exclude_modules, str):
        config.exclude_modules = [*(config.exclude_modules or ()), *added]
    try:
        _inject(model, config)
    except (re.error, TypeError, KeyError, AttributeError) as error:  # patterns that are none, ranks that are words
        raise ValueError(f"{wrong}: peft cannot add it ({briefly(error)})") from None
    if missing := peft.get_peft_model_state_dict(network, adapter_name="default").keys() - weights.keys():
        raise ValueError(f"{wrong}: it lacks {len(missing)} weights, one is {min(missing)}")
    try:
        peft.set_peft_model_state_dict(network, weights, adapter_name="default")
    except RuntimeError as error:
        raise ValueError(f"{wrong}: {briefly(error)}") from None
    network.load_state_dict(whole, strict=False)


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


def _check_bare(model: Any) -> None:
    if not isinstance(model, NetworkField | FlowMap):
        raise ValueError(f"a {type(model).__name__} has no network to adapt: adapters go into fields and flow maps")
    if has_lora(model):
        raise ValueError("there is an adapter in the model already: merge_lora(model) first, or train the one it has")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs peft, which is not installed: pip install 'fewstep[lora]'") from None
    return peft


def _inner(model: Any) -> Any:
    """What names go by: the diffusers model where it is all that the network has, else the network."""
    network: Any = model.network
    inner: Any = getattr(network, "model", None)
    is_all = hasattr(inner, "save_pretrained") and {*map(id, inner.parameters())} == {*map(id, network.parameters())}
    return inner if is_all else network


def _prefix(network: nn.Module) -> str:
    """How diffusers' pipelines call the model in a file of adapters."""
    return "unet" if "UNet" in type(network).__name__ else "transformer"  # TwoTimeUNet2DConditionModel too


def _in_full(model: NetworkField | FlowMap) -> dict[str, nn.Module]:
    """The modules that fewstep added to the network, by name."""
    network = _inner(model)
    found: dict[str, nn.Module] = {name: m for name, m in network.named_modules() if isinstance(m, SecondTime)}
    if isinstance(model.network, TwoTimeNetwork):
        new = {id(part) for part, _ in new_parts(network)}
        found |= {name: module for name, module in network.named_modules() if id(module) in new}
    return found


def _choose(model: NetworkField | FlowMap, targets: list[str] | str | None) -> tuple[list[str], list[str]]:
    """The names of the layers to adapt, and of the others of their kinds."""
    network = _inner(model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layers = {name: layer for name, layer in network.named_modules() if name and isinstance(layer, kinds)}
    barred = _barred(model)
    free = [name for name in layers if name not in barred]
    if targets is None:
        is_large = hasattr(network, "save_pretrained") and "UNet2DModel" not in type(network).__name__
        plain = [name for name in free if isinstance(layers[name], nn.Linear) or _is_plain(layers[name])]
        # With an image beside the state, what reads it has to train, or nothing would heed it.
        first, last = (getattr(network, name, None) for name in ("conv_in", "conv_out"))
        is_wide = first is not None and last is not None and first.in_channels > last.out_channels
        wanted = (*ATTENTION, "conv_in") if is_wide else ATTENTION
        chosen = [name for name in plain if is_large and _ends(name, wanted)] or plain
    elif isinstance(targets, str):
        try:
            chosen = [name for name in layers if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"targets {targets!r} is no regular expression ({error})") from None
    else:
        chosen = [name for name in layers if _ends(name, targets)]
    if not chosen:
        there = ", ".join(sorted({_end(name) for name in free})) or "none that can be adapted"
        wanted = "all linear layers and convolutions" if targets is None else repr(targets)
        raise ValueError(f"no layer of this {type(network).__name__} matches targets {wanted}; there is: {there}")
    if stuck := next((name for name in chosen if name in barred), None):
        raise ValueError(f"the layer {stuck} cannot be adapted, as {barred[stuck]}: leave it out of targets")
    return chosen, [name for name in layers if name not in chosen]


def _barred(model: NetworkField | FlowMap) -> dict[str, str]:
    """The layers that take no adapter, and why."""
    network, barred = _inner(model), {}
    for name, module in network.named_modules():
        if isinstance(module, _CLOSED):
            why = f"{type(module).__name__} uses its weights past any adapter"
            barred |= {f"{name}.{inner}".strip("."): why for inner, _ in module.named_modules()}
    for name, module in _in_full(model).items():
        barred |= {f"{name}.{inner}".strip("."): "it trains in full" for inner, _ in module.named_modules()}
    return barred


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a convolution of all channels: peft takes one in groups only at some ranks."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


def _ends(name: str, ends: Any) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _end(name: str) -> str:
    """The last word of a name, with its number if it ends in one: ``to_out.0``."""
    above, _, last = name.rpartition(".")
    return f"{above.rpartition('.')[2]}.{last}".lstrip(".") if last.isdigit() else last


def _inject(model: NetworkField | FlowMap, config: "LoraConfig") -> None:
    """Put the adapter of ``config`` in; then it, what is new and its ``modules_to_save`` train, and nothing else."""
    network = _inner(model)
    saved = config.modules_to_save or ()
    whole = {name: module for name, module in network.named_modules() if _ends(name, saved)} | _in_full(model)
    config.modules_to_save = None  # peft would wrap them; here they train as they are
    _peft().inject_adapter_in_model(config, network)
    network.peft_config["default"].modules_to_save = list(whole)
    model.requires_grad_(False)
    for name, weight in network.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            weight.requires_grad_(True)
    for module in whole.values():
        module.requires_grad_(True)
    for module in network.modules():
        if hasattr(module, "lora_A"):
            module.train(model.training)  # else its dropout would be on in a model that samples


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
