"""Several methods trained alike, on one teacher, network, data, seeds and budget, and put side by side."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.common.disk import replace_file
from fewstep.common.distributed import environment
from fewstep.common.errors import shortened
from fewstep.common.locks import owned
from fewstep.common.model_files import read_json
from fewstep.common.options import parse_value
from fewstep.evaluation.results import Evaluation
from fewstep.runs.budget import FAILURES, costs_of
from fewstep.runs.build import build
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.runs.side_by_side import Comparison, Training
from fewstep.training import checkpoints
from fewstep.training.fingerprint import check_recipe
from fewstep.training.folder import begin, check_ours
from fewstep.training.run_files import CHECKPOINTS, FAILED, METRICS, QUALITY, RECIPE, read_mark
from fewstep.training.trackers import read_metrics

STEPS = (1, 2, 4, 8, 16)


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
        costs = costs_of(first, built, out / "budget.json", say)
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
    if checkpoints.steps_in(folder / CHECKPOINTS):
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
        except FAILURES as error:  # all that can be refused has been: this is the method's own
            failed = shortened(str(error))
            note = {"why": failed, "recipe": recipe.as_dict()}
            if not read_mark(folder):  # one that was refused leaves nothing
                begin(folder)
            replace_file(folder / FAILED, json.dumps(note, indent=2).encode())
    metrics = folder / METRICS
    last = (read_metrics(metrics) if metrics.is_file() else [])[-1:] or [{}]
    steps = max(checkpoints.steps_in(folder / CHECKPOINTS), default=0)
    return Training(label, recipe.seed, folder, steps, last[0].get("loss"), last[0].get("seconds"), failed, found)


def _failure(folder: Path, recipe: Recipe) -> str | None:
    """Why the run in the folder failed, if it did: the same recipe would fail again."""
    file = folder / FAILED
    note = read_json(file)
    return str(note.get("why", "")) if note.get("recipe") == recipe.as_dict() else None


def _finished(folder: Path, recipe: Recipe) -> Evaluation | None:
    """The evaluation of a run that was trained and judged by just this recipe."""
    file, kept = folder / QUALITY, folder / RECIPE
    # Of a longer training that was killed before its evaluation, the file is older than the recipe.
    if not file.is_file() or file.stat().st_mtime < kept.stat().st_mtime:
        return None
    found = Evaluation.read(file)
    steps = {row["steps"] for row in found.rows if row["model"] == "student"}
    is_same = steps == set(recipe.evaluation.steps) and found.facts["count"] == recipe.evaluation.count
    return found if is_same and load_recipe(folder).as_dict() == recipe.as_dict() else None
