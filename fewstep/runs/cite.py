"""BibTeX for what a run used: its method, the conversion and guidance of its teacher, its coupling."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.common.errors import briefly, unknown
from fewstep.common.trust import is_code, only_looking
from fewstep.data.pairs import FACTS
from fewstep.flows.fields import NetworkField
from fewstep.objectives import OBJECTIVES
from fewstep.runs.loading import make_teacher
from fewstep.runs.recipe import Recipe, Teacher
from fewstep.runs.recipes import find_recipe, known_recipes, load_recipe
from fewstep.runs.teachers import EXACT
from fewstep.runs.warm_start import recipe_of
from fewstep.training.run_files import RECIPE

# A paper by its arXiv number, or "" for a remark, and what it is cited for.
Use = tuple[str, str]

# Options of an objective that come from a paper of their own: whether a value uses it, and what it is.
_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "times": ("logit-normal", "2403.03206", "logit-normal times"),
    "learned": (True, "2312.02696", "the learned weight"),
    "diffused": (True, "2206.02262", "the noise on the critic's rows (Diffusion-GAN)"),
    "critic": ("teacher", "2403.12015", "the teacher's features as a critic"),
    "adaptive": (True, "2012.09841", "the adaptive weight of the adversarial term"),
    "starts": ("prior", "2511.19428", "rows that start from noise alone"),
}


def cite(*what: str | Path) -> str:
    """BibTeX entries of the papers behind runs, recipes or methods, each with a comment that says what it is cited for.
    No code runs that these name: the papers of a method of one's own are read in the text of its file.

    Args:
        what: run folders, recipes by path or name, methods by name or ``FILE.py:CLASS``.

    Raises:
        FileNotFoundError, ValueError: nothing of that name, or a recipe that cannot be read.

    >>> print(fewstep.cite("runs/fast"))
    """
    reasons: dict[str, list[str]] = {}
    with only_looking():
        for number, reason in (use for item in what for use in _uses(str(item))):
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
    return _recipe(load_recipe(name, look=True))


def _method(name: str) -> Iterator[Use]:
    if name in OBJECTIVES:
        sources = OBJECTIVES[name].sources
    elif name.rpartition(":")[0].endswith(".py"):
        sources = _sources_in(name)
    else:
        yield "", f"what {name} uses is not known: no code is run to cite it, and only FILE.py:CLASS is read as text"
        return
    for number in sources:
        yield number, f"{name.rpartition(':')[2]}, the objective"
    if not sources:
        yield "", f'{name} names no papers: say them in its class, such as sources = ("2505.01169",)'


def _sources_in(name: str) -> tuple[str, ...]:
    """The papers that a class in a file says it is of, or that it has from a method of fewstep's; read as text.

    Raises:
        FileNotFoundError, ValueError: no such file, or no such class in it.
    """
    file, _, wanted = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no Python: {error}") from None
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        raise ValueError(f"{name} is no objective: a class that derives from fewstep.objectives.Objective is needed")
    seen: list[str] = []
    while wanted in classes and wanted not in seen:
        seen.append(wanted)
        for node in classes[wanted].body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _sets_sources(node):
                return _strings(node.value)
        bases = [ast.unparse(base).rpartition(".")[2] for base in classes[wanted].bases]
        wanted = next((base for base in bases if base in classes or base in OBJECTIVES), "")
    return tuple(OBJECTIVES[wanted].sources) if wanted in OBJECTIVES else ()


def _sets_sources(node: ast.Assign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == "sources" for target in targets)


def _strings(value: ast.expr) -> tuple[str, ...]:
    return tuple(n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _recipe(recipe: Recipe) -> Iterator[Use]:
    for section in recipe.objectives:
        try:
            yield from list(_method(section.name))
        except (OSError, ValueError) as error:
            yield "", f"what {section.name} uses is not known: {error}"
        for option, (value, number, reason) in _OPTIONS.items():
            said = section.options.get(option)
            if isinstance(said, Mapping):  # with options of its own
                said = said.get("name", True)
            is_same = said == value and isinstance(said, type(value))  # 1.0 is no True
            if is_same or (isinstance(said, str) and said.partition("(")[0] == value):  # with its numbers
                yield number, reason
    if recipe.student.start is not None and (start := recipe_of(recipe.student.start)) is not None:
        for number, reason in _recipe(load_recipe(start, look=True)):
            yield number, f"of the model that the student goes on from: {reason}" if number else reason
    if recipe.student.lora is not None:
        yield "2106.09685", "the adapter that trains in the place of the weights (LoRA)"
    if recipe.student.image is not None:
        yield "2211.09800", "the image beside the state"
    if recipe.student.network == "continuous":
        yield "2310.20092", "the continuous U-Net"
    if recipe.blocks is not None:
        yield "2410.02548", "the blocks, trained one after the other"
    if recipe.coupling != "independent":
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
    if is_code(section.source):
        yield "", f"what the teacher {section.source} uses is not known: no code is run to cite it"
        return
    folder = Path(section.source).expanduser()
    if (folder / RECIPE).is_file():
        for number, reason in _recipe(load_recipe(folder, look=True)):
            yield number, f"of the teacher: {reason}" if number else reason
    try:
        # What the teacher is made of is known for sure only once it is made.
        field: Any = make_teacher(section.model_copy(update={"guidance": None}))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        yield "", f"what the teacher {section.source} uses is not known, as it cannot be loaded: {briefly(error)}"
        return
    if isinstance(field, NetworkField) and not field.native.same_as(field.path):
        yield "2506.02221", "the change of path (a diffusion model as a flow)"


def _guidance(interval: tuple[float, float], autoguided: bool) -> Iterator[Use]:
    yield ("2406.02507", "autoguidance") if autoguided else ("2207.12598", "classifier-free guidance")
    if interval != (0.0, 1.0):
        yield "2404.07724", "guidance on an interval of times"
