"""What folders of models are written with: whole or not at all, of new parts and of those that lie elsewhere."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.common.disk import put_right, replace_folder
from fewstep.common.model_files import (
    ENCODER_WEIGHTS,
    WEIGHT_FILES,
    WEIGHTS,
    check_weights,
    has_weights,
    read_json,
    variant_in,
    weight_files,
    weight_paths,
)
from fewstep.common.options import read_yaml
from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import copy_file, is_place
from fewstep.common.version import __version__
from fewstep.flows.fields import VelocityField
from fewstep.latents.prompts import Prompts, encoder_class, projection_class, text_parts
from fewstep.latents.vae import Latents
from fewstep.models.manifests import read_mark
from fewstep.models.wan_experts import SECOND
from fewstep.pipelines.stock_prompts import PROJECTION
from fewstep.training.run_files import RECIPE

# In every folder that fewstep writes: it alone says that the folder may be replaced.
MARK = "fewstep.json"
# The weights of a text encoder of transformers, whole or in pieces.
ENCODER_FILES = weight_files(ENCODER_WEIGHTS)
# What of a pipeline's part is copied: nothing that can run code when it is opened (of a tokenizer's template of chats
# transformers makes text in a sandbox), and of weights the plain ones (of variants see `copy_part`).
PART_FILES = ("config.json", "*_config.json", "*tokens*.json", "vocab.json", "tokenizer.json", "*.txt", "*.model")
PART_FILES += ("chat_template.jinja", "chat_template.json", "*.safetensors.index.json", *WEIGHT_FILES, *ENCODER_FILES)


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
        value = parse_json(read_text(file), str(file))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _needed_by(source: Any) -> list[tuple[str, Path]]:
    """The folders that a run is opened with, by their keys; none for anything else."""
    recipe = Path(source).expanduser() / RECIPE if isinstance(source, str | Path) else None
    if recipe is None or not recipe.is_file():
        return []
    said = read_yaml(recipe)
    found = []
    for key in ("student.start", "teacher", "teacher.source", "teacher.guidance.weak"):
        value = said
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            found.append((key, Path(value).expanduser().resolve()))
    return found


@contextmanager
def aside(folder: Path, model: Any = None) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` at the end (``replace_folder``), with the mark of fewstep in it.

    Args:
        model: what is written. What its weights do not say is kept beside the mark: the moments of its data, and of a
            field the coupling that it was trained with and the chain that it is (``VelocityField``).
    """
    with replace_folder(folder) as part:
        known = {name: getattr(model, name, "") for name in ("coupling", "chain")}
        moments = {"moments": getattr(model, "moments", None)}
        write_json(part / MARK, {"_fewstep_version": __version__, **moments, **{k: v for k, v in known.items() if v}})
        yield part


def moments_in(folder: Path) -> tuple[float, float] | None:
    """The moments that :func:`aside` kept."""
    return read_mark(folder).moments


def knowing(model: Any, folder: Path) -> Any:
    """The model of a folder, with what :func:`aside` kept of it."""
    mark = read_mark(folder)
    model.moments = mark.moments or model.moments
    if isinstance(model, VelocityField):
        model.coupling, model.chain = mark.coupling or model.coupling, mark.chain or model.chain
    return model


def save_part(part: Any, folder: Path) -> None:
    """A model or scheduler, without the path that it was loaded from: that is the business of its maker."""
    part.save_pretrained(folder)
    _name_no_places(folder / part.config_name)


def write_vae(latents: Latents, folder: Path) -> list[str]:
    """Write a VAE into a new folder, from the one it is in if it has one; returns its entry in ``model_index.json``."""
    if latents.folder is None:
        save_part(latents.vae, folder)
    else:
        above = latents.folder.parent
        root = above if (above / "model_index.json").is_file() else latents.folder
        copy_part(latents.folder, folder, root, ("*.json", *WEIGHT_FILES), latents.variant)
    return ["diffusers", vae_config(latents)["_class_name"]]


def vae_config(latents: Latents) -> dict[str, Any]:
    """The config of a VAE, without loading it."""
    if latents.folder is None:
        return {**latents.vae.config, "_class_name": type(latents.vae).__name__}
    return read_json(latents.folder / "config.json")


def copy_part(
    source: Path, folder: Path, root: Path, only: Sequence[str] = PART_FILES, variant: str | None = None
) -> None:
    """Copy the files of a pipeline's part into a new folder, without the path that it was loaded from. Weights that are
    read as a variant (see ``model_files.variant_in``) are the plain ones there.

    Args:
        root: the folder of the pipeline, out of which no link is followed.
        variant: of the weights, where it is there.

    Raises:
        ValueError: a link out of it, or a file that is not what its name says.
    """
    folder.mkdir()
    for file in sorted({file for pattern in only for file in source.glob(pattern) if not file.is_dir()}):
        copy_file(file, folder / file.name, root)
    for name in (WEIGHTS, ENCODER_WEIGHTS):
        if (found := variant_in(source, name, variant)) is not None:
            _copy_plainly(source, folder, root, name, found)
    for config in (*folder.glob("config.json"), *folder.glob("*_config.json")):
        _name_no_places(config)


def _name_no_places(config: Path) -> None:
    """Take out of a config where it was loaded from, and what else it says of places on this machine."""
    values = read_json(config)
    if (kept := _without_places(values)) != values:
        write_json(config, kept)


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    gone = ("_name_or_path", "name_or_path")
    return {k: v for k, v in config.items() if k not in gone and not (isinstance(v, str) and is_place(v))}


def pipeline_of(model: Any) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the pipeline that a model's text encoders and VAE are from, and its index, without places; none for
    a model that has neither, or a VAE that was given as an object."""
    if model.text is not None:
        folder = model.text.folder
    elif model.latents is not None and model.latents.folder is not None:
        folder = model.latents.folder.parent
    else:
        return None, {}
    index = _without_places(read_json(folder / "model_index.json"))
    return folder, {name: value for name, value in index.items() if name != "_diffusers_version"}


def parts_in(index: dict[str, Any]) -> list[str]:
    """The names of a pipeline's parts but for the network and the scheduler, by its ``model_index.json``.

    Raises:
        ValueError: a name that is no word, or a part of another library than diffusers and transformers.
    """
    import diffusers

    names = []
    for name, value in index.items():
        if name in ("unet", "transformer", SECOND, "scheduler") or name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"model_index.json names a part {name[:80]!r}: a word is needed, no path")
        if value[0] not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, value[0]):
            raise ValueError(
                f"model_index.json has {name} from {value[0][:80]!r}: parts of diffusers and transformers are copied"
            )
        names.append(name)
    return names


def is_whole_part(part: Path) -> bool:
    """Whether a part of a pipeline is there: its weights too where it is a model, which a ``config.json`` says."""
    if not part.is_dir() or not any(part.iterdir()):
        return False
    return not (part / "config.json").is_file() or has_weights(part)


def variant_of(model: Any) -> str | None:
    """That of the weights which the parts of a model's pipeline were asked for."""
    return next((part.variant for part in (model.text, model.latents) if part is not None), None)


def _copy_plainly(source: Path, folder: Path, root: Path, name: str, variant: str) -> None:
    """The weights of a variant under the names of the plain ones, and none beside them."""
    for file in folder.glob(f"{name}*.safetensors*"):
        file.unlink()
    for file in weight_paths(source, name, variant):
        copy_file(file, folder / file.name.replace(f".{variant}", ""), root)
    index = read_json(source / f"{name}.safetensors.index.{variant}.json")
    if index:
        index["weight_map"] = {key: file.replace(f".{variant}", "") for key, file in index["weight_map"].items()}
        write_json(folder / f"{name}.safetensors.index.json", index)


def check_text(text: Prompts) -> None:
    """That all that encodes prompts is there: tokenizers, and text encoders with whole weights.

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    for name in text_parts(text.index):
        part = text.folder / name
        if not part.is_dir():
            raise FileNotFoundError(f"no {name} in {text.folder}, which its model_index.json names: fetch it")
        if name == PROJECTION:
            projection_class(text.folder, text.index)
            check_weights(part, variant=text.variant)
            continue
        encoder_class(text.folder, text.index, name)
        if name.startswith("text_encoder"):
            check_weights(part, ENCODER_WEIGHTS, text.variant)


def write_text(text: Prompts, folder: Path) -> dict[str, Any]:
    """Copy tokenizers and text encoders into the folder of a model; returns their entries in ``model_index.json``."""
    parts = text_parts(text.index)
    for name in parts:
        files = ("config.json", "*.safetensors.index.json", *ENCODER_FILES)
        is_encoder = name.startswith("text_encoder")
        files = files if is_encoder else PART_FILES
        copy_part(text.folder / name, folder / name, text.folder, files, text.variant)
    kept = {key: text.index[key] for key in ("force_zeros_for_empty_prompt",) if key in text.index}
    return {"text": {"pipeline": text.pipeline, **kept}, **{name: text.index[name] for name in parts}}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
