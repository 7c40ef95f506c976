"""The method of a recipe: its class by name, its options and those of what it stands around, all filled in."""

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fewstep.common.errors import unknown
from fewstep.common.options import arguments, find_object, in_one_line
from fewstep.common.trust import is_code
from fewstep.objectives import OBJECTIVES, Finishing, Objective
from fewstep.runs.recipe import Named, Recipe


def find_objective(name: str) -> type[Objective]:
    """The class of a method: fewstep's by name, or one's own by ``FILE.py:CLASS``."""
    if is_code(name):
        found = find_object(name, Objective)
        if not isinstance(found, type):
            raise ValueError(f"{name!r} is a function, and an objective is a class that derives from Objective")
        return found
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def settle_objective(recipe: Recipe) -> None:
    """The options of the method filled in, once it is clear that there is what it and the student start from."""
    teacher, student = recipe.teacher, recipe.student
    recipe.objective = _filled(recipe, finished(recipe.objective), "objective")
    if recipe.data.name in ("teacher", "prior"):
        for section in recipe.objectives:
            if find_objective(section.name).needs_rows:
                raise ValueError(
                    f"{section.name} sets what the student makes against real rows, and data: {recipe.data.name} has "
                    "none: name data (a folder of samples will do), or take Corrected, which needs none"
                )
    if teacher is None and student.network == "auto" and student.start is None:
        raise ValueError(
            "student.network is auto, the network of the teacher, and there is no teacher: say mlp or unet"
        )


def _filled(recipe: Recipe, section: Named, where: str) -> Named:
    """The section of a method with all its options, and those of what it stands around."""
    method, options = find_objective(section.name), section.options
    is_around = issubclass(method, Finishing)
    base = {"base": options.pop("base", None) or "ITVM"} if is_around else {}
    alone = {"teacher": "none"} if "teacher" in options else {}
    if alone:
        _train_alone(recipe, method, options.pop("teacher"))
    # A run of long ago may have options that are no more: null ones decided nothing.
    known = inspect.signature(method).parameters
    options = {name: value for name, value in options.items() if value is not None or name in known}
    options = arguments(where, method, options, given=("teacher", *base))
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    wanted = known.get("teacher")
    if recipe.teacher is None and wanted is not None and (is_around or wanted.default is wanted.empty):
        raise ValueError(
            f"{section.name} distills a teacher and there is none: say --teacher, or teacher: in the recipe"
        )
    if is_around:
        try:
            inner = base["base"]
            inner = Named.model_validate({"name": "ITVM", **inner} if isinstance(inner, Mapping) else inner)
        except ValidationError as error:
            raise in_one_line(error, Named, f"{where}.base") from None
        base = {"base": _filled(recipe, inner, f"{where}.base").model_dump()}
    return Named.model_validate({"name": section.name, **base, **alone, **options})


def finished(section: Named) -> Named:
    """``{name: ITVM, finish: corrected}`` written out: the finishing objective, around what is said. Options that only
    the finishing one has are its own: ``{name: ITVM, finish: corrected, begin: 0.3}``.

    Raises:
        ValueError: a finish that is not known.
    """
    options = section.options
    for finish in _list(options.pop("finish", None)):
        finish = {"name": finish} if isinstance(finish, str) else finish
        known = {name.lower(): name for name, method in OBJECTIVES.items() if issubclass(method, Finishing)}
        name = finish.get("name") if isinstance(finish, Mapping) else finish
        if str(name).lower() not in known:
            raise unknown("objective.finish", str(name), known)
        name = known[str(name).lower()]
        its, inside = (inspect.signature(find_objective(method)).parameters for method in (name, section.name))
        own = {key: value for key, value in options.items() if key in its and key not in inside}
        inner = {"name": section.name, **{key: value for key, value in options.items() if key not in own}}
        section = Named.model_validate({**own, **finish, "name": name, "base": inner})
        options = section.options
    return section


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _train_alone(recipe: Recipe, method: type, value: Any) -> None:
    """Take in ``objective.teacher: none``: the loss, and the first weights, know the data alone, and the teacher is
    there for the evaluation."""
    wanted, name = inspect.signature(method).parameters.get("teacher"), recipe.objective.name
    if value not in ("none", None):
        raise ValueError(f"objective.teacher is {value!r}: none is all it can be; the teacher is named by `teacher`")
    if wanted is not None and wanted.default is wanted.empty:
        raise ValueError(f"objective.teacher is none, but {name} needs its teacher: leave it out")
    if recipe.student.start is not None:
        return
    if recipe.student.network == "auto" and recipe.student.weights != "teacher":
        raise ValueError(
            "objective.teacher is none, and student.network is auto, which starts from the teacher's weights: say mlp "
            "or unet, or student.weights: teacher"
        )
    recipe.student.weights = recipe.student.weights or "random"
