"""The files that a model is kept in: read with care, and nothing in them is run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fewstep.received import plain_name

WEIGHTS = "diffusion_pytorch_model"
# The weights of a diffusers model, whole or in pieces, without its other variants (fp16, non_ema).
WEIGHT_FILES = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}-?????-of-?????.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none.

    Raises:
        ValueError: it is no JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or export the model again") from None


def load_weights(model_class: Any, folder: Path) -> Any:
    """A diffusers model with the weights in its folder, which are exactly its own.

    Raises:
        FileNotFoundError, ValueError: as :func:`check_weights`, or weights that are not those of its config.json.
    """
    check_weights(folder)
    wrong = f"the weights in {folder} are not those of its config.json"
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **plainly(model_class))
    except RuntimeError as error:
        raise ValueError(f"{wrong}: {' '.join(str(error).split('. ')[0].split())}") from None
    # diffusers would leave what is missing as random numbers, with a warning.
    for what in ("missing", "unexpected"):
        if names := report[f"{what}_keys"]:
            raise ValueError(f"{wrong}: {len(names)} are {what}, one is {names[0]!r}")
    return model


def plainly(model_class: Any) -> dict[str, Any]:
    """The options of ``from_pretrained`` for the plain way of loading safetensors: the other one needs accelerate, and
    words its errors otherwise. A model that keeps parts of it in float32 has that one alone."""
    has_choice = getattr(model_class, "_keep_in_fp32_modules", None) is None
    return {"use_safetensors": True, **({"low_cpu_mem_usage": False} if has_choice else {})}


def class_names_in(folder: Path) -> tuple[str, ...]:
    """What the classes of a pipeline are called, each at its number, as its index says (``id2label``); empty for those
    in between that it does not name."""
    said = read_json(folder / "model_index.json").get("id2label") or {}
    names = {int(number): str(name) for number, name in said.items()}
    return tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))


def check_weights(model: Path, names: Sequence[str] = WEIGHT_FILES) -> None:
    """That a model's weights are there, as safetensors, and whole; ``names`` are those of diffusers' models."""
    files = sorted(file for pattern in names for file in model.glob(pattern))
    if not files and list(model.glob("*.bin")):
        raise FileNotFoundError(
            f"{model} has its weights in .bin files only, and a .bin can run code when it is opened: if you trust it, "
            "open it with diffusers and write it anew, model.save_pretrained(folder, safe_serialization=True)"
        )
    if not files:
        raise FileNotFoundError(f"no weights in {model}: {names[0]} is missing")
    for file in files:
        check_file(file)
    for listed in model.glob("*.safetensors.index.json"):
        places = read_json(listed).get("weight_map")
        for name in sorted(set(map(str, places.values() if isinstance(places, dict) else []))):
            if not (model / plain_name(name, listed)).is_file():
                raise FileNotFoundError(f"{model / name} is missing, which {listed.name} names: fetch it")


def check_file(file: Path) -> None:
    """That a safetensors file is there and whole."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: fetch or export the model again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): fetch or export the model again") from None
