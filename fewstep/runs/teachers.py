"""The teacher of a recipe: the fields that come in closed form, its guidance, and what may be distilled."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.flows.exact import CheckerboardField, eight_gaussians, spiral
from fewstep.flows.fields import VelocityField, check_velocity
from fewstep.flows.guided import Guided
from fewstep.flows.psd import orbital
from fewstep.flows.signature import takes
from fewstep.runs.objective import follows_teacher
from fewstep.runs.recipe import Recipe, Teacher

EXACT: dict[str, Callable[[], VelocityField]] = {
    "checkerboard": CheckerboardField,
    "eight-gaussians": eight_gaussians,
    "spiral": spiral,
    "orbital": orbital,
}


def guided(
    field: VelocityField,
    section: Teacher,
    weak_of: Callable[[str], VelocityField],
    null_of: Callable[[Mapping[str, int | float | str] | str, VelocityField], dict[str, Any]],
) -> VelocityField:
    """The field of a teacher, with the guidance that its section says.

    Args:
        weak_of: how the name of the weaker model becomes a field. null_of: how what the section says of the conditions
            that stand for none becomes these conditions.

    Raises:
        ValueError: a teacher that is said to be told the strength of guidance, and is not.
    """
    guidance = section.guidance
    if guidance is None:
        return field
    if guidance.embedded:
        check_embedded(section.source, field)
        return field
    weak = None if guidance.weak is None else weak_of(guidance.weak)
    null = null_of(guidance.null, field)
    return Guided(field, guidance.scale, guidance.interval, null=null, weak=weak, scale_2=guidance.scale_2)


def is_nowhere(source: str) -> bool:
    """Whether the name of a teacher is a bare word that neither fewstep nor this folder has."""
    return not any(mark in source for mark in "/:~") and source not in EXACT and not Path(source).exists()


def check_teacher(recipe: Recipe, teacher: VelocityField) -> None:
    """That what is distilled is a velocity, or the recipe says that it is to be taken for one.

    Raises:
        ValueError: it is a model that was distilled for a few steps.
    """
    if recipe.teacher is not None and recipe.teacher.distilled:
        teacher.distilled = ""
    if follows_teacher(recipe):
        check_velocity(teacher, recipe.objective.name)


def check_embedded(source: str, field: VelocityField) -> None:
    """That a teacher is told the strength of guidance as it is.

    Raises:
        ValueError: it is not.
    """
    if not takes(field, "guidance"):
        raise ValueError(f"teacher.guidance.embedded: {source!r} is told no strength of guidance: say null")
