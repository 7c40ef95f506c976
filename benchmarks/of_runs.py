"""A results file of runs that were judged: what their quality.json say, one below the other.

    python benchmarks/of_runs.py finishing-mnist.json "before=runs/itvm" "finished=runs/finish" --title "MNIST" \\
        --commands "fewstep distill ..." --commit b37e848 --notes "10,000 samples against the 10,000 test images."

Each run is a label and a folder; all have been judged alike. Of the teacher, whose rows each run may have, those of the
last run are taken. The file lies in benchmarks/results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import FOLDER, here, write

from fewstep.evaluation.results import Evaluation

METRICS = ("fd", "feature_w2", "precision", "recall", "accuracy", "diversity", "rmse", "sliced_w2", "outside")
NAMES = {"fd": "FD", "feature_w2": "feature W2", "accuracy": "asked class right"}
FORMATS = {"FD": "{:.2f}", "diversity": "{:.2f}", "rmse": "{:.4f}", "sliced_w2": "{:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="name of the file in benchmarks/results")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--title", required=True)
    parser.add_argument("--commands", nargs="+", required=True, help="that made the runs")
    parser.add_argument("--commit", required=True, help="that the runs were made at")
    parser.add_argument("--notes", nargs="*", default=[])
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    args = parser.parse_args()
    runs = dict(text.rsplit("=", 1) for text in args.runs)
    found = {label: Evaluation.read(Path(run) / "quality.json") for label, run in runs.items()}
    metrics = [name for name in args.metrics if any(name in row for one in found.values() for row in one.rows)]
    seeds = sorted({one.facts.get("seed", 0) for one in found.values()})
    rows: list[list[Any]] = []
    for label, one in found.items():
        rows += [_row(label, row, metrics) for row in one.rows if row["model"] == "student"]
    rows += [_row("teacher", row, metrics) for row in one.rows if row["model"] == "teacher"]
    counts = {json.dumps(one.facts["count"]) for one in found.values()}
    if len(counts) > 1:
        parser.error(f"the runs were judged by {' and '.join(sorted(counts))} samples: judge them alike first")
    columns = [NAMES.get(name, name) for name in metrics]
    facts = here(seeds, args.notes)
    facts |= {"commands": args.commands, "commit": args.commit}
    formats = {name: FORMATS.get(name, "{:.3f}") for name in columns}
    write(FOLDER / args.out, title=args.title, columns=["model", "NFE", *columns], formats=formats, rows=rows, **facts)


def _row(label: str, row: dict[str, Any], metrics: list[str]) -> list[Any]:
    steps = f"{row['steps']} step{'s' * (row['steps'] != 1)}"
    return [f"{label}, {steps}", round(row["nfe"]), *(row.get(name) for name in metrics)]


if __name__ == "__main__":
    main()
