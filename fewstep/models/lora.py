"""Low-rank adapters (LoRA, arXiv 2106.09685) of fields and flow maps, through peft.

A chosen layer ``W x`` becomes ``W x + (alpha / rank) B A x`` with W frozen, A random and B zero at first, so that a
fresh adapter changes nothing. ``fit`` then trains, averages and checkpoints the adapter alone.
"""

import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.networks import OfDiffusers, SecondTime, TwoTimeNetwork, new_parts
from fewstep.networks.frozen_base import restore_base

if TYPE_CHECKING:
    from peft import LoraConfig

Model = TypeVar("Model", bound=nn.Module)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
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
            (transformers, ``UNet2DConditionModel``), as diffusers' own scripts do, ``to_qkv_mlp_proj`` of Flux.2's
            single blocks, and the first layer where it takes an image beside the state; every linear layer and
            convolution of a ``UNet2DModel``, which has hardly any attention, and of any other network.
        dropout: of the adapter's input while training.

    Raises:
        ValueError: no layer of those names (lists what there is), a layer that cannot be adapted, an adapter that is
            there already, a rank, alpha or dropout that cannot be.
        ImportError: peft is not installed.

    >>> field = fewstep.load("./my-ddpm")
    >>> add_lora(field, rank=16)
    >>> fit(field, FlowMatching(), data, steps=2000)
    """
    check_bare(model)
    if rank < 1:
        raise ValueError(f"the rank of an adapter is {rank}: it is 1 at least")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"the alpha of an adapter is {alpha}: it is more than 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout of an adapter is {dropout}: it lies in [0, 1)")
    peft = import_peft()
    chosen, others = _choose(model, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        # peft goes by the ends of names too: what only ends like a chosen name is named here.
        exclude_modules=[name for name in others if any(name.endswith(f".{end}") for end in chosen)] or None,
    )
    inject(model, config)


def has_lora(model: nn.Module) -> bool:
    """Whether there is an adapter in the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def merge_lora(model: Model) -> Model:
    """A copy of the model with the adapter added into its weights: plain layers, nothing frozen, the same outputs up
    to rounding. Without an adapter, just a copy."""
    model = deepcopy(model)
    restore_base(model)
    model.requires_grad_(True)
    if not has_lora(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = inner_network(model)
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        above, _, last = name.rpartition(".")
        setattr(network.get_submodule(above), last, layer.get_base_layer())
    del network.peft_config
    if "_hf_peft_config_loaded" in vars(network):
        del network._hf_peft_config_loaded
    return model


def check_bare(model: Any) -> None:
    if not isinstance(model, NetworkField | FlowMap):
        raise ValueError(f"a {type(model).__name__} has no network to adapt: adapters go into fields and flow maps")
    if has_lora(model):
        raise ValueError("there is an adapter in the model already: merge_lora(model) first, or train the one it has")


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs peft, which is not installed: pip install 'fewstep[lora]'") from None
    return peft


def inner_network(model: Any) -> Any:
    """What names go by: the diffusers model where it is all that the network has, else the network."""
    network: Any = model.network
    inner: Any = getattr(network, "model", None)
    is_all = hasattr(inner, "save_pretrained") and {*map(id, inner.parameters())} == {*map(id, network.parameters())}
    return inner if is_all else network


def trained_in_full(model: NetworkField | FlowMap) -> dict[str, nn.Module]:
    """The modules that fewstep added to the network, by name."""
    network = inner_network(model)
    found: dict[str, nn.Module] = {name: m for name, m in network.named_modules() if isinstance(m, SecondTime)}
    if isinstance(model.network, TwoTimeNetwork):
        new = {id(part) for part, _ in new_parts(network)}
        found |= {name: module for name, module in network.named_modules() if id(module) in new}
    return found


def _choose(model: NetworkField | FlowMap, targets: list[str] | str | None) -> tuple[list[str], list[str]]:
    """The names of the layers to adapt, and of the others of their kinds."""
    network = inner_network(model)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layers = {name: layer for name, layer in network.named_modules() if name and isinstance(layer, kinds)}
    barred = _barred(model)
    free = [name for name in layers if name not in barred]
    if targets is None:
        is_large = hasattr(network, "save_pretrained") and "UNet2DModel" not in type(network).__name__
        plain = [name for name in free if isinstance(layers[name], nn.Linear) or _is_plain(layers[name])]
        # With an image beside the state, what reads it has to train, or nothing would heed it.
        wanted = (*ATTENTION, *_reads_image(model.network, network))
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


def _reads_image(own: nn.Module, inner: Any) -> list[str]:
    """The layer that takes an image beside the state, where there is one."""
    if isinstance(own, OfDiffusers):
        return [own.first] if own.image_channels else []
    first, last = (getattr(inner, name, None) for name in ("conv_in", "conv_out"))
    return ["conv_in"] if first is not None and last is not None and first.in_channels > last.out_channels else []


def _barred(model: NetworkField | FlowMap) -> dict[str, str]:
    """The layers that take no adapter, and why."""
    network, barred = inner_network(model), {}
    for name, module in network.named_modules():
        if isinstance(module, _CLOSED):
            why = f"{type(module).__name__} uses its weights past any adapter"
            barred |= {f"{name}.{inner}".strip("."): why for inner, _ in module.named_modules()}
    for name, module in trained_in_full(model).items():
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


def inject(model: NetworkField | FlowMap, config: "LoraConfig") -> None:
    """Put the adapter of ``config`` in; then it, what is new and its ``modules_to_save`` train, and nothing else."""
    network = inner_network(model)
    saved = config.modules_to_save or ()
    whole = {name: module for name, module in network.named_modules() if _ends(name, saved)} | trained_in_full(model)
    config.modules_to_save = None  # peft would wrap them; here they train as they are
    import_peft().inject_adapter_in_model(config, network)
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
