"""What folders of models are written with: whole or not at all, of new parts and of those that lie elsewhere."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.latents import Latents
from fewstep.lora import DIFFUSERS_FILE, PEFT_CONFIG
from fewstep.model_files import WEIGHT_FILES, WEIGHTS, check_weights, read_json
from fewstep.prompts import Prompts, text_parts

# The weights of a text encoder of transformers, whole or in pieces.
ENCODER_FILES = tuple(file.replace(WEIGHTS, "model") for file in WEIGHT_FILES)


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is something else than a model, or one that is there and may not be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marks = ("model_index.json", "config.json", "unet/config.json", "transformer/config.json")
    marks += (PEFT_CONFIG, DIFFUSERS_FILE)
    if not any((folder / name).is_file() for name in marks):
        raise ValueError(f"{folder} is there and is no model: nothing in it is overwritten, export to another folder")
    if not overwrite:
        raise FileExistsError(f"{folder} is there already: export to another folder, or overwrite it (overwrite=True)")


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end, and leaves nothing behind where it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_part(part: Any, folder: Path) -> None:
    """A model or scheduler, without the path that it was loaded from: that is the business of its maker."""
    part.save_pretrained(folder)
    config = folder / part.config_name
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    write_json(config, values)


def write_vae(latents: Latents, folder: Path) -> list[str]:
    """Write a VAE into a new folder, from the one it is in if it has one; returns its entry in ``model_index.json``."""
    if latents.folder is None:
        save_part(latents.vae, folder)
    else:
        copy_part(latents.folder, folder, ("*.json", *WEIGHT_FILES))
    return ["diffusers", vae_config(latents)["_class_name"]]


def vae_config(latents: Latents) -> dict[str, Any]:
    """The config of a VAE, without loading it."""
    if latents.folder is None:
        return {**latents.vae.config, "_class_name": type(latents.vae).__name__}
    return read_json(latents.folder / "config.json")


def copy_part(source: Path, folder: Path, only: Sequence[str] = ("*",)) -> None:
    """Copy the files of a pipeline's part into a new folder, without the path that it was loaded from."""
    folder.mkdir()
    for file in {file for pattern in only for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, folder / file.name)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        values = read_json(folder / name)
        if values.pop(key, None) is not None:
            write_json(folder / name, values)


def check_text(text: Prompts) -> None:
    """That all that encodes prompts is there: tokenizers, and text encoders with whole weights.

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    for name in text_parts(text.index):
        part = text.folder / name
        if not part.is_dir():
            raise FileNotFoundError(f"no {name} in {text.folder}, which its model_index.json names: fetch it")
        if name.startswith("text_encoder"):
            check_weights(part, ENCODER_FILES)


def write_text(text: Prompts, folder: Path) -> dict[str, Any]:
    """Copy tokenizers and text encoders into the folder of a model; returns their entries in ``model_index.json``."""
    parts = text_parts(text.index)
    for name in parts:
        files = ("config.json", "*.safetensors.index.json", *ENCODER_FILES)
        is_encoder = name.startswith("text_encoder")
        copy_part(text.folder / name, folder / name, files if is_encoder else ("*.json", "*.txt", "*.model"))
    kept = {key: text.index[key] for key in ("force_zeros_for_empty_prompt",) if key in text.index}
    return {"text": {"pipeline": text.pipeline, **kept}, **{name: text.index[name] for name in parts}}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
