"""Diff-Tuning: the Fashion-MNIST teacher that fewstep carries, fine-tuned to 2000 MNIST digits, against plain ways.

    python benchmarks/diff_tuning.py FOLDER --seeds 0 1 2    # each way and seed is kept in FOLDER
    python benchmarks/diff_tuning.py FOLDER --seeds          # the table and the picture, of what FOLDER has

All have the same start, data and updates (100 of 32 rows); the class embedding has an eleventh row, none, which starts
as the mean of the others and stands in for a tenth of the labels. ``plain``: FlowMatching, uniform times. ``times
alone``: FlowMatching at DiffTuning's times for new data, mirrored-power(1). ``lora``: plain, an adapter of rank 16 at 4
times the rate. ``Diff-Tuning``: 1000 samples of the teacher; ``velocity``: with retain: velocity.

``fd`` and ``class``: Frechet distance of 500 samples of 10 Euler steps to 10,000 rows of MNIST, by the features of a
small classifier, and the share that it takes for the class that was asked. The other columns are the loss of flow
matching on 200 rows of each set without a class (before, on Fashion-MNIST, with theirs), at t below .3 and above .7.

Writes benchmarks/results/diff-tuning.json (--out) and docs/images/diff-tuning.png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor
from torch.utils.data import TensorDataset

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.conditions import Dropped
from fewstep.data.given import as_data
from fewstep.evaluation.extractor import accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance
from fewstep.networks import UNet
from fewstep.objectives.base import squared_error

WAYS = ("before", "plain", "times alone", "lora", "Diff-Tuning", "Diff-Tuning, velocity")
ONCE = ("before", "times alone", "Diff-Tuning, velocity")  # of the first seed alone
NULL, TIMES = 10, [round(0.05 + 0.1 * k, 2) for k in range(10)]
METRICS = ("fd", "class", "fashion t < .3", "fashion t > .7", "mnist t < .3", "mnist t > .7")


def start() -> Any:
    """The teacher with an eleventh class, that stands for none."""
    from diffusers import UNet2DModel

    field: Any = fewstep.load("fewstep:fashion-mnist")
    model = field.network.model
    wider: Any = UNet2DModel.from_config({**model.config, "num_class_embeds": NULL + 1})
    weights = dict(model.state_dict())
    known = weights["class_embedding.weight"]
    weights["class_embedding.weight"] = torch.cat([known, known.mean(0, keepdim=True)])
    wider.load_state_dict(weights)
    return fewstep.NetworkField(UNet(wider), field.native, field.prediction, path=field.path)


def rows_of(name: str, count: int) -> tuple[Tensor, Tensor]:
    data = fewstep.load_data(name)
    rows = data.rows(torch.randperm(data.size or 0, generator=generator(5))[:count], generator(0))
    return rows.data, rows.cond["class_labels"]


def tuned(way: str, seed: int, samples: Tensor) -> Any:
    field = start()
    if way == "before":
        return field
    data = Dropped(as_data(TensorDataset(*rows_of("mnist", 2000))), 0.1, {"class_labels": NULL})
    lr, objective = 5e-4, fewstep.FlowMatching()
    if way == "lora":
        field.requires_grad_(False)
        fewstep.add_lora(field, 16)
        lr = 2e-3
    elif way == "times alone":
        objective = fewstep.FlowMatching(times="mirrored-power(1)")
    elif way.startswith("Diff"):
        retain = "velocity" if way.endswith("velocity") else "samples"
        old = as_data(TensorDataset(samples, torch.arange(len(samples)) % 10))
        objective = fewstep.DiffTuning(old, null={"class_labels": NULL}, retain=retain)
    return fewstep.fit(field, objective, data, 100, seed=seed, batch=32, lr=lr, warmup=20, ema=0.98, quiet=True).ema


@torch.no_grad()
def losses(field: Any, rows: Tensor, labels: Tensor) -> list[float]:
    """The loss of flow matching at each of TIMES."""
    noise = torch.randn(rows.shape, generator=generator(6))
    found: list[float] = []
    for time_ in TIMES:
        t = torch.full((len(rows),), time_)
        x, dx = field.path.sample(noise, rows, t)
        found.append(float(squared_error(field(x, t, class_labels=labels), dx).mean()))
    return found


def judged(way: str, seed: int, samples: Tensor, judge: Any, real: FeatureStatistics) -> dict[str, Any]:
    begun = time.process_time()
    field = tuned(way, seed, samples).eval()
    seconds = time.process_time() - begun
    labels = torch.arange(500) % 10
    noise = torch.randn(500, 1, 28, 28, generator=generator(seed, 7))
    x = torch.cat(
        [fewstep.sample(field, z, 10, class_labels=c) for z, c in zip(noise.split(250), labels.split(250), strict=True)]
    )
    found: dict[str, Any] = {"way": way, "seed": seed, "seconds": seconds, "class": accuracy(judge, x, labels)}
    found["fd"] = frechet_distance(real, FeatureStatistics.of(extract(judge, x)))
    for name in ("fashion", "mnist"):
        rows, own = rows_of("fashion-mnist" if name == "fashion" else "mnist", 4000)
        rows, own = rows[-200:], own[-200:]
        none = own if (way, name) == ("before", "fashion") else torch.full_like(own, NULL)
        curve = losses(field, rows, none)
        found[f"{name} curve"] = curve
        found[f"{name} t < .3"] = statistics.mean(curve[:3])
        found[f"{name} t > .7"] = statistics.mean(curve[7:])
    return found


def table(folder: Path, out: Path) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    cells = [[way, *(spread([row[key] for row in rows if row["way"] == way]) for key in METRICS)] for way in ways]
    write(
        out,
        title="Diff-Tuning: a Fashion-MNIST teacher fine-tuned to 2000 digits",
        formats=dict.fromkeys(METRICS, "{mean} ± {std}"),
        columns=["way", *METRICS],
        rows=cells,
        **here(sorted({row["seed"] for row in rows})),
    )


def spread(values: list[float]) -> dict[str, float]:
    mean = float(f"{statistics.mean(values):.3g}")
    return {"mean": mean, "std": float(f"{statistics.stdev(values):.2g}") if len(values) > 1 else 0.0}


def picture(folder: Path, file: Path) -> None:
    """What each way adds to the loss of the teacher on its own data, by time; and the teacher's own on the digits."""
    from matplotlib import pyplot

    rows = [json.loads(name.read_text()) for name in sorted(folder.glob("*-0.json"))]
    of = {row["way"]: row for row in rows}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
    before = torch.tensor(of["before"]["fashion curve"])
    for way in (way for way in WAYS[1:] if way in of):
        axes[0].plot(TIMES, torch.tensor(of[way]["fashion curve"]) / before, label=way)
    axes[0].set_title("Fashion-MNIST: loss after / before", fontsize=10)
    axes[0].axhline(1, color="grey", lw=0.7)
    for way in ("before", "plain", "Diff-Tuning"):
        axes[1].plot(TIMES, of[way]["mnist curve"], label=way, color="grey" if way == "before" else None)
    axes[1].set_title("MNIST: loss", fontsize=10)
    for axis in axes:
        axis.set_xlabel("t (0 noise, 1 data)")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Diff-Tuning against plain fine-tuning, on MNIST.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER / "diff-tuning.json")
    parser.add_argument("--picture", type=Path, default=FOLDER.parent.parent / "docs/images/diff-tuning.png")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    kept = args.folder / "samples.pt"
    if args.seeds and not kept.is_file():
        field: Any = fewstep.load("fewstep:fashion-mnist")
        noise, labels = torch.randn(1000, 1, 28, 28, generator=generator(3)), torch.arange(1000) % 10
        pairs = zip(noise.split(250), labels.split(250), strict=True)
        torch.save(torch.cat([fewstep.sample(field, z, 20, class_labels=c) for z, c in pairs]), kept)
    if args.seeds:
        samples, (rows, classes) = torch.load(kept, weights_only=True), rows_of("mnist", 10_000)
        judge = trained_classifier(as_data(TensorDataset(rows, classes)), args.folder)
        real = FeatureStatistics.of(extract(judge, rows))
        for seed in args.seeds:
            for way in sorted(WAYS, key=ONCE.__contains__):
                file = args.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}.json"
                if not file.is_file() and (way not in ONCE or seed == args.seeds[0]):
                    file.write_text(json.dumps(judged(way, seed, samples, judge, real)))
                    print(file.stem, "done", flush=True)
    table(args.folder, args.out)
    picture(args.folder, args.picture)


if __name__ == "__main__":
    main()
