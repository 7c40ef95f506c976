"""Methods side by side: what their runs came to, as tables, plots and a page."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.common.console import markdown
from fewstep.common.disk import replace_file
from fewstep.evaluation.calls import Counts
from fewstep.evaluation.likelihoods import LIKELIHOODS
from fewstep.evaluation.measure import METRICS
from fewstep.evaluation.plots import quality_figure
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import Evaluation
from fewstep.evaluation.style import png
from fewstep.runs.judge import LABELS
from fewstep.runs.recipe import Recipe


@dataclass(frozen=True)
class MethodCost:
    """``seconds`` of a step (forward and backward); ``time`` and peak ``memory`` as multiples of flow matching's; or,
    of a method that cannot run here, why it ``failed``."""

    seconds: float | None = None
    time: float | None = None
    memory: float | None = None
    counts: Counts | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Training:
    """One run: a method with a seed. ``failed`` says why it came to nothing, where it did."""

    method: str
    seed: int
    folder: Path
    steps: int = 0
    loss: float | None = None
    seconds: float | None = None
    failed: str | None = None
    evaluation: Evaluation | None = None

    def line(self, width: int) -> str:
        """For the one who waits."""
        loss = "" if self.loss is None else f"  loss {self.loss:.4g}"
        seconds = "" if self.seconds is None else f"  {self.seconds:.0f} s"
        outcome = f"  {self.outcome}: {self.failed}" if self.failed else f"{loss}{seconds}"
        return f"{self.method:<{width}}  seed {self.seed}  {self.steps} steps{outcome}"

    @property
    def outcome(self) -> str:
        """In a word: done, or diverged, or failed for another reason."""
        if self.failed is None:
            return "done"
        at = re.match(r"step (\d+): .*= (nan|-?inf)", self.failed)
        if at:
            return f"diverged at step {at[1]}"
        return f"diverged in {self.steps} steps" if "has diverged" in self.failed else "failed"


@dataclass(frozen=True)
class Comparison:
    """Every run, and the cost of each method."""

    runs: list[Training]
    costs: dict[str, MethodCost]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a method, seed and step count: ``model``, ``seed``, ``nfe`` and the metrics; last the teacher's."""
        rows: list[dict[str, Any]] = []
        teachers: dict[int, list[dict[str, Any]]] = {}  # one and the same for all runs of a seed
        for run in self.runs:
            measured = run.evaluation.rows if run.evaluation else []
            rows += [{**row, "model": run.method, "seed": run.seed} for row in measured if row["model"] == "student"]
            found = [{**row, "seed": run.seed} for row in measured if row["model"] == "teacher"]
            teachers[run.seed] = teachers.get(run.seed) or found
        return rows + [row for found in teachers.values() for row in found]

    @property
    def metrics(self) -> list[str]:
        """Those that were measured, the one to judge by first."""
        values = ((name, value) for row in self.rows for name, value in row.items() if name in METRICS)
        found = {name for name, value in values if value is not None and math.isfinite(value)}
        return [name for name in dict.fromkeys(("fid", "fd", *METRICS)) if name in found]

    def table(self, metric: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows: for each method its cost, how its runs ended and, for each number of network calls, the
        metric as mean ± standard deviation over seeds; last the teacher's, which also has its largest number of calls.
        """
        values: dict[str, dict[int, list[float]]] = {}
        for row in self.rows:
            if row.get(metric) is not None:
                values.setdefault(row["model"], {}).setdefault(row["nfe"], []).append(row[metric])
        teacher = values.pop("teacher", {})
        calls = sorted({n for points in values.values() for n in points} | ({max(teacher)} if teacher else set()))
        rows: list[list[Any]] = []
        for method, cost in self.costs.items():
            runs = [run for run in self.runs if run.method == method]
            points = values.get(method, {})
            rows.append([method, *_cells(cost, runs), *(_spread(points.get(n, [])) for n in calls)])
        if teacher:
            rows.append(["teacher", None, None, None, None, *(_spread(teacher.get(n, [])) for n in calls)])
        return ["method", "steps", "runs", "time / FM", "memory / FM", *map(str, calls)], rows

    def caption(self, metric: str) -> str:
        """What the table of a metric shows."""
        seeds = len({run.seed for run in self.runs})
        floors = [
            run.evaluation.floor[metric] for run in self.runs if run.evaluation and metric in run.evaluation.floor
        ]
        floor = f"; data against data: {statistics.mean(floors):.4g}" if floors else ""
        over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
        return f"{LABELS.get(metric, metric)}, against network calls{over}{floor}"

    def write(self, out: Path, recipe: Recipe) -> None:
        """``compare.html``, ``compare.md``, ``compare.json`` and a plot a metric, in the folder ``out``."""
        tables = [(self.caption(metric), *self.table(metric)) for metric in self.metrics]
        if not tables:
            tables = [("Nothing was measured", *self.table(""))]
        figures = [
            (LABELS.get(metric, metric), png(quality_figure(self.rows, metric), out / f"{metric}.png"))
            for metric in self.metrics
            if metric not in LIKELIHOODS
        ]
        text = [
            f"# Methods on {recipe.data.name}",
            *(f"{head}\n\n{markdown(columns, rows)}" for head, columns, rows in tables),
        ]
        text += [f"{run.method}, seed {run.seed}, {run.outcome}: {run.failed}" for run in self.runs if run.failed]
        replace_file(out / "compare.md", ("\n\n".join(text) + "\n").encode())
        replace_file(out / "compare.json", json.dumps(self._tree(), indent=2).encode())
        shared = recipe.as_dict() | {"name": out.name, "objective": list(self.costs), "seed": self._seeds()}
        write_report(
            out / "compare.html",
            title=f"Methods on {recipe.data.name}",
            recipe_text=json.dumps(shared, indent=2),
            figures=figures,
            tables=tables,
        )

    def _seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.runs))

    def _tree(self) -> dict[str, Any]:
        runs = [vars(run) | {"folder": str(run.folder), "outcome": run.outcome} for run in self.runs]
        for run in runs:
            del run["evaluation"]
        costs = {method: dataclasses.asdict(cost) for method, cost in self.costs.items()}
        return {"costs": costs, "runs": runs, "rows": self.rows}


def _cells(cost: MethodCost, runs: Sequence[Training]) -> Iterator[Any]:
    """Steps, runs, and the ratios of a method."""
    done = [run for run in runs if run.failed is None]
    yield max(run.steps for run in done or runs)
    ends = ", ".join(dict.fromkeys(run.outcome for run in runs if run.failed))
    yield f"{len(done)} of {len(runs)}: {ends}" if ends else str(len(runs))
    yield None if cost.time is None else f"{cost.time:.2f}"
    yield None if cost.memory is None else f"{cost.memory:.2f}"


def _spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    mean = f"{statistics.mean(values):.4g}"
    return (
        mean if len(values) == 1 or not all(map(math.isfinite, values)) else f"{mean} ± {statistics.stdev(values):.2g}"
    )
