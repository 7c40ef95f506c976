"""The method of a recipe: its class by name, its options and those of what it stands around, all filled in."""

import inspect
from collections.abc import Mapping
from typing import Any

from fewstep.common.errors import shown, unknown
from fewstep.common.options import arguments, find_object
from fewstep.common.trust import is_code
from fewstep.objectives import OBJECTIVES, Finishing, Objective
from fewstep.runs.recipe import MADE, Named, Recipe, base_section


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
    if getattr(find_objective(recipe.objective.name), "trains_denoiser", False) and student.kind is None:
        student.kind = "denoised"
    if recipe.data.name in MADE:
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
    base = {"base": options.pop("base", None) or method.around} if method.around else {}
    alone = {"teacher": "none"} if "teacher" in options else {}
    if alone:
        _train_alone(recipe, method, options.pop("teacher"))
    # A run of long ago may have options that are no more: null ones decided nothing.
    known = inspect.signature(method).parameters
    options = {name: value for name, value in options.items() if value is not None or name in known}
    options = arguments(where, method, options, given=("teacher", *base))
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    wanted = known.get("teacher")
    if recipe.teacher is None and wanted is not None and (method.around or wanted.default is wanted.empty):
        raise ValueError(
            f"{section.name} distills a teacher and there is none: say --teacher, or teacher: in the recipe"
        )
    if method.around:
        inner = base_section(base["base"], f"{where}.base", method.around)
        if issubclass(method, Finishing) and inner.name == "ITVM":
            inner = Named.model_validate({**method.inside, **inner.model_dump()})
        base = {"base": _filled(recipe, inner, f"{where}.base").model_dump()}
    return Named.model_validate({"name": section.name, **base, **alone, **options})


def finished(section: Named) -> Named:
    """``{name: ITVM, finish: corrected}`` written out: the finishing objectives, from the inside out, around what is
    said. Options that only those have are theirs: ``{name: ITVM, finish: corrected, begin: 0.3}``; of several, each has
    those that it takes.

    Raises:
        ValueError: a finish that is not known, or an option of two that mean different things by it.
    """
    options = section.options
    if "finish" not in options:
        return section
    finishes = [_read_finish(finish) for finish in _list(options.pop("finish"))]
    names = (section.name, *(name for name, _ in finishes))
    inside, *its = ({*inspect.signature(find_objective(name)).parameters} for name in names)
    beside = {key: value for key, value in options.items() if key not in inside and any(key in of for of in its)}
    for key in beside:
        _check_shared(key, [name for name, own in finishes if key not in own])
    section = Named.model_validate(
        {"name": section.name, **{key: value for key, value in options.items() if key not in beside}}
    )
    for (name, own), takes in zip(finishes, its, strict=True):
        told = {key: value for key, value in beside.items() if key in takes}
        section = Named.model_validate({**told, **own, "name": name, "base": section.model_dump()})
    return section


def _read_finish(finish: Any) -> tuple[str, dict[str, Any]]:
    """The class that ``corrected``, or ``{name: corrected, weight: 2}``, is short for, and the options beside it."""
    known = {name.lower(): name for name, method in OBJECTIVES.items() if issubclass(method, Finishing)}
    own = dict(finish) if isinstance(finish, Mapping) else {"name": finish}
    name = own.pop("name", None)
    if name is None:
        names = " or ".join(sorted(known))
        raise ValueError(f"objective.finish is {shown(finish)}, which has no name: say name: {names}")
    if str(name).lower() not in known:
        raise unknown("objective.finish", name, known)
    if "base" in own:
        raise ValueError(f"objective.finish has base: {shown(own['base'])}, and its base is objective: say it there")
    return known[str(name).lower()], own


def _check_shared(key: str, names: list[str]) -> None:
    """That an option beside several finishes is one that they all mean alike.

    Raises:
        ValueError: their defaults differ, as those of ``weight`` do.
    """
    parameters = [inspect.signature(find_objective(name)).parameters for name in names]
    defaults = {str(of[key].default): name for of, name in zip(parameters, names, strict=True) if key in of}
    if len(defaults) > 1:
        example = ", ".join(f"{{name: {name.lower()}, {key}: {default}}}" for default, name in defaults.items())
        raise ValueError(f"objective.{key}: each finish has its own, say whose it is: finish: [{example}]")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "none") else [value]


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
