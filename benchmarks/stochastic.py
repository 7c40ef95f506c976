"""Sampling by SDEs of several strengths, and likelihoods, for docs/guides/stochastic-sampling.md and likelihood.md.

    python benchmarks/stochastic.py              # all parts; half an hour on one core
    python benchmarks/stochastic.py gaussian     # one of them: gaussian, checkerboard, likelihood, images

Writes benchmarks/results/sde-gaussian.json (the variance of N(1, 1/4) after N steps, without chance), and for small
fields that were trained on the checkerboard, three seeds, sde-checkerboard.json with its figure, and likelihood.json;
likelihood-images.json has bits a dimension of the Fashion-MNIST teacher that comes along.
"""

import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.evaluation.plots import quality_figure
from fewstep.evaluation.points import histogram_kl
from fewstep.evaluation.style import png
from fewstep.flows.solvers import integrate
from fewstep.flows.stochastic import SDE_SOLVERS, STEPS, kappa, places_along, quiet_step
from fewstep.flows.times import step_grid
from fewstep.networks import MLP

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "stochastic-sampling.png"
SEEDS = (0, 1, 2)
COUNT = 20_000  # samples of each, and data that they are held against


def capped(t: Tensor) -> Tensor:
    return kappa(fewstep.Linear(), t).clamp(max=2)


NAMES: dict[str, Any] = {
    "0 (ODE)": 0.0, "sigma": "sigma", "increasing-decreasing": "increasing-decreasing", "min(kappa, 2)": capped,
    "kappa": "kappa", "0.5": 0.5,
}  # fmt: skip


def gaussian() -> None:
    """A step on a Gaussian is affine in state and noise: its three numbers are read off, and moments follow exactly."""
    field = fewstep.GaussianField(torch.ones(1, dtype=torch.float64), torch.full((1, 1), 0.25, dtype=torch.float64))
    x, z = torch.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]], dtype=torch.float64)
    rows = []
    for name, eps in NAMES.items():
        for solver in SDE_SOLVERS:
            found: list[float] = []
            for steps in (10, 50, 250):
                *before, (here_, end) = pairwise(places_along(field.path, step_grid(steps), eps, x))
                moved = [STEPS[solver](field, x, a, b, lambda _: z) for a, b in before]
                last = STEPS[solver](field, x, here_, end, lambda _: z)
                moved.append(last if solver == "ancestral" else quiet_step("tweedie", field, x, here_, end))
                variance = 1.0
                for still, first, noisy in (step.flatten().tolist() for step in moved):
                    variance = (first - still) ** 2 * variance + (noisy - still) ** 2
                found.append(variance)
            rows.append([name, solver, *found])
    write(
        FOLDER / "sde-gaussian.json",
        title="The variance of N(1, 1/4) after N uniform steps, the last by Tweedie; 0.25 is exact",
        columns=["eps", "solver", "10", "50", "250"],
        formats=dict.fromkeys(("10", "50", "250"), "{:.4f}"),
        rows=rows,
        **here(seeds=[0], notes=["Moments are propagated exactly: there is no chance in it."]),
    )


def trained(seed: int) -> fewstep.VelocityField:
    """A field too small for its data, and trained too short."""
    torch.manual_seed(seed)
    field = fewstep.NetworkField(MLP(2, width=64, depth=3))
    data = fewstep.load_data("checkerboard")
    made = fewstep.fit(
        field, fewstep.FlowMatching(), data, steps=3000, batch=512, lr=2e-3, warmup=50, ema=0.995, seed=seed, quiet=True
    )
    return made.ema.eval().requires_grad_(False)


def checkerboard() -> None:
    exact = fewstep.CheckerboardField()
    fields = {seed: trained(seed) for seed in SEEDS}
    data = exact.data(COUNT, generator(100))
    floor = histogram_kl(exact.data(COUNT, generator(101)), data)
    rows, lines = [], []
    for name, eps in NAMES.items():
        for steps in (10, 25, 50, 100, 250):
            found = []
            for seed, field in fields.items():
                noise = torch.randn(COUNT, 2, generator=generator(7, seed))
                points = fewstep.sample(field, noise, steps, eps=eps, generator=generator(8, seed))
                found.append(histogram_kl(points, data))
            rows.append([name, steps, {"mean": mean(found), "std": stdev(found)}])
            lines.append({"model": name, "nfe": steps, "histogram_kl": mean(found)})
            print(name, steps, found, flush=True)
    solved = []
    for seed, field in fields.items():
        noise = torch.randn(COUNT, 2, generator=generator(7, seed))
        points = integrate(field, noise, step_grid(200).float(), "midpoint")
        solved.append(histogram_kl(points, data))
    rows.append(["0 (ODE), solved", 400, {"mean": mean(solved), "std": stdev(solved)}])
    write(
        FOLDER / "sde-checkerboard.json",
        title="Histogram KL to the checkerboard of a small trained field, by the ODE and by SDEs",
        columns=["eps", "network calls", "histogram KL"],
        formats={"histogram KL": "{mean:.3f} ± {std:.3f}"},
        rows=rows,
        **here(
            seeds=SEEDS,
            notes=[
                "MLPs of 3 x 64, trained by flow matching for 3000 steps of 512 rows; Euler-Maruyama, the last step by "
                f"Tweedie; {COUNT} samples of each seed.",
                f"Two sets of data differ by {floor:.3f}.",
            ],
        ),
    )
    draw(lines)


def draw(lines: list[dict[str, Any]]) -> None:
    figure = quality_figure(lines, "histogram_kl", "histogram KL to the data")
    calls = sorted({line["nfe"] for line in lines})
    figure.axes[0].set_xticks(calls, [str(n) for n in calls])
    png(figure, FIGURE)


def likelihood() -> None:
    fields = {seed: trained(seed) for seed in SEEDS}
    x = fewstep.CheckerboardField().data(500, generator(102))
    rows = []
    ways: list[tuple[str, int, Callable[..., Tensor]]] = [
        (name, n, lambda field, n=n, told=told: fewstep.log_likelihood(field, x, steps=n, **told))
        for name, told, counts in (
            ("ODE, exact divergence", {}, (25, 50, 100)),
            ("ODE, 1 probe", {"probes": 1, "generator": generator(9)}, (100,)),
            ("ODE, 8 probes", {"probes": 8, "generator": generator(9)}, (100,)),
            ("SDE bound, sigma", {"method": "sde", "generator": generator(9)}, (50, 100, 200, 800)),
        )
        for n in counts
    ]
    exact = {seed: fewstep.log_likelihood(field, x, steps=200) for seed, field in fields.items()}
    for name, steps, way in ways:
        found, scatter = [], []
        for seed, field in fields.items():
            value = way(field)
            found.append(-float(value.mean()))
            scatter.append(float((value - exact[seed]).square().mean().sqrt()))
        rows.append([name, steps, {"mean": mean(found), "std": stdev(found)}, mean(scatter)])
        print(rows[-1], flush=True)
    write(
        FOLDER / "likelihood.json",
        title="-log p of 500 held-out points of the checkerboard under small trained fields, nats",
        columns=["method", "steps", "mean -log p", "rms error of a row"],
        formats={"mean -log p": "{mean:.4f} ± {std:.4f}", "rms error of a row": "{:.4f}"},
        rows=rows,
        **here(
            seeds=SEEDS,
            notes=[
                f"The fields of sde-checkerboard.json. The data's own mean is log 6 = {math.log(6):.4f}.",
                "The error of a row is held against the exact divergence in 200 steps.",
            ],
        ),
    )


def images(count: int = 32, steps: int = 25) -> None:
    teacher: Any = fewstep.load("fewstep:fashion-mnist")
    data = fewstep.load_data("fashion-mnist", split="test")
    rows = []
    for seed in SEEDS:
        batch = data.rows(torch.arange(count), generator(seed))
        level = 1 / 127.5
        x = batch.data + level * (torch.rand(batch.data.shape, generator=generator(11, seed)) - 0.5)
        bits = fewstep.bits_per_dim(
            fewstep.log_likelihood(teacher, x, steps=steps, probes=1, generator=generator(12, seed), **batch.cond), 784
        )
        rows.append([seed, float(bits.mean()), float(bits.std()) / count**0.5])
        print(rows[-1], flush=True)
    write(
        FOLDER / "likelihood-images.json",
        title="Bits a dimension of Fashion-MNIST's test images under the teacher that comes along",
        columns=["seed", "bits a dimension", "standard error"],
        formats={"bits a dimension": "{:.3f}", "standard error": "{:.3f}"},
        rows=rows,
        **here(
            seeds=SEEDS,
            notes=[f"The first {count} images, {steps} midpoint steps, one probe; a seed decides noise and signs."],
        ),
    )


def parts() -> Iterator[Callable[[], None]]:
    known = {part.__name__: part for part in (gaussian, checkerboard, likelihood, images)}
    return (known[name] for name in sys.argv[1:] or known)


if __name__ == "__main__":
    for part in parts():
        part()
