"""BibTeX for what a run used: its method, the conversion and guidance of its teacher, its coupling."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.config import find_objective, find_recipe, known_recipes, load_recipe
from fewstep.data.pairs import FACTS
from fewstep.errors import unknown
from fewstep.fields import Guided, NetworkField
from fewstep.objectives import OBJECTIVES, Objective
from fewstep.parts import EXACT, make_teacher
from fewstep.recipe import Recipe, Teacher
from fewstep.starts import recipe_of

# A paper by its arXiv number, or "" for a remark, and what it is cited for.
Use = tuple[str, str]

# Options of an objective that come from a paper of their own: whether a value uses it, and what it is.
_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "times": ("logit-normal", "2403.03206", "logit-normal times"),
    "learned": (True, "2312.02696", "the learned weight"),
}


def cite(*what: str | Path) -> str:
    """BibTeX entries of the papers behind runs, recipes or methods, each with a comment that says what it is cited for.

    Args:
        what: run folders, recipes by path or name, methods by name or ``FILE.py:CLASS``.

    Raises:
        FileNotFoundError, ValueError: nothing of that name, or a recipe that cannot be read.

    >>> print(fewstep.cite("runs/fast"))
    """
    reasons: dict[str, list[str]] = {}
    for item in what:
        for number, reason in _uses(str(item)):
            known = reasons.setdefault(number, [])
            if reason not in known:
                known.append(reason)
    remarks = reasons.pop("", [])
    table = bibliography()
    entries = [f"% {'; '.join(said)}\n{table.get(number) or _bare(number)}" for number, said in reasons.items()]
    return "\n\n".join([*entries, *(f"% {remark}" for remark in remarks)]) + "\n"


def bibliography() -> dict[str, str]:
    """The entries of ``citations.bib`` by arXiv number."""
    text = (Path(__file__).parent / "citations.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@.*?^}", text, re.MULTILINE | re.DOTALL)
    return {re.findall(r"eprint = {(.*)}", entry)[0]: entry for entry in entries}


def _bare(number: str) -> str:
    """An entry for a paper that is not in the bibliography: a method of one's own may name any."""
    return f"@misc{{arxiv{number},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"


def _uses(name: str) -> Iterator[Use]:
    if name in OBJECTIVES or (":" in name and not Path(name).exists()):
        return _method(name)
    try:
        find_recipe(name)
    except FileNotFoundError:
        if "/" in name or "." in name:
            raise
        raise unknown("run, recipe or method", name, [*OBJECTIVES, *known_recipes()]) from None
    return _recipe(load_recipe(name))


def _method(name: str) -> Iterator[Use]:
    method = find_objective(name)
    if not (isinstance(method, type) and issubclass(method, Objective)):
        raise ValueError(f"{name} is no objective: a class that derives from fewstep.objectives.Objective is needed")
    for number in method.sources:
        yield number, f"{method.__name__}, the objective"
    if not method.sources:
        yield "", f'{name} names no papers: say them in its class, such as sources = ("2505.01169",)'


def _recipe(recipe: Recipe) -> Iterator[Use]:
    yield from _method(recipe.objective.name)
    for option, (value, number, reason) in _OPTIONS.items():
        if recipe.objective.options.get(option) == value:
            yield number, reason
    if recipe.student.start is not None and (start := recipe_of(recipe.student.start)) is not None:
        for number, reason in _recipe(load_recipe(start)):
            yield number, f"of the model that the student goes on from: {reason}" if number else reason
    if recipe.student.lora is not None:
        yield "2106.09685", "the adapter that trains in the place of the weights (LoRA)"
    if recipe.student.image is not None:
        yield "2211.09800", "the image beside the state"
    if recipe.coupling == "ot":
        yield "2302.00482", "the optimal-transport coupling"
    if (Path(recipe.data.name).expanduser() / FACTS).is_file():
        yield "2209.03003", "the pairs of noise and data that a model made (reflow)"
    if recipe.teacher is not None:
        yield from _teacher(recipe.teacher)


def _teacher(section: Teacher) -> Iterator[Use]:
    if (guidance := section.guidance) is not None:
        yield from _guidance(guidance.interval, autoguided=guidance.weak is not None)
    if section.source in EXACT:
        return
    folder = Path(section.source).expanduser()
    if (folder / "recipe.yaml").is_file():
        for number, reason in _recipe(load_recipe(folder)):
            yield number, f"of the teacher: {reason}" if number else reason
    try:
        # What the teacher is made of is known for sure only once it is made, above all one of the user's own.
        field: Any = make_teacher(section.model_copy(update={"guidance": None}))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())
        yield "", f"what the teacher {section.source} uses is not known, as it cannot be loaded: {said}"
        return
    while isinstance(field, Guided):
        yield from _guidance(field.interval, autoguided=field.weak is not None)
        field = field.field
    if isinstance(field, NetworkField) and not field.native.same_as(field.path):
        yield "2506.02221", "the change of path (a diffusion model as a flow)"


def _guidance(interval: tuple[float, float], autoguided: bool) -> Iterator[Use]:
    yield ("2406.02507", "autoguidance") if autoguided else ("2207.12598", "classifier-free guidance")
    if interval != (0.0, 1.0):
        yield "2404.07724", "guidance on an interval of times"
