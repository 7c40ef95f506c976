"""Where an export comes from: the run, its images and figures, and the model that it began as."""

import re
import warnings
from pathlib import Path
from typing import Any

from fewstep.common.options import as_yaml, read_yaml
from fewstep.common.parsing import parse_yaml
from fewstep.common.received import clean_png, own_file, without_places
from fewstep.evaluation.results import Evaluation
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.model_card import Origin
from fewstep.runs.cite import cite
from fewstep.runs.recipe import Recipe
from fewstep.training.run_files import QUALITY, QUALITY_FIGURE, RECIPE, SAMPLES, TRAINING

_BASE = ("license", "license_name", "license_link", "base_model")


def origin_of(model: FlowMap | NetworkField, run: Path | None, export: Path) -> Origin:
    """What is known of the origin of a model, which has been written to the folder ``export``; the recipe and the
    images of its run are copied there.

    Args:
        run: the folder of the run that trained it, if one did.
    """
    base = _base_of(_source(model))
    if run is None:
        return Origin(base=base)
    (export / TRAINING).mkdir()
    pictures = {}
    grids = sorted((run / SAMPLES).glob("step-*.png"))
    found = {"samples.png": grids[-1:], "quality.png": [*run.glob(QUALITY_FIGURE)]}
    captions = {"samples.png": "Samples at the end of the training", "quality.png": "Quality against network calls"}
    for name, files in found.items():
        for packed in filter(None, (_picture(file, run) for file in files)):
            (export / TRAINING / name).write_bytes(packed)
            pictures[f"{TRAINING}/{name}"] = captions[name]
    said = read_yaml(run / RECIPE)
    (export / TRAINING / RECIPE).write_text(as_yaml(without_places(said)))
    recipe = Recipe.model_validate(said)  # which opening the run has checked
    method = " around ".join(section.name for section in recipe.objectives)
    teacher = recipe.teacher.source if recipe.teacher else ""
    if not base:
        base = _base_of(Path(teacher).expanduser()) if teacher else {}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", teacher) and not Path(teacher).exists():
        base = {**base, "base_model": teacher}  # a name on the hub
    return Origin(
        method=without_places(method),
        quality=_table_of(run),
        pictures=pictures,
        recipe=f"{TRAINING}/{RECIPE}",
        citation=citation(str(run)) or citation(recipe.objectives[-1].name),
        base=base,
    )


def _picture(file: Path, run: Path) -> bytes | None:
    """An image of a run, packed anew; None, and a note, for what is none of its own."""
    try:
        if own_file(file, run).stat().st_nlink > 1:
            raise ValueError(f"{file} has another name on this disk (a hard link)")
        return clean_png(file)
    except ValueError as error:
        warnings.warn(f"{error}: it is left out of the export", stacklevel=2)
        return None


def citation(what: str) -> str | None:
    """BibTeX of a run or method, without remarks; None for one that names no papers, or cannot be read."""
    try:
        found = cite(what)
    except (OSError, ValueError, ImportError):
        return None
    return "\n\n".join(part for part in found.strip().split("\n\n") if "\n@" in part) or None


def _table_of(run: Path) -> str | None:
    from fewstep.common.console import markdown

    file = run / QUALITY
    if not file.is_file():
        return None
    return markdown(*Evaluation.read(own_file(file, run)).table())


def _source(model: Any) -> Path | None:
    """The folder that the text encoders or the VAE of a model are from."""
    if model.text is not None:
        return model.text.folder
    folder = None if model.latents is None else model.latents.folder
    return None if folder is None else folder.parent


def _base_of(folder: Path | None) -> dict[str, str]:
    """The license and the name of the base model that the model card of a folder has in its front matter."""
    file = None if folder is None else folder / "README.md"
    if file is None or folder is None or not file.is_file():
        return {}
    try:
        own_file(file, folder)
    except ValueError:
        return {}
    found = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = parse_yaml(found[1]) if found else {}
    except ValueError:
        return {}
    front = front if isinstance(front, dict) else {}
    said = {name: front[name] for name in _BASE if isinstance(front.get(name), str | list)}
    return {name: value for name, value in said.items() if without_places(value) == value}
