"""The objective of a recipe, and what it makes of teacher and student."""

import inspect
import re
from pathlib import Path

from fewstep.data import FACTS
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.maps import FlowMap
from fewstep.flows.times import NATIVE, without_native
from fewstep.models.lora import add_lora
from fewstep.objectives import OBJECTIVES
from fewstep.objectives.base import Objective
from fewstep.runs.methods import find_objective
from fewstep.runs.recipe import MADE, Named, Recipe


def make_objective(recipe: Recipe, teacher: VelocityField | None) -> Objective:
    """The training loss of a recipe."""
    return _made(recipe.objective, teacher)


def _made(section: Named, teacher: VelocityField | None) -> Objective:
    """An objective, and inside it what it stands around."""
    method, options = find_objective(section.name), section.options
    if "base" in options and method.around:
        options["base"] = _made(Named.model_validate(options["base"]), teacher)
    if options.pop("teacher", None) == "none":
        teacher = None
    if (rank := lora_rank(options.get("fake"))) is not None:
        options["fake"] = _adapter(teacher, rank)
    takes_teacher = "teacher" in inspect.signature(method).parameters
    return method(**({"teacher": teacher} if takes_teacher else {}), **options)


def lora_rank(fake: object) -> int | None:
    """The rank that ``lora`` or ``lora(16)`` says; None for anything else."""
    found = re.fullmatch(r"lora(?:\(\s*([1-9]\d*)\s*\))?", fake.strip()) if isinstance(fake, str) else None
    return None if found is None else int(found[1] or 8)


def _adapter(teacher: VelocityField | None, rank: int) -> FlowMap:
    """A fake velocity that is an adapter of the teacher's own weights.

    Raises:
        ValueError: a teacher without a network.
    """
    inner = unguided(teacher)
    if not isinstance(inner, NetworkField):
        raise ValueError(
            f"objective.fake: lora adapts the teacher's network, and {type(inner).__name__} has none: say copy"
        )
    fake = FlowMap.from_field(inner, share=True)
    add_lora(fake, rank)
    return fake


def trains_map(recipe: Recipe) -> bool:
    """Whether the student is a flow map: asked for, or what the objective trains."""
    kind, method = recipe.student.kind, find_objective(recipe.objectives[-1].name)
    return kind == "map" if kind else not getattr(method, "trains_field", False)


def strength_of(recipe: Recipe) -> float | None:
    """The strength of guidance at which a student that is told one is held against its teacher: the teacher's own."""
    guidance = recipe.teacher.guidance if recipe.teacher else None
    return guidance.scale if guidance is not None and (guidance.embedded or guidance.range is not None) else None


def sampled_at(recipe: Recipe) -> float | None:
    """The strength of guidance that a student is told where nothing is said."""
    strength = strength_of(recipe)
    return recipe.guided.get("scale") if strength is None else strength


def grid_of(recipe: Recipe) -> str:
    """Where a student takes its steps where nothing is said."""
    section = recipe.objectives[-1]  # the innermost
    times = section.options.get("times", "")
    moves = getattr(find_objective(section.name), "moves_pairs", False)
    return NATIVE if moves and isinstance(times, str) and without_native(times)[1] else "uniform"


def follows_teacher(recipe: Recipe) -> bool:
    """Whether the student is to end where the teacher's trajectories do: it is distilled, or trained on what the
    teacher made. Otherwise the teacher is what it starts from, and fine-tuning leads elsewhere."""
    names = [section.name for section in recipe.objectives]
    if recipe.data.name in MADE or (Path(recipe.data.name).expanduser() / FACTS).is_file():
        return True  # made by the teacher
    if any(name not in OBJECTIVES and ":" not in name for name in names):  # a method of one's own, from Python
        return recipe.teacher is not None
    return any("teacher" in inspect.signature(find_objective(name)).parameters for name in names)
