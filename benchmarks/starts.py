"""What the rows of a distillation start from: data, noise alone, or trajectories of the teacher; in the plane.

    python benchmarks/starts.py trajectory --out trajectory.json
    python benchmarks/starts.py stored --out stored-trajectories.json
    python benchmarks/starts.py stored --set spiral --out stored-spiral.json
    python benchmarks/starts.py data-free --out data-free.json

The checkerboard, or another --set with an exact teacher, an MLP of 4 x 128, the same number of steps (--steps) and rows
for every method, three seeds. Errors are RMSEs to the exact end points of 2000 samples, in 1, 2, 4 and 8 calls;
``calls`` are those without a backward pass that a step makes, in batches, of any network, counted.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from record import here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import Prior
from fewstep.data.batch import Batch
from fewstep.data.toy import Toy
from fewstep.evaluation.cost import step_cost
from fewstep.evaluation.points import rmse
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP
from fewstep.runs.teachers import EXACT

Make = Callable[[Any], Any]
ITVM, LMD, Trajectory = fewstep.ITVM, fewstep.LMD, fewstep.Trajectory
EIGHTHS = tuple(k / 8 for k in range(1, 8))
OF_CALLS: dict[str, Any] = {"diagonal": 0.0, "times": "calls(1)", "ends": 0.0}
# How it is made, what it learns from (data, prior, or stored trajectories), and the options of its network.
METHODS: dict[str, dict[str, tuple[Make, str, dict[str, Any]]]] = {
    "trajectory": {
        "Trajectory": (lambda v: Trajectory(v), "data", {}),
        "ITVM": (lambda v: ITVM(v), "data", {}),
        "ITVM, 30 % trajectory": (lambda v: ITVM(v, {"interval": 0.7, "trajectory": 0.3}), "data", {}),
    },
    "stored": {
        "ITVM, `diagonal: 0.75`": (lambda v: ITVM(v, diagonal=0.75), "data", {}),
        "the same, relu": (lambda v: ITVM(v, diagonal=0.75), "data", {"activation": "relu"}),
        "Trajectory, solved anew": (lambda v: Trajectory(v), "prior", {}),
        "the same, times of calls alone": (lambda v: Trajectory(v, **OF_CALLS), "prior", {}),
        "stored at 8 random times": (lambda v: Trajectory(diagonal=0.0), "random", {}),
        "stored at eighths": (lambda v: Trajectory(diagonal=0.0), "eighths", {}),
        "the same, times of calls": (lambda v: Trajectory(**OF_CALLS), "eighths", {}),
        "and relu": (lambda v: Trajectory(**OF_CALLS), "eighths", {"activation": "relu"}),
    },
    "data-free": {
        "LMD, data": (lambda v: LMD(v, ends=0.25), "data", {}),
        "LMD, prior, adaptive: 1": (lambda v: LMD(v, ends=0.25, starts="prior", adaptive=1.0), "prior", {}),
        "LMD, own, adaptive: 1": (lambda v: LMD(v, ends=0.25, starts="own", adaptive=1.0), "prior", {}),
        "ITVM, data": (lambda v: ITVM(v), "data", {}),
        "ITVM integral, prior": (lambda v: ITVM(v, "integral", starts="prior"), "prior", {}),
        "ITVM, own": (lambda v: ITVM(v, starts="own"), "prior", {}),
    },
}
CALLS, SETS = (1, 2, 4, 8), ("checkerboard", "spiral", "eight-gaussians")


@cache
def truth(name: str) -> tuple[Tensor, Tensor]:
    """Noise, and where the exact flow takes it."""
    noise = torch.randn(2000, 2, generator=generator(9))
    field: Any = EXACT[name]()
    return noise, field.flow(noise, 0.0, 1.0, tolerance=1e-6)


@cache
def source(name: str, kind: str) -> Any:
    """What a training draws its rows from."""
    field: Any = EXACT[name]()
    if kind in ("data", "prior"):
        return Toy(field.data, field.shape) if kind == "data" else Prior((2,))
    folder = tempfile.mkdtemp()
    make_pairs(
        field, folder, 50_000, steps=64, solver="midpoint", batch=10_000, seed=1,
        states=EIGHTHS if kind == "eighths" else 8,
    )  # fmt: skip
    return fewstep.load_data(folder)


def trained(name: str, make: Make, kind: str, options: dict[str, Any], steps: int, seed: int) -> list[float]:
    """The errors of a training at each number of calls."""
    teacher = EXACT[name]()
    torch.manual_seed(seed)
    student = fewstep.FlowMap(MLP(2, width=128, depth=4, times=2, **options))
    result = fewstep.fit(
        student, make(teacher), source(name, kind), steps=steps, batch=256, chunk=256, lr=3e-3, warmup=100, ema=0.998,
        seed=seed, quiet=True, device="cpu",
    )  # fmt: skip
    noise, ends = truth(name)
    return [rmse(fewstep.sample(result.ema, noise, n), ends) for n in CALLS]


def plain_calls(name: str, make: Make, kind: str) -> float:
    """The calls of a step without a backward pass, in batches."""
    teacher = fewstep.NetworkField(MLP(2, width=8, depth=2))
    student = fewstep.FlowMap.from_field(teacher)
    batch = Batch(truth(name)[0][:256])
    if kind in ("random", "eighths"):
        batch = source(name, kind).rows(torch.arange(256), generator(0))
    return step_cost(student, make(teacher), batch, rounds=1).counts.plain


def main() -> None:
    parser = argparse.ArgumentParser(description="What the rows of a distillation start from.")
    parser.add_argument("which", choices=list(METHODS))
    parser.add_argument("--set", choices=SETS, default="checkerboard")
    parser.add_argument("--methods", nargs="+", help="some of them, by their names (default: all)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("starts.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for name, (make, kind, options) in METHODS[arguments.which].items():
        if name not in (arguments.methods or [name]):
            continue
        found = [trained(arguments.set, make, kind, options, arguments.steps, seed) for seed in arguments.seeds]
        errors = [list(column) for column in zip(*found, strict=True)]
        cells = [{"mean": statistics.mean(e), "std": statistics.stdev(e) if len(e) > 1 else 0.0} for e in errors]
        rows.append([name, plain_calls(arguments.set, make, kind), *cells])
        print(name, *(f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in cells), flush=True)
    columns = ["method", "plain calls", *(f"{n} calls" if n > 1 else "1 call" for n in CALLS)]
    notes = [f"{arguments.steps} steps of 256 rows, lr 3e-3, an MLP of 4 x 128; RMSE to the exact end points."]
    write(
        arguments.out, title=f"Starts: {arguments.which}, {arguments.set}", columns=columns, rows=rows,
        formats={"plain calls": "{:.2f}", **dict.fromkeys(columns[2:], "{mean:.3f} ± {std:.3f}")},
        **here(seeds=arguments.seeds, notes=notes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
