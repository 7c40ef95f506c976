"""A run while it lasts: what trains, what a callback sees, and what a checkpoint saves and restores."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

import torch
from torch import Tensor, nn

from fewstep.common.distributed import World
from fewstep.common.errors import refused
from fewstep.common.model_files import put_in
from fewstep.common.shards import is_sharded
from fewstep.objectives.base import Objective, Player
from fewstep.training import checkpoints
from fewstep.training.checkpoints import Checkpoint, Sizes, Tensors
from fewstep.training.ema import Ema, Model
from fewstep.training.meter import Meter
from fewstep.training.moments import empty_moment, give_back, moments_of, options_of
from fewstep.training.run_files import CHECKPOINTS


@dataclass
class Run:
    """The live state of a training. ``step`` counts updates done, ``seconds`` the time spent in all its parts."""

    student: nn.Module
    objective: Objective
    players: dict[str, Player]
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    average: Ema[nn.Module] | None
    slow: Ema[nn.Module] | None
    out: Path | None
    fingerprint: dict[str, Any]
    world: World = field(default_factory=World)
    still: Sequence[float] = ()  # the mark of the weights that do not train
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    seconds: float = 0.0
    threads: int | None = None  # of the CPU, which the bits of sums may depend on
    progress: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def ema(self) -> nn.Module:
        """The weights to evaluate: the average, or the student itself where none is kept."""
        return self.student if self.average is None else self.average.module

    @property
    def target(self) -> nn.Module | None:
        """The slow copy that the objective asked for."""
        return None if self.slow is None else self.slow.module

    @property
    def copies(self) -> list[Ema[nn.Module]]:
        """The averages that follow the student."""
        return [copy for copy in (self.average, self.slow) if copy is not None]

    @property
    def _models(self) -> dict[str, nn.Module]:
        """The student and the copies of it, as a checkpoint calls them."""
        models = {"model": self.student, "ema": self.average and self.average.module, "target": self.target}
        return {name: model for name, model in models.items() if model is not None}

    def log(self, values: Mapping[str, Any]) -> None:
        """Add numbers to this step's line in ``metrics.jsonl`` and to the trackers."""
        self.record.update(values)

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """All that decides how the run goes on: tensors by group, and the rest as JSON."""
        still = frozen(self.student)
        tensors: Tensors = {"model": {}, "objective": own_state(self.objective, self.student)}
        for group, model in self._models.items():
            tensors[group] = {name: value for name, value in model.state_dict().items() if name not in still}
        for player, optimizer in self.optimizers.items():
            tensors[f"optimizer-{player}"] = moments_of(optimizer, self.players[player])
        state = {
            "seconds": self.seconds,
            "losses": self.losses,
            "sums": self.meter.sums,
            "optimizers": {player: options_of(optimizer) for player, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "threads": self.threads,
            "fingerprint": self.fingerprint,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            **({"frozen": list(self.still)} if still else {}),
        }
        return tensors, state

    @property
    def is_sharded(self) -> bool:
        """Whether each process keeps a share of the weights alone."""
        return is_sharded(self.student)

    def save(self, keep: int) -> None:
        """Write a checkpoint, where there is a run folder, and drop all but the newest ``keep``: the main process, or
        all of a sharded training together."""
        if self.out is not None and (self.world.is_main or self.is_sharded):
            together = self.world if self.is_sharded else None
            checkpoints.save(self.out / CHECKPOINTS, self.step, *self.capture(), keep, together)

    def restore(self, path: Path) -> None:
        """Go back to where a checkpoint was taken."""
        if self.is_sharded:
            checkpoint = checkpoints.load_shards(path, self.world, lambda sizes: self._targets(path, sizes))
            check_mark(self.still, checkpoint)
        else:
            checkpoint = checkpoints.load(path)
            for group, model in self._models.items():
                put_back(model, frozen(self.student), checkpoint, group)
        tensors, state = checkpoint.tensors, checkpoint.state
        with _going_on(path):
            _check_players(state.get("optimizers", {}), self.players)
            state_of = self.objective.state_dict()
            shared = {name: state_of[name] for name in state_of.keys() - own_state(self.objective, self.student).keys()}
            self.objective.load_state_dict({**shared, **tensors.get("objective", {})})
            for player, optimizer in self.optimizers.items():  # one that has not moved yet has nothing to keep
                give_back(optimizer, tensors.get(f"optimizer-{player}", {}))
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds, self.losses = checkpoint.step, state["seconds"], state["losses"]
            self.threads = state.get("threads") or torch.get_num_threads()  # that of a run from before it was kept
            self.meter.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}

    def _targets(self, path: Path, sizes: Sizes) -> Tensors:
        """What the shards of a checkpoint are read into: the weights themselves, and new moments.

        Raises:
            ValueError: they are those of another student, or another optimizer.
        """
        wanted, _ = self.capture()
        for group, model in self._models.items():
            if found := differing({name: x.shape for name, x in wanted[group].items()}, sizes.get(group, {})):
                wrong = f"the weights in {path} are not those of the student that the recipe describes"
                raise ValueError(f"{wrong}: {found} of the {type(model).__name__}")
        with _going_on(path):
            if found := differing({k: x.shape for k, x in wanted["objective"].items()}, sizes.get("objective", {})):
                raise ValueError(f"{found} of the objective")
            for player, of in self.players.items():
                group = f"optimizer-{player}"
                wanted[group] = {key: empty_moment(key, size, of) for key, size in sizes.get(group, {}).items()}
        return wanted


@dataclass(frozen=True)
class Result(Generic[Model]):
    """What a training came to.

    ``ema`` holds the averaged weights (the student itself where ``ema=None``): the ones to use. ``losses`` are the
    means last logged. ``stopped`` says why: all steps done, the time used up, or Ctrl-C (or a SIGTERM that a handler of
    the script's own takes: without one it ends the process, once the checkpoint is written).
    """

    student: Model
    ema: Model
    step: int
    seconds: float
    steps_per_second: float
    losses: dict[str, float]
    out: Path | None
    stopped: Literal["done", "time", "interrupted"]


Callback = Callable[[Run], None]


def every(steps: int, callback: Callback) -> Callback:
    """The callback, called at each multiple of ``steps`` alone: ``fit(..., callbacks=[every(1000, draw_grid)])``."""

    def at_multiples(run: Run) -> None:
        if run.step % steps == 0:
            callback(run)

    return at_multiples


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that do not train, by name: a checkpoint leaves them out."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def own_state(objective: Objective, student: nn.Module) -> dict[str, Tensor]:
    """The state of an objective without what are the teacher's weights, or frozen ones of the student: of these it may
    have an adapter."""
    still = {id(p) for p in frozen(student).values()}
    still |= {id(p) for p in objective.teacher.parameters()} if objective.has_teacher else set()
    shared = {name for name, p in objective.named_parameters(remove_duplicate=False) if id(p) in still}
    return {name: value for name, value in objective.state_dict().items() if name not in shared}


def put_back(model: nn.Module, still: Mapping[str, Tensor], checkpoint: Checkpoint, group: str) -> None:
    """Load a model's weights from a checkpoint, all but those that stood ``still`` in the training.

    Raises:
        ValueError: the weights that stood still are others than in the training, so that the rest is worth nothing.
        ValueError: a weight is missing, not known, or of another shape.
    """
    if checkpoint.state.get("frozen") is not None:
        check_mark(mark(still.values()), checkpoint)
    weights = checkpoint.tensors.get(group, {})
    own = model.state_dict()
    wrong = f"the weights in {checkpoint.path} are not those of the student that the recipe describes"
    put_in(model, {**{name: own[name] for name in still}, **weights}, wrong)


def check_mark(now: Sequence[float], checkpoint: Checkpoint) -> None:
    """That the weights which do not train are those that they were in the training.

    Raises:
        ValueError: they are others, so that the rest is worth nothing.
    """
    if (expected := checkpoint.state.get("frozen")) is not None:
        norm = max(expected[0], 1e-12)
        if any(abs(here - then) > 1e-5 * norm for here, then in zip(now, expected, strict=True)):
            raise ValueError(
                f"the frozen weights are not those that {checkpoint.path} was trained on, and it holds the others "
                "alone: start from the same model (the same teacher; the same torch.manual_seed where it is made anew)"
            )


def mark(weights: Iterable[Tensor]) -> list[float]:
    """Two numbers that tell other weights apart, whatever the machine: the norm, and a projection, of some 4096 numbers
    of each tensor, from all over it. Not bits, as weights may be computed anew (a merged adapter); and of packed ones
    not the integers, which may then round to the next, but the scales beside them."""
    square = along = torch.zeros((), dtype=torch.float64)
    for index, weight in enumerate(weight for weight in weights if weight.is_floating_point()):
        first = weight.detach().flatten()[:: max(1, weight.numel() // 4096)].cpu().double()
        square = square + first.square().sum()
        along = along + (first * torch.cos(index + torch.arange(len(first), dtype=torch.float64))).sum()
    return [square.sqrt().item(), along.item()]


def _check_players(kept: Mapping[str, Any], players: Mapping[str, Player]) -> None:
    if missing := [name for name in players if name not in kept]:
        raise ValueError(f"it has no optimizer of {missing[0]!r}, and those of {', '.join(kept) or 'nobody'}")


def _going_on(path: Path) -> AbstractContextManager[None]:
    wrong = f"{path} is no checkpoint that this run can go on from"
    return refused(wrong, "put the file back, or start again (resume=False)")


def differing(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str | None:
    """The first difference of two sets of tensors, in words."""
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = wanted.get(name), found.get(name)
            say = lambda shape: "absent" if shape is None else tuple(shape)  # noqa: E731
            return f"{name!r} is {say(there)} there and {say(here)} here"
    return None
