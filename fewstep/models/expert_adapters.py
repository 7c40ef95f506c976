"""Adapters of two experts (Wan 2.2), a file each, as diffusers' pipelines load them: that of the first stands in the
folder itself, that of the second in ``transformer_2``, for ``load_lora_weights(..., load_into_transformer_2=True)``."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.common.model_files import check_file
from fewstep.models.lora_keys import layers_of, options_of, read_adapter
from fewstep.models.wan_experts import models_of

# What says of an adapter where it goes, and how large it is there.
_PLACED = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def places_of(network: Any, folder: Path, name: str) -> dict[str, Path]:
    """The files of the adapters of a network's models, by the names of these; one without experts has one."""
    return {part: folder / (part if part.endswith("_2") else "") / name for part in models_of(network)}


def apart(network: Any, weights: dict[str, Tensor]) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The options and the weights of each expert's adapter, of those of both, by the names of the experts."""
    found = {}
    for part, expert in models_of(network).items():
        own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        if own:
            ranks = {layer: len(own[f"{layer}.lora_A.weight"]) for layer in layers_of(own)}
            scales = {layer: expert.get_submodule(layer).scaling["default"] for layer in ranks}
            found[part] = options_of(own, {layer: scales[layer] * rank for layer, rank in ranks.items()}), own
    return found


def read_both(network: Any, files: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and weights of an adapter of two experts, of the files that are there, one of which is.

    Raises:
        ValueError: they are adapters of two kinds.
    """
    weights: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    kinds: list[dict[str, Any]] = []
    for part, file in files.items():
        if not file.is_file():
            continue
        check_file(file)
        options, own = read_adapter(file, models_of(network)[part])
        named = {f"{part}.{layer}": _alpha(layer, options) for layer in layers_of(own)}
        alphas, weights = alphas | named, weights | {f"{part}.{name}": value for name, value in own.items()}
        kinds.append({key: value for key, value in options.items() if key not in _PLACED})
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"the adapters in {', '.join(map(str, files.values()))} differ in more than their sizes")
    return {**kinds[0], **options_of(weights, alphas)}, weights


def _alpha(layer: str, options: dict[str, Any]) -> float:
    """That of a layer: peft takes the first pattern that is the end of its name."""
    patterns = options.get("alpha_pattern") or {}
    return next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), options["lora_alpha"])
