"""Learned noise: how straight the trajectories get, and what few Euler steps make of it, at three weights of its KL.

    python benchmarks/learned_noise.py FOLDER pair eight-gaussians digits    # three seeds, kept in FOLDER
    python benchmarks/learned_noise.py FOLDER                                # the table and the picture

``pair``: two Gaussians at (-2, 0) and (2, 0) of deviation 0.2, an MLP of 4 x 64, 2000 updates of 256 rows.
``eight-gaussians``: as the recipe eight-gaussians-learned-noise, which has the same network and updates.
``digits``: 8 x 8 digits without their classes, as 64 numbers, an MLP of 4 x 256, 1500 updates of 256 rows.

The ways: independent noise, minibatch optimal transport (``coupling: ot``, chunks of 256), and learned noise.
``curvature`` is ``E |v(x_t, t) - (x_1 - x_0)|^2 / D`` along trajectories of 64 Euler steps. Quality at 1, 2, 4, 8 and
64 Euler calls: energy distance of 4000 samples (points), Frechet distance of 1797 by the features of a small classifier
(digits). ``noise`` is the mean square of the noise that training saw at its end; sampling draws 1.

Writes benchmarks/results/learned-noise.json (--out) and docs/images/learned-noise.png.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import digits, judge_of
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.given import as_data
from fewstep.evaluation.extractor import extract
from fewstep.evaluation.features import FeatureStatistics, frechet_distance
from fewstep.evaluation.points import energy_distance
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.sampling import sample_states
from fewstep.networks import MLP

NOTES = (
    "Mean and deviation of the seeds; eight-gaussians has seed 0 alone. In CPU seconds a training with ot took 2 to 6 "
    "times as long as with independent noise (the assignment), with learned noise 1.2 to 1.8 times.",
)
WAYS = ("independent", "ot", "beta 20", "beta 5", "beta 1")
CALLS = (1, 2, 4, 8, 64)
PAIR = fewstep.MixtureField(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.2, 0.2]), torch.ones(2) / 2)
SETS: dict[str, Any] = {"pair": PAIR, "eight-gaussians": eight_gaussians()}


def network(name: str) -> Any:
    return MLP(64, width=256, depth=4) if name == "digits" else MLP(2, width=64, depth=4)


def trained(name: str, way: str, seed: int, rows: Tensor) -> tuple[Any, float]:
    """The field of one way, and the mean square of the noise that its training saw last."""
    torch.manual_seed(seed)
    field = fewstep.NetworkField(network(name))
    data, steps = as_data(rows), 1500 if name == "digits" else 2000
    objective: Any = fewstep.FlowMatching()
    if way == "ot":
        from fewstep.data.couplings import Coupled

        data = Coupled(data)
    elif way != "independent":
        objective = fewstep.LearnedNoise(objective, beta=float(way.split()[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of narrow noise, which the table shows
        fewstep.fit(
            field, objective, data, steps, seed=seed, batch=256, chunk=256, lr=2e-3, warmup=50, ema=0.99, quiet=True
        )
    if way in ("independent", "ot"):
        return field, 1.0
    with torch.no_grad():
        mean, log_variance = objective.encoder(rows[:1797])
    return field, float((mean.square() + log_variance.exp()).mean())


def judged(name: str, way: str, seed: int, rows: Tensor, judge: Any) -> dict[str, Any]:
    begun = time.process_time()
    field, noise = trained(name, way, seed, rows)
    seconds = time.process_time() - begun
    count = len(rows) if judge else 4000
    start = torch.randn(count, *rows.shape[1:], generator=generator(seed, 7))
    states = sample_states(field, start[:500], 64)
    velocity, chord = states.diff(dim=1) * 64, states[:, -1:] - states[:, :1]
    found: dict[str, Any] = {"curvature": float((velocity - chord).square().mean()), "noise": noise}
    for n in CALLS:
        x = torch.cat([fewstep.sample(field, some, n, solver="euler") for some in start.split(500)])
        found[str(n)] = judge(x) if judge else energy_distance(x, SETS[name].data(count, generator(seed, 8)))
    return {"set": name, "way": way, "seed": seed, "seconds": seconds, **found}


def frechet_to(rows: Tensor, labels: Tensor) -> Any:
    classifier = judge_of(rows, labels)

    real = FeatureStatistics.of(extract(classifier, rows))
    return lambda x: frechet_distance(real, FeatureStatistics.of(extract(classifier, x.reshape(rows.shape))))


def table(folder: Path, out: Path) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    keys = ("curvature", "noise", *map(str, CALLS))
    cells: list[list[Any]] = []
    for name in (*SETS, "digits"):
        for way in WAYS:
            same = [row for row in rows if (row["set"], row["way"]) == (name, way)]
            if same:
                cells.append([name, way, *(spread([row[key] for row in same]) for key in keys)])
    write(
        out,
        title="Learned noise: curvature, and quality at few Euler calls",
        group="set",
        formats=dict.fromkeys(keys, "{mean} ± {std}"),
        columns=["set", "noise of training", *keys],
        rows=cells,
        **here(sorted({row["seed"] for row in rows}), NOTES),
    )


def spread(values: list[float]) -> dict[str, float]:
    mean = float(f"{statistics.mean(values):.3g}")
    return {"mean": mean, "std": float(f"{statistics.stdev(values):.2g}") if len(values) > 1 else 0.0}


def picture(file: Path) -> None:
    """Trajectories of the pair: independent noise, and each beta, of seed 0."""
    from matplotlib import pyplot

    ways = ("independent", "beta 20", "beta 5", "beta 1")
    figure, axes = pyplot.subplots(1, len(ways), figsize=(10, 2.9), sharex=True, sharey=True, layout="constrained")
    start = torch.randn(60, 2, generator=generator(0, 9))
    for axis, way in zip(axes, ways, strict=True):
        field, _ = trained("pair", way, 0, PAIR.data(20_000, generator(0, 1)))
        states, one = sample_states(field, start, 64), fewstep.sample(field, start, 1, solver="euler")
        axis.plot(states[:, :, 0].T, states[:, :, 1].T, color="C0", lw=0.6, alpha=0.7)
        axis.scatter(start[:, 0], start[:, 1], s=5, color="grey", zorder=2)
        axis.scatter(one[:, 0], one[:, 1], s=9, color="C1", zorder=3, label="one Euler call")
        axis.set_title(way if way == "independent" else f"learned, {way}", fontsize=10)
        axis.set_xlim(-3, 3)
        axis.set_ylim(-2.6, 2.6)
    axes[0].legend(fontsize=8, loc="upper left")
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learned noise: curvature and quality at few Euler calls.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help="pair, eight-gaussians, digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER / "learned-noise.json")
    parser.add_argument("--picture", type=Path, default=FOLDER.parent.parent / "docs/images/learned-noise.png")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        rows, labels = digits() if name == "digits" else (SETS[name].data(20_000, generator(0, 1)), None)
        judge = None if labels is None else frechet_to(rows, labels)
        rows = rows.flatten(1)
        for seed in args.seeds:
            for way in WAYS:
                file = args.folder / f"{name}-{way.replace(' ', '-')}-{seed}.json"
                if not file.is_file():
                    file.write_text(json.dumps(judged(name, way, seed, rows, judge)))
                    print(file.stem, "done", flush=True)
    table(args.folder, args.out)
    picture(args.picture)


if __name__ == "__main__":
    main()
