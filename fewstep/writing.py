"""What folders of models are written with: whole or not at all, of new parts and of those that lie elsewhere."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import fewstep
from fewstep.disk import put_right, replace_folder
from fewstep.latents import Latents
from fewstep.model_files import WEIGHT_FILES, WEIGHTS, check_weights, read_json
from fewstep.prompts import Prompts, text_parts

# In every folder that fewstep writes: it alone says that the folder may be replaced.
MARK = "fewstep.json"
# The weights of a text encoder of transformers, whole or in pieces.
ENCODER_FILES = tuple(file.replace(WEIGHTS, "model") for file in WEIGHT_FILES)


def check_target(folder: Path, overwrite: bool, source: Any = None) -> None:
    """Refuse a folder that fewstep did not write, one that is there and may not be overwritten, and one that the run
    ``source`` needs to be opened."""
    put_right(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_ours(folder):
        raise ValueError(
            f"{folder} is there and is no model that fewstep wrote: nothing in it is overwritten, export to another "
            "folder"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} is there already: export to another folder, or overwrite it (overwrite=True)")
    for key, needed in _needed_by(source):
        if needed == folder or folder in needed.parents:
            raise ValueError(
                f"{folder} is the {key} of {source}, which could not be opened without it: export to another folder"
            )


def is_ours(folder: Path) -> bool:
    """Whether fewstep wrote a folder, as ``fewstep.json`` says. In exports of earlier versions names of its own do."""
    mark, config, index = (_said(folder / name) for name in (MARK, "config.json", "model_index.json"))
    return (
        "_fewstep_version" in {**mark, **config}
        or config.get("_class_name") == "FlowMapProgram"
        or "FlowMapPipeline" in (index.get("_class_name") or "")
    )


def _said(file: Path) -> dict[str, Any]:
    """What a file says, which may be anybody's: nothing, if it is no JSON of keys."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _needed_by(source: Any) -> list[tuple[str, Path]]:
    """The folders that a run is opened with, by their keys; none for anything else."""
    recipe = Path(source).expanduser() / "recipe.yaml" if isinstance(source, str | Path) else None
    if recipe is None or not recipe.is_file():
        return []
    said = yaml.safe_load(recipe.read_text())
    student, teacher = said.get("student") or {}, said.get("teacher") or {}
    named = {
        "student.start": student.get("start"),
        "teacher.source": teacher.get("source"),
        "teacher.guidance.weak": (teacher.get("guidance") or {}).get("weak"),
    }
    return [(key, Path(name).expanduser().resolve()) for key, name in named.items() if name]


@contextmanager
def aside(folder: Path, moments: tuple[float, float] | None = None) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` at the end (``replace_folder``), with the mark of fewstep in it.

    Args:
        moments: of the model that is written (``VelocityField.moments``); they are kept beside the mark.
    """
    with replace_folder(folder) as part:
        write_json(part / MARK, {"_fewstep_version": fewstep.__version__, "moments": moments})
        yield part


def moments_in(folder: Path) -> tuple[float, float] | None:
    """The moments that :func:`aside` kept."""
    mean_and_std = read_json(folder / MARK).get("moments")
    return None if mean_and_std is None else tuple(mean_and_std)


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
