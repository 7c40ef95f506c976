"""Recipes from YAML files. ``load_recipe`` reads one, applies the flags of the command line, refuses what is not known,
and fills in every default, so that the ``recipe.yaml`` of a run folder says all that decided the run.
"""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fewstep.common.errors import unknown
from fewstep.common.options import in_one_line, parse_value, read_yaml
from fewstep.common.trust import check_folder, code_in, is_code, trusting
from fewstep.runs.recipe import BETWEEN, NETWORKS, PATHS, Named, Recipe
from fewstep.training.run_files import RECIPE, came_with
from fewstep.training.shares import check_shares, default_chunk

# The key that a section's short form gives: `teacher: checkerboard` is `teacher: {source: checkerboard}`.
_SHORT = {"teacher": "source", "student": "network", "data": "name", "source": "name", "objective": "name"}
# The same as flags, and the one that everybody types.
_FLAGS = {key: f"{key}.{inner}" for key, inner in _SHORT.items()} | {"steps": "training.steps"}


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    *,
    trust: bool = False,
    look: bool = False,
) -> Recipe:
    """The recipe of a YAML file, of a name among those that come with fewstep, or of a mapping.

    Args:
        source: a path (of a run folder too), a name such as ``checkerboard-itvm``, or the keys themselves.
        overrides: dotted keys, and their values as YAML text: ``{"objective.ema": "0.99", "steps": "10"}``. Short
            forms: ``steps``, ``teacher``, ``student``, ``data``, ``objective``. Another objective, or network of the
            student, starts from its own defaults: the options in the file are those of the one that it replaces.
        trust: whether code may run that the recipe of a folder names, where this user's fewstep did not write that
            folder: see ``fewstep.common.trust``.
        look: read it without code: options of a method of one's own stay as the file has them.

    Raises:
        FileNotFoundError: there is no such recipe, or no file that it names.
        ValueError: a key, a name or a value that cannot be; one line with the dotted key and what is known. Code named
            by the recipe of a folder that is not known to be this user's.
    """
    base, folder, path = Path(), None, Path()
    if isinstance(source, Mapping):
        tree = dict(source)
    else:
        path = find_recipe(source)
        base, tree, folder = path.parent, read_yaml(path), came_with(path)
        folder = Path(source).expanduser() if Path(source).expanduser().is_dir() else folder
        tree.setdefault("name", path.stem)
    received = {} if folder is None else code_in(tree)
    # The short forms first, as they may take away options that others set.
    for key, text in sorted((overrides or {}).items(), key=lambda item: item[0] not in _FLAGS):
        value = parse_value(key, text)
        _replace(tree, key, value)
        dotted = key if isinstance(value, Mapping) else _FLAGS.get(key, key)
        _set(tree, dotted, value)
        received = {of: name for of, name in received.items() if of != dotted and not of.startswith(f"{dotted}.")}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise in_one_line(error, Recipe, inside=lambda: _open_keys(tree)) from None
    _find_names(recipe, base)
    with trusting(trust):
        if folder is not None and not look:
            check_folder(folder, path, {of: _beside(base, name) for of, name in received.items()})
        if not (look and is_code(recipe.objective.name)):
            from fewstep.runs.methods import settle_objective

            settle_objective(recipe)
    return recipe


def _open_keys(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """The options that images and the recipe's method take, for who leaves the section out: ``size``, ``ema``."""
    from fewstep.data.images import hugging_face
    from fewstep.objectives import OBJECTIVES

    method = tree.get("objective")
    method = OBJECTIVES.get(str(method.get("name") if isinstance(method, Mapping) else method))
    return {
        "data": list(inspect.signature(hugging_face).parameters)[1:],
        "objective": [] if method is None else list(inspect.signature(method).parameters),
    }


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe, given by its path, its run folder or its name."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / RECIPE
    if path.is_file():
        return path
    known = known_recipes()
    if path.stem in known and str(path.parent) in (".", "recipes"):
        return known[path.stem]
    near = get_close_matches(path.stem, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"there is no recipe {str(source)!r}: {hint}`fewstep recipes` lists what comes with fewstep"
    )


def known_recipes() -> dict[str, Path]:
    """The recipes that come with fewstep, by name."""
    package = Path(__file__).parents[1]
    # A wheel has them inside the package, a checkout beside it.
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if _has_its_code(path)}


def _has_its_code(recipe: Path) -> bool:
    """Whether the files of code that a recipe names are there."""
    files = [name.rpartition(":")[0] for name in code_in(read_yaml(recipe)).values()]
    return all((recipe.parent / file).is_file() for file in files if file.endswith(".py"))


def describe(recipe: Path) -> str:
    """What a recipe says it is: the comment on its first line."""
    first = recipe.read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _replace(tree: dict[str, Any], key: str, value: Any) -> None:
    """Take away the options of a method or network that gives way to another."""
    section = tree.get(key)
    if key in ("objective", "student") and isinstance(section, dict) and section.get(_SHORT[key]) != value:
        kept = ("kind", "path", "prediction", "weights") if key == "student" else ()
        tree[key] = {name: section[name] for name in kept if name in section}


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key; short forms on the way are opened up to take an option."""
    *parents, key = dotted.split(".")
    for depth, parent in enumerate(parents):
        inner = tree.get(parent) or {}
        if isinstance(inner, str) and depth == 0 and parent in _SHORT:
            inner = {_SHORT[parent]: inner}
        elif isinstance(inner, str) and parents[0] == "objective" and depth:
            inner = {"name": inner}  # what it stands around, a critic
        if not isinstance(inner, dict):
            raise ValueError(f"unknown recipe key {dotted!r}: {parent} is {inner!r}, which has no keys inside")
        tree[parent] = tree = dict(inner)
    tree[key] = value


def _find_names(recipe: Recipe, base: Path) -> None:
    """Names checked, and files found."""
    teacher, student = recipe.teacher, recipe.student
    paths = PATHS if student.latent is None else BETWEEN
    if student.path is not None and student.path not in paths:
        raise unknown("path" if student.latent is None else "path between two data sets", student.path, paths)
    if not is_code(student.network) and student.network not in NETWORKS:
        raise unknown("network", student.network, NETWORKS)
    if recipe.training.steps is None and recipe.training.max_seconds is None:
        raise ValueError("training.steps or training.max_seconds is needed: when is the training done?")
    training = recipe.training
    check_shares(training.batch, training.chunk or default_chunk(training.batch), training.accumulate)

    if teacher is not None:
        teacher.source = _beside(base, teacher.source)
        if teacher.guidance is not None and teacher.guidance.weak is not None:
            teacher.guidance.weak = _beside(base, teacher.guidance.weak)
        guidance = teacher.guidance
        # One that is told the strength as it is makes a student that is.
        is_new = guidance is not None and guidance.range is not None and not guidance.embedded
        if is_new and student.network == "auto" and student.guidance is None:
            student.guidance = True
    if recipe.guided and student.guidance is None and not is_code(student.network):
        student.guidance = "interval"
    _check_student(recipe)
    student.network = _beside(base, student.network)
    if student.start is not None:
        student.start = _beside(base, student.start)
        if (start := Path(student.start).expanduser()).is_dir():
            student.start = str(start.resolve())  # a run is opened with it, from anywhere
    recipe.data.name = _beside(base, recipe.data.name)
    if recipe.source is not None:
        recipe.source.name = _beside(base, recipe.source.name)
    if isinstance(prompts := recipe.data.options.get("prompts"), str):
        recipe.data = Named.model_validate(
            {"name": recipe.data.name, **recipe.data.options, "prompts": _beside(base, prompts)}
        )
    recipe.objective = Named.model_validate(_beside_inside(base, recipe.objective.model_dump()))


def _beside_inside(base: Path, value: Any) -> Any:
    """An objective's section with the files of code found that it names, however deep."""
    if isinstance(value, Mapping):
        return {key: _beside_inside(base, inner) for key, inner in value.items()}
    return _beside(base, value) if is_code(value) else value


def _check_student(recipe: Recipe) -> None:
    """Refuse what is asked of a student that would come to nothing."""
    student, guidance = recipe.student, recipe.teacher.guidance if recipe.teacher else None
    if student.start is not None:
        for key in ("options", "prediction", "weights", "image", "conversion", "late_share"):
            if getattr(student, key):
                raise ValueError(f"student.start is a whole model, and student.{key} would change it: leave one out")
        if student.network != "auto":
            raise ValueError(f"student.start is a whole model, and student.network is {student.network}: leave one out")
    for key, own in (("image", "unet"), ("conversion", "auto")):
        if getattr(student, key) is not None and student.network not in ("auto", own):
            raise ValueError(
                f"student.{key} changes the network of the teacher, and student.network is {student.network}: say auto"
                + (f" or {own}" if own != "auto" else "")
            )
    if student.weights == "random" and student.network == "auto":
        raise ValueError(
            "student.weights: random, and student.network: auto is the teacher's with its weights: say mlp, unet or "
            "FILE.py:FUNCTION, or leave weights out"
        )
    is_guided = bool(recipe.guided)
    if student.guidance and (guidance is None or guidance.range is None) and not is_guided:
        raise ValueError(
            "student.guidance is an input for the strength of guidance, and there are no strengths to learn: say "
            "teacher.guidance.range, such as [1, 3]"
        )
    if student.late_share is not None and student.second_time != "late":
        raise ValueError(f"student.late_share is {student.late_share}: it belongs to student.second_time: late")
    if student.second_time is not None and student.kind == "field":
        raise ValueError("student.second_time is for flow maps, and student.kind is field: leave one of them out")
    if student.guidance and student.kind == "field":
        raise ValueError("student.guidance is for flow maps, and student.kind is field: leave one of them out")


def _beside(base: Path, name: str) -> str:
    """A path that is not here but beside the recipe, as the path that is there; anything else as it is."""
    path, colon, inside = name.rpartition(":") if ".py:" in name else (name, "", "")
    looks_so = "/" in path or Path(path).suffix != ""
    return f"{base / path}{colon}{inside}" if looks_so and not Path(path).exists() and (base / path).exists() else name
