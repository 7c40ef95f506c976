"""The parts of a run, made from its recipe and called once, so that what does not fit is known before anything is
computed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.common.errors import is_out_of_memory, shortened
from fewstep.common.randomness import generator
from fewstep.data.batch import Data, has_classes
from fewstep.data.buckets import Bucket, InBucket, buckets_of, of_one_shape, usual
from fewstep.data.conditions import Dropped
from fewstep.data.couplings import uncoupled
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided, unguided
from fewstep.flows.signature import Model, classes_of, network_of, shape_of, sized
from fewstep.networks import MLP, ContinuousUNet, Conv1dNet, OfDiffusers, SequenceTransformer, UNet
from fewstep.objectives.base import Objective
from fewstep.runs.datasets import encoded_folder, encoded_shape, make_data, null_of, settled, source_of, with_tokens
from fewstep.runs.loading import start_of, teacher_of
from fewstep.runs.objective import follows_teacher, make_objective, trains_map
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import load_recipe
from fewstep.runs.students import make_student
from fewstep.training import checkpoints
from fewstep.training.run_files import CHECKPOINTS, is_run

# Networks that recipes make: all can be told classes, and those of points and signals numbers.
_TOLD = MLP | Conv1dNet
_OURS = _TOLD | SequenceTransformer | ContinuousUNet


@dataclass(frozen=True)
class Built:
    """The parts of a run, made and checked against each other, before any training; the ``recipe`` says all of them."""

    recipe: Recipe
    student: Model
    objective: Objective
    data: Data
    teacher: VelocityField | None


def build(recipe: Recipe, out: Path | None = None, fresh: bool = False) -> Built:
    """Make the parts of a run and call each once, so that what does not fit is known before anything is computed.

    Args:
        out: the run folder, where samples of the teacher are kept if they stand in for data.
        fresh: what is in the run folder is about to be thrown away.

    Raises:
        ValueError: parts that are not known, or do not fit each other.
        FileNotFoundError: data or a teacher that are not there.
    """
    teacher = teacher_of(recipe)
    if fresh or out is None or not _is_unsettled(out):
        recipe = settled(recipe, teacher)
    # Images may take hours to encode: what can be known to fit before is.
    data, shape = None, encoded_shape(recipe.data, teacher)
    if shape is None:
        data = make_data(recipe, teacher, out, fresh)
        recipe, shape = with_tokens(recipe, data), tuple(data.shape)
    # Before the objective, which freezes the teacher that the student may be a copy of.
    begun, lent = start_of(recipe.student), recipe.training.shard is not None
    student = make_student(recipe.student, shape, teacher, trains_map(recipe), recipe.seed, begun, lent)
    objective = make_objective(recipe, teacher)
    objective.check_student(student)
    if data is None:
        data = make_data(recipe, teacher, out, fresh)
    student.starts_from = source_of(recipe, teacher)
    objective.check_data(data, student)
    _check_fit("student", student, recipe.data.name, data)
    _check_buckets(student, recipe.data.name, uncoupled(data, whole=True))
    if recipe.drop is not None:
        _check_fit(
            "student",
            student,
            recipe.data.name,
            Dropped(uncoupled(data), 1.0, null_of(recipe.drop.null, teacher, encoded_folder(recipe))),
        )
    return Built(recipe, student, objective, data, held_against(recipe, teacher, data))


def parts_of_blocks(recipe: Recipe) -> Built:
    """The parts of a recipe of blocks: the first of them, its objective and the data. Errors as of :func:`build`."""
    data = make_data(recipe, None, None)
    section = recipe.student.model_copy(update={"latent": "none", "kind": "field"})
    student = make_student(section, tuple(data.shape), None, False, recipe.seed)
    _check_fit("student", student, recipe.data.name, data)
    return Built(recipe, student, make_objective(recipe, None), data, None)


def _is_unsettled(out: Path) -> bool:
    """Whether a run that has begun took its images as they are, from before its teacher settled their size."""
    return (
        is_run(out)
        and bool(checkpoints.steps_in(out / CHECKPOINTS))
        and "size" not in load_recipe(out, look=True).data.options
    )


def held_against(recipe: Recipe, teacher: VelocityField | None, data: Data) -> VelocityField | None:
    """The teacher as what the student is held against: none where the student only starts from it, and it does not
    take these data (another size, a condition more).

    Raises:
        ValueError: the student follows the teacher, and that does not take the data.
    """
    if teacher is None:
        return None
    try:
        _check_fit("teacher", teacher, recipe.data.name, data)
    except ValueError:
        if follows_teacher(recipe) or not isinstance(unguided(teacher), NetworkField):
            raise
        return None
    return teacher


def _check_buckets(model: Model, name: str, data: Data) -> None:
    """That a student takes images of the sizes of all buckets: as far as its network says, and of the one whose shape
    is farthest from the usual, by a call.

    Raises:
        ValueError: it does not.
    """
    buckets = buckets_of(data)
    if len(buckets) < 2:
        return

    def aspect(bucket: Bucket) -> float:
        return math.log(bucket.shape[-1] / bucket.shape[-2])

    middle = aspect(usual(buckets))
    try:
        for bucket in buckets if isinstance(network_of(model), OfDiffusers) else ():
            image = bucket.shape if model.latents is None else model.latents.image_shape_of(bucket.shape)
            sized(model, bucket.shape, (image[-2], image[-1]))
        far = max(buckets, key=lambda bucket: abs(aspect(bucket) - middle))
        _check_fit("student", model, name, InBucket(data, far))
    except ValueError as error:
        raise ValueError(
            f"{error}. With data.buckets a student takes images of many shapes: leave buckets out for one of a fixed "
            "size, and the middle square of each image is taken"
        ) from None


@torch.no_grad()
def _check_fit(who: str, model: Model, name: str, data: Data) -> None:
    """Call the model on two rows of the data's shape, with two rows of its conditions."""
    alike = of_one_shape(data)
    cond = getattr(alike, "cond", None)
    if cond is None:
        cond = alike.rows(torch.zeros(2, dtype=torch.long), generator(0)).cond
    classes, labels = classes_of(model), cond.get("class_labels")
    if classes and labels is None:
        raise ValueError(f"the {who} has {classes} classes, and the data {name!r} has no class_labels")
    if classes and labels is not None and not has_classes(cond):
        raise ValueError(
            f"the {who} has {classes} classes, and the data {name!r} has class_labels of {labels.dtype} and shape "
            f"{tuple(labels.shape)}: whole numbers are needed, one a row"
        )
    if classes and labels is not None and int(labels.max()) >= classes and not isinstance(data, Dropped):
        last = int(labels.max())
        raise ValueError(f"the data {name!r} has class_labels up to {last}, the {who} only 0 to {classes - 1}")
    rows: dict[str, Any] = {key: value[torch.arange(2) % len(value)] for key, value in cond.items()}  # of a bucket, one
    if isinstance(data, Dropped):
        rows |= {key: torch.as_tensor(value).to(rows[key]).expand_as(rows[key]) for key, value in data.null.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Where it is guided, the weaker call is made too.
    low, high = model.interval if isinstance(model, Guided) else (0.0, 1.0)
    x, t = torch.randn(2, *data.shape, generator=generator(0)), low + (high - low) * torch.tensor([0.25, 0.75])
    try:
        velocity = model.velocity(x.to(device), t.to(device), **{key: value.to(device) for key, value in rows.items()})
        given = tuple(velocity.shape[1:])
        why = "" if given == tuple(data.shape) else f"it gives {given}"
    except Exception as error:  # whatever a network's code makes of numbers and shapes that do not fit
        if is_out_of_memory(error):
            raise
        why = shortened(str(error), 240) + _hint(model, data, rows, who == "student")
    if why:
        conditions = f" and conditions {', '.join(rows)}" if rows else ""
        raise ValueError(
            f"the {who} does not take the data {name!r} of shape {tuple(data.shape)}{conditions}: "
            f"{_wants(model, tuple(data.shape))}{why}"
        )


def _hint(model: Model, data: Data, rows: dict[str, Any], is_student: bool) -> str:
    """What is likely meant, where a model does not take its data."""
    network = network_of(model)
    if "class_labels" in rows and not classes_of(model):
        key = "num_class_embeds" if isinstance(network, UNet) else "classes" if isinstance(network, _OURS) else None
        told = f", or tell it them: student.options.{key}" if is_student and key else ""
        return f". It may know no classes: say data.labels: false{told}"
    if is_student and isinstance(network, _TOLD) and (numbers := rows.get("vector")) is not None and numbers.ndim == 2:
        return f". Numbers are told to a network that is made for them: student.options.vector: {numbers.shape[1]}"
    if isinstance(data, Dropped):
        return f". Are the conditions for none, {data.null}, among those that it knows?"
    try:
        in_pixels = None if model.latents is None else tuple(model.latents.image_shape_of(shape_of(model)))
    except ValueError:
        return ""
    if in_pixels is not None and len(data.shape) == 3 and data.shape[0] == in_pixels[0]:
        return (
            ". It works on latents: a folder of images, hf:NAME or webdataset shards are encoded for it once; other "
            "images go through field.latents.encode(images), kept in a .npz file"
        )
    return ""


def _wants(model: Model, data_shape: tuple[int, ...]) -> str:
    """What it is made for; a convolutional student takes the size of its data for its own."""
    try:
        shape = shape_of(model)
    except ValueError:
        return ""
    return "" if shape == data_shape else f"it is for samples of shape {shape}. "
