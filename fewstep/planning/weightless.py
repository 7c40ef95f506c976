"""The teacher and the data of a recipe from their configurations alone: shapes and types without numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.randomness import generator
from fewstep.common.trust import is_code
from fewstep.data import encoded, load_data, pairs
from fewstep.data.buckets import of_one_shape
from fewstep.data.decode import check_side
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.signature import classes_of, image_channels, shape_at, shape_of
from fewstep.latents.prompts import SIZES
from fewstep.latents.vae import Latents
from fewstep.models.folders import find_configurations
from fewstep.models.weightless import META, field_without_weights, needed_shapes, numbers, text_conditions
from fewstep.runs.datasets import make_data, null_of, settled
from fewstep.runs.loading import make_teacher
from fewstep.runs.recipe import MADE, Recipe, Teacher
from fewstep.runs.students import path_of
from fewstep.runs.teachers import EXACT, check_teacher, guided
from fewstep.training.run_files import is_run


def teacher_without_weights(recipe: Recipe) -> VelocityField | None:
    """The teacher of a recipe on the meta device, guided and on the path that the recipe says.

    A diffusers folder needs its ``.json`` files alone. Other teachers (runs, exports, functions of one's own) are
    loaded as they always are, and their numbers dropped.

    Raises:
        FileNotFoundError, ValueError: as ``fewstep.runs.loading.make_teacher``.
    """
    if recipe.teacher is None:
        return None
    teacher, path = _teacher(recipe.teacher), path_of(recipe.student)
    check_teacher(recipe, teacher)
    return (teacher if path is None or teacher.path.same_as(path) else teacher.on(path)).to(META)


def _teacher(section: Teacher) -> VelocityField:
    bare = section.model_copy(update={"guidance": None})
    source = section.source
    is_folder = source not in EXACT and not is_code(source) and not is_run(Path(source).expanduser())
    folder = carried(source) or find_configurations(source) if is_folder else None
    field = make_teacher(bare) if folder is None else field_without_weights(folder)
    return guided(field, section, lambda weak: _teacher(Teacher(source=weak)), _null)


def carried(source: str) -> Path | None:
    """The configurations that come with fewstep of a published model, by its name on the hub, so that plans need no
    network; None for another, and where a folder has that name."""
    folder = Path(__file__).parent / "published" / source.replace("/", "--")
    return folder if folder.is_dir() and source.count("/") == 1 and not Path(source).exists() else None


def _null(null: Mapping[str, int | float | str] | str, field: VelocityField) -> dict[str, Any]:
    """The conditions that stand for none, without numbers where they are those of an empty prompt."""
    text = text_conditions(field, 1) if null == "text" else {}
    return {name: value[0] for name, value in text.items() if name not in SIZES} if text else null_of(null, field)


def sample_of(recipe: Recipe, teacher: VelocityField | None) -> tuple[tuple[int, ...], dict[str, Tensor] | None]:
    """The shape of a row of the recipe's data, and a few rows of its conditions on the meta device; None for those that
    its model is known to take. The data are opened only where they alone say what they are."""
    name, options = recipe.data.name, recipe.data.options
    inner = unguided(teacher)
    if inner is not None:
        if name in MADE:
            return tuple(options.get("shape") or shape_of(inner)), None
        folder = Path(name).expanduser()
        if inner.latents is not None:
            for kind in (pairs, encoded):
                if (folder / kind.FACTS).is_file():
                    if options:
                        load_data(name, **options)  # which refuses them
                    return _written(inner.latents, name, kind.read_facts(folder)), None
        if inner.latents is not None or (not folder.exists() and "/" in name):
            return _sized(inner, options), None
    data = of_one_shape(make_data(settled(recipe, teacher), teacher, None))
    cond = data.rows(torch.zeros(2, dtype=torch.long), generator(0)).cond
    return data.shape, {key: value.to(META) for key, value in cond.items()}


def _written(latents: Latents, name: str, facts: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the latents in a folder that `encode` or `reflow` wrote."""
    shape = tuple(facts["shape"])
    if shape[0] != latents.channels:
        raise ValueError(
            f"the data {name!r} has latents of shape {shape}, and the teacher's have {latents.channels} channels: "
            "it was written for another model"
        )
    return shape


def _sized(field: VelocityField, options: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a model's samples, of images of the size that the data are cut to."""
    shape, size = shape_of(field), options.get("size")
    if size is None or len(shape) != 3:
        return shape
    check_side(size)
    return shape_at(field, (size, size))


def conditions(recipe: Recipe, model: Any, rows: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The conditions (rows, ...) that a model of diffusers takes in the training of a recipe, on the meta device."""
    cond = text_conditions(model, rows)
    if classes_of(model):
        cond["class_labels"] = torch.zeros(rows, dtype=torch.long, device=META)
    if channels := (recipe.student.image or image_channels(model)):
        cond["image"] = numbers(rows, channels, *shape[1:])
    guidance = recipe.teacher.guidance if recipe.teacher else None
    if guidance is not None and (guidance.embedded or guidance.range is not None):
        cond["guidance"] = numbers(rows)
    others = {name: numbers(rows, *shape) for name, shape in needed_shapes(model).items() if name not in cond}
    return cond | others
