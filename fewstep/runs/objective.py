"""The objective of a recipe, and what it makes of teacher and student."""

import inspect
from pathlib import Path

from fewstep.data import FACTS
from fewstep.flows.fields import VelocityField
from fewstep.objectives import OBJECTIVES
from fewstep.objectives.base import Objective
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import find_objective


def make_objective(recipe: Recipe, teacher: VelocityField | None) -> Objective:
    """The training loss of a recipe."""
    method = find_objective(recipe.objective.name)
    takes_teacher = "teacher" in inspect.signature(method).parameters
    options = recipe.objective.options
    if options.pop("teacher", None) == "none":
        teacher = None
    return method(**({"teacher": teacher} if takes_teacher else {}), **options)


def trains_map(recipe: Recipe) -> bool:
    """Whether the student is a flow map: asked for, or what the objective trains."""
    kind, method = recipe.student.kind, find_objective(recipe.objective.name)
    return kind == "map" if kind else not getattr(method, "trains_field", False)


def strength_of(recipe: Recipe) -> float | None:
    """The strength of guidance at which a student that is told one is held against its teacher: the teacher's own."""
    guidance = recipe.teacher.guidance if recipe.teacher else None
    return guidance.scale if guidance is not None and (guidance.embedded or guidance.range is not None) else None


def follows_teacher(recipe: Recipe) -> bool:
    """Whether the student is to end where the teacher's trajectories do: it is distilled, or trained on what the
    teacher made. Otherwise the teacher is what it starts from, and fine-tuning leads elsewhere."""
    name = recipe.objective.name
    if recipe.data.name == "teacher" or (Path(recipe.data.name).expanduser() / FACTS).is_file():
        return True  # made by the teacher
    if name not in OBJECTIVES and ":" not in name:  # a method of one's own, from Python
        return recipe.teacher is not None
    return "teacher" in inspect.signature(find_objective(name)).parameters
