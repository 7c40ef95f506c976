"""Diffusion operator learning: does predicting the path help its end, and do Fourier layers over the times?

    python benchmarks/parallel_times.py FOLDER    # three seeds, kept in FOLDER; what is there is not trained again

The checkerboard's exact field; 2,000 or 20,000 stored trajectories of 64 Heun steps, at t = 1/4, 1/2, 3/4 and 1. An MLP
of 4 x 128 with two times, AdamW 2e-3 with a cosine over SECONDS of CPU, EMA .999, 1024 rows of the network an update:
``end``: 1024 trajectories, t = 1 alone; ``path``: 256 trajectories, all four times, one by one; ``Fourier``: the same
through ParallelTimes, 2 or all 3 modes; ``longer``: 2.5 times the SECONDS.
RMSE of one call to the end points of stored rows, and to exact ones of 2,000 new rows. Writes
benchmarks/results/parallel-times.json.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import Batch, Pairs
from fewstep.evaluation import teacher_states
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP, ParallelTimes
from fewstep.objectives.rows import Now, Rows

TIMES = (0.25, 0.5, 0.75, 1.0)
WAYS = ("end", "path", "Fourier, 2 modes", "Fourier, 3 modes", "Fourier, 2 modes, longer")
SIZES = (2000, 20_000)
TEACHER = fewstep.CheckerboardField()


class End(fewstep.TwoTime):
    """The way from the noise to the data of pairs, alone."""

    def __init__(self) -> None:
        super().__init__(diagonal=0.0)

    def pairs(self, rows: int, generator: Any, now: Now) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows), torch.ones(rows)

    def goal(self, student: fewstep.FlowMap, rows: Rows, now: Now) -> Tensor:
        return rows.dx


def trained(way: str, pairs: Pairs, size: int, seed: int, seconds: float) -> tuple[fewstep.FlowMap, int]:
    torch.manual_seed(seed)
    network: Any = MLP(2, width=128, depth=4, times=2)
    if way.startswith("Fourier"):
        network = ParallelTimes(network, TIMES, modes=int(way.split()[1]))
    student, draw = fewstep.FlowMap(network), generator(seed, 3)
    objective = End() if way.startswith("end") else fewstep.Trajectory(diagonal=0.0, parallel=True)
    optimizer, ema = torch.optim.AdamW(network.parameters(), weight_decay=0.0), fewstep.Ema(student, 0.999, warmup=True)
    seconds *= 2.5 if way.endswith("longer") else 1
    begun, step, rows = time.process_time(), 0, 1024 if way == "end" else 256
    while (share := (time.process_time() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * share)) * min(1.0, (step + 1) / 50)
        batch: Batch = pairs.rows(torch.randint(size, (rows,), generator=draw), draw)
        loss = objective(student, batch, generator=draw).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        step += 1
    return ema.module, step


def judged(way: str, size: int, seed: int, seconds: float, folder: Path) -> dict[str, Any]:
    make_pairs(TEACHER, folder / "pairs", 22_000, steps=64, states=TIMES[:-1], batch=2000)
    pairs = Pairs(folder / "pairs")
    student, steps = trained(way, pairs, size, seed, seconds)
    found: dict[str, Any] = {"way": way, "size": size, "seed": seed, "updates": steps}
    for name, index in (("new", torch.arange(20_000, 22_000)), ("stored", torch.arange(2000))):
        known = pairs.rows(index, generator(0))
        assert known.noise is not None
        end = teacher_states(TEACHER, known.noise, torch.ones(1))[-1] if name == "new" else known.data
        found[name] = float((fewstep.sample(student, known.noise, 1) - end).square().sum(1).mean().sqrt())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Parallel times against one by one, and the path against its end.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=FOLDER / "parallel-times.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[Any]] = {way: [way] for way in WAYS}
    for size in SIZES:
        for way in WAYS:
            rows = []
            for seed in args.seeds:
                file = args.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{size}-{seed}.json"
                if not file.is_file():
                    file.write_text(json.dumps(judged(way, size, seed, args.seconds, args.folder)))
                    print(file.read_text(), flush=True)
                rows.append(json.loads(file.read_text()))
            cells[way] += [spread([row[name] for row in rows]) for name in ("updates", "stored", "new")]
    names = [f"{name}, {size:,} trajectories" for size in SIZES for name in ("updates", "stored rows", "new rows")]
    write(
        args.out,
        title="One call after training by stored trajectories: RMSE to the end points of the checkerboard's field",
        formats=dict.fromkeys(names, "{mean} ± {std}"),
        columns=["way", *names],
        rows=list(cells.values()),
        **here(args.seeds, [f"{args.seconds:g} CPU seconds each, {2.5 * args.seconds:g} of the longer one."]),
    )


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(f"{statistics.mean(values):.3g}"), "std": float(f"{statistics.stdev(values):.2g}")}


if __name__ == "__main__":
    main()
