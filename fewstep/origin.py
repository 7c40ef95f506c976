"""Where an export comes from: the run, its pictures and figures, and the model that it began as."""

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from fewstep.evaluation.evaluate import Evaluation
from fewstep.fields import NetworkField
from fewstep.maps import FlowMap
from fewstep.model_card import Origin

# Where an export of a run keeps what it has of the run. Not beside the model: a folder with a recipe.yaml is a run.
TRAINING = "training"
_BASE = ("license", "license_name", "license_link", "base_model")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()


def origin_of(model: FlowMap | NetworkField, run: Path | None, export: Path) -> Origin:
    """What is known of the origin of a model, which has been written to the folder ``export``; the recipe and the
    pictures of its run are copied there.

    Args:
        run: the folder of the run that trained it, if one did.
    """
    base = _base_of(_source(model))
    if run is None:
        return Origin(base=base)
    (export / TRAINING).mkdir()
    pictures = {}
    grids = sorted((run / "samples").glob("step-*.png"))
    found = {"samples.png": grids[-1:], "quality.png": [*run.glob("quality.png")]}
    captions = {"samples.png": "Samples at the end of the training", "quality.png": "Quality against network calls"}
    for name, files in found.items():
        for file in files:
            shutil.copyfile(file, export / TRAINING / name)
            pictures[f"{TRAINING}/{name}"] = captions[name]
    shutil.copyfile(run / "recipe.yaml", export / TRAINING / "recipe.yaml")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    method, teacher = recipe["objective"]["name"], (recipe.get("teacher") or {}).get("source", "")
    if not base:
        base = _base_of(Path(teacher).expanduser()) if teacher else {}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", teacher) and not Path(teacher).exists():
        base = {**base, "base_model": teacher}  # a name on the hub
    return Origin(
        method=method,
        quality=_table_of(run),
        pictures=pictures,
        recipe=f"{TRAINING}/recipe.yaml",
        citation=citation(str(run)) or citation(method),
        base=base,
    )


def citation(what: str) -> str | None:
    """BibTeX of a run or method; None for one that names no papers, or cannot be read."""
    from fewstep.citing import cite

    try:
        found = cite(what)
    except (OSError, ValueError, ImportError):
        return None
    return found if "@" in found else None


def _table_of(run: Path) -> str | None:
    from fewstep.console import markdown

    file = run / "quality.json"
    return markdown(*Evaluation.from_json(file.read_text()).table()) if file.is_file() else None


def _source(model: Any) -> Path | None:
    """The folder that the text encoders or the VAE of a model are from."""
    if model.text is not None:
        return model.text.folder
    folder = None if model.latents is None else model.latents.folder
    return None if folder is None else folder.parent


def _base_of(folder: Path | None) -> dict[str, str]:
    """The license and the name of the base model that the model card of a folder has in its front matter."""
    file = None if folder is None else folder / "README.md"
    if file is None or not file.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    front = front if isinstance(front, dict) else {}
    return {name: front[name] for name in _BASE if isinstance(front.get(name), str | list)}
