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
from fewstep.model_files import WEIGHT_FILES, read_json


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is something else than a model, or one that is there and may not be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marks = ("model_index.json", "config.json", "unet/config.json", PEFT_CONFIG, DIFFUSERS_FILE)
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
    values = read_json(folder / "config.json")
    if values.pop("_name_or_path", None) is not None:
        write_json(folder / "config.json", values)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
