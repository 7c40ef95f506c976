"""Options of the corrector: the finished student that fewstep carries goes on for 300 steps with each.

    python benchmarks/finishing_trials.py FOLDER [--trials "weight 1" ...]    # what is kept is not repeated

A trial takes six minutes of a core. Frechet distances are of 10,000 samples at one call and of 4,000 at 2 and 4, so
they are smaller than those of the 2,000 samples of the recipes: compare rows of this table with each other. Writes
benchmarks/results/finishing-trials.json, for docs/methods/corrected.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.evaluation.extractor import accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, precision_recall

START = "fewstep:fashion-mnist-fast"
COUNTS = {1: 10_000, 2: 4_000, 4: 4_000}  # samples by number of calls
COMPARED = 2_000  # for precision and recall
FIT: dict[str, Any] = {"batch": 64, "lr": 2e-4, "warmup": 20, "ema": 0.99}
TRIALS: dict[str, dict[str, Any]] = {
    "weight 1": {},
    "weight 0.3": {"weight": 0.3},
    "weight 3": {"weight": 3.0},
    **{f"weight 3, fake lr 2, seed {seed}": {"weight": 3.0, "lr": 2.0, "seed": seed} for seed in (0, 1, 2)},
    "weight 1, times logit-normal(-0.8, 1)": {"times": "logit-normal(-0.8, 1)"},
    "weight 1, times logit-normal(0.8, 1)": {"times": "logit-normal(0.8, 1)"},
}


def measured(model: Any, classifier: Any, real: torch.Tensor) -> dict[str, list[float]]:
    """FD, precision, recall and the share of the asked class, by number of calls."""
    found = {}
    for calls, count in COUNTS.items():
        noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(5))
        labels = torch.arange(count) % 10
        parts = zip(noise.split(500), labels.split(500), strict=True)
        made = torch.cat([fewstep.sample(model, z, steps=calls, class_labels=some) for z, some in parts])
        features = extract(classifier, made)
        fd = frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(real))
        near = precision_recall(real[:COMPARED], features[:COMPARED])
        found[str(calls)] = [fd, *near, accuracy(classifier, made.clamp(-1, 1), labels)]
    return found


def tried(folder: Path, name: str, train: Any, classifier: Any, real: torch.Tensor) -> dict[str, list[float]]:
    file = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    if not file.is_file():
        teacher: Any = fewstep.load("fewstep:fashion-mnist")
        student: Any = fewstep.load(START).requires_grad_(True)
        options = {"seed": 0, "weight": 1.0, "rollout": (1, 2, 1, 4), **TRIALS[name]}
        seed = options.pop("seed")
        objective = fewstep.Corrected(fewstep.ITVM(teacher, **fewstep.Corrected.inside), begin=0.0, **options)
        done = fewstep.fit(student, objective, train, 300, seed=seed, **FIT)
        file.write_text(json.dumps(measured(done.ema.eval(), classifier, real)))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS), metavar="TRIAL")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    train: Any = fewstep.load_data("fashion-mnist")
    test: Any = fewstep.load_data("fashion-mnist", split="test")
    classifier = trained_classifier(train)
    real = extract(classifier, test.rows(torch.arange(10_000), torch.Generator()).data)
    student: Any = fewstep.load(START)
    found = {"the student": measured(student.eval(), classifier, real)}
    found |= {name: tried(args.folder, name, train, classifier, real) for name in args.trials}
    columns = ["trial", *(f"{what} {n}" for what in ("FD", "precision", "recall", "asked class right") for n in COUNTS)]
    rows = [[name, *(round(by[str(n)][k], 4) for k in range(4) for n in COUNTS)] for name, by in found.items()]
    notes = [
        "Corrected around ITVM with `ema: 0.9, times: uniform, ends: 0.25`, rollout [1, 2, 1, 4], learning rate 2e-4; "
        "300 steps of 64 rows, six minutes of a core each.",
        "10,000 samples at one call, 4,000 at 2 and 4, against the 10,000 test images, in the features of a small "
        "classifier, not FID: compare these rows with each other.",
        "Seed 0 where no seed is named.",
    ]
    write(FOLDER / "finishing-trials.json", title="Fashion-MNIST, options of the corrector", rows=rows, columns=columns,
          **here(seeds=[0, 1, 2], notes=notes))  # fmt: skip


if __name__ == "__main__":
    main()
