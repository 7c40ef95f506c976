"""The data of a recipe: coupled, with conditions left out, in the size that its teacher settles."""

import warnings
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common.console import progress_bar
from fewstep.common.distributed import environment
from fewstep.common.options import arguments
from fewstep.common.randomness import generator
from fewstep.data import FACTS, Encoded, Pairs, Prior, load_data
from fewstep.data.batch import Data
from fewstep.data.between import Between
from fewstep.data.buckets import of_one_shape
from fewstep.data.conditions import Dropped, Strengths
from fewstep.data.couplings import Coupled
from fewstep.data.decode import check_side
from fewstep.data.sources import is_pictures
from fewstep.data.texts import NULL, read_null
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.signature import (
    Model,
    classes_of,
    image_channels,
    needed_conditions,
    network_of,
    shape_at,
    shape_of,
    takes,
)
from fewstep.flows.sources import RowsOf
from fewstep.generation.bucketing import buckets_for
from fewstep.generation.encoding import check_model, encoded_once
from fewstep.generation.teacher_samples import TeacherPairs, TeacherSamples
from fewstep.latents.encoders import kept_null
from fewstep.latents.prompts import TEXT_CONDITIONS
from fewstep.networks import OfDiffusers
from fewstep.runs.objective import follows_teacher, strength_of
from fewstep.runs.recipe import MADE, Named, Recipe
from fewstep.training.leaving import UNNAMED
from fewstep.training.run_files import TEACHER_SAMPLES, TEACHER_SAMPLES_FILE


def null_of(
    null: Mapping[str, int | float | str] | str, field: VelocityField | None, encoded: Path | None = None
) -> dict[str, Any]:
    """The conditions that stand for none: as they are said, or those of an empty prompt, from the folder ``encoded`` if
    there is one, else as the teacher's text encoders gave them once.

    Raises:
        ValueError: a prompt for a model without text encoders.
    """
    if not isinstance(null, str):
        return {name: float(value) if value == "nan" else value for name, value in null.items()}
    if encoded is not None and (kept := read_null(encoded)):
        return kept
    if field is None or field.text is None:
        raise ValueError("null: text is an empty prompt, and the teacher has no text encoders: name its conditions")
    return kept_null(copy(field.text))  # a copy, so that the encoders are let go again


def coupling_of(recipe: Recipe) -> str:
    """How noise and data are paired in a run, ``reflow pairs`` and ``learned noise`` among the ways; empty where they
    are independent."""
    if recipe.coupling != "independent":
        return recipe.coupling
    if recipe.objective.name == "LearnedNoise":
        return "learned noise"
    is_paired = recipe.data.name == "teacher" and recipe.data.options.get("states")
    return "reflow pairs" if is_paired or (Path(recipe.data.name).expanduser() / FACTS).is_file() else ""


def encoded_folder(recipe: Recipe) -> Path | None:
    """The folder of encoded data that a recipe names, if it has the conditions of an empty prompt."""
    folder = Path(recipe.data.name).expanduser()
    return folder if (folder / NULL).is_file() else None


def make_data(recipe: Recipe, teacher: VelocityField | None, out: Path | None, fresh: bool = False) -> Data:
    """The data of a recipe, coupled as it says; ``out`` is where samples of the teacher are kept, with ``fresh`` after
    those that are there have been thrown away.

    Raises:
        ValueError, FileNotFoundError: as :func:`data_of`; ``out`` holds samples of another teacher or other settings.
    """
    data = _uncoupled(recipe, teacher, out, fresh)
    if (source := source_of(recipe, teacher)) is not None and not getattr(data, "brings_noise", False):
        data = Between(data, source.data)
    if recipe.drop is not None:
        data = Dropped(data, recipe.drop.share, null_of(recipe.drop.null, teacher, encoded_folder(recipe)))
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    if guidance is not None and (guidance.embedded or guidance.range is not None):
        data = Strengths(data, *(guidance.range or (guidance.scale, guidance.scale)))
    return data if recipe.coupling == "independent" else Coupled(data, recipe.coupling)


def source_of(recipe: Recipe, model: Model | None) -> RowsOf | None:
    """Where a flow between two data sets starts: the recipe's source, else that of the model it is made from, None for
    normal noise. The data are read when they are asked for."""
    if recipe.source is None:
        known = getattr(unguided(model), "starts_from", None)
        return known if isinstance(known, RowsOf) else None
    section, quiet = recipe.source, recipe.training.quiet
    return RowsOf(lambda: data_of(section, model, quiet))


def _uncoupled(recipe: Recipe, teacher: VelocityField | None, out: Path | None, fresh: bool) -> Data:
    if recipe.data.name not in MADE:
        return data_of(recipe.data, teacher, quiet=recipe.training.quiet)
    if teacher is None:
        raise ValueError(f"data: {recipe.data.name} is what a teacher says, and there is none: name a data set")
    options = {key: value for key, value in recipe.data.options.items() if (key, value) != ("states", 0)}
    if recipe.data.name == "prior":
        return _prior(teacher, options)
    if teacher.text is None and "states" not in options:
        options = arguments("data", TeacherSamples, options, given=("field", "seed", "file"))
        file = None if out is None else out / TEACHER_SAMPLES_FILE
        return TeacherSamples(teacher, seed=recipe.seed, file=file, **options)
    if teacher.text is not None and "prompts" not in options:
        raise ValueError(
            "data: teacher draws samples of the teacher, which is conditioned on text: say which prompts, a line each, "
            "data: {name: teacher, prompts: captions.txt}"
        )
    options = arguments("data", TeacherPairs, options, given=("field", "seed", "folder", "guidance", "fresh"))
    embedded = recipe.teacher is not None and recipe.teacher.guidance is not None and recipe.teacher.guidance.embedded
    folder = None if out is None else out / TEACHER_SAMPLES
    strength = strength_of(recipe) if embedded else None
    return TeacherPairs(teacher, seed=recipe.seed, folder=folder, guidance=strength, fresh=fresh, **options)


def _prior(teacher: VelocityField, options: dict[str, Any]) -> Prior:
    """No data: the shape and the classes that the teacher has, where nothing else is said.

    Raises:
        ValueError: it has conditions beside classes, or does not say its shape.
    """
    if others := sorted(set(needed_conditions(teacher)) - {"class_labels", "guidance"}):
        raise ValueError(
            f"data: prior has classes alone, and the teacher needs {', '.join(others)}: name data that has them, of "
            "which starts: prior uses nothing else"
        )
    options = {name: value for name, value in options.items() if value is not None}
    shape = None if "shape" in options else shape_of(teacher)
    said = {} if shape is None else {"shape": list(shape)}
    return Prior(**arguments("data", Prior, {"classes": classes_of(teacher), **said, **options}))


def encoded_shape(section: Named, model: Model | None) -> tuple[int, ...] | None:
    """The shape (c, h, w) that the images of a section will have as latents; None where nothing is to be encoded."""
    if model is None or model.latents is None or section.name in MADE:
        return None
    if not is_pictures(section.name, section.options):
        return None
    size = section.options.get("size")
    if size is None:
        return shape_of(model)
    check_side(size)
    return shape_at(model, (size, size))


def data_of(section: Named, model: Model | None, quiet: bool = False) -> Data:
    """The data set that a section names. For a latent model, images come as their latents, encoded once into the
    cache, and data that was encoded has to be its own.

    Raises:
        ValueError, FileNotFoundError: as ``fewstep.load_data`` and ``fewstep.encode``.
    """
    name, options = section.name, section.options
    if name == UNNAMED:
        raise ValueError("the data of this run were given to fewstep.fit without a name: say --data NAME")
    if model is None or model.latents is None:
        return load_data(name, **options)
    if is_pictures(name, options):
        size = options.get("size") or model.latents.image_shape_of(shape_of(model))[-1]
        what = "in buckets of about" if options.get("buckets") else "the middle square of each at"
        text = f"encoding the images in {name}, {what} {size} x {size} pixels, once"
        with progress_bar(text, quiet or not environment().is_main) as progress:
            return encoded_once(model, name, progress=progress, **options)
    data = load_data(name, **options)
    if isinstance(data, Encoded | Pairs):
        check_model(data, model, name)
    return data


def settled(recipe: Recipe, teacher: VelocityField | None) -> Recipe:
    """The recipe with what its teacher settles about images where nothing is said: their size in pixels, their
    channels, and that sub-folders are no classes where it knows none. Each is said once in a line."""
    inner = unguided(teacher)
    is_auto = recipe.student.network == "auto" and recipe.student.start is None
    if inner is None or recipe.data.name in MADE or not (is_auto or follows_teacher(recipe)):
        return recipe
    data, held_out = recipe.data, recipe.evaluation.data
    channels = recipe.student.image or image_channels(inner)
    if "beside" in data.options and channels and "beside_channels" not in data.options:
        data = Named.model_validate({"name": data.name, "beside_channels": channels, **data.options})
    data = _pictures_for(inner, data, is_auto, "data")
    held_out = None if held_out is None else _pictures_for(inner, held_out, is_auto, "evaluation.data")
    source = None if recipe.source is None else _pictures_for(inner, recipe.source, is_auto, "source")
    evaluation = recipe.evaluation.model_copy(update={"data": held_out})
    return recipe.model_copy(update={"data": data, "source": source, "evaluation": evaluation})


def with_tokens(recipe: Recipe, data: Data) -> Recipe:
    """The recipe, saying of data of text which tokens its student's samples are: by this a run is opened without it."""
    symbols, student = getattr(data, "symbols", None), recipe.student
    if symbols is None or student.space is not None:
        return recipe
    space = Named.model_validate({"name": "tokens", "symbols": list(symbols)})
    return recipe.model_copy(update={"student": student.model_copy(update={"space": space})})


def _pictures_for(model: Model, section: Named, is_auto: bool, where: str) -> Named:
    """A section of data, of images that nothing is said of with the options that a model takes them with."""
    # A latent model has its own way from images to latents, where their size is settled too.
    if model.latents is not None or not is_pictures(section.name, section.options):
        return section
    if "size" in section.options:
        return _with_step(model, section)
    try:
        channels, height, width = shape_of(model)
    except ValueError:  # it does not say, or takes no images
        return section
    if height != width or channels not in (1, 3, 4):
        return section
    network = getattr(model, "network", None)
    knows_classes = classes_of(model) > 0 or (not hasattr(network, "classes") and takes(model, "class_labels"))
    options = {
        "size": height,
        **({} if channels == 3 else {"channels": channels}),
        **({} if knows_classes or not is_auto else {"labels": False}),
        **section.options,
    }
    if environment().is_main:
        folder = Path(section.name).expanduser()
        has_folders = folder.is_dir() and any(inner.is_dir() for inner in folder.iterdir())
        shape = "buckets of about" if options.get("buckets") else "their middle square and scaled to"
        flip = "mirrored at random" if options.get("flip") else f"not mirrored (--{where}.flip true does, at random)"
        classes = ", folders are no classes" if has_folders and options.get("labels") is False else ""
        warnings.warn(
            f"images in {section.name} are cut to {shape} {height} x {height} pixels, the "
            f"teacher's size (--{where}.size takes another), {flip}{classes}",
            stacklevel=3,
        )
    return _with_step(model, Named.model_validate({"name": section.name, **options}))


def _with_step(model: Model, section: Named) -> Named:
    """A section of images in buckets with the step of their sides, one that a model takes.

    Raises:
        ValueError: a model of squares alone, a step that it does not take.
    """
    options = section.options
    if not options.get("buckets") or not isinstance(network_of(model), OfDiffusers):
        return section
    step, _ = buckets_for(model, options["size"], options.get("bucket_step"))
    return Named.model_validate({"name": section.name, **options, "bucket_step": step})


def given_by(recipe: Recipe, model: Model, count: int, first: int = 0, text: bool = True) -> dict[str, Tensor]:
    """What a run's data gives the samples of its model besides their classes: the conditions of ``count`` of its rows,
    (n, ...) each, fewer where it has fewer. The data is read where the model needs them, or the recipe names them.

    Args:
        first: the row to begin with; they go around.
        text: whether those of a text model are wanted too, which prompts give otherwise.
    """
    others = {"guidance", *(() if text or model.text is None else TEXT_CONDITIONS)}
    needed = set(needed_conditions(model))
    if classes_of(model) or "class_labels" not in needed:  # else they are vectors or times
        others.add("class_labels")
    is_needed = needed - others or (text and model.text is not None)
    if recipe.data.name in MADE or not (is_needed or any(map(recipe.data.options.get, ("conditions", "vector")))):
        return {}
    data = of_one_shape(data_of(recipe.data, model))
    rows = first + torch.arange(min(count, data.size or count))
    cond = data.rows(rows % data.size if data.size else rows, generator(recipe.seed)).cond
    return {name: value for name, value in cond.items() if name not in others and takes(model, name)}
