"""What a training step of an objective costs: its time, its memory, and the network calls it is made of.

A step here is the loss and its backward pass; the optimizer and the averages, which cost the same for every method, are
left out. Costs are compared as ratios to plain flow matching on the same network, and held against what the counted
calls say they should be: an objective costs what its network calls cost.
"""

import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.common.randomness import Generators, generator
from fewstep.data.batch import Batch
from fewstep.evaluation.calls import UNITS, Counts, counting
from fewstep.evaluation.memory import held_bytes, synchronize
from fewstep.flows.broadcasting import as_times
from fewstep.flows.maps import FlowMap
from fewstep.flows.times import draw_pairs
from fewstep.objectives import FlowMatching, Loss, Objective
from fewstep.objectives.base import noise_of, squared_error
from fewstep.objectives.derivative import derivative

# What is measured: a student, its loss, and the slow copy of the student where the loss wants one (made if None).
Entry = tuple[Any, Objective, Any]


@dataclass(frozen=True)
class Cost:
    """``times``: seconds of each round. ``peak_bytes``: the most that a step holds at once beside the weights, their
    gradients and the batch, that is activations and what passes. ``counts``: the network calls it is made of."""

    times: tuple[float, ...]
    peak_bytes: int
    counts: Counts

    @property
    def seconds(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.times)

    def over(self, base: "Cost") -> float:
        """The time as a multiple of another's, measured with it: the median of the ratios round by round, so that a
        machine that was slow for a while was slow for both."""
        return statistics.median(mine / its for mine, its in zip(self.times, base.times, strict=True))


def expected_cost(counts: Counts, units: Mapping[str, float] = UNITS) -> float:
    """What calls alone should cost, in steps of flow matching; ``units`` as :func:`unit_costs` measures them."""
    return sum(rows * units[kind] for kind, rows in counts.rows.items())


def step_cost(
    student: Any, objective: Objective, batch: Batch, *, target: Any = None, rounds: int = 5, seed: int = 0
) -> Cost:
    """The cost of one step of one objective; arguments as :func:`compare_costs`."""
    return compare_costs({"": (student, objective, target)}, batch, rounds, seed=seed)[""]


def compare_costs(
    make: Mapping[str, Entry],
    batch: Batch,
    rounds: int = 5,
    *,
    seed: int = 0,
    precision: torch.dtype | None = None,
) -> dict[str, Cost]:
    """The cost of one step, forward and backward, of each of several objectives on the same rows.

    Two steps of each warm it up, in which calls are counted and memory is measured; then every round times one step of
    each, in shuffled order, so that what else runs on the machine hits all alike. In a round all have the same random
    numbers.
    Time is wall time; on a CPU with one thread, CPU time, which other programs lengthen less.

    Args:
        make: by name, a student (put in train mode), its objective and the objective's target, or None: a frozen copy
            of the student is made where the objective has an ``ema``. All may share one student.
        batch: rows on the device of the students.
        seed: decides every random number. Progress is 0.5; the step counts from 0.
        precision: the autocast type, None for none.

    Raises:
        ValueError: rounds below 1. Whatever the objectives raise.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: each method is timed once at least")
    device = batch.data.device
    ready = {name: _prepared(*entry) for name, entry in make.items()}
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def run(name: str, step: int) -> float:
        student, objective, target = ready[name]
        draw = generator(seed, step)
        torch.manual_seed(seed)  # dropout
        synchronize(device)
        start = clock()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = objective(student, batch, target=target, progress=0.5, step=step, generator=draw)
        loss.descended.backward()
        synchronize(device)
        seconds = clock() - start
        for module in (student, objective):
            module.zero_grad(set_to_none=True)
        return seconds

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        counts, peaks = {}, {}
        for name, parts in ready.items():
            with counting(*parts) as calls:
                run(name, 0)
            counts[name] = calls(len(batch))
            with held_bytes(device, *parts) as peak:
                run(name, 1)
            peaks[name] = peak()
        times = []
        for n in range(rounds):
            # Shuffled: what a step leaves behind, such as memory at hand, is worth a few per cent to the next one.
            order = torch.randperm(len(ready), generator=generator(seed, n)).tolist()
            times.append({name: run(name, 2 + n) for name in (list(ready)[i] for i in order)})
    return {name: Cost(tuple(t[name] for t in times), peaks[name], counts[name]) for name in ready}


def probes(student: FlowMap) -> dict[str, Entry]:
    """One bare call of each kind, to be measured among the objectives: what :func:`unit_costs` reads."""
    bare = {kind: Probe(kind) for kind in UNITS if kind != "trained"}
    return {kind: (student, objective, None) for kind, objective in {"trained": FlowMatching(), **bare}.items()}


def unit_costs(costs: Mapping[str, Cost]) -> dict[str, float]:
    """What each kind of call costs on this network and machine, in steps of flow matching, from costs with probes."""
    return {kind: costs[kind].over(costs["trained"]) for kind in UNITS}


class Probe(Objective):
    """No loss to train by: one call of the student, of one kind, on every row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.ema = 0.0 if kind == "frozen" else None

    def forward(
        self,
        student: Any,
        batch: Batch,
        *,
        target: Any = None,
        progress: float = 0.0,
        step: int = 0,
        generator: Generators,
    ) -> Loss:
        noise = noise_of(batch, generator)
        s, t = (as_times(time, noise) for time in draw_pairs(len(batch), generator))
        x, dx = student.path.sample(noise, batch.data, s)
        if self.kind == "frozen":
            x.requires_grad_()
            return Loss(squared_error(target.average_velocity(x, s, t, **batch.cond), dx).mean())
        with torch.set_grad_enabled(self.kind == "tangent_trained"):
            if self.kind == "plain":
                value = student.average_velocity(x, s, t, **batch.cond)
            else:
                along = (dx, torch.ones_like(s), torch.zeros_like(t))
                _, value = derivative(lambda *at: student.average_velocity(*at, **batch.cond), (x, s, t), along)
            loss = squared_error(value, dx).mean()
        return Loss(loss if loss.requires_grad else loss.requires_grad_())


def _prepared(student: Any, objective: Objective, target: Any) -> Entry:
    """The student in train mode, and the target that its objective wants."""
    if target is None and objective.ema is not None:
        target = deepcopy(student).eval().requires_grad_(False)
    objective.adopt(student)
    return student.train(), objective, target
