"""What a step of each method costs on one recipe: measured once, in turn, and kept in budget.json."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from fewstep.common.disk import replace_file
from fewstep.common.distributed import choose_device, environment
from fewstep.common.errors import TrainingError, shortened
from fewstep.common.model_files import read_json
from fewstep.common.parsing import checked
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch, Data
from fewstep.data.buckets import of_one_shape
from fewstep.evaluation.calls import Counts
from fewstep.evaluation.cost import Cost, Entry, compare_costs, step_cost
from fewstep.objectives import FlowMatching
from fewstep.runs.build import Built
from fewstep.runs.recipe import Recipe
from fewstep.runs.side_by_side import MethodCost
from fewstep.training.computing import PRECISIONS
from fewstep.training.fingerprint import MAY_DIFFER, flat

_ROUNDS = 7
FAILURES = (TrainingError, ValueError, TypeError, RuntimeError)


class _Cost(BaseModel):
    failed: str | None = None
    time: float | None = None
    memory: float | None = None
    counts: Counts | None = None


class _Budget(BaseModel):
    """What ``budget.json`` says: of each method its cost, over the seconds of a step of flow matching."""

    recipe: dict[str, Any]
    base_seconds: float | None
    methods: dict[str, _Cost]


def costs_of(
    recipes: dict[str, Recipe], built: dict[str, Built], file: Path, say: Callable[[str], None]
) -> dict[str, MethodCost]:
    """The cost of each method, from ``budget.json`` or measured now. What is kept is the time of a step of flow
    matching, and ratios to it, so that a method that joins later is measured against the same."""
    recipe = next(iter(recipes.values()))
    ours = {
        key: value
        for key, value in flat(recipe.fingerprint()).items()
        if not key.startswith("objective.") and key not in {*MAY_DIFFER, "seed", "student.weights"}
    }
    kept: dict[str, Any] = {"recipe": ours, "base_seconds": None, "methods": {}}
    if file.is_file():
        budget = checked(_Budget, read_json(file), file, "remove it, and steps are timed anew")
        kept = budget.model_dump(exclude_unset=True)
    if kept["recipe"] != ours:
        differing = ", ".join(k for k in ours.keys() | kept["recipe"].keys() if ours.get(k) != kept["recipe"].get(k))
        raise ValueError(f"{file} was measured for another recipe ({differing} differ): use another --out")
    missing = [label for label in recipes if label not in kept["methods"]]
    if missing:
        say(f"timing a step of {', '.join(missing)}")
        base, found = _measure({label: built[label] for label in missing}, recipe)
        kept["base_seconds"] = kept["base_seconds"] or base.seconds * recipe.training.accumulate
        for label, cost in found.items():
            if isinstance(cost, str):
                kept["methods"][label] = {"failed": cost}
                continue
            memory, counts = cost.peak_bytes / base.peak_bytes, dataclasses.asdict(cost.counts)
            kept["methods"][label] = {"time": cost.over(base), "memory": memory, "counts": counts}
        replace_file(file, json.dumps(kept, indent=2).encode())

    def read(values: dict[str, Any]) -> MethodCost:
        if "failed" in values:
            return MethodCost(failed=values["failed"])
        counts = Counts(**values["counts"])
        return MethodCost(kept["base_seconds"] * values["time"], values["time"], values["memory"], counts)

    return {label: read(kept["methods"][label]) for label in recipes}


def _measure(built: dict[str, Built], recipe: Recipe) -> tuple[Cost, dict[str, Cost | str]]:
    """Flow matching's cost, and each method's, timed in turn; of one that cannot run, why."""
    device = choose_device(recipe.training.device, environment())
    batch = _batch(next(iter(built.values())).data, recipe.training.batch // recipe.training.accumulate).to(device)
    parts: dict[str, Entry] = {
        label: (one.student.to(device), one.objective.to(device), None) for label, one in built.items()
    }
    failed: dict[str, Cost | str] = {}
    for label, part in list(parts.items()):
        try:
            step_cost(part[0], part[1], batch, rounds=1)
        except FAILURES as error:
            failed[label] = shortened(str(error))
            del parts[label]
    student = next(iter(parts.values()))[0] if parts else next(iter(built.values())).student
    base: dict[str, Entry] = {"": (student, FlowMatching(), None)}
    costs = compare_costs(base | parts, batch, _ROUNDS, precision=PRECISIONS[recipe.training.precision])
    return costs.pop(""), {**costs, **failed}


def _batch(data: Data, rows: int) -> Batch:
    """As many rows as a step has. Samples of a teacher are not drawn for it: their values do not change the cost."""
    data = of_one_shape(data)
    cond = getattr(data, "cond", None)
    if cond is None:
        return data.rows(torch.arange(rows) % (data.size or rows), generator(0))
    index = torch.arange(rows) % (data.size or rows)
    return Batch(torch.randn(rows, *data.shape, generator=generator(0)), {k: v[index] for k, v in cond.items()})
