"""Several methods trained alike, on one teacher, network, data, seeds and budget, and put side by side."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from fewstep.common.disk import replace_file
from fewstep.common.distributed import choose_device, environment
from fewstep.common.errors import TrainingError, shortened
from fewstep.common.locks import owned
from fewstep.common.model_files import read_json
from fewstep.common.options import parse_value
from fewstep.common.parsing import checked
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch, Data
from fewstep.evaluation.calls import Counts
from fewstep.evaluation.cost import Cost, Entry, compare_costs, step_cost
from fewstep.evaluation.results import Evaluation
from fewstep.objectives import FlowMatching
from fewstep.runs.build import Built, build
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.runs.side_by_side import Comparison, MethodCost, Training
from fewstep.training import checkpoints
from fewstep.training.folder import MAY_DIFFER, check_ours, check_recipe, flat
from fewstep.training.trackers import read_metrics

STEPS = (1, 2, 4, 8, 16)
_ROUNDS = 7
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FAILURES = (TrainingError, ValueError, TypeError, RuntimeError)


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


@dataclass(frozen=True)
class Method:
    """A method with options of its own; ``label`` is as it was written."""

    label: str
    name: str
    options: dict[str, Any]

    def folder(self, seed: int) -> str:
        """The name of its run folder."""
        name = f"{Path(self.name).name}{self.label.removeprefix(self.name)}"
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', name).strip('-')}-seed{seed}"


def parse_method(text: str) -> Method:
    """``NAME`` or ``NAME:key=value,key=value``, values as YAML; NAME may be ``FILE.py:CLASS``.

    >>> parse_method("ITVM:target=mixed,ema=0.9").options
    {'target': 'mixed', 'ema': 0.9}
    """
    found = re.fullmatch(r"(.*?):(\w+=.*)", text)
    if found is None:
        if "=" in text:
            raise ValueError(f"method {text!r}: NAME:key=value,key=value is how options are given")
        return Method(text, text, {})
    name, options = found[1], {}
    for part in re.split(r",(?=\w+=)", found[2]):  # a comma inside a list or mapping is not followed by a key
        key, _, value = part.partition("=")
        options[key] = parse_value(f"{name}:{key}", value)
    return Method(text, name, options)


def compare_methods(
    recipe: str | Path | Mapping[str, Any],
    methods: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    seconds: float | None = None,
    out: str | Path = "compare",
    overrides: Mapping[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Train each method with each seed on a recipe's teacher, network and data, and judge all alike.

    A method has its own default options, not those of the recipe's objective; ``NAME:key=value`` gives others, and
    ``NAME:teacher=none`` trains a method whose teacher is optional from data alone. Runs are in ``out/NAME-seedK``;
    one that is done is not trained again, and one that was stopped goes on. A method that fails is noted, and does not
    stop the others; to try it again, remove its folder. ``out`` gets ``compare.html``, ``.md`` and ``.json``, a plot a
    metric, and ``budget.json``, the measured costs, which a later call reads back.

    Args:
        recipe: as :func:`fewstep.runs.recipes.load_recipe` takes it.
        methods: see :func:`parse_method`.
        steps: updates of each; by default what the recipe says.
        seconds: the same time for each instead: first the steps of all methods are timed in turn, in this process, and
            each gets as many as fit. Not the clock but that measurement decides, so that a run can be repeated and
            goes on, and what else the machine does favours nobody. The optimizer's part is not counted.
        overrides: keys of the recipe for all methods, as text: ``{"training.lr": "1e-3"}``. The default is to evaluate
            at 1, 2, 4, 8 and 16 steps, and to draw no samples on the way.
        say: gets a line a run; by default to stderr.

    Raises:
        ValueError, FileNotFoundError: what cannot be, in any of the runs; before anything is computed.
        KeyboardInterrupt: a run was interrupted; the same call goes on with it.

    >>> compare_methods("checkerboard-itvm", ["ITVM", "LMD"], seeds=(0, 1), seconds=60).table("rmse")
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    out, chosen = Path(out), [parse_method(text) for text in methods]
    _check(chosen, seeds, steps, seconds)

    with owned(out, "filled"):

        def recipe_of(method: Method, seed: int, steps: int | None) -> Recipe:
            length = {} if steps is None else {"steps": str(steps), "training.max_seconds": "null"}
            fixed = {
                "objective": json.dumps({"name": method.name, **method.options}),
                "seed": str(seed),
                "name": method.folder(seed),
                "training.quiet": "true",
            }
            usual = {"evaluation.steps": str(list(STEPS)), "evaluation.every": str(10**9)}
            return load_recipe(recipe, {**usual, **(overrides or {}), **length, **fixed})

        first = {m.label: recipe_of(m, seeds[0], steps or (None if seconds is None else 1)) for m in chosen}
        for method in chosen:
            for seed in seeds:
                _check_folder(out / method.folder(seed), recipe_of(method, seed, steps or 1))
        built = {label: build(found) for label, found in first.items()}
        costs = _costs(first, built, out / "budget.json", say)
        del built

        def planned(method: Method, seed: int) -> Recipe:
            per_step = costs[method.label].seconds
            return recipe_of(
                method, seed, steps if seconds is None or per_step is None else max(1, round(seconds / per_step))
            )

        for method in chosen:
            for seed in seeds:
                _check_length(out / method.folder(seed), planned(method, seed))
        trained = []
        for seed in seeds:
            for method in chosen:
                cost, folder = costs[method.label], out / method.folder(seed)
                if cost.seconds is None:
                    done = Training(method.label, seed, folder, failed=cost.failed)
                else:
                    done = _train(method.label, planned(method, seed), folder)
                trained.append(done)
                say(done.line(max(len(m.label) for m in chosen)))
        found = Comparison(trained, costs)
        found.write(out, planned(chosen[0], seeds[0]))
        return found


def _check(methods: Sequence[Method], seeds: Sequence[int], steps: int | None, seconds: float | None) -> None:
    if environment().size > 1:
        raise ValueError("methods are compared in one process: start it without torchrun")
    if steps is not None and seconds is not None:
        raise ValueError("steps and seconds are two budgets: give one")
    for name, value in {"steps": steps, "seconds": seconds}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: it must be more than 0")
    for kind, given in {"methods": [m.label for m in methods], "seeds": list(seeds)}.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{kind} are {given}: at least one is needed, and each once")


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise if a run of another recipe is there: before any other is trained."""
    check_ours(folder)
    check_recipe(folder, recipe.fingerprint())


def _check_length(folder: Path, recipe: Recipe) -> None:
    """Raise if the run that is there was to be of another length: it would be neither of the two."""
    if checkpoints.steps_in(folder / "checkpoints"):
        there, here = load_recipe(folder).training.steps, recipe.training.steps
        if there != here:
            raise ValueError(
                f"the run in {folder} is one of {there} steps, and here it would have {here}: use another --out"
            )


def _train(label: str, recipe: Recipe, folder: Path) -> Training:
    """Train and judge one run, or go on with it, or read what it came to."""
    failed, found = _failure(folder, recipe), _finished(folder, recipe)
    if failed is None and found is None:
        try:
            done = run(recipe, folder)
            found = done.evaluation
            if done.result.stopped == "interrupted":
                raise KeyboardInterrupt
        except _FAILURES as error:  # all that can be refused has been: this is the method's own
            failed = shortened(str(error))
            note = {"why": failed, "recipe": recipe.as_dict()}
            replace_file(folder / "failed.json", json.dumps(note, indent=2).encode())
    metrics = folder / "metrics.jsonl"
    last = (read_metrics(metrics) if metrics.is_file() else [])[-1:] or [{}]
    steps = max(checkpoints.steps_in(folder / "checkpoints"), default=0)
    return Training(label, recipe.seed, folder, steps, last[0].get("loss"), last[0].get("seconds"), failed, found)


def _failure(folder: Path, recipe: Recipe) -> str | None:
    """Why the run in the folder failed, if it did: the same recipe would fail again."""
    file = folder / "failed.json"
    note = read_json(file)
    return str(note.get("why", "")) if note.get("recipe") == recipe.as_dict() else None


def _finished(folder: Path, recipe: Recipe) -> Evaluation | None:
    """The evaluation of a run that was trained and judged by just this recipe."""
    file, kept = folder / "quality.json", folder / "recipe.yaml"
    # Of a longer training that was killed before its evaluation, the file is older than the recipe.
    if not file.is_file() or file.stat().st_mtime < kept.stat().st_mtime:
        return None
    found = Evaluation.read(file)
    steps = {row["steps"] for row in found.rows if row["model"] == "student"}
    is_same = steps == set(recipe.evaluation.steps) and found.facts["count"] == recipe.evaluation.count
    return found if is_same and load_recipe(folder).as_dict() == recipe.as_dict() else None


def _costs(
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
        except _FAILURES as error:
            failed[label] = shortened(str(error))
            del parts[label]
    student = next(iter(parts.values()))[0] if parts else next(iter(built.values())).student
    base: dict[str, Entry] = {"": (student, FlowMatching(), None)}
    costs = compare_costs(base | parts, batch, _ROUNDS, precision=_HALF.get(recipe.training.precision))
    return costs.pop(""), {**costs, **failed}


def _batch(data: Data, rows: int) -> Batch:
    """As many rows as a step has. Samples of a teacher are not drawn for it: their values do not change the cost."""
    cond = getattr(data, "cond", None)
    if cond is None:
        return data.rows(torch.arange(rows) % (data.size or rows), generator(0))
    index = torch.arange(rows) % (data.size or rows)
    return Batch(torch.randn(rows, *data.shape, generator=generator(0)), {k: v[index] for k, v in cond.items()})
