"""A run judged: quality against network calls, as a table, plots and a report in its folder."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.config import Recipe
from fewstep.data import load_data
from fewstep.data.batch import Data
from fewstep.drawing import Model, draw
from fewstep.evaluation.evaluate import Evaluation, compare, evaluate
from fewstep.evaluation.extractor import trained_classifier
from fewstep.evaluation.files import replace_file
from fewstep.evaluation.inception import inception
from fewstep.evaluation.plots import image_grid, loss_figure, png, points_figure, quality_figure
from fewstep.evaluation.report import write_report
from fewstep.fields import VelocityField
from fewstep.maps import FlowMap
from fewstep.training.trackers import read_metrics

# What is plotted, the first that there is heading the report.
_PLOTTED = ("fid", "fd", "rmse", "sliced_w2")
_LABELS = {
    "rmse": "RMSE to the end points of the teacher's ODE",
    "sliced_w2": "sliced W2 to the data",
    "fd": "Frechet distance to the data",
    "fid": "FID",
}
_POINTS, _IMAGES = 8192, 32


def judge(
    model: Model,
    recipe: Recipe,
    data: Data,
    teacher: VelocityField | None,
    out: Path,
    *,
    quiet: bool = False,
) -> Evaluation | None:
    """Measure a model as its recipe says, and write ``quality.json``, ``quality.png`` and ``report.html``.

    Returns None, and writes the report alone, where there is nothing to measure: images without teacher and labels.
    """
    section = recipe.evaluation
    held_out = load_data(section.data.name, **section.data.options) if section.data else data
    extractor = _extractor(section.extractor, held_out if recipe.data.name == "teacher" else data, model)
    found = None
    if teacher is not None or extractor is not None or len(data.shape) != 3:
        with _bar("evaluating", quiet) as progress:
            found = evaluate(
                model,
                teacher=teacher,
                data=held_out,
                steps=section.steps,
                teacher_steps=section.teacher_steps,
                count=section.count,
                extractor=extractor,
                seed=recipe.seed,
                batch=section.batch,
                progress=progress,
            )
        replace_file(out / "quality.json", found.to_json().encode())
    _report(model, recipe, found, out)
    return found


def compare_runs(evaluations: dict[str, Evaluation], out: Path) -> tuple[list[str], list[list[Any]]]:
    """The table of several runs, and ``compare.html`` with a plot a metric in the folder ``out``.

    Raises:
        ValueError: they were measured differently.
    """
    columns, rows = compare(evaluations)
    lines = [
        {**row, "model": name if row["model"] == "student" else f"teacher of {name}"}
        for name, evaluation in evaluations.items()
        for row in evaluation.rows
    ]
    if "teacher" in columns:  # one and the same for all
        first = next(iter(evaluations))
        lines = [row for row in lines if not row["model"].startswith("teacher")] + [
            {**row, "model": "teacher"} for row in evaluations[first].rows if row["model"] == "teacher"
        ]
    figures = [(_LABELS[m], quality_figure(lines, m, _LABELS[m])) for m in _plotted(lines)]
    out.mkdir(parents=True, exist_ok=True)
    for metric, figure in zip(_plotted(lines), figures, strict=True):
        png(figure[1], out / f"{metric}.png")
    write_report(
        out / "compare.html",
        title=" · ".join(evaluations),
        recipe_text="\n".join(f"{name}: {evaluation.facts}" for name, evaluation in evaluations.items()),
        figures=figures,
        tables=[("Side by side", columns, rows)],
    )
    return columns, rows


def next_commands(out: Path, recipe: Recipe, is_map: bool) -> list[str]:
    """What one may type after a run."""
    name, data = out.name, "" if recipe.data.name == "teacher" else f" --data {shlex.quote(recipe.data.name)}"
    if is_map:
        return [
            f"fewstep sample {out} --steps 2 --count 64 --out {name}.png",
            f"fewstep evaluate {out} --steps 1 2 4 8 16",
            f"fewstep export {out} {name}-export",
        ]
    return [
        f"fewstep sample {out} --steps 50 --count 64 --out {name}.png",
        f"fewstep distill --teacher {out}{data} --out {out}-itvm",
        f"fewstep export {out} {name}-export",
    ]


def _extractor(choice: str, data: Data, model: Model) -> nn.Module | None:
    """The network whose features stand for an image; None for points, and where there are no labels to train one."""
    if choice == "none" or len(data.shape) != 3:
        return None
    if choice != "auto":
        found: nn.Module = inception(choice)
    elif "class_labels" in getattr(data, "cond", {}) and min(data.shape[1:]) >= 8 and max(data.shape[1:]) <= 64:
        with _bar("features of images: a small classifier, trained once", quiet=False) as progress:
            found = trained_classifier(data, progress=progress)
    else:
        return None
    return found.to(next(model.parameters()).device)


def _plotted(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [metric for metric in _PLOTTED if any(row.get(metric) is not None for row in rows)]


def _report(model: Model, recipe: Recipe, found: Evaluation | None, out: Path) -> None:
    is_map = isinstance(model, FlowMap)
    figures, tables = [], []
    if found is not None:
        columns, rows = found.table()
        tables.append(("Quality against network calls", columns, rows))
        for metric in _plotted(found.rows):
            figures.append((_LABELS[metric], quality_figure(found.rows, metric, _LABELS[metric])))
        png(figures[0][1], out / "quality.png")
        figures += _pictures(model, recipe, found)
    if len(lines := read_metrics(out / "metrics.jsonl")) > 1:
        figures.append(("Loss", loss_figure(lines)))
    write_report(
        out / "report.html",
        title=recipe.name,
        recipe_text=recipe.as_yaml(),
        figures=figures,
        tables=tables,
        next_commands=next_commands(out, recipe, is_map),
    )


def _pictures(model: Model, recipe: Recipe, found: Evaluation) -> list[tuple[str, bytes]]:
    """Samples at each step count, the teacher's beside them, and the data."""
    shape = found.facts["shape"]
    if shape == [2]:
        panels = {
            f"{n} step{'s' * (n > 1)}": draw(model, _POINTS, n, seed=recipe.seed, batch=_POINTS)[0]
            for n in recipe.evaluation.steps
        }
        return [("Samples", png(points_figure(panels)))]
    if len(shape) == 3 and shape[0] in (1, 3):
        return [
            (f"{name} step{'s' * (not name.endswith(' 1'))}" if name != "data" else name, grid)
            for name, images in found.samples.items()
            for grid in [image_grid(images[:_IMAGES], columns=8)]
        ]
    return []


@contextmanager
def _bar(text: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, one line elsewhere; both on stderr."""
    import sys

    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if quiet or not sys.stderr.isatty():
        if not quiet:
            console.print(text, highlight=False)
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
