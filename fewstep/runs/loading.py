"""Whatever a name leads to, opened: a run, an export, a model of diffusers, an exact field, code; and the teacher of a
recipe."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from fewstep.common.errors import TrainingError, unknown
from fewstep.common.model_files import read_json
from fewstep.common.options import arguments, find_object, in_one_line, read_yaml
from fewstep.common.parsing import checked
from fewstep.common.received import plain_name
from fewstep.common.trust import check_folder, code_in, is_code, trusting
from fewstep.flows.chained import Chained
from fewstep.flows.description import say_shape
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import Model
from fewstep.models.folders import has_one_variant, load_folder
from fewstep.models.lora import has_lora, merge_lora
from fewstep.networks.frozen_base import check_base, keep_base
from fewstep.runs.datasets import coupling_of, data_of, encoded_folder, null_of, source_of
from fewstep.runs.methods import find_objective
from fewstep.runs.objective import grid_of, sampled_at, trains_map
from fewstep.runs.recipe import Recipe, Student, Teacher
from fewstep.runs.recipes import load_recipe
from fewstep.runs.students import make_student, path_of
from fewstep.runs.teachers import EXACT, check_teacher, guided, is_nowhere
from fewstep.training import checkpoints
from fewstep.training.fingerprint import check_kept
from fewstep.training.leaving import is_from_python, student_of
from fewstep.training.run import frozen, put_back
from fewstep.training.run_files import CHAIN, CHECKPOINTS, RECIPE, is_run


def make_teacher(section: Teacher, encoded: Path | None = None, base: str = "float32") -> VelocityField:
    """The field that is distilled.

    Args:
        encoded: a folder of encoded data, which has the conditions of an empty prompt too.
        base: what the linear layers of a diffusers folder are kept in, from the start.

    Raises:
        ValueError: nothing of that name, or something that is no velocity field.
        FileNotFoundError: a path that is not there.
    """
    source = section.source
    if is_nowhere(source):
        raise ValueError(f"{unknown('teacher', source, EXACT)}; and nothing is at that path here")
    field = find_model(source, section.options, base)
    if isinstance(field, FlowMap):
        raise ValueError(
            f"the teacher {section.source!r} is a flow map, and what is distilled is a velocity field: "
            "name the teacher that it was made from; to train the map on, name it as student.start"
        )
    return guided(field, section, find_model, lambda null, field: null_of(null, field, encoded))


def find_model(source: str, options: dict[str, Any] | None = None, base: str = "float32") -> Any:
    """What a name stands for: an exact field, a function of a file or module, or whatever ``fewstep.load`` takes."""
    if source in EXACT:
        return EXACT[source]()
    if is_code(source):
        function = find_object(source, VelocityField, FlowMap)
        model = function(**arguments("teacher.options", function, options or {}))
        if not isinstance(model, VelocityField | FlowMap):
            raise ValueError(f"{source!r} gave a {type(model).__name__}, not a VelocityField or FlowMap")
        return model
    own = arguments("teacher.options", load, options or {}, given=("source", "device", "trust"))
    return _load(source, base=base, **own)


def load(
    source: Any, *, device: str = "cpu", trust: bool = False, variant: str | None = None
) -> VelocityField | FlowMap:
    """A model from a folder, in evaluation mode.

    Args:
        source: one of

            * a diffusers folder with a model of ``fewstep.networks.FAMILIES`` and a scheduler (a pipeline, or a bare
              model with ``scheduler_config.json`` beside it), as a velocity field on the linear path
              (arXiv 2506.02221), with the ``latents`` of its VAE and the ``text`` of its encoders;
            * an export of fewstep's, as what was exported, or what ``fewstep.convert`` wrote, as what was converted;
            * a run folder, as what was trained; that of a chain of blocks, as a :class:`Chained`;
            * ``fewstep:NAME``, a model that comes with fewstep;
            * ``owner/name``, a diffusers model on the Hugging Face hub;
            * a pipeline of diffusers in memory, whose model and VAE are used as they are.
        device: where it goes.
        trust: whether code may run that the recipe of a run names, where this user's fewstep did not write that run:
            see ``fewstep.common.trust``; and the code that an export of a network of one's own carries.
        variant: which weights of a diffusers model are read, such as fp16; by default the plain ones, or the only ones
            that there are.

    Raises:
        FileNotFoundError: no such folder or hub model; a folder without model, scheduler, its VAE or safetensors
            weights.
        ValueError: a model, scheduler or VAE that fewstep does not know, parts that do not belong together, or a file
            that cannot be read; code of a run that is not known to be this user's.

    >>> teacher = fewstep.load("./my-ddpm")
    """
    return _load(source, trust=trust, variant=variant).to(device)


def _load(source: Any, *, trust: bool = False, variant: str | None = None, base: str = "float32") -> Any:
    folder = Path(source).expanduser() if isinstance(source, str | Path) else None
    if folder is not None and (folder / CHAIN).is_file():
        return _chain_in(folder, trust)
    if folder is None or not is_run(folder):
        return load_folder(source, trust=trust, variant=variant, base=base)
    if variant is not None:
        raise has_one_variant(source, variant)
    model = load_run(folder, trust=trust)
    model.source = str(folder.resolve())
    return model


class _Chain(BaseModel):
    blocks: Annotated[list[str], Field(min_length=1, max_length=100)]


def _chain_in(folder: Path, trust: bool) -> Chained:
    """The chain of blocks that ``fit_blocks`` left in a folder: runs beside ``chain.json``, from noise to data."""
    where = folder / CHAIN
    said = checked(_Chain, read_json(where), where, "put it back as it was")
    chain = Chained([load(folder / plain_name(name, where), trust=trust) for name in said.blocks]).eval()  # pyright: ignore[reportArgumentType]
    chain.source = str(folder.resolve())
    return chain


def start_of(section: Student) -> VelocityField | FlowMap | None:
    """The model that a student goes on from; None where it starts otherwise.

    Raises:
        FileNotFoundError: it is not there.
    """
    if section.start is None:
        return None
    try:
        return load(section.start)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"student.start: {error}. The student goes on from it, and its run is opened with it: put it back, or say "
            "where it is now, student.start in the recipe (of a run, its recipe.yaml)"
        ) from None


@dataclass(frozen=True)
class Trained:
    """A run on disk: ``model`` has its averaged weights, ``shape`` is that of one sample."""

    model: Model
    recipe: Recipe
    shape: tuple[int, ...]
    step: int


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
    if (path / CHAIN).is_file():
        raise ValueError(
            f"{path} is a chain of blocks, each a run of its own: fewstep sample, reflow and distill take it, and from "
            "Python fewstep.evaluate(fewstep.load(...), data=...)"
        )
    if not (path / RECIPE).is_file():
        raise FileNotFoundError(f"there is no run in {path}: a run folder has a recipe.yaml and checkpoints/")
    found = checkpoints.latest(path / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"the run in {path} has no checkpoint yet: `fewstep train {path}` goes on with it")
    recipe, saved = recipe_of(path), checkpoints.load(found)
    known = saved.state["fingerprint"]
    if not known.get("data_shape"):
        raise TrainingError(f"{found} does not say what it was trained on: put its state.json back as it was")
    if not is_from_python(path):
        check_kept(path, known, recipe.fingerprint())
    shape = tuple(known["data_shape"])
    with _opening(path), warnings.catch_warnings():
        # That some weights are new in the student was said when it was made, and they are loaded here.
        warnings.simplefilter("ignore")
        if is_from_python(path):
            model: Model = student_of(path)
        else:
            teacher = _teacher_of(path, recipe)
            model = make_student(
                recipe.student,
                shape,
                teacher,
                trains_map(recipe),
                recipe.seed,
                start_of(recipe.student),
            )
            model.starts_from = source_of(recipe, teacher or model)
    if isinstance(model, FlowMap | NetworkField):
        say_shape(model, shape)
    put_back(model, frozen(model), saved, "ema" if "ema" in saved.tensors else "model")
    model.class_names = tuple(known.get("data_classes") or model.class_names)
    if moments := known.get("data_moments"):
        model.moments = tuple(moments)
    elif recipe.data.options.get("normalize"):  # a run from before they were kept
        model.moments = getattr(data_of(recipe.data, model), "moments", None)
    if isinstance(model, FlowMap) and not is_from_python(path):
        model.gamma = find_objective(recipe.objectives[-1].name).gamma
        model.grid = grid_of(recipe)
        model.guidance = sampled_at(recipe)
    if isinstance(model, VelocityField):
        model.coupling = coupling_of(recipe)
        model.chain = (
            str(recipe.objective.options.get("kind", "masked")) if recipe.objective.name == "MarkovChain" else ""
        )
    return Trained(model.eval().requires_grad_(False), recipe, shape, saved.step)


def recipe_of(path: Path, tree: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a run, or ``tree`` in its place. One that Python started says what was known of its parts: none of
    its names is code, and nothing is looked up."""
    if not is_from_python(path):
        return load_recipe(path if tree is None else tree)
    if tree is None:
        tree = read_yaml(path / RECIPE)
        check_folder(path, path / RECIPE, code_in(tree))
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
    model = open_run(path, trust=trust).model
    return merge_lora(model).requires_grad_(False) if has_lora(model) else model


def _teacher_of(path: Path, recipe: Recipe) -> VelocityField | None:
    """The teacher of a run, without which its student is not made again."""
    source = "" if recipe.teacher is None else recipe.teacher.source
    try:
        if source and is_nowhere(source):
            raise FileNotFoundError(f"no folder {source}")
        return teacher_of(recipe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is the teacher of the run in {path}, and is not there ({str(error)[:100]}). Put it back, or say "
            f"where it is now: teacher.source in {path / RECIPE}"
        ) from None


def teacher_of(recipe: Recipe) -> VelocityField | None:
    if recipe.teacher is None:
        return None
    if (lora := recipe.student.lora) is not None:
        check_base(lora.base)
    base = "float32" if lora is None else lora.base
    teacher, path = make_teacher(recipe.teacher, encoded_folder(recipe), base), path_of(recipe.student)
    check_teacher(recipe, teacher)
    inner = unguided(teacher)
    if lora is not None and lora.base != "float32" and isinstance(inner, NetworkField):
        keep_base(lora.base, inner.requires_grad_(False).network)  # before anything asks which teacher it is
    return teacher if path is None or teacher.path.same_as(path) else teacher.on(path)
