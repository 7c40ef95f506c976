"""A generator from a formula: maps of a density that vanishes along both diagonals, learned with no data.

    python benchmarks/psd_model.py

The teacher is the exact field of ``orbital``, a PSD model; the student an MLP of 4 x 128, trained by ITVM at its own
states (``starts: own``, ``data: prior``), the recipe orbital-itvm in 1500 updates. RMSE to the exact flow of 2000 rows,
and the share of 10,000 samples in the band ``||x| - |y|| < 0.2`` about the diagonals, beside that of the density and of
the mixture of four Gaussians with its lobes' means and deviations: what no mixture can leave empty.

Writes benchmarks/results/psd-model.json and docs/images/psd-model.png.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import Prior
from fewstep.flows.psd import orbital
from fewstep.networks import MLP

CALLS = (1, 2, 4, 8)
FIELD = orbital()


def trained(seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    student = fewstep.FlowMap(MLP(2, width=128, depth=4, times=2))
    settings: dict[str, Any] = {"batch": 256, "chunk": 256, "lr": 3e-3, "warmup": 50, "ema": 0.99, "quiet": True}
    fit = fewstep.fit(student, fewstep.ITVM(FIELD, starts="own"), Prior([2]), steps, seed=seed, **settings)
    return fit.ema


def empty(x: Tensor) -> float:
    return float((x[:, 0].abs() - x[:, 1].abs()).abs().lt(0.2).double().mean())


def four_gaussians() -> Any:
    """The mixture with one Gaussian a lobe, of its mean and its root mean square deviation."""
    x = FIELD.data(40_000, generator(9))
    right = x[x[:, 0] > x[:, 1].abs()]
    mean, scale = right.mean(0), float((right - right.mean(0)).square().mean().sqrt())
    means = float(mean[0]) * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    return fewstep.MixtureField(means, torch.full((4,), scale), torch.ones(4))


def picture(student: Any, file: Path) -> None:
    from matplotlib import pyplot

    noise = torch.randn(4000, 2, generator=generator(3))
    shown = {
        "the density, sampled by boxes": FIELD.data(4000, generator(4)),
        "map, 1 call": fewstep.sample(student, noise, 1),
        "teacher, 4 Euler calls": fewstep.sample(FIELD, noise, 4),
        "four Gaussians": four_gaussians().data(4000, generator(5)),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(10, 2.8), sharex=True, sharey=True, layout="constrained")
    for axis, (name, x) in zip(axes, shown.items(), strict=True):
        axis.scatter(x[:, 0], x[:, 1], s=0.6, alpha=0.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlim(-3, 3)
        axis.set_ylim(-3, 3)
        axis.set_aspect("equal")
    figure.savefig(file, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="A generator from a formula: a map of a PSD model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    noise = torch.randn(2000, 2, generator=generator(1))
    truth = FIELD.flow(noise, 0.0, 1.0)
    many = torch.randn(10_000, 2, generator=generator(2))
    found: dict[tuple[str, int], list[Tensor]] = {}
    student: Any = None
    for seed in args.seeds:
        student = trained(seed, args.steps)
        for n in CALLS:
            found.setdefault(("map, ITVM", n), []).append(of(student, noise, truth, many, n))
            if seed == args.seeds[0]:
                found["teacher, Euler", n] = [of(FIELD, noise, truth, many, n)]
    rows: list[list[Any]] = [
        [way, n, *(spread([float(each[k]) for each in values]) for k in range(2))] for (way, n), values in found.items()
    ]
    rows.append(["the density, by boxes", None, None, spread([empty(FIELD.data(10_000, generator(7)))])])
    rows.append(["four Gaussians", None, None, spread([empty(four_gaussians().data(10_000, generator(8)))])])
    write(
        FOLDER / "psd-model.json",
        title="A generator from a formula: the orbital in a few calls",
        formats={"rmse": "{mean} ± {std}", "near the diagonals": "{mean} ± {std}"},
        columns=["samples of", "calls", "rmse", "near the diagonals"],
        rows=rows,
        **here(args.seeds),
    )
    picture(student, FOLDER.parent.parent / "docs/images/psd-model.png")


def of(model: Any, noise: Tensor, truth: Tensor, many: Tensor, n: int) -> Tensor:
    """RMSE to the exact flow, and the share of samples near the diagonals."""
    error = (fewstep.sample(model, noise, n) - truth).square().sum(1).mean().sqrt()
    return torch.stack([error, torch.tensor(empty(fewstep.sample(model, many, n)))])


def spread(values: list[float]) -> dict[str, float]:
    mean = float(f"{statistics.mean(values):.3g}")
    return {"mean": mean, "std": float(f"{statistics.stdev(values):.2g}") if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()
