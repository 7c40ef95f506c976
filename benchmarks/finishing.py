"""What finishes a student: each way from the same students, at the same cost, on the 8 x 8 digits of scikit-learn.

    python benchmarks/finishing.py FOLDER [--seeds 0 1 2] [--ways corrected ...]    # what is kept is not trained again

A teacher is trained, and distilled by ITVM once a seed; then each way goes on from that student for as long as the
first way takes for STEPS steps, by measured costs of a step (processor time, in turns). Writes
benchmarks/results/finishing-digits.json, for docs/methods/corrected.md and adversarial.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import FIT, digits, judge_of, teacher_in
from torch.utils.data import TensorDataset

import fewstep
from fewstep.evaluation.cost import compare_costs

COUNTS, METRICS = (1, 2, 4), ("fd", "precision", "recall", "accuracy")
FIRST, STEPS = 1500, 400  # of the student, and of ITVM after it
NOW: dict[str, Any] = {"begin": 0.0}
BEFORE: dict[str, Any] = {"ema": 0.9, "times": "uniform", "ends": 0.25}  # ITVM's own until its times were of calls
NOISY = "logit-normal(-0.8, 1)"

Make = Callable[[Any], Any]
WAYS: dict[str, Make] = {
    "ITVM goes on": lambda t: fewstep.ITVM(t),
    **{
        f"corrected, weight {w:g}": lambda t, w=w: fewstep.Corrected(fewstep.ITVM(t), weight=w, **NOW)
        for w in (0.2, 0.5, 1.0, 2.0, 4.0)
    },
    "corrected, base of before": lambda t: fewstep.Corrected(fewstep.ITVM(t, **BEFORE), weight=1.0, **NOW),
    **{
        f"corrected, base of before, weight {w:g}, fake lr {lr:g}": lambda t, w=w, lr=lr: fewstep.Corrected(
            fewstep.ITVM(t, **BEFORE), weight=w, lr=lr, **NOW
        )
        for w, lr in ((1.0, 2.0), (3.0, 2.0))
    },
    "corrected, one step only": lambda t: fewstep.Corrected(fewstep.ITVM(t), rollout=(1,), weight=1.0, **NOW),
    "corrected, one network": lambda t: fewstep.Corrected(fewstep.ITVM(t), fake="same", weight=1.0, **NOW),
    "corrected, own diagonal": lambda t: fewstep.Corrected(fewstep.ITVM(t), real="diagonal", weight=1.0, **NOW),
    "corrected, every 2": lambda t: fewstep.Corrected(fewstep.ITVM(t), every=2, weight=1.0, **NOW),
    "corrected, not normalized": lambda t: fewstep.Corrected(fewstep.ITVM(t), normalize=False, weight=1.0, **NOW),
    "corrected, more noise": lambda t: fewstep.Corrected(fewstep.ITVM(t), times=NOISY, weight=1.0, **NOW),
    "adversarial": lambda t: adversarial(fewstep.ITVM(t)),
    "adversarial, weight 0.1": lambda t: adversarial(fewstep.ITVM(t), weight=0.1),
    "adversarial, weight 0.3": lambda t: adversarial(fewstep.ITVM(t), weight=0.3),
    "adversarial, features of the teacher": lambda t: adversarial(fewstep.ITVM(t), critic="teacher"),
    "adversarial, diffused": lambda t: adversarial(fewstep.ITVM(t), diffused=True),
    "both": lambda t: adversarial(fewstep.Corrected(fewstep.ITVM(t), weight=1.0, **NOW), weight=0.1),
}


def adversarial(base: Any, **options: Any) -> Any:
    from fewstep.objectives.adversarial import Adversarial

    return Adversarial(base, **NOW, **options)


@cache
def judge() -> Any:
    return judge_of(*digits())


def measured(model: Any, steps: tuple[int, ...] = COUNTS) -> dict[str, dict[str, float]]:
    found = fewstep.evaluate(model, data=TensorDataset(*digits()), steps=steps, count=1797, batch=599,
                             extractor=judge(), metrics=list(METRICS))  # fmt: skip
    return {str(row["steps"]): {name: row[name] for name in METRICS} for row in found.rows}


def student_in(folder: Path, seed: int) -> Path:
    run = folder / f"student-{seed}"
    if not (run / "checkpoints" / f"step-{FIRST:08d}").is_dir():
        teacher: Any = fewstep.load(teacher_in(folder))
        student = fewstep.FlowMap.from_field(teacher).requires_grad_(True)
        data = fewstep.load_data("digits")
        fewstep.fit(student, fewstep.ITVM(teacher), data, FIRST, out=run, seed=seed, lr=1e-3, **FIT)
    return run


def costs(folder: Path, ways: list[str]) -> dict[str, float]:
    """Steps of ITVM that a step of each way is worth: the mean over three steps, as rollouts take turns."""
    rows = fewstep.load_data("digits").rows(torch.arange(64), torch.Generator())
    entries = {}
    for way in {"ITVM goes on", *ways}:
        teacher: Any = fewstep.load(teacher_in(folder))
        student: Any = fewstep.load(student_in(folder, 0))
        entries[way] = (student.requires_grad_(True), WAYS[way](teacher), None)
    found = compare_costs(entries, rows, rounds=12)
    base = sum(found["ITVM goes on"].times)
    return {way: sum(cost.times) / base for way, cost in found.items()}


def finished(folder: Path, way: str, seed: int, cost: float) -> dict[str, Any]:
    file = folder / f"{way.replace(' ', '-').replace(',', '')}-{seed}.json"
    if not file.is_file():
        teacher: Any = fewstep.load(teacher_in(folder))
        student: Any = fewstep.load(student_in(folder, seed))
        steps = round(STEPS / cost)
        fit = {**FIT, "seed": 100 + seed, "lr": 5e-4}
        done = fewstep.fit(student.requires_grad_(True), WAYS[way](teacher), fewstep.load_data("digits"), steps, **fit)
        file.write_text(json.dumps({"steps": steps, "quality": measured(done.ema.eval())}))
        print(way, seed, file.read_text(), flush=True)
    return json.loads(file.read_text())


def cells(found: list[dict[str, dict[str, float]]]) -> list[Any]:
    def over(n: int, metric: str) -> dict[str, float]:
        values = [quality[str(n)][metric] for quality in found]
        return {"mean": round(statistics.mean(values), 4), "std": round(statistics.stdev(values), 4)}

    return [over(n, metric) for metric in ("fd", "recall", "precision") for n in COUNTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--out", type=Path, default=FOLDER / "finishing-digits.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)

    kept = args.folder / "costs.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    if missing := [way for way in args.ways if way not in known]:
        known |= costs(args.folder, missing)
        kept.write_text(json.dumps(known))
    teacher = measured(fewstep.load(teacher_in(args.folder)), (100,))["100"]
    start = [measured(fewstep.load(student_in(args.folder, seed))) for seed in args.seeds]
    rows = [["the student", 0, 0.0, *cells(start)]]
    for way in args.ways:
        found = [finished(args.folder, way, seed, known[way]) for seed in args.seeds]
        rows.append([way, found[0]["steps"], round(known[way], 2), *cells([some["quality"] for some in found])])
    columns = [f"{metric} {n}" for metric in ("FD", "recall", "precision") for n in COUNTS]
    said = ", ".join(f"{name} {value:.3g}" for name, value in teacher.items())
    notes = [
        f"The 8 x 8 digits; a U-Net teacher, and its students after {FIRST} steps of ITVM. Each way goes on from those "
        f"for the time of {STEPS} steps of ITVM, by the measured costs of a step (`cost`), learning rate 5e-4.",
        f"The teacher, guided by nothing, at 100 Euler steps: {said}.",
        "1,797 samples against the 1,797 digits, in the features of a small classifier (not FID); mean and standard "
        "deviation over the seeds, of students and of their finishing.",
    ]
    formats = {"cost": "{:.2f}"} | dict.fromkeys(columns, "{mean:.2f} ± {std:.2f}")
    facts = here(seeds=args.seeds, notes=notes)
    write(args.out, title="Ways to finish a student", formats=formats, rows=rows,
          columns=["way", "steps", "cost", *columns], **facts)  # fmt: skip


if __name__ == "__main__":
    main()
