"""Adapters of diffusers' form, whatever their keys are called: each version of its scripts has its own names."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.common.errors import shown
from fewstep.common.reading import parse_json
from fewstep.models.lora_foreign import as_of_diffusers

# From the names of older versions to those of peft, in this order.
_RENAMED = (
    (r"^base_model\.model\.", ""),  # peft's own, in a file of diffusers' form
    (r"\.processor\.", "."),  # to 0.21: attention processors held the adapters
    (r"\.(to_q|to_k|to_v|to_out|add_q_proj|add_k_proj|add_v_proj|to_add_out)_lora\.", r".\1.lora."),
    (r"\.to_out\.lora", ".to_out.0.lora"),
    (r"\.lora(_linear_layer)?\.alpha$", ".alpha"),
    (r"\.(lora(_linear_layer)?\.|lora_)down\.", ".lora_A."),
    (r"\.(lora(_linear_layer)?\.|lora_)up\.", ".lora_B."),
    (r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight"),  # with the name of the adapter in it
)
# How the weights of an adapter may be called, where it is written.
KEYS = ("diffusers", "kohya", "peft")
_TEXT, _KOHYA, _COMFY = "text_encoder", "lora_unet_", "diffusion_model."
# DoRA's norms, and the parts of other kinds of adapters (LoHa, LoKr, changes of whole weights).
_OTHER_KINDS = (".dora_scale", "_w1", "_w2", "_w1_a", "_w1_b", "_w2_a", "_w2_b", ".diff", ".diff_b", ".reshape_weight")


def prefix_of(network: nn.Module) -> str:
    """How diffusers' pipelines call the model in a file of adapters."""
    return "unet" if "UNet" in type(network).__name__ else "transformer"  # TwoTimeUNet2DConditionModel too


def read_adapter(file: Path, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options of a LoRA of this model, and its weights by the names of peft: ``LAYER.lora_A.weight`` and
    ``LAYER.lora_B.weight``.

    An adapter of the text encoders in the same file is left out, with a warning. Names that no version of diffusers
    gave are read by its own code (``fewstep.models.lora_foreign``).

    Raises:
        ValueError: no adapter for it.
    """
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    metadata = parse_json(said, f"the metadata of {file}")
    if not isinstance(metadata, dict):
        raise ValueError(f"the metadata of {file} is {shown(metadata)}, and has no options of an adapter: save it anew")
    tensors, prefix = load_file(file), prefix_of(network)
    text = [name for name in tensors if name.startswith((_TEXT, "lora_te"))]
    layers = dict(network.named_modules())
    own_names = {name: value for name, value in tensors.items() if name not in text}
    weights, alphas = _sorted(own_names, layers, prefix)
    if any(layer not in layers for layer in layers_of(weights)):
        _check_plain(tensors, file)
        if (foreign := as_of_diffusers(own_names, network, file)) is not None:
            weights, alphas = _sorted(foreign, layers, prefix)
    if not any(".lora_A." in name for name in weights):
        there = min(tensors, default="nothing")
        raise ValueError(f"{file} has no adapter of a {prefix} (its first weight is {there}): is it one of this model?")
    if text:
        warnings.warn(
            f"{file} has an adapter of the text encoders too ({len(text)} weights): it is left out, and prompts are "
            "encoded as without it",
            stacklevel=4,
        )
    own = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    # What the metadata says is whole: without a pattern in it, all layers are alike.
    said = {"rank_pattern": {}, "alpha_pattern": {}, **own} if own else {}
    return {**options_of(weights, alphas), **said}, weights


def _sorted(
    tensors: Mapping[str, Any], layers: Collection[str], prefix: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights by the names of peft, and the alphas of layers."""
    known = {f"{_KOHYA}{layer.replace('.', '_')}": layer for layer in layers}
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    has_prefix = any(name.startswith(f"{prefix}.") for name in tensors)
    for name, value in tensors.items():
        if has_prefix and not name.startswith(f"{prefix}."):
            continue
        plain = name.removeprefix(_COMFY)  # which tools put before a model's own names too
        own = plain if plain.partition(".lora")[0].removesuffix(".alpha") in layers else name
        renamed = _renamed(own.removeprefix(f"{prefix}."), known)
        if renamed.endswith(".alpha"):
            alphas[renamed.removesuffix(".alpha").partition(".lora_")[0]] = float(value)
        else:
            weights[renamed] = value
    return weights, alphas


def _check_plain(tensors: Collection[str], file: Path) -> None:
    """That an adapter is low-rank alone: diffusers passes over what else a layer may have, in silence."""
    for name in tensors:
        if name.endswith(_OTHER_KINDS):
            raise ValueError(
                f"{file} is no plain LoRA ({name}): fewstep reads pairs of down and up alone. Merge it into the model "
                "with the tool that made it"
            )


def layers_of(weights: Collection[str]) -> list[str]:
    """The layers that an adapter of peft's names is of."""
    return sorted({name.partition(".lora_")[0] for name in weights})


def to_kohya(weights: dict[str, Tensor], scales: dict[str, float]) -> dict[str, Tensor]:
    """The weights of an adapter by kohya's names, with the ``alpha`` of each layer: its scale times the rank."""
    named = {}
    for layer, scale in scales.items():
        down, up = (weights[f"{layer}.lora_{side}.weight"] for side in "AB")
        name = f"{_KOHYA}{layer.replace('.', '_')}"
        named |= {f"{name}.lora_down.weight": down.detach().cpu().clone().contiguous()}
        named |= {f"{name}.lora_up.weight": up.detach().cpu().clone().contiguous()}
        named |= {f"{name}.alpha": torch.tensor(scale * len(down), dtype=down.dtype)}
    return named


def _renamed(name: str, known: dict[str, str]) -> str:
    layer, _, rest = name.partition(".")
    name = f"{known[layer]}.{rest}" if layer in known else name
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


def options_of(weights: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Any]:
    """Those of weights without metadata: the rank and scale of each layer. Without an alpha the scale is 1."""
    ranks = {name.partition(".lora_")[0]: len(value) for name, value in weights.items() if ".lora_A." in name}
    scales = {layer: alphas.get(layer, rank) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, scales))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        # ^: of this very name, not of another one that ends like it.
        "rank_pattern": {f"^{layer}": value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{layer}": value for layer, value in scales.items() if value != alpha},
    }
