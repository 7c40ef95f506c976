"""Local flow matching: small flows trained one after the other, each on a short way (arXiv 2410.02548)."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.common.disk import replace_file
from fewstep.common.distributed import environment
from fewstep.common.errors import shown
from fewstep.common.model_files import read_json
from fewstep.common.randomness import generator, normal
from fewstep.data import ArrayData, Batch, Data
from fewstep.data.buckets import buckets_of
from fewstep.data.given import Around, as_data
from fewstep.flows.chained import Chained
from fewstep.flows.fields import NetworkField
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.signature import device_of
from fewstep.flows.trajectories import flow_of
from fewstep.objectives.base import Objective
from fewstep.objectives.flow_matching import FlowMatching
from fewstep.training import folder
from fewstep.training.fit import fit
from fewstep.training.run import Result
from fewstep.training.run_files import CHAIN, is_run

_AT_ONCE = 1024  # rows that are carried


class Noised(Around):
    """Data x whose rows bring ``e^-g x + sqrt(1 - e^-2g) z`` as their noise, z normal; z alone where g is infinite."""

    two_sided = brings_noise = True

    def __init__(self, data: Data, length: float) -> None:
        super().__init__(data)
        self.length = length

    def rows(self, index: torch.Tensor, generator: torch.Generator) -> Batch:
        batch = self.data.rows(index, generator)
        scale, spread = math.exp(-self.length), math.sqrt(-math.expm1(-2 * self.length))
        return replace(batch, noise=scale * batch.data + spread * normal(batch.data, generator))


def fit_blocks(
    student: NetworkField,
    data: Any,
    steps: int | None = None,
    *,
    ou_times: Sequence[float] = (0.1, 0.15, 0.225),
    rows: int = 50_000,
    solver_steps: int = 32,
    objective: Objective | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    **training: Any,
) -> Result[Chained]:
    """Train ``len(ou_times) + 1`` blocks like ``student``, which is the first, and chain them (arXiv 2410.02548).

    Block n is flow matching between rows x of q_n and ``e^-g x + sqrt(1 - e^-2g) z``, an Ornstein-Uhlenbeck step of
    length g = ou_times[n]; the last one is from normal noise. q_0 are the data, q_(n+1) the rows of q_n carried back by
    the ODE of block n. Each begins with the averaged weights of the one before. Reconstructed from the authors' code.

    Args:
        student: on ``Interpolant()``, as blocks go from rows to rows. data: without noise of their own.
        steps, seed, training: of each block, as :func:`fit` takes them.
        ou_times: those of the authors for CIFAR-10 by default.
        rows: how many are carried of data without an end; of others all are, in memory, drawn once.
        solver_steps: Heun steps that carry rows through a block.
        objective: a FlowMatching with other options.
        out: a folder with a run for each block, which ``fewstep.load`` takes; the same call goes on there.

    Returns:
        What the training of the last block came to, with the chain as ``student`` and ``ema``.

    Raises:
        ValueError: a student, data, lengths or a folder that do not fit, several processes; before the training.
        KeyboardInterrupt: a block was interrupted.

    >>> chain = fit_blocks(NetworkField(MLP(2), Interpolant()), data, steps=4000, out="runs/local").ema
    """
    lengths, objective, given = [*map(float, ou_times), math.inf], objective or FlowMatching(), as_data(data)
    if not isinstance(student, NetworkField) or not isinstance(student.path, Interpolant) or student.path.has_latent:
        raise ValueError("blocks go from rows to rows: the student is a NetworkField(network, Interpolant())")
    if not isinstance(objective, FlowMatching):
        raise ValueError(f"blocks are trained by FlowMatching, not by {type(objective).__name__}")
    if len(lengths) < 2 or not all(math.isfinite(g) and g > 0 for g in lengths[:-1]) or min(rows, solver_steps) < 1:
        raise ValueError(f"ou_times {shown(lengths[:-1])}, {rows} rows, {solver_steps} solver_steps: all are above 0")
    if buckets_of(given):
        raise ValueError("blocks are trained on rows of one shape: leave buckets out")
    if getattr(given, "brings_noise", False):
        raise ValueError("blocks noise the data themselves, and these bring noise of their own: give the data alone")
    if environment().size > 1:
        raise ValueError("blocks are trained by one process, and there are several: start it without torchrun")
    objective.check_data(Noised(given, lengths[0]), student)
    out = None if out is None else Path(out).expanduser()
    if out is not None:
        said = {"ou_times": lengths[:-1], "rows": rows, "solver_steps": solver_steps, "seed": seed}
        _begin(out, {**said, "blocks": [f"block-{n}" for n in range(len(lengths), 0, -1)]}, resume)

    fields, left, done = [], given, None
    for n, length in enumerate(lengths, 1):
        place = None if out is None else out / f"block-{n}"
        done = fit(student, objective, Noised(left, length), steps, seed=seed, out=place, resume=resume, **training)
        if done.stopped == "interrupted":
            raise KeyboardInterrupt
        fields.append(deepcopy(done.ema).eval().requires_grad_(False))
        student = deepcopy(fields[-1]).requires_grad_(True)
        if n < len(lengths):
            left = _carried(fields[-1], left, left.size or rows, solver_steps, seed + n)
    chain = Chained(fields[::-1]).eval()
    chain.class_names, chain.moments = tuple(getattr(given, "classes", ())), getattr(given, "moments", None)
    chain.source = None if out is None else str(out.resolve())
    return replace(done, student=chain, ema=chain, out=out)  # pyright: ignore[reportReturnType, reportArgumentType]


def _begin(out: Path, facts: dict[str, Any], resume: bool) -> None:
    """Mark the folder of a chain."""
    folder.check_ours(out)
    if is_run(out) or (resume and (before := read_json(out / CHAIN)) and before != facts):
        raise ValueError(f"{out} has another run, or a chain trained otherwise: say another folder, or --fresh")
    out.mkdir(parents=True, exist_ok=True)
    folder.begin(out)
    replace_file(out / CHAIN, (json.dumps(facts, indent=1) + "\n").encode())


@torch.no_grad()
def _carried(field: NetworkField, data: Data, count: int, steps: int, seed: int) -> ArrayData:
    """Rows of data, carried from t = 1 to 0 by a field's ODE."""
    parts: dict[str, list[torch.Tensor]] = {}
    for number, index in enumerate(torch.arange(count).split(_AT_ONCE)):
        batch = data.rows(index, generator(seed, number)).to(device_of(field))
        moved = flow_of(field, batch.data, 1.0, 0.0, steps=steps, **batch.cond)
        for name, value in {"": moved, **batch.cond}.items():
            parts.setdefault(name, []).append(value.cpu())
    rows = {name: torch.cat(part) for name, part in parts.items()}
    return ArrayData(rows.pop(""), rows)
