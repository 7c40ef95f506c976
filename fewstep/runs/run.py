"""Whole runs: from a recipe to a trained model in its folder, and from the folder back to the model."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from fewstep.common import distributed
from fewstep.common.disk import sweep
from fewstep.common.distributed import World
from fewstep.common.errors import TrainingError, is_out_of_memory, shortened
from fewstep.common.locks import BusyError, owned
from fewstep.common.options import in_one_line, read_yaml
from fewstep.common.randomness import generator
from fewstep.common.trust import check_folder, code_in, remember, trusting
from fewstep.data.batch import Data, has_classes
from fewstep.data.conditions import Dropped
from fewstep.data.couplings import uncoupled
from fewstep.evaluation.evaluate import Evaluation
from fewstep.flows.description import say_shape
from fewstep.flows.fields import Guided, NetworkField, VelocityField, unguided
from fewstep.flows.maps import FlowMap
from fewstep.generation.drawing import Model, classes_of, shape_of
from fewstep.models.provenance import is_run
from fewstep.objectives.base import Objective
from fewstep.runs.build import (
    check_teacher,
    data_of,
    encoded_folder,
    encoded_shape,
    follows_teacher,
    is_nowhere,
    make_data,
    make_objective,
    make_student,
    make_teacher,
    null_of,
    path_of,
    settled,
    strength_of,
    trains_map,
)
from fewstep.runs.judge import judge, prepare
from fewstep.runs.previews import Watch
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import find_objective, load_recipe
from fewstep.training import checkpoints, folder
from fewstep.training.fit import fit
from fewstep.training.leaving import check_from_recipe, is_from_python, student_of
from fewstep.training.run import Result, frozen, put_back


@dataclass(frozen=True)
class Built:
    """The parts of a run, made and checked against each other, before any training; the ``recipe`` says all of them."""

    recipe: Recipe
    student: Model
    objective: Objective
    data: Data
    teacher: VelocityField | None


@dataclass(frozen=True)
class Finished:
    """What a run came to: the training, and its evaluation where it got that far."""

    result: Result[Model]
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Trained:
    """A run on disk: ``model`` has its averaged weights, ``shape`` is that of one sample."""

    model: Model
    recipe: Recipe
    shape: tuple[int, ...]
    step: int


def build(recipe: Recipe, out: Path | None = None, fresh: bool = False) -> Built:
    """Make the parts of a run and call each once, so that what does not fit is known before anything is computed.

    Args:
        out: the run folder, where samples of the teacher are kept if they stand in for data.
        fresh: what is in the run folder is about to be thrown away.

    Raises:
        ValueError: parts that are not known, or do not fit each other.
        FileNotFoundError: data or a teacher that are not there.
    """
    teacher = _teacher(recipe)
    if fresh or out is None or not _is_unsettled(out):
        recipe = settled(recipe, teacher)
    # Pictures may take hours to encode: what can be known to fit before is.
    data, shape = None, encoded_shape(recipe.data, teacher)
    if shape is None:
        data = make_data(recipe, teacher, out, fresh)
        shape = tuple(data.shape)
    # Before the objective, which freezes the teacher that the student may be a copy of.
    student = make_student(recipe.student, shape, teacher, trains_map(recipe), recipe.seed)
    objective = make_objective(recipe, teacher)
    objective.check_student(student)
    if data is None:
        data = make_data(recipe, teacher, out, fresh)
    _check_fit("student", student, recipe.data.name, data)
    if recipe.drop is not None:
        _check_fit(
            "student",
            student,
            recipe.data.name,
            Dropped(uncoupled(data), 1.0, null_of(recipe.drop.null, teacher, encoded_folder(recipe))),
        )
    return Built(recipe, student, objective, data, _held_against(recipe, teacher, data))


def run(recipe: Recipe, out: Path, *, fresh: bool = False) -> Finished:
    """Train what the recipe says in the run folder ``out``, and judge it; goes on where an earlier start stopped.

    Args:
        fresh: throw away the run that is in ``out`` and start again.

    Raises:
        ValueError: parts that do not fit, or a folder of something else; before anything is computed or overwritten.
        TrainingError: see ``fewstep.fit``.
    """
    folder.check_ours(out)
    is_main = distributed.environment().is_main
    if not fresh:
        check_from_recipe(out)
    with owned(out, "trained") if is_main else nullcontext():
        return _run(recipe, out, fresh, is_main)


def _run(recipe: Recipe, out: Path, fresh: bool, is_main: bool) -> Finished:
    built = build(recipe, out, fresh)
    recipe = built.recipe
    if not fresh:
        folder.check_recipe(out, recipe.fingerprint())
    if recipe.evaluation.count:
        prepare(recipe, uncoupled(built.data), built.student)
    if is_main:
        _begin(out, recipe, fresh)
    if built.teacher is not None:  # an objective without a teacher would leave it where it is
        built.teacher.to(distributed.choose_device(recipe.training.device, distributed.environment()))
    watch = Watch(recipe, uncoupled(built.data), built.teacher, out)
    result = fit(
        built.student,
        built.objective,
        built.data,
        seed=recipe.seed,
        out=out,
        callbacks=[watch],
        fingerprint=recipe.fingerprint(),
        resume=not fresh,
        **recipe.training.model_dump(),
    )
    if not is_main:
        return Finished(result, None)
    # Only now: one that went on may have got other steps, and `fit` has seen that it is the same run.
    _write_recipe(out, recipe)
    watch.draw(result.ema, result.step)
    if result.stopped == "interrupted" or recipe.evaluation.count == 0:
        return Finished(result, None)
    model = cast(Model, result.ema)
    evaluation = judge(model, recipe, uncoupled(built.data), built.teacher, out, quiet=recipe.training.quiet)
    return Finished(result, evaluation)


def evaluate_run(
    path: Path, device: str | None = None, teacher: str | None = None, data: str | None = None, **changes: Any
) -> Evaluation | None:
    """Judge a run at its last checkpoint.

    Args:
        teacher, data: what it is held against, where that has moved, or never had a name.
        changes: keys of ``evaluation``, and ``seed``.

    Raises:
        BusyError: another process judges it. A training may go on the while, which judges the run once more at its end.
    """
    run = open_run(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(owned(path, "evaluated"))
            sweep(path)
        except BusyError as busy:
            if busy.doing != "trained":
                raise
        return _evaluate(run, path, device, teacher, data, **changes)


def _evaluate(
    run: Trained, path: Path, device: str | None, teacher: str | None, data: str | None, **changes: Any
) -> Evaluation | None:
    tree = run.recipe.as_dict()
    tree["seed"] = changes.pop("seed", tree["seed"])
    tree["evaluation"] |= changes
    if teacher is not None:
        tree["teacher"] = {**(tree["teacher"] or {}), "source": teacher}
    if data is not None:
        tree["data"] = {"name": data}
    recipe = recipe_of(path, tree)
    field = _teacher(recipe)
    if data is not None:
        recipe = settled(recipe, field or run.model)  # pyright: ignore[reportArgumentType]
    place = distributed.choose_device(device, World())
    # With the seed that its samples were drawn with.
    rows = make_data(recipe.model_copy(update={"seed": run.recipe.seed}), field, path)
    field = _held_against(recipe, field, rows)
    return judge(run.model.to(place), recipe, uncoupled(rows), None if field is None else field.to(place), path)


def open_run(path: str | Path, *, trust: bool = False) -> Trained:
    """A run from its folder, at its last checkpoint.

    Args:
        trust: whether code may run that its recipe names, or that of a run which it leads to, where this user's fewstep
            did not write them: see ``fewstep.common.trust``.

    Raises:
        FileNotFoundError: no run there, no checkpoint yet, or its teacher is gone.
        ValueError: code that is not known to be this user's.
        TrainingError: a damaged checkpoint.
    """
    with trusting(trust):
        return _opened(path)


def _opened(path: str | Path) -> Trained:
    path = Path(path).expanduser()
    if not (path / "recipe.yaml").is_file():
        raise FileNotFoundError(f"there is no run in {path}: a run folder has a recipe.yaml and checkpoints/")
    found = checkpoints.latest(path / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"the run in {path} has no checkpoint yet: `fewstep train {path}` goes on with it")
    recipe, saved = recipe_of(path), checkpoints.load(found)
    known = saved.state["fingerprint"]
    if not known.get("data_shape"):
        raise TrainingError(f"{found} does not say what it was trained on: put its state.json back as it was")
    if not is_from_python(path):
        folder.check_kept(path, known, recipe.fingerprint())
    shape = tuple(known["data_shape"])
    with _opening(path), warnings.catch_warnings():
        # That some weights are new in the student was said when it was made, and they are loaded here.
        warnings.simplefilter("ignore")
        if is_from_python(path):
            model: Model = student_of(path)
        else:
            model = make_student(recipe.student, shape, _teacher_of(path, recipe), trains_map(recipe), recipe.seed)
    if isinstance(model, FlowMap | NetworkField):
        say_shape(model, shape)
    put_back(model, frozen(model), saved, "ema" if "ema" in saved.tensors else "model")
    model.class_names = tuple(known.get("data_classes") or model.class_names)
    if moments := known.get("data_moments"):
        model.moments = tuple(moments)
    elif recipe.data.options.get("normalize"):  # a run from before they were kept
        model.moments = getattr(data_of(recipe.data, model), "moments", None)
    if isinstance(model, FlowMap) and not is_from_python(path):
        model.gamma = find_objective(recipe.objective.name).gamma
        model.guidance = strength_of(recipe)
    return Trained(model.eval().requires_grad_(False), recipe, shape, saved.step)


def recipe_of(path: Path, tree: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a run, or ``tree`` in its place. One that Python started says what was known of its parts: none of
    its names is code, and nothing is looked up."""
    if not is_from_python(path):
        return load_recipe(path if tree is None else tree)
    if tree is None:
        tree = read_yaml(path / "recipe.yaml")
        check_folder(path, path / "recipe.yaml", code_in(tree))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise in_one_line(error, Recipe) from None


_OPENING: ContextVar[tuple[Path, ...]] = ContextVar("runs that are being opened", default=())


@contextmanager
def _opening(run: Path) -> Iterator[None]:
    """While the models that a run was made from are opened, none of which it can be itself.

    Raises:
        ValueError: it is.
    """
    run = run.resolve()
    if run in _OPENING.get():
        raise ValueError(f"the run in {run} was made from itself, says its recipe: put recipe.yaml back as it was")
    before = _OPENING.set((*_OPENING.get(), run))
    try:
        yield
    finally:
        _OPENING.reset(before)


def load_run(path: str | Path, *, trust: bool = False) -> Model:
    """What a run trained, with its averaged weights, an adapter added in: a ``FlowMap`` or a ``NetworkField``; the
    arguments, and what is raised, are those of ``open_run``."""
    from fewstep.models.lora import has_lora, merge_lora

    model = open_run(path, trust=trust).model
    return merge_lora(model).requires_grad_(False) if has_lora(model) else model


def _teacher_of(path: Path, recipe: Recipe) -> VelocityField | None:
    """The teacher of a run, without which its student is not made again."""
    source = "" if recipe.teacher is None else recipe.teacher.source
    try:
        if source and is_nowhere(source):
            raise FileNotFoundError(f"no folder {source}")
        return _teacher(recipe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is the teacher of the run in {path}, and is not there ({str(error)[:100]}). Put it back, or say "
            f"where it is now: teacher.source in {path / 'recipe.yaml'}"
        ) from None


def _teacher(recipe: Recipe) -> VelocityField | None:
    if recipe.teacher is None:
        return None
    teacher, path = make_teacher(recipe.teacher, encoded_folder(recipe)), path_of(recipe.student)
    check_teacher(recipe, teacher)
    return teacher if path is None or teacher.path.same_as(path) else teacher.on(path)


def _is_unsettled(out: Path) -> bool:
    """Whether a run that has begun took its pictures as they are, from before its teacher settled their size."""
    return (
        is_run(out)
        and bool(checkpoints.steps_in(out / "checkpoints"))
        and "size" not in load_recipe(out, look=True).data.options
    )


def _held_against(recipe: Recipe, teacher: VelocityField | None, data: Data) -> VelocityField | None:
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


def _begin(out: Path, recipe: Recipe, fresh: bool) -> None:
    """Write the recipe of a run that starts. One that goes on keeps its own until ``fit`` has compared the two."""
    if fresh:
        folder.throw_away(out)
    if not checkpoints.steps_in(out / "checkpoints"):
        folder.begin(out)
        _write_recipe(out, recipe)


def _write_recipe(out: Path, recipe: Recipe) -> None:
    folder.write_recipe(out, recipe.as_dict())
    remember(out, out / "recipe.yaml", code_in(recipe.as_dict()))


@torch.no_grad()
def _check_fit(who: str, model: Model, name: str, data: Data) -> None:
    """Call the model on two rows of the data's shape, with two rows of its conditions."""
    cond = getattr(data, "cond", None)
    if cond is None:
        cond = data.rows(torch.zeros(2, dtype=torch.long), generator(0)).cond
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
    rows: dict[str, Any] = {key: value[:2] for key, value in cond.items()}
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
        why = shortened(str(error), 240) + _hint(model, data, labels is not None and not classes)
    if why:
        conditions = f" and conditions {', '.join(rows)}" if rows else ""
        raise ValueError(
            f"the {who} does not take the data {name!r} of shape {tuple(data.shape)}{conditions}: "
            f"{_wants(model, tuple(data.shape))}{why}"
        )


def _hint(model: Model, data: Data, has_needless_labels: bool) -> str:
    """What is likely meant, where a model does not take its data."""
    if has_needless_labels:
        return ". It may know no classes: say data.labels: false"
    if isinstance(data, Dropped):
        return f". Are the conditions for none, {data.null}, among those that it knows?"
    try:
        in_pixels = None if model.latents is None else tuple(model.latents.image_shape_of(shape_of(model)))
    except ValueError:
        return ""
    if in_pixels is not None and len(data.shape) == 3 and data.shape[0] == in_pixels[0]:
        return (
            ". It works on latents: a folder of pictures, hf:NAME or webdataset shards are encoded for it once; other "
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
