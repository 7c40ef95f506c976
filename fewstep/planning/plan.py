"""What a training will need, before it is started: parameters, memory by part, floating-point operations and time.

The parts of the run are made as the run makes them, but on torch's ``meta`` device, and one step of it is counted there
(``fewstep.planning.counting``). Parameters, their copies and what a step keeps are exact; what a GPU adds to them (its
context, what its allocator loses between blocks) and how fast it is are estimates, which :data:`CONTEXT`, :data:`LOST`
and ``utilization`` say.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import shown
from fewstep.data.batch import Batch
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.models.weightless import META
from fewstep.objectives.base import Objective
from fewstep.planning.counting import Counted, count_call, count_step
from fewstep.planning.gpus import GPUS
from fewstep.planning.parts import Part, parts_of
from fewstep.planning.shards import Shards, calls_of
from fewstep.planning.weightless import conditions, sample_of, teacher_without_weights
from fewstep.runs.loading import start_of
from fewstep.runs.objective import make_objective, trains_map
from fewstep.runs.recipe import Recipe
from fewstep.runs.recipes import load_recipe
from fewstep.runs.students import make_student
from fewstep.training.computing import PRECISIONS, use_checkpoints
from fewstep.training.eight_bits import bytes_of_moments, is_eight_bit
from fewstep.training.ema import Ema
from fewstep.training.run import own_state
from fewstep.training.sharding import networks_of
from fewstep.training.shares import default_chunk
from fewstep.training.step import checkpoints_followed, players_of

GIB = 2**30
# What is kept free of a GPU's memory: the context of CUDA and its libraries, and the part lost between blocks.
CONTEXT, LOST = 1 * GIB, 0.05


@dataclass(frozen=True)
class Plan:
    """What a recipe will need on one GPU.

    ``parameters`` of the student, ``trained`` of them. ``parts`` lie in memory throughout. ``shards``: what several
    GPUs keep of them, and send. ``step`` is the recipe's micro-batch, ``least`` the smallest that its objective takes.
    ``checkpoint``: bytes of one on disk. ``call``: FLOPs of the student for one sample; ``teacher_call`` those of the
    teacher, 0 without one. ``row``: bytes of a row's latents and conditions kept in float16, ``shape`` a row's.
    """

    recipe: Recipe
    student: str
    parameters: int
    trained: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shards: Shards
    step: Counted
    least: Counted
    checkpoint: int
    call: int
    teacher_call: int
    row: int

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return sum(part.bytes for part in self.parts)

    def passing(self, rows: int) -> int:
        """Bytes of a step on so many rows beside that: exact at the two counted sizes, on the line through them
        elsewhere."""
        low, high = self.least, self.step
        slope = (high.peak - low.peak) / (high.rows - low.rows) if high.rows > low.rows else high.peak / high.rows
        return math.ceil(high.peak + slope * (rows - high.rows))

    def total(self, rows: int) -> int:
        """Bytes of a training with micro-batches of so many rows, with what a GPU adds."""
        return math.ceil((self.fixed + self.passing(rows)) / (1 - LOST)) + CONTEXT

    def rows_of(self, gpus: int) -> int | None:
        """Rows at once on each of so many GPUs: as in the recipe, or as many as its part of the batch leaves; None
        where the batch cannot be shared out, or leaves a term of the loss without rows."""
        share, left = divmod(self.recipe.training.batch, gpus)
        fit = [rows for rows in _divisors(share) if self.least.rows <= rows <= self.step.rows]
        return fit[-1] if fit and not left else None

    def sharded_total(self, gpus: int, rows: int) -> int:
        """Bytes of each GPU where a training is sharded over so many, with what a GPU adds."""
        held = self.shards.fixed(gpus) + self.shards.gathered + self.passing(rows)
        return math.ceil(held / (1 - LOST)) + CONTEXT

    def sent(self, gpus: int, rows: int) -> int:
        """Bytes that a GPU sends in an update, and as many that it gets."""
        return self.shards.sent(gpus) * self.recipe.training.batch // (gpus * rows)

    @property
    def flops(self) -> int:
        """Of one update."""
        return self.step.flops * self.recipe.training.batch // self.step.rows

    def seconds(self, flops: float, gpu: str, utilization: float) -> float:
        """The time of so many FLOPs on a GPU, at this share of its peak."""
        return flops / (GPUS[gpu].speed(self.recipe.training.precision) * utilization)


@dataclass(frozen=True)
class Fit:
    """How a recipe's batch fits a GPU: ``micro`` rows at once in ``bytes``, and the keys of the recipe that say so."""

    micro: int
    bytes: int
    keys: dict[str, Any]


def plan(recipe: Recipe) -> Plan:
    """What a recipe will need. No weights are read, and of a teacher on the hub only its configurations are fetched.

    Raises:
        ValueError, FileNotFoundError: parts that are not known or do not fit each other.

    >>> plan(load_recipe("sdxl-itvm", {"data": "./photos"})).fixed / GIB
    """
    training, run = recipe.training, _build(recipe)
    networks = networks_of(run.student, run.objective, [x for x in (run.average, run.target) if x is not None])
    with calls_of(networks) as calls:
        step = run.counted(training.batch // training.accumulate)
    network = getattr(run.student.network, "model", run.student.network)
    one = run.batch(1)
    times = (0.0, 1.0) if isinstance(run.student, FlowMap) else (0.0,)
    return Plan(
        recipe,
        f"{type(run.student).__name__} of a {type(network).__name__}",
        sum(p.numel() for p in run.student.parameters()),
        sum(p.numel() for p in run.student.parameters() if p.requires_grad),
        run.shape,
        parts_of(**_holders(run)),
        Shards.of(networks, calls, PRECISIONS[training.precision], training.offload, _holders(run)),
        step,
        _least(run, step),
        _checkpoint(run),
        count_call(run.student.eval(), one.data, times, one.cond),
        0 if run.teacher is None else count_call(run.teacher, one.data, (0.5,), one.cond),
        2 * sum(value[0].numel() for value in (one.data, *one.cond.values())),
    )


def fit_on(plan: Plan, capacity: int) -> Fit | None:
    """The largest micro-batch with which a training fits into so many bytes; None where the smallest does not."""
    recipe, least = plan.recipe, plan.least.rows
    batch, chunk = recipe.training.batch, _chunk(recipe)
    for rows in reversed(_divisors(batch)):
        # A smaller chunk than that of the least batch would leave a term of the loss without rows.
        if rows < least or _chunk(recipe, rows) < _chunk(recipe, least) or plan.total(rows) > capacity:
            continue
        changed = {"training.chunk": _chunk(recipe, rows)} if rows % chunk else {}
        return Fit(rows, plan.total(rows), {"training.accumulate": batch // rows, **changed})
    return None


def changes(recipe: Recipe) -> Iterator[tuple[dict[str, Any], Plan]]:
    """What to change where a recipe does not fit, one thing after the other: the keys so far, and the plan with them.

    Left out is what the parts of the recipe refuse: checkpoints by a derivative that they do not follow, for one.
    """
    wanted: dict[str, Any] = {}
    training, student = recipe.training, recipe.student
    if training.precision == "float32":
        wanted["training.precision"] = "bf16"
    if not training.gradient_checkpointing and student.network == "auto":
        wanted["training.gradient_checkpointing"] = True
    if student.lora is None and student.network == "auto" and student.weights != "random":
        wanted["student.lora.rank"] = 16
    keys: dict[str, Any] = {}
    for key, value in wanted.items():
        more = {**keys, key: value}
        try:
            found = plan(load_recipe(recipe.as_dict(), {key: str(value).lower() for key, value in more.items()}))
        except (ValueError, ImportError):
            continue
        keys = more
        yield keys, found


@dataclass(frozen=True)
class _Run:
    """The parts of a run on the meta device; ``given`` are rows of the conditions, where the data say them."""

    recipe: Recipe
    student: Any
    objective: Objective
    teacher: VelocityField | None
    average: nn.Module | None
    target: nn.Module | None
    shape: tuple[int, ...]
    given: dict[str, Tensor] | None

    def batch(self, rows: int) -> Batch:
        if self.given is None:
            cond = conditions(self.recipe, self.student, rows, self.shape)
        else:
            cond = {name: torch.empty_like(c[:1]).repeat(rows, *[1] * (c.ndim - 1)) for name, c in self.given.items()}
        return Batch(torch.empty(rows, *self.shape, device=META), cond)

    def counted(self, rows: int) -> Counted:
        precision, chunk = PRECISIONS[self.recipe.training.precision], _chunk(self.recipe, rows)
        batch = self.batch(rows)
        with checkpoints_followed(self.objective):
            return count_step(self.student, self.objective, batch, target=self.target, precision=precision, chunk=chunk)


def _build(recipe: Recipe) -> _Run:
    """As ``fewstep.runs.build.build`` and ``fewstep.fit`` make them, before the first step."""
    training = recipe.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is new in a student is said where it is trained
        teacher = teacher_without_weights(recipe)
        shape, given = sample_of(recipe, teacher)
        if any(side >> 40 for side in shape):  # more than a tensor's shape can say, on any device
            raise ValueError(f"a sample of shape {shown(list(shape))}: no memory holds one side of it")
        # What it starts from is loaded, which the meta device does not let it be.
        with META if recipe.student.start is None else nullcontext():
            student: Any = make_student(
                recipe.student, shape, teacher, trains_map(recipe), recipe.seed, start_of(recipe.student)
            )
    if training.gradient_checkpointing:
        use_checkpoints(student)
    objective = make_objective(recipe, teacher)
    objective.check_student(student)
    student.to(META).train()
    objective.adopt(student)
    objective.to(META)
    average, slow = (None if decay is None else Ema(student, decay).module for decay in (training.ema, objective.ema))
    return _Run(recipe, student, objective, teacher, average, slow, shape, given)


def _holders(run: _Run) -> dict[str, Any]:
    return {
        "trained": _trained(run),
        "student": run.student,
        "teacher": run.teacher,
        "objective": run.objective,
        "average": run.average,
        "target": run.target,
        "eight_bit": _is_eight_bit(run.recipe),
    }


def _trained(run: _Run) -> list[nn.Parameter]:
    """What the optimizers change."""
    return [p for player in players_of(run.objective, run.student).values() for p in player.parameters]


def _checkpoint(run: _Run) -> int:
    """Bytes of what ``Run.capture`` saves: all that is not frozen, of the student and its copies, and the moments."""
    frozen = {name for name, p in run.student.named_parameters(remove_duplicate=False) if not p.requires_grad}
    models = [model for model in (run.student, run.average, run.target) if model is not None]
    saved = [value for model in models for name, value in model.state_dict().items() if name not in frozen]
    moments = [bytes_of_moments(p.numel()) if _is_eight_bit(run.recipe) else 2 * p.nbytes for p in _trained(run)]
    return sum(x.nbytes for x in [*saved, *own_state(run.objective, run.student).values()]) + sum(moments)


def _is_eight_bit(recipe: Recipe) -> bool:
    return is_eight_bit(recipe.training.optimizer, recipe.training.shard)


def _least(run: _Run, step: Counted) -> Counted:
    """The smallest part of a batch of which every term of the loss gets a row."""
    for rows in _divisors(run.recipe.training.batch):
        if rows < step.rows:
            with suppress(ValueError):
                return run.counted(rows)
    return step


def _chunk(recipe: Recipe, rows: int | None = None) -> int:
    """The rows that share a generator: as the recipe has it, or what divides micro-batches of so many rows."""
    chunk = recipe.training.chunk or default_chunk(recipe.training.batch)
    return chunk if rows is None or rows % chunk == 0 else default_chunk(rows)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
