"""What a run that Python started leaves beside its checkpoints, so that its folder is enough to open it: a
``recipe.yaml`` that says what is known of its parts, and ``student.json``, from which its student is made anew."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.common.disk import replace_file
from fewstep.common.model_files import read_json
from fewstep.common.trust import check_folder, remember
from fewstep.common.version import __version__
from fewstep.data.batch import Data
from fewstep.data.given import Around
from fewstep.flows.description import check_description, code_named, describe, made_again
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided, unguided
from fewstep.flows.maps import FlowMap
from fewstep.objectives.base import Objective
from fewstep.training.folder import write_recipe
from fewstep.training.run import frozen
from fewstep.training.run_files import STUDENT

# In the place of the name of data that have none.
UNNAMED = "given to fewstep.fit"
_PLAIN = bool | int | float | str | None


def leave(
    out: Path, student: nn.Module, objective: Objective, data: Data, training: Mapping[str, Any], seed: int
) -> list[str]:
    """Write both files; returns what the run lacks, a line each, nothing where its folder says all."""
    described, why = {}, ""
    try:
        described = _describe(student, objective)
    except ValueError as error:
        why = str(error)
    teacher = _teacher(objective.teacher) if objective.has_teacher else None
    while isinstance(data, Around):
        data = data.data
    named = getattr(data, "source", None)
    recipe = {
        "name": out.resolve().name,
        "teacher": teacher,
        "student": {"kind": "map" if isinstance(student, FlowMap) else "field"},
        "data": named or {"name": UNNAMED},
        "objective": {"name": type(objective).__name__, **_options(objective)},
        "training": {name: list(value) if isinstance(value, tuple) else value for name, value in training.items()},
        "seed": seed,
    }
    write_recipe(out, recipe)
    facts = {"_fewstep_version": __version__, **described, **({"lacks": why} if why else {})}
    replace_file(out / STUDENT, (json.dumps(facts, indent=2) + "\n").encode())
    remember(out, out / STUDENT, code_named(facts))

    lacks = []
    if why:
        lacks.append(f"{out} cannot be loaded, sampled or exported later, only gone on with: {why}")
    if named is None:
        lacks.append(
            f"fewstep evaluate {out} needs --data NAME: these data have no name, as those of fewstep.load_data have"
        )
    if objective.has_teacher and teacher is None:
        lacks.append(
            f"fewstep evaluate {out} needs --teacher MODEL to measure against: this teacher is not from fewstep.load"
        )
    return lacks


def is_from_python(run: Path) -> bool:
    """Whether a run was started by ``fewstep.fit``, and not from a recipe."""
    return (run / STUDENT).is_file()


def check_from_recipe(run: Path) -> None:
    """That a run is one that a command goes on with.

    Raises:
        ValueError: ``fewstep.fit`` started it.
    """
    if is_from_python(run):
        raise ValueError(
            f"the run in {run} was started by fewstep.fit in Python, and the same call goes on with it: use another "
            "folder (--out), or --fresh to throw that run away"
        )


def student_of(run: Path) -> Any:
    """The student of such a run, with weights that mean nothing yet.

    Raises:
        ValueError: what it lacked when it was started.
    """
    facts = read_json(run / STUDENT)
    if why := facts.get("lacks"):
        raise ValueError(f"the run in {run} can only be gone on with, by the same call of fewstep.fit: {why}")
    check_description(facts, str(run / STUDENT))
    check_folder(run, run / STUDENT, code_named(facts))
    model: Any = made_again(facts, str(run / STUDENT))
    if facts.get("latents"):
        from fewstep.latents.vae import Latents

        model.latents = Latents(str(facts["latents"]))
    if facts.get("text"):
        from fewstep.latents.prompts import Prompts

        model.text = Prompts(str(facts["text"]))
    return model


def _describe(student: Any, objective: Objective) -> dict[str, Any]:
    if still := frozen(student):
        raise ValueError(
            f"its checkpoints hold what trains alone, and not {next(iter(still))!r}, which stands still: export the "
            "student before the program ends, fewstep.export(result.ema, FOLDER)"
        )
    found = describe(student)
    if isinstance(student, FlowMap):  # as it is told when the training begins
        found |= {"gamma": objective.gamma, "grid": objective.grid}
    made = {name: value.shape for name, value in made_again(json.loads(json.dumps(found))).state_dict().items()}
    if made != {name: value.shape for name, value in student.state_dict().items()}:
        raise ValueError(f"a {type(student.network).__name__} made anew by its config has other weights")
    folders = {}
    for name in ("latents", "text"):
        part = getattr(student, name)
        folders[name] = None if part is None else part.folder and str(Path(part.folder).resolve())
        if part is not None and part.folder is None:
            raise ValueError(f"its {name} are from no folder: give fewstep.Latents the folder of the VAE")
    return {**found, **folders}


def _teacher(teacher: VelocityField) -> dict[str, Any] | None:
    """The section of a recipe for a teacher; None for one that has no name."""
    source = unguided(teacher).source
    if source is None or not isinstance(teacher, Guided):
        return None if source is None else {"source": source}
    weak, null = teacher.weak, teacher.null
    is_said = all(isinstance(value, int) for value in null.values()) and (weak is None or weak.source is not None)
    if not is_said or isinstance(teacher.field, Guided):
        return None
    interval = list(teacher.interval)
    guidance = {"scale": teacher.scale, "interval": interval, "null": null, "weak": weak and weak.source}
    guidance |= {} if teacher.scale_2 is None else {"scale_2": teacher.scale_2}
    return {"source": source, "guidance": guidance}


def _options(objective: Objective) -> dict[str, Any]:
    """The options that an objective was made with, as far as it keeps them by their names."""
    names = [name for name in inspect.signature(type(objective)).parameters if name not in ("teacher", "name")]
    kept = {name: getattr(objective, name, objective) for name in names}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    plain = {name: value for name, value in plain.items() if isinstance(value, _PLAIN | list)}
    base = getattr(objective, "base", None)
    around = {"base": {"name": type(base).__name__, **_options(base)}} if isinstance(base, Objective) else {}
    return {**around, **plain}
