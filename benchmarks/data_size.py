"""How much data a student needs: Fashion-MNIST distilled with 64 to 16,384 of its images, with none, and with samples
of the teacher in their place.

    python benchmarks/data_size.py FOLDER                    # all that is missing, then the table
    python benchmarks/data_size.py FOLDER --sizes 64 none    # some of it
    python benchmarks/data_size.py FOLDER --sizes            # the table alone, of what FOLDER has

Each student is the teacher that comes with fewstep (classes, guided by none), trained by ITVM in the same number of
steps. ``none`` is the prior: noise alone, the states of every row are the student's own (``ITVM(starts="own")``).
``teacher`` is 4,096 samples of the teacher, by 16 calls each. All are held against the same 2,000 images of the test
split; a memorised sample is as near to an image trained on as the nearest 5 % of test images are.

Writes benchmarks/results/data-size.json (--out).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, spread, write

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Prior
from fewstep.evaluation.extractor import trained_classifier

SIZES = ("64", "256", "1024", "4096", "16384", "none", "teacher")
CALLS, COUNT = (1, 2, 4), 2000
METRICS = ("fd", "recall", "precision", "accuracy", "memorisation")
SETTINGS: dict[str, Any] = {"batch": 64, "lr": 5e-4, "warmup": 20, "ema": 0.99, "quiet": True}
Row = dict[str, Any]


def images_of(data: Any, count: int, seed: int) -> ArrayData:
    """So many rows of the data, drawn by the seed; a smaller number is the beginning of a larger one."""
    rows = torch.randperm(data.size, generator=generator(seed, 7))[:count]
    batch = data.rows(rows, generator(seed, 8))
    return ArrayData(batch.data, cond=batch.cond)


def teacher_samples(teacher: Any, out: Path) -> ArrayData:
    """4,096 samples of the teacher in 8 Heun steps, its classes in turn; drawn once."""
    file = out / "teacher.pt"
    if not file.is_file():
        labels = torch.arange(4096) % 10
        noise = torch.randn(4096, 1, 28, 28, generator=generator(0, 9))
        parts = [
            fewstep.sample(teacher, noise[i : i + 512], 8, solver="heun", class_labels=labels[i : i + 512])
            for i in range(0, 4096, 512)
        ]
        torch.save({"x": torch.cat(parts), "labels": labels}, file)
    kept = torch.load(file, weights_only=True)
    return ArrayData(kept["x"], cond={"class_labels": kept["labels"]})


def measured(out: Path, size: str, seed: int, steps: int, extractor: Any) -> list[Row]:
    """The rows of one student: at each number of calls, what was measured."""
    file = out / f"{size}-seed{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    teacher = fewstep.load("fewstep:fashion-mnist")
    whole, test = fewstep.load_data("fashion-mnist"), fewstep.load_data("fashion-mnist", split="test")
    data: Any = Prior(tuple(whole.shape), classes=10) if size == "none" else None
    data = data or (teacher_samples(teacher, out) if size == "teacher" else images_of(whole, int(size), seed))
    objective = fewstep.ITVM(teacher, **({"starts": "own"} if size == "none" else {}))
    student = fewstep.FlowMap.from_field(teacher)
    done = fewstep.fit(student, objective, data, steps, seed=seed, **SETTINGS)
    found = fewstep.evaluate(
        done.ema, data=test, steps=CALLS, count=COUNT, extractor=extractor, seed=seed,
        metrics=[name for name in METRICS if size != "none" or name != "memorisation"],
        training=None if size == "none" else data,
    )  # fmt: skip
    rows = [{**row, "size": size, "seed": seed} for row in found.rows if row["model"] == "student"]
    file.write_text(json.dumps(rows))
    return rows


def table(out: Path, steps: int, to: Path, seeds: list[int]) -> None:
    """The results file, of what was measured."""
    rows: list[Row] = [row for file in sorted(out.glob("*-seed*.json")) for row in json.loads(file.read_text())]
    lines = []
    for metric in METRICS:
        for size in SIZES:
            cells = []
            for calls in CALLS:
                values = [r[metric] for r in rows if r["size"] == size and r["nfe"] == calls and metric in r]
                cells.append(spread(values))
            if any(one is not None for one in cells):
                lines.append([metric, size, *cells])
    write(
        to,
        title="How much data a student needs: Fashion-MNIST",
        columns=["metric", "images", *map(str, CALLS)],
        rows=lines,
        group="metric",
        formats={str(calls): "{mean} ± {std}" for calls in CALLS},
        **here(
            seeds,
            [
                f"{steps} steps of batch 64 each (ITVM), {COUNT:,} samples against as many images of the test split; "
                "mean ± standard deviation over the seeds.",
                '`none`: from noise alone (`starts="own"`). `teacher`: 4,096 samples of the teacher, 16 calls each.',
            ],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=[*SIZES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=FOLDER / "data-size.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.sizes:
        extractor = trained_classifier(fewstep.load_data("fashion-mnist"))
        for seed in args.seeds:
            for size in args.sizes:
                rows = measured(args.folder, size, seed, args.steps, extractor)
                print(size, seed, [f"{row['nfe']}: {row['fd']:.2f}" for row in rows], flush=True)
    table(args.folder, args.steps, args.out, args.seeds)


if __name__ == "__main__":
    main()
