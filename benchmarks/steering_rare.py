"""When steering pays: a reward that is rarer and rarer, at equal calls of an exact map.

    python benchmarks/steering_rare.py

Data N(0, I) in 16 dimensions and r(x) = s u.x of a unit vector u: the target is N(s u, I), log E e^r is s^2 / 2. Writes
benchmarks/results/steering-rare.json in a few seconds.
"""

import math
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor, nn

import fewstep
from fewstep.common.randomness import generator
from fewstep.flows.sampling import sample_noise

SIZE, CALLS, SEEDS = 16, 1120, tuple(range(20))
STRENGTHS = 1.0, 3.0, 5.0
F64 = torch.float64


class UnitMap(fewstep.FlowMap):
    """The flow map of N(0, I) on the linear path."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, x: Tensor, s: Any, t: Any, **cond: Any) -> Tensor:
        before, after = ((r * r + (1 - r) ** 2) ** 0.5 for r in (s, t))
        return x * (after / before)


# Steps, calls a particle, and the options of each way.
WAYS: dict[str, tuple[int, int, dict[str, Any], bool]] = {
    "weights alone, 1 step": (1, 1, {"ess": 0.0}, False),
    "weights alone, 4 steps": (4, 4, {"ess": 0.0}, False),
    "map ahead, 4 steps": (4, 7, {}, False),
    "map ahead, gradient, 4 steps": (4, 10, {}, True),
    "map ahead, gradient, 8 steps": (8, 22, {}, True),
}


def reached(way: str, strength: float, seed: int) -> tuple[float, float]:
    """The mean along u, which is to be s, and the estimate of log E e^r."""
    steps, calls, options, gradient = WAYS[way]
    g = generator(seed)
    noise = sample_noise((CALLS // calls, SIZE), g, F64)
    reward = fewstep.Reward(lambda x: x.sum(1) / math.sqrt(SIZE), strength=strength, gradient=gradient)
    particles = fewstep.steer(UnitMap(), noise, steps, reward, generator=g, **options)
    return float(particles.mean(particles.x.sum(1) / math.sqrt(SIZE))), float(particles.log_normalizer)


def spread(values: list[float]) -> dict[str, str]:
    t = torch.tensor(values, dtype=F64)
    return {"mean": f"{float(t.mean()):.2f}", "std": f"{float(t.std()):.2f}"}


def main() -> None:
    rows = []
    for way, (_, calls, _, _) in WAYS.items():
        row: list[Any] = [way, CALLS // calls]
        for strength in STRENGTHS:
            means, masses = zip(*(reached(way, strength, seed) for seed in SEEDS), strict=True)
            row += [spread(list(means)), spread(list(masses))]
        rows.append(row)
        print(row, flush=True)
    notes = [
        f"Data N(0, I) in {SIZE} dimensions, r = s u.x, gamma 1: the target's mean along u is s, and log E e^r is "
        "s^2 / 2: 0.5, 4.5 and 12.5.",
        f"{CALLS} calls of the map a population, mean and standard deviation over {len(SEEDS)} seeds.",
    ]
    columns = ["way", "particles", *(f"s = {s:g}: {what}" for s in STRENGTHS for what in ("mean", "log E e^r"))]
    write(FOLDER / "steering-rare.json", title="Steering to what is rare", columns=columns, rows=rows,
          formats=dict.fromkeys(columns[2:], "{mean} ± {std}"), **here(seeds=SEEDS, notes=notes))  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
