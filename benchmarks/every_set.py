"""Every few-step distillation method on every set, in equal seconds: which default is first, and where it is not.

    python benchmarks/every_set.py FOLDER spiral                              # one set: all methods, three seeds
    python benchmarks/every_set.py FOLDER spiral --methods ITVM PSD --seconds 10
    python benchmarks/every_set.py FOLDER mnist --cpu-seconds 60              # of one thread, beside other work
    python benchmarks/every_set.py FOLDER                                     # only the table, of what FOLDER has

Steps are timed before the trainings, all methods in turn. ``--cpu-seconds`` times them, and trains, on one thread:
then it is the time of the processor that counts, and what else runs favours nobody. Say the same each time for a set.
A command that was stopped goes on, and what is there is not trained again; methods that come later join those of the
set. All sets (``for set in checkerboard spiral ...; do python benchmarks/every_set.py FOLDER $set; done``) are a night
on two cores; a GPU is taken where there is one. Teachers of Darcy fields and CIFAR-10 are trained first, into
FOLDER/teachers. Where the data are had: set_parts.py; MNIST as in examples/mnist_vit.py.

Writes benchmarks/results/every-set.json (--out).
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import set_parts
import torch
from record import FOLDER, here, write
from small_digits import teacher_in

import fewstep
from fewstep.evaluation.measure import METRICS as MEASURED
from fewstep.evaluation.results import Evaluation
from fewstep.runs.compare import compare_methods, parse_method
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

ROOT = Path(__file__).resolve().parent.parent
CALLS = (1, 2, 4, 8)
JUDGED = (1, 2, 4)  # the calls at which a default has to be first
# Each distils; the options are those that its row of the leaderboard is best with.
METHODS = (
    "ITVM", "ITVM:diagonal=0.5", "ITVM:diagonal=0.75", "ITVM:ema=0.9,times=uniform,ends=0.25",
    "ITVM:ema=0.5,times=uniform,ends=0.25", "ITVM:target={interval: 3, trajectory: 1}",
    "SplitMeanFlow", "SplitMeanFlow:ends=0.25", "PSD", "PSD:ends=0.25", "PSD:middle=uniform", "Shortcut", "PFMM", "CTM",
    "LMD", "LMD:ends=0.25", "EMD", "ESD", "LSD", "TVM", "AYF", "AYF:variant=LMD", "MeanFlow", "ImprovedMeanFlow",
    "AlphaFlow", "SCM", "ConsistencyDistillation", "Trajectory",
)  # fmt: skip
# Smaller is better, but for these.
LARGER = ("precision", "recall", "accuracy", "diversity")

Tree = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Set:
    """``recipe(folder, steps)`` of the set, with its data and teacher made if they are not there, the teacher in so
    many steps; the ``metric`` that it is judged by first, ``seconds`` of steps for each method, and an extractor where
    fewstep's own is not taken."""

    recipe: Callable[[Path, int | None], Tree | str]
    metric: str
    seconds: float
    overrides: dict[str, str] = field(default_factory=dict)
    extractor: Callable[[], Any] | None = None


def plane(teacher: str, data: Callable[[Path], str]) -> Set:
    """Points of the plane with an exact teacher; the student is an MLP with random first weights."""

    def recipe(folder: Path, _: int | None) -> Tree:
        return {
            "teacher": teacher,
            "data": data(folder),
            "student": {"network": "mlp", "options": {"width": 128, "depth": 4}},
            "objective": "ITVM",
            "training": {"steps": 1000, "batch": 256, "chunk": 256, "lr": 3e-3, "warmup": 100, "ema": 0.999},
            "evaluation": {"count": 4000, "batch": 4000, "teacher_steps": list(CALLS)},
        }

    return Set(recipe, "rmse", 30.0)


def teacher_run(folder: Path, name: str, recipe: Tree, steps: int | None) -> str:
    """The run folder of a teacher, trained if it is not."""
    out = folder / "teachers" / name
    run(load_recipe({**recipe, "name": name}, {} if steps is None else {"training.steps": str(steps)}), out)
    return str(out)


def darcy(folder: Path, teacher_steps: int | None = None) -> Tree:
    """64 numbers a field; the teacher is an MLP that is trained here, and the student starts as its copy."""
    files = [folder / f"darcy-{split}.npy" for split in ("train", "test")]
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no {files[0]}: python benchmarks/set_parts.py darcy WHEEL {folder}")
    data, held_out = map(str, files)
    teacher = {
        "data": data,
        "objective": "FlowMatching",
        "student": {"network": "mlp", "options": {"width": 256, "depth": 4}},
        "training": {"steps": 3000, "batch": 128, "lr": 1e-3, "warmup": 100, "ema": 0.999},
        "evaluation": {"count": 0},
    }
    return {
        "teacher": teacher_run(folder, "darcy", teacher, teacher_steps),
        "data": data,
        "student": "auto",
        "objective": "ITVM",
        "training": {"steps": 1000, "batch": 128, "chunk": 128, "lr": 1e-3, "warmup": 50, "ema": 0.999},
        "evaluation": {"count": 1000, "data": held_out, "teacher_steps": list(CALLS)},
    }


def digits(folder: Path, _: int | None = None) -> Tree:
    """8 x 8 in grey: the teacher of small_digits.py, a U-Net, and the student starts as its copy."""
    return {
        "teacher": str(teacher_in(folder / "teachers" / "digits")),
        "data": "digits",
        "student": "auto",
        "objective": "ITVM",
        "training": {"steps": 1000, "batch": 64, "lr": 1e-3, "warmup": 20, "ema": 0.99},
        "evaluation": {"count": 1000, "batch": 250},
    }


def cifar10(folder: Path, teacher_steps: int | None = None) -> Tree:
    """32 x 32 in colour; the teacher is a class-conditional U-Net of 0.7 M parameters that is trained here (on two
    cores: hours), and the student starts as its copy."""
    files = [folder / f"cifar10-{split}.npz" for split in ("train", "test")]
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no {files[0]}: python benchmarks/set_parts.py cifar10 TGZ {folder}")
    data, held_out = {"name": str(files[0]), "flip": True}, str(files[1])
    network = {
        "block_out_channels": [16, 32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "num_class_embeds": 10,
    }
    teacher = {
        "data": data,
        "objective": {"name": "FlowMatching", "times": "logit-normal"},
        "student": {"network": "unet", "options": network},
        "training": {"steps": 40_000, "batch": 64, "lr": 1e-3, "warmup": 500, "ema": 0.9995},
        "evaluation": {"count": 0, "every": 10_000},
    }
    return {
        "teacher": teacher_run(folder, "cifar10", teacher, teacher_steps),
        "data": data,
        "student": "auto",
        "objective": "ITVM",
        "training": {"steps": 2000, "batch": 64, "lr": 5e-4, "warmup": 100, "ema": 0.998},
        "evaluation": {"count": 2000, "data": held_out, "teacher_steps": [*CALLS, 100], "metrics": IMAGES},
    }


# RMSE to the end points of an image's teacher takes 256 of its calls each.
IMAGES = ["fd", "feature_w2", "kid", "precision", "recall", "accuracy"]
_IMAGES = {"evaluation.metrics": str([*IMAGES, "diversity"]), "evaluation.teacher_steps": str([*CALLS, 100])}

SETS: dict[str, Set] = {
    "checkerboard": plane("checkerboard", lambda _: "checkerboard"),
    "spiral": plane("spiral", lambda _: "spiral"),
    "eight-gaussians": plane("eight-gaussians", lambda _: "eight-gaussians"),
    "seven-gaussians": plane(
        f"{ROOT / 'benchmarks' / 'set_parts.py'}:seven_gaussians", lambda out: str(set_parts.seven_gaussians_file(out))
    ),
    "darcy": Set(darcy, "rmse", 30.0),
    "digits": Set(digits, "fd", 60.0, _IMAGES),
    "mnist": Set(lambda *_: str(ROOT / "recipes" / "mnist-vit-itvm.yaml"), "fd", 300.0, _IMAGES),
    "fashion-mnist": Set(lambda *_: "fashion-mnist-itvm", "fd", 600.0, _IMAGES),
    "cifar10": Set(cifar10, "fd", 900.0, extractor=set_parts.resnet20),
}


def train(name: str, folder: Path, methods: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> None:
    """Train and judge what is missing of a set, and keep what was measured in ``FOLDER/SET/measured.json``."""
    one, out = SETS[name], folder / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = out / "measured.json"
    known: Tree = json.loads(kept.read_text()) if kept.is_file() else {}
    methods = list(dict.fromkeys([*known.get("methods", []), *methods]))
    before = known.get("clock", "wall")
    clock = "processor" if args.cpu_seconds else before
    if known and clock != before:
        raise ValueError(f"{kept} has times of the wall clock: --cpu-seconds wants another folder")
    if clock == "processor":  # what compare_methods times a step by on one thread; trainings take no more than that
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    seconds = args.cpu_seconds or args.seconds or known.get("seconds") or one.seconds
    overrides = {"evaluation.steps": str(list(CALLS)), **one.overrides, **args.set}
    recipe = one.recipe(folder, args.teacher_steps)
    count = None
    if one.extractor is not None:
        count, overrides["evaluation.count"] = load_recipe(recipe, {**args.set, "name": name}).evaluation.count, "0"
    found = compare_methods(recipe, methods, seeds=seeds, seconds=seconds, out=out, overrides=overrides)
    rows = found.rows if count is None else judged(out, methods, seeds, count, one)
    failed = {run.method: f"{run.outcome}: {run.failed}" for run in found.runs if run.failed}
    steps = {run.method: run.steps for run in found.runs if not run.failed}
    facts = {key: value for key, value in here(seeds).items() if key != "notes"}
    commands = [*dict.fromkeys([*known.get("commands", []), *facts.pop("commands")])]
    tree = {"methods": methods, "seconds": seconds, "clock": clock, "steps": steps, "failed": failed, "rows": rows}
    kept.write_text(json.dumps({**tree, **facts, "commands": commands}, indent=1))


def judged(out: Path, methods: Iterable[str], seeds: Iterable[int], count: int, one: Set) -> list[Row]:
    """The rows of runs that ``compare_methods`` did not judge, by the set's own extractor."""
    assert one.extractor is not None
    rows, teacher_rows, extractor = [], {}, one.extractor()
    for seed in seeds:
        for method in map(parse_method, methods):
            place = out / method.folder(seed)
            file = place / "judged.json"
            if not (place / "recipe.yaml").is_file():
                continue
            if not file.is_file():
                recipe = load_recipe(place)
                section = recipe.evaluation
                assert section.data is not None
                assert recipe.teacher is not None
                found = fewstep.evaluate(
                    fewstep.load(place),
                    teacher=fewstep.load(recipe.teacher.source),
                    data=fewstep.load_data(section.data.name),
                    steps=section.steps,
                    teacher_steps=section.teacher_steps if seed not in teacher_rows else [CALLS[0]],
                    count=count,
                    extractor=extractor,
                    seed=seed,
                    batch=section.batch,
                    metrics=IMAGES,
                )
                file.write_text(found.to_json())
            found = Evaluation.read(file)
            rows += [{**row, "model": method.label, "seed": seed} for row in found.rows if row["model"] == "student"]
            of_teacher = [{**row, "seed": seed} for row in found.rows if row["model"] == "teacher"]
            if len(of_teacher) > len(teacher_rows.get(seed, [])):
                teacher_rows[seed] = of_teacher
    return rows + [row for found in teacher_rows.values() for row in found]


def table(folder: Path, out: Path) -> None:
    """The results file, of all sets that were measured."""
    found = {name: json.loads(file.read_text()) for name in SETS if (file := folder / name / "measured.json").is_file()}
    if not found:
        raise FileNotFoundError(f"nothing was measured in {folder}: python benchmarks/every_set.py {folder} spiral")
    rows = [line for name, tree in found.items() for line in lines(name, tree)]
    of = {"processor": " of the processor, one thread"}
    seconds = ", ".join(f"{name} {tree['seconds']:g} s{of.get(tree.get('clock'), '')}" for name, tree in found.items())
    failed = [f"{name}: {method} {why}." for name, tree in found.items() for method, why in tree["failed"].items()]
    notes = [
        f"Each method has the same seconds of steps, timed in turn before: {seconds}.",
        "Mean ± standard deviation over the seeds. `first at` names the calls at which a method is the best of the "
        "set, or behind the best by no more than one standard deviation (the larger of the two).",
        *failed,
    ]
    missing = ["machine: not recorded"] if any(not tree["machine"] for tree in found.values()) else []

    def every(key: str) -> str:
        return "; ".join(dict.fromkeys(str(tree[key]) for tree in found.values()))

    write(
        out,
        title="Every method on every set",
        commands=[line for tree in found.values() for line in tree["commands"]],
        commit=every("commit"),
        seeds=sorted({seed for tree in found.values() for seed in tree["seeds"]}),
        machine=every("machine"),
        date=max(tree["date"] for tree in found.values()),
        notes=notes + missing,
        group="set",
        formats={str(calls): "{mean} ± {std}" for calls in CALLS},
        columns=["set", "method", "metric", "steps", *map(str, CALLS), "first at"],
        rows=rows,
    )


def lines(name: str, tree: Tree) -> list[list[Any]]:
    """The rows of a set: for each metric, the one that it is judged by first, its methods from the best, then the
    teacher."""
    first = SETS[name].metric
    metrics = [metric for metric in dict.fromkeys((first, *MEASURED)) if any(metric in row for row in tree["rows"])]
    found = []
    for metric in metrics:
        cells = spread(tree["rows"], metric)
        teacher = cells.pop("teacher", {})
        leads = {method: leading(cells, method, metric) for method in cells}
        sign = -1 if metric in LARGER else 1
        for method in sorted(cells, key=lambda m: sign * sum(cells[m][n]["mean"] for n in JUDGED if n in cells[m])):
            at = ", ".join(map(str, leads[method])) or "-"
            points = [_cell(cells[method].get(calls)) for calls in CALLS]
            found.append([name, shown(method), metric, tree["steps"].get(method), *points, at])
        if teacher:
            found.append([name, "teacher, Euler", metric, None, *(_cell(teacher.get(calls)) for calls in CALLS), None])
    return found


def shown(method: str) -> str:
    """``ITVM:ema=0.5,ends=0.1`` as tables have it: ``ITVM, ema=0.5, ends=0.1``."""
    one = parse_method(method)
    return ", ".join([one.name, *(f"{key}={value}" for key, value in one.options.items())])


def spread(rows: Sequence[Row], metric: str) -> dict[str, dict[int, dict[str, float]]]:
    """Of each model the mean over seeds, and their standard deviation, at each number of calls."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.get(metric) is not None and row["nfe"] in CALLS:
            values.setdefault(row["model"], {}).setdefault(row["nfe"], []).append(row[metric])
    return {
        model: {
            calls: {"mean": statistics.mean(each)} | ({"std": statistics.stdev(each)} if len(each) > 1 else {})
            for calls, each in points.items()
        }
        for model, points in values.items()
    }


def leading(cells: dict[str, dict[int, dict[str, float]]], method: str, metric: str) -> list[int]:
    """The calls at which a method is the best, or within one standard deviation of it (the larger of the two)."""
    sign, found = -1 if metric in LARGER else 1, []
    for calls in JUDGED:
        here = {name: points[calls] for name, points in cells.items() if calls in points}
        if method not in here:
            continue
        best, own = min(here.values(), key=lambda cell: sign * cell["mean"]), here[method]
        if sign * (own["mean"] - best["mean"]) <= max(own.get("std", 0.0), best.get("std", 0.0)):
            found.append(calls)
    return found


def _cell(cell: dict[str, float] | None) -> Any:
    """Three digits; of one seed the number alone."""
    if cell is None:
        return None
    rounded = {name: float(f"{value:.3g}") for name, value in cell.items()}
    return rounded if "std" in rounded else rounded["mean"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as fewstep compare takes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, help="of steps, for each method")
    budget.add_argument("--cpu-seconds", type=float, help="of steps, for each method, by processor time on one thread")
    parser.add_argument("--teacher-steps", type=int, help="updates of a teacher that is trained here, to try it")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--out", type=Path, default=FOLDER / "every-set.json")
    args = parser.parse_args()
    args.set = dict(word.split("=", 1) for word in args.set)
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"no set is called {unknown[0]!r}; there are: {', '.join(SETS)}")
    for name in args.sets:
        train(name, args.folder.resolve(), args.methods, args.seeds, args)
    table(args.folder.resolve(), args.out)


if __name__ == "__main__":
    main()
