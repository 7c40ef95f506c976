"""A run while it lasts: what trains, what a callback sees, and what a checkpoint saves and restores."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.objectives.base import Objective
from fewstep.training import checkpoints
from fewstep.training.checkpoints import Checkpoint, Tensors
from fewstep.training.ema import Ema
from fewstep.training.meter import Meter


@dataclass
class Run:
    """The live state of a training. ``step`` counts updates done, ``seconds`` the time spent in all its parts."""

    student: nn.Module
    objective: Objective
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    average: Ema | None
    slow: Ema | None
    out: Path | None
    fingerprint: dict[str, Any]
    meter: Meter = field(default_factory=Meter)
    step: int = 0
    seconds: float = 0.0
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
    def copies(self) -> list[Ema]:
        """The averages that follow the student."""
        return [copy for copy in (self.average, self.slow) if copy is not None]

    def log(self, values: Mapping[str, Any]) -> None:
        """Add numbers to this step's line in ``metrics.jsonl`` and to the trackers."""
        self.record.update(values)

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """All that decides how the run goes on: tensors by group, and the rest as JSON."""
        tensors: Tensors = {"model": self.student.state_dict(), "objective": self.objective.state_dict()}
        if self.average is not None:
            tensors["ema"] = self.average.module.state_dict()
        if self.slow is not None:
            tensors["target"] = self.slow.module.state_dict()
        for player, optimizer in self.optimizers.items():
            tensors[f"optimizer-{player}"] = _flatten(optimizer)
        state = {
            "seconds": self.seconds,
            "losses": self.losses,
            "sums": self.meter.sums,
            "optimizers": {player: _options(optimizer) for player, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "fingerprint": self.fingerprint,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        return tensors, state

    def save(self, keep: int) -> None:
        """Write a checkpoint, where there is a run folder, and drop all but the newest ``keep``."""
        if self.out is not None:
            checkpoints.save(self.out / "checkpoints", self.step, *self.capture(), keep)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where the checkpoint was taken."""
        tensors, state = checkpoint.tensors, checkpoint.state
        self.student.load_state_dict(tensors["model"])
        self.objective.load_state_dict(tensors.get("objective", {}))
        if self.average is not None:
            self.average.module.load_state_dict(tensors["ema"])
        if self.slow is not None:
            self.slow.module.load_state_dict(tensors["target"])
        for player, optimizer in self.optimizers.items():
            _unflatten(optimizer, tensors[f"optimizer-{player}"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.losses = checkpoint.step, state["seconds"], state["losses"]
        self.meter.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}


@dataclass(frozen=True)
class Result:
    """What a training came to.

    ``ema`` holds the averaged weights (the student itself where ``ema=None``): the ones to use. ``losses`` are the
    means last logged. ``stopped`` says why: all steps done, the time used up, or Ctrl-C / SIGTERM.
    """

    student: nn.Module
    ema: nn.Module
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


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's tensors as ``INDEX.NAME``, the index counting the player's parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        whole["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(whole)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
