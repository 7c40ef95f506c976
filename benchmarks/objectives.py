"""What a training step of every objective costs, as multiples of a step of flow matching on the same network.

    python benchmarks/objectives.py                                      # all families: some minutes each on one core
    python benchmarks/objectives.py --family MLP --only ITVM MeanFlow:diagonal=0.75 --rounds 21

A step is the loss and its backward pass. Writes a results file (--out), for each family: the measured time; the time
that the counted calls of networks should take, by what one call of each kind costs in the same rounds; the most memory
held beside the weights and their gradients; and the calls, in batches: F forward alone, F+B forward and backward,
F+B(x) backward to the inputs alone, J forward mode, J+B forward mode and backward through it. (!) marks a time more
than 10 % above that of its calls. One thread, CPU time, medians of ratios within rounds, so that a busy machine hits
all alike.
"""

import argparse
import gc
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family
from record import here, write

from fewstep.evaluation.calls import UNITS, Counts
from fewstep.evaluation.cost import Cost, Entry, compare_costs, expected_cost, probes, step_cost, unit_costs
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.objectives import OBJECTIVES
from fewstep.runs.compare import Method, parse_method
from fewstep.runs.methods import find_objective

METHODS = [*OBJECTIVES, "MeanFlow:teacher=none"]
TOLERANCE = 1.1
_KINDS = {"trained": "F+B", "frozen": "F+B(x)", "plain": "F", "tangent": "J", "tangent_trained": "J+B"}


def made(method: Method, student: FlowMap, teacher: NetworkField) -> Entry:
    """A method with its teacher, where it takes one, and the student that it trains."""
    function: Any = find_objective(method.name)
    options = dict(method.options)
    is_alone = options.pop("teacher", None) == "none"
    takes_teacher = "teacher" in inspect.signature(function).parameters
    return student, function(*([None if is_alone else teacher] if takes_teacher else []), **options), None


def measured(family: Family, methods: list[Method], rounds: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """The costs of probes and methods on a family, and why those that cannot run cannot."""
    teacher = family.field()
    student = FlowMap.from_field(teacher).requires_grad_(True)
    batch, entries, failed = family.batch(), probes(student), {}
    for method in methods:
        try:
            entry = made(method, student, teacher)
            step_cost(entry[0], entry[1], batch, rounds=1)
            entries[method.label] = entry
        except (RuntimeError, ValueError, TypeError) as error:
            failed[method.label] = " ".join(str(error).split())[:200]
    return compare_costs(entries, batch, rounds), failed


def calls(counts: Counts) -> str:
    """The rows of each kind of call, in batches: ``1 F+B, 1.5 F``."""
    return ", ".join(f"{rows:.3g} {_KINDS[kind]}" for kind, rows in counts.rows.items())


def table(name: str, costs: dict[str, Cost]) -> tuple[list[list[Any]], str]:
    """The rows of a family, and what one call of each kind takes."""
    base, units = costs["trained"], unit_costs(costs)
    rows: list[list[Any]] = []
    for label, cost in costs.items():
        if label in UNITS:
            continue
        time, expected = cost.over(base), expected_cost(cost.counts, units)
        memory = cost.peak_bytes / base.peak_bytes
        rows.append([name, label, time, expected, memory, calls(cost.counts), cost.counts.jvps])
        off = f"{100 * (time / expected - 1):+.0f} %{' (!)' if time > TOLERANCE * expected else ''}"
        print(f"{name}: {label}: {time:.2f} ({expected:.2f}, {off}), memory {memory:.2f}", flush=True)
    kinds = ", ".join(f"{_KINDS[kind]} {cost:.2f}" for kind, cost in units.items())
    return rows, f"{name}: one call of each kind, in steps of FM: {kinds}. FM: {1000 * base.seconds:.0f} ms."


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step of every objective costs.")
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", default=list(OBJECTIVES), help="NAME:key=value for options"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("objectives.json"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    methods = [parse_method(text) for text in arguments.only]
    rows: list[list[Any]] = []
    notes = [
        f"As multiples of a step of flow matching (FM), medians of {arguments.rounds} rounds. Calls are in batches."
    ]
    for name in arguments.family:
        costs, failed = measured(FAMILIES[name], methods, arguments.rounds)
        found, units = table(name, costs)
        rows += found
        notes += [units, *(f"{name}: {label} cannot run: {why}" for label, why in failed.items())]
        print(*notes[1:], sep="\n", flush=True)
        gc.collect()
    columns = ["family", "objective", "time", "time of its calls", "memory", "calls", "JVPs"]
    write(
        arguments.out, title="What a step costs", columns=columns, rows=rows, group="family",
        formats=dict.fromkeys(columns[2:5], "{:.2f}"), **here(seeds=[0], notes=notes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
