"""The files that a model is kept in: read with care, and nothing in them is run."""

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.common.errors import refused, shortened, shown
from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import plain_name
from fewstep.common.streamed import Keep, check_quantisation, streamed

WEIGHTS = "diffusion_pytorch_model"
_MOST_CLASSES = _MOST_NUMBER = 1 << 20
_MOST_LAYERS = 1000
_PARTS = re.compile(r"unet|transformer|scheduler|vae|vqvae|movq|projection_model|(text_encoder|tokenizer)(_\d)?")
ENCODER_WEIGHTS = "model"  # of a text encoder, as transformers writes them


def weight_files(name: str = WEIGHTS, variant: str | None = None) -> tuple[str, ...]:
    """The files of a model's weights of one variant (fp16, non_ema), None for the plain ones: whole, or in pieces."""
    if variant is None:
        return f"{name}.safetensors", f"{name}-?????-of-?????.safetensors"
    pieces = f"{name}.{variant}-?????-of-?????", f"{name}-?????-of-?????.{variant}"  # of today, and before
    return tuple(f"{stem}.safetensors" for stem in (f"{name}.{variant}", *pieces))


# The weights of a diffusers model, without its other variants.
WEIGHT_FILES = weight_files()


def weight_paths(folder: Path, name: str = WEIGHTS, variant: str | None = None) -> list[Path]:
    """The files in a folder that the weights of a model are read from: see :func:`variant_in`."""
    found = variant_in(folder, name, variant)
    return sorted(file for pattern in weight_files(name, found) for file in folder.glob(pattern))


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights of a model or a text encoder, of whatever variant."""
    return any(file for name in (WEIGHTS, ENCODER_WEIGHTS) for file in folder.glob(f"{name}*.safetensors"))


def variant_in(folder: Path, name: str = WEIGHTS, wanted: str | None = None) -> str | None:
    """Which variant of the weights in a folder is read: the one that is wanted, where it is there, else the plain ones
    (None), else the only one that there is.

    Raises:
        FileNotFoundError: there are several, and none of them is wanted.
    """
    form = re.compile(rf"{name}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors")
    matches = [form.fullmatch(file.name) for file in folder.glob(f"{name}*.safetensors")]
    found = {match[1] or match[2] for match in matches if match}
    if wanted in found:
        return wanted
    if None in found or not found:
        return None
    if len(found) == 1:
        only = str(next(iter(found)))
        warnings.warn(f"{folder} has its weights as the variant {only} alone: they are read", stacklevel=3)
        return only
    raise FileNotFoundError(
        f"no {name}.safetensors in {folder}, which has its weights as {', '.join(sorted(map(str, found)))}: say one of "
        f"them, variant={min(map(str, found))!r} of fewstep.load or --variant of a command"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The keys of a JSON file, none where there is no file.

    Raises:
        ValueError: it is no JSON, or has no keys; it is the index of a pipeline, and a part of it is no pair of names.
    """
    if not path.exists():
        return {}
    try:
        value = parse_json(read_text(path), str(path))
    except ValueError as error:
        raise ValueError(f"{error}: fetch or export the model again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} has no keys, it is {shown(value)}: fetch or export the model again")
    if path.name == "model_index.json":
        _check_parts(path, value)
    return value


def _check_parts(path: Path, index: dict[str, Any]) -> None:
    """That the parts which an index names are pairs of a library and a class, or of nulls."""
    for name, part in index.items():
        is_pair = isinstance(part, list) and [type(word) for word in part] in ([str, str], [type(None)] * 2)
        if _PARTS.fullmatch(name) and part is not None and not is_pair:
            raise ValueError(f"{path}: {name} is {shown(part)}, and a library and a class are needed: fetch it again")


# Pipelines that are diffusers' by another name.
_PIPELINES = {"WanAnyFlowPipeline": "AnyFlowPipeline"}


def class_of(index: dict[str, Any]) -> str:
    """The class of a pipeline by its index; one with code of its own has the file before it, ``["file", "Name"]``."""
    name = index.get("_class_name", "of no class")
    name = str(name[-1] if isinstance(name, list) and name else name)
    return _PIPELINES.get(name, name)


def load_weights(
    model_class: Any, folder: Path, variant: str | None = None, keep: Keep | None = None, **options: Any
) -> Any:
    """A diffusers model with the weights in its folder, of a variant if it is there, which are exactly its own. Those
    that bitsandbytes quantised are made whole.

    Args:
        keep: what puts each tensor into the model, as it is read (see :func:`streamed`).
        options: of its ``from_pretrained``.

    Raises:
        FileNotFoundError, ValueError: as :func:`check_weights`, or weights that are not those of its config.json, or
            that are quantised in another way.
    """
    check_weights(folder, variant=variant)
    config, where = read_json(folder / "config.json"), str(folder / "config.json")
    is_quantised = check_quantisation(config, folder)
    check_numbers(config, where)
    _check_kinds(model_class, config, where)
    if keep is not None or is_quantised:
        options.pop("torch_dtype", None)  # each is float32, or as it is kept
        with quietly():
            return streamed(model_class, folder, weight_paths(folder, variant=variant), keep, **options)
    options = {"output_loading_info": True, **plainly(model_class), **options}
    options["variant"] = variant_in(folder, wanted=variant)
    wrong = f"the weights in {folder} are not those of its config.json"
    report: Any
    with refused(f"diffusers cannot load the {model_class.__name__} in {folder}"), quietly():
        try:
            model, report = model_class.from_pretrained(folder, **options)
        except RuntimeError as error:
            model, report = None, _first_line(error)
    if model is None:
        raise ValueError(f"{wrong}: {report}")
    # diffusers would leave what is missing as random numbers, with a warning.
    for what in ("missing", "unexpected"):
        if names := report[f"{what}_keys"]:
            raise ValueError(f"{wrong}: {len(names)} are {what}, one is {names[0]!r}")
    return model


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """That the numbers which a network or a schedule is made of are none that no machine could make: its code would go
    on for hours, or ask for all memory, before it failed.

    Raises:
        ValueError: one is, by its key.
    """
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key or "blocks" in key else _MOST_NUMBER
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{where}: {key} is {shown(value)}, and {most:,} is the most that fewstep makes")


def _check_kinds(model_class: type[Any], config: Mapping[str, Any], where: str) -> None:
    """That numbers are where a class has numbers by default: of a text, or of true, some networks are made that fail
    when they are called.

    Raises:
        ValueError: one is not, by its key.
    """
    made = [kind.__init__ for kind in reversed(model_class.__mro__) if "__init__" in vars(kind)]
    usual = {p.name: p.default for init in made for p in inspect.signature(init).parameters.values()}
    for key, value in config.items():
        default, given = (v if isinstance(v, list | tuple) else [v] for v in (usual.get(key), value))
        is_number = bool(default) and all(type(number) in (int, float) for number in default)
        if is_number and any(isinstance(one, bool | str | dict) for one in given):
            raise ValueError(f"{where}: {key} is {shown(value)}, and numbers are needed: export or fetch it again")


def put_in(model: nn.Module, weights: Mapping[str, Tensor], wrong: str) -> None:
    """Load weights that were read from a file into a model, which they are to fit exactly.

    Raises:
        ValueError: they do not; ``wrong`` says of which they are not, and the first of them is named.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{wrong}: {_first_line(error)}") from None


def _first_line(error: RuntimeError) -> str:
    """The first of what torch has to say of weights that do not fit."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return shortened(next((line for line in lines if not line.startswith("Error(s)")), lines[0]).split(". ")[0], 200)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what diffusers and transformers log of weights that do not fit: what is wrong is raised."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def plainly(model_class: Any) -> dict[str, Any]:
    """The options of ``from_pretrained`` for the plain way of loading safetensors: the other one needs accelerate, and
    words its errors otherwise. A model that keeps parts of it in float32 has that one alone."""
    has_choice = getattr(model_class, "_keep_in_fp32_modules", None) is None
    return {"use_safetensors": True, **({"low_cpu_mem_usage": False} if has_choice else {})}


def class_names_in(folder: Path) -> tuple[str, ...]:
    """What the classes of a pipeline are called, each at its number, as its index says (``id2label``); empty for those
    in between that it does not name."""
    said = read_json(folder / "model_index.json").get("id2label") or {}
    try:
        names = {int(number): str(name) for number, name in said.items()}
    except (ValueError, AttributeError):
        names = {-1: ""}
    if not all(0 <= number < _MOST_CLASSES for number in names):
        raise ValueError(f"id2label in {folder / 'model_index.json'} is {shown(said)}: names by number are needed")
    return tuple(names.get(number, "") for number in range(max(names, default=-1) + 1))


def check_weights(model: Path, name: str = WEIGHTS, variant: str | None = None) -> None:
    """That a model's weights are there, as safetensors, and whole; ``name`` is how their files begin."""
    files = weight_paths(model, name, variant)
    if not files and list(model.glob("*.bin")):
        raise FileNotFoundError(
            f"{model} has its weights in .bin files only, and a .bin can run code when it is opened: if you trust it, "
            "open it with diffusers and write it anew, model.save_pretrained(folder, safe_serialization=True)"
        )
    if not files:
        raise FileNotFoundError(f"no weights in {model}: {name}.safetensors is missing")
    for file in files:
        check_file(file)
    for listed in model.glob("*.safetensors.index.json"):
        places = read_json(listed).get("weight_map")
        for name in sorted(set(map(str, places.values() if isinstance(places, dict) else []))):
            if not (model / plain_name(name, listed)).is_file():
                raise FileNotFoundError(f"{model / name} is missing, which {listed.name} names: fetch it")


def check_file(file: Path) -> None:
    """That a safetensors file is there and whole."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: fetch or export the model again")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error}): fetch or export the model again") from None
