"""What sampling costs beside its network calls: ``fewstep.sample`` and ``draw`` against N bare calls on the same rows.

    python benchmarks/sampling.py                                        # a few minutes on one core
    python benchmarks/sampling.py --family UNet2DModel --steps 1 8 --rounds 31 --rows 16

Bare calls are N times ``network(x, s, t, **cond)`` without grad. ``fewstep.sample`` adds the algebra of the map;
``draw`` also draws each sample's noise from a generator of its own, counts the calls and collects the samples, as a
batch of `fewstep sample` does. Writes a results file (--out): medians of the ratios within rounds, in each of which all
run in another order, so that a busy machine hits all alike. "own" is what each takes with a network that does nothing,
over the bare calls in the same rounds: 1 + own is the ratio without the scatter of the networks' times, and should stay
under 1.02; (!) marks where it does not. One thread and CPU time; on a GPU (--device cuda) the clock.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import FAMILIES, Family
from record import here, write
from torch import Tensor

from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.generation.drawing import draw

TOLERANCE = 1.02


class Idle(torch.nn.Module):
    """A network that takes no time."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return x


def ways(family: Family, steps: int, rows: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The same number of calls of the same network on as many rows: bare, and by fewstep."""
    student = FlowMap.from_field(family.field()).eval().requires_grad_(False).to(device)
    idle = FlowMap(Idle(), student.native, student.prediction, path=student.path).to(device)
    noise = torch.randn(rows, *family.shape).to(device)
    cond: dict[str, Any] = {name: value.to(device) for name, value in family.cond(rows).items()}
    times = torch.linspace(0, 1, steps + 1, device=device)

    @torch.no_grad()
    def bare() -> Tensor:
        out = noise
        for s, t in pairwise(times):
            out = student.network(noise, s.expand(rows), t.expand(rows), **cond)
        return out.cpu()

    return {
        "bare": bare,
        "fewstep.sample": lambda: sample(student, noise, steps, **cond).cpu(),
        "draw": lambda: draw(student, rows, steps, shape=family.shape, given=cond, batch=rows),
        "own of fewstep.sample": lambda: sample(idle, noise, steps, **cond).cpu(),
        "own of draw": lambda: draw(idle, rows, steps, shape=family.shape, given=cond, batch=rows),
    }


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The time of one call; on a GPU until it is done."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    function()
    return clock() - start


def ratios(functions: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The time of each over that of the bare calls in the same round; bare calls themselves in seconds."""
    for function in functions.values():
        function()
    names, found = list(functions), {name: [] for name in functions}
    for i in range(rounds):
        # Forwards and backwards from every start: none is always first, none always follows the same.
        order = [*names[i % len(names) :], *names[: i % len(names)]][:: 1 if i % 2 else -1]
        took = {name: seconds(functions[name], device) for name in order}
        for name in names:
            found[name].append(took[name] if name == "bare" else took[name] / took["bare"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What sampling costs beside its network calls.")
    known = ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"]
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=known)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("sampling.json"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)

    rows: list[list[Any]] = []
    for family in arguments.family:
        for steps in arguments.steps:
            found = ratios(ways(FAMILIES[family], steps, arguments.rows, device), arguments.rounds, device)
            middle = {name: float(np.median(values)) for name, values in found.items()}
            ours = [value for n in ("fewstep.sample", "draw") for value in (middle[n], 100 * middle[f"own of {n}"])]
            rows.append([family, steps, *ours, 1000 * middle["bare"]])
            slow = [name for name in ("fewstep.sample", "draw") if 1 + middle[f"own of {name}"] > TOLERANCE]
            print(*rows[-1], *(f"(!) {name}" for name in slow), flush=True)
            gc.collect()
    ratio, own = ["fewstep.sample / bare", "draw / bare"], ["own part of fewstep.sample", "own part of draw"]
    note = (
        f"Time over as many bare calls of the same network on the same {arguments.rows} rows, medians of the ratios "
        f"within {arguments.rounds} rounds; 'own' is what each takes with a network that does nothing."
    )
    write(
        arguments.out, title="What sampling costs beside its network calls",
        columns=["network", "steps", ratio[0], own[0], ratio[1], own[1], "bare, ms"], rows=rows,
        formats={**dict.fromkeys(ratio, "{:.3f}"), **dict.fromkeys(own, "{:.1f} %"), "bare, ms": "{:.0f}"},
        **here(seeds=[0], notes=[note]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
