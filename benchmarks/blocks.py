"""Local flow matching: four small blocks against one flow of as many weights, in as many CPU seconds.

    python benchmarks/blocks.py FOLDER    # three seeds, each way kept in FOLDER; what is there is not trained again

The checkerboard; batches of 1024 rows, lr 3e-3, EMA .999. ``one flow``: an MLP of 4 x 128 (58,000 weights). ``blocks``:
four of 4 x 64 (68,000 weights in all), with the lengths of the paper for CIFAR-10. 4,000 updates of the one, 2,000 of
each block: about as many CPU seconds, with those that carry rows (50,000 each time). Each is sampled by Euler and the
midpoint rule, at 4 to 64 calls in all. Then a map of 4 x 128 is distilled from 20,000 trajectories of 8 states
(Trajectory, 2,000 updates). Sliced W2 of 16,000 samples to the data. Writes benchmarks/results/blocks.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import Pairs
from fewstep.evaluation.points import sliced_wasserstein
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP

WAYS: dict[str, tuple[float, ...]] = {"one flow": (), "blocks": (0.1, 0.15, 0.225)}
CALLS = (4, 8, 16, 64)
COUNT = 16_000
DATA = fewstep.load_data("checkerboard")
HOW: dict[str, Any] = {"batch": 1024, "chunk": 1024, "lr": 3e-3, "warmup": 100, "quiet": True}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    return work(), time.process_time() - begun


def teacher(way: str, seed: int) -> Any:
    torch.manual_seed(seed)
    if not WAYS[way]:
        field = fewstep.NetworkField(MLP(2, width=128, depth=4))
        return fewstep.fit(field, fewstep.FlowMatching(), DATA, 4000, seed=seed, **HOW).ema
    block = fewstep.NetworkField(MLP(2, width=64, depth=4), fewstep.Interpolant())
    return fewstep.fit_blocks(block, DATA, 2000, ou_times=WAYS[way], seed=seed, **HOW).ema


def distilled(field: Any, seed: int, folder: Path) -> Any:
    make_pairs(field, folder, 20_000, steps=32, states=8, seed=seed, solver="midpoint", batch=5000)
    torch.manual_seed(seed)
    student = fewstep.FlowMap(MLP(2, width=128, depth=4, times=2), field.path)
    return fewstep.fit(student, fewstep.Trajectory(field), Pairs(folder), 2000, seed=seed, **HOW).ema


def judged(way: str, seed: int, folder: Path) -> dict[str, Any]:
    field, took = timed(lambda: teacher(way, seed))
    data = DATA.rows(torch.arange(COUNT), generator(seed, 8)).data
    noise = torch.randn(COUNT, 2, generator=generator(seed, 7))

    def far(x: torch.Tensor) -> float:
        return float(sliced_wasserstein(x, data))

    found: dict[str, Any] = {"way": way, "seed": seed, "seconds": took}
    found |= {f"euler {n}": far(fewstep.sample(field, noise, n)) for n in CALLS}
    found |= {f"midpoint {n}": far(fewstep.sample(field, noise, n // 2, solver="midpoint")) for n in CALLS[1:]}
    student = distilled(field, seed, folder / f"states-{way}-{seed}")
    return found | {f"map {n}": far(fewstep.sample(student, noise, n)) for n in (1, 2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Blocks against one flow.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER / "blocks.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for way in WAYS:
            file = args.folder / f"{way.replace(' ', '-')}-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(judged(way, seed, args.folder)))
                print(file.read_text(), flush=True)
            found.setdefault(way, []).append(json.loads(file.read_text()))
    shown = {"euler": CALLS, "midpoint": CALLS[1:], "map": (1, 2, 4)}
    keys = [f"{how} {n}" for how, calls in shown.items() for n in calls]
    cells: list[list[Any]] = [
        [way, *(spread([row[key] for row in rows]) for key in keys)] for way, rows in found.items()
    ]
    used = ", ".join(f"{way} {statistics.mean(row['seconds'] for row in rows):.1f}" for way, rows in found.items())
    write(
        args.out,
        title="Local flow matching: sliced W2 to the checkerboard by calls in all",
        formats=dict.fromkeys(keys, "{mean} ± {std}"),
        columns=["way", *keys],
        rows=cells,
        **here(args.seeds, [f"CPU seconds of training, on average: {used}."]),
    )


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(f"{statistics.mean(values):.3g}"), "std": float(f"{statistics.stdev(values):.2g}")}


if __name__ == "__main__":
    main()
