"""Guidance by an ODE, by an SDE and by weights, on two mixtures of a line whose product of powers is known.

    python benchmarks/steering_guidance.py

Writes benchmarks/results/steering-guidance.json and docs/images/steering-guidance.png; a minute or two.
"""

import math
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.flows.exact import MixtureField
from fewstep.flows.sampling import sample_noise

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "steering-guidance.png"
F64, COUNT, SEEDS, SCALE = torch.float64, 20_000, (0, 1, 2), 2.5
LOW, HIGH, BINS, FINE = -2.0, 3.0, 60, 50


def mixture(means: list[float], variances: list[float], weights: list[float]) -> MixtureField:
    m, v, w = (torch.tensor(value, dtype=F64) for value in (means, variances, weights))
    return MixtureField(m[:, None], v.sqrt(), w)


WEAK = mixture([-1.0, 1.5], [0.25, 0.16], [0.4, 0.6])
STRONG = mixture([1.5, 0.6], [0.16, 0.09], [0.7, 0.3])


def target() -> Tensor:
    """The share of STRONG^w WEAK^(1-w) in each bin."""
    x = LOW + (torch.arange(BINS * FINE, dtype=F64)[:, None] + 0.5) * (HIGH - LOW) / (BINS * FINE)

    def log_density(field: MixtureField) -> Tensor:
        log = -0.5 * ((x - field.means[:, 0]) / field.scales) ** 2 - field.scales.log()
        return torch.logsumexp(field.weights.log() + log, 1)

    mass = (SCALE * log_density(STRONG) + (1 - SCALE) * log_density(WEAK)).exp().reshape(BINS, FINE).sum(1)
    return mass / mass.sum()


def shares(x: Tensor, weights: Tensor) -> Tensor:
    """The weight in each bin."""
    place = ((x[:, 0] - LOW) / (HIGH - LOW) * BINS).floor().long()
    inside = (place >= 0) & (place < BINS)
    return torch.zeros(BINS, dtype=F64).index_add(0, place[inside], weights[inside])


WAYS: dict[str, dict[str, Any]] = {
    "ODE, no weights": {"eps": torch.zeros_like, "ess": 0.0},
    "SDE, no weights": {"ess": 0.0},
    "ODE, weights": {"eps": torch.zeros_like},
    "SDE, weights": {},
}


def run(way: str, steps: int, seed: int) -> tuple[Tensor, float]:
    g = generator(seed)
    noise = sample_noise((COUNT, 1), g, F64)
    mixed = fewstep.Mixed({STRONG: SCALE, WEAK: 1 - SCALE})
    particles = fewstep.steer(STRONG, noise, steps, mixed, generator=g, **WAYS[way])
    weights = particles.log_weights.exp()
    if "no weights" in way:
        weights = torch.full_like(weights, 1 / COUNT)
    return shares(particles.x, weights), float(particles.ess.min()) / COUNT


def colder(size: int, least: float, seed: int) -> tuple[float, float]:
    """Of N(1, 1/4)^2 in ``size`` dimensions: the variance found, 1/8 in truth, and the least share of particles."""
    field = fewstep.GaussianField(torch.ones(size, dtype=F64), torch.eye(size, dtype=F64) / 4)
    g = generator(seed)
    particles = fewstep.steer(field, sample_noise((COUNT // 4, size), g, F64), 100, fewstep.Mixed({field: 2.0}),
                              ess=least, generator=g)  # fmt: skip
    mean = particles.mean(particles.x)
    return float(particles.mean((particles.x - mean) ** 2).mean()), float(particles.ess.min()) / len(particles.x)


def spread(values: list[float]) -> dict[str, str]:
    t = torch.tensor(values, dtype=F64)
    return {"mean": f"{float(t.mean()):.3f}", "std": f"{float(t.std()):.3f}"}


def main() -> None:
    truth, rows, found = target(), [], {}
    for way in WAYS:
        for steps in (20, 50, 100) if way == "SDE, weights" else (50,):
            each = [run(way, steps, seed) for seed in SEEDS]
            far = [float((bins - truth).abs().sum() / 2) for bins, _ in each]
            weighted = None if "no weights" in way else spread([least for _, least in each])
            rows.append([f"guidance, {way}", steps, spread(far), None, weighted])
            found[way] = each[0][0] if steps == 50 else found.get(way, each[0][0])
            print(rows[-1], flush=True)
    for size in (1, 8, 32):
        for name, least in (("never resampled", 0.0), ("resampled", 0.5)):
            each = [colder(size, least, seed) for seed in SEEDS]
            rows.append(
                [f"colder, {size}-D, {name}", 100, None, spread([v for v, _ in each]), spread([e for _, e in each])]
            )
            print(rows[-1], flush=True)
    notes = [
        f"guidance: {COUNT:,} particles towards c^{SCALE} u^{1 - SCALE} of two mixtures on a line; far: the total "
        f"variation from it over {BINS} bins; mean and standard deviation of three seeds.",
        f"colder: {COUNT // 4:,} particles towards N(1, 1/4)^2, whose variance is .125 on each axis.",
        "effective: the least share of effective particles before a resampling.",
    ]
    columns = ["way", "steps", "far", "variance", "effective"]
    write(FOLDER / "steering-guidance.json", title="Guidance that samples what it says", columns=columns, rows=rows,
          formats=dict.fromkeys(columns[2:], "{mean} ± {std}"), **here(seeds=SEEDS, notes=notes))  # fmt: skip
    draw(truth, found)


def draw(truth: Tensor, found: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    middle = LOW + (torch.arange(BINS) + 0.5) * (HIGH - LOW) / BINS
    width = (HIGH - LOW) / BINS
    figure = Figure(figsize=(9.5, 2.3), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axis, (way, bins) in zip(panels, found.items(), strict=True):
        axis.bar(middle, bins / width, width, color="#6f9ee8")
        axis.plot(middle, truth / width, color="#202124", linewidth=1.3)
        axis.set_title(way, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 1.1 * math.ceil(float(truth.max() / width)))
    figure.savefig(PICTURE, dpi=110)
    print(f"{PICTURE} has the picture")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
