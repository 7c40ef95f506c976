"""Where the numbers of a run go: ``metrics.jsonl`` always, TensorBoard, trackio and Weights & Biases when asked."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fewstep.common.disk import replace_file
from fewstep.common.errors import shown, unknown
from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import no_link
from fewstep.common.write_errors import cannot_write
from fewstep.training.run_files import TENSORBOARD

_GOES_ON = "the same command goes on from the last checkpoint"


class Tracker(Protocol):
    """One place that numbers go to."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``metrics.jsonl``: one JSON object a line, with its ``step``. Lines after ``step`` are of a run that was cut off
    before its next checkpoint; they are dropped, so that the file has each step once."""

    def __init__(self, file: Path, step: int) -> None:
        if file.exists():
            kept = "".join(f"{json.dumps(record)}\n" for record in read_metrics(file) if record["step"] <= step)
            replace_file(file, kept.encode())
        self._file = file
        with cannot_write(file):
            # Without a buffer, so that closing has nothing left to write, and to fail at.
            self._stream = open(file, "ab", buffering=0, opener=no_link)  # noqa: SIM115

    def log(self, step: int, values: dict[str, Any]) -> None:
        line = memoryview(f"{json.dumps({'step': step, **values})}\n".encode())
        with cannot_write(self._file, f". Stopped at step {step}: {_GOES_ON}"):
            while line:
                line = line[self._stream.write(line) :]

    def sync(self) -> None:
        """Down to the disk, before a checkpoint that stands for these lines."""
        with cannot_write(self._file, f": {_GOES_ON}"):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


class TensorBoard:
    """Event files in ``out/tensorboard``."""

    def __init__(self, out: Path | None, step: int, config: dict[str, Any]) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._folder = Path("runs") if out is None else out / TENSORBOARD
        with cannot_write(self._folder):
            self._writer = writer(None if out is None else str(self._folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, Any]) -> None:
        with cannot_write(self._folder, f". Stopped at step {step}: {_GOES_ON}"):  # of its thread that writes
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with cannot_write(self._folder):
            self._writer.close()


class Hosted:
    """trackio or Weights & Biases, which share ``init``, ``log`` and ``finish``."""

    def __init__(self, package: str, options: dict[str, Any]) -> None:
        self._module = import_module(package)
        self._module.init(project="fewstep", resume="allow", **options)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


def _trackio(out: Path | None, step: int, config: dict[str, Any]) -> Hosted:
    return Hosted("trackio", {"config": config, **({} if out is None else {"name": out.name})})


def _wandb(out: Path | None, step: int, config: dict[str, Any]) -> Hosted:
    if out is None:
        return Hosted("wandb", {"config": config})
    # The same folder is the same run, so that a resumed one goes on in the same curves.
    ident = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    return Hosted("wandb", {"config": config, "name": out.name, "id": ident, "dir": str(out)})


_TRACKERS: dict[str, tuple[str, Callable[[Path | None, int, dict[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "trackio": ("trackio", _trackio),
    "wandb": ("wandb", _wandb),
}


def check(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is computed.

    Raises:
        ValueError: which, and what to install.
    """
    for name in names:
        if name not in _TRACKERS:
            raise unknown("tracker", name, _TRACKERS)
        if find_spec(package := _TRACKERS[name][0]) is None:
            raise ValueError(f"track={name!r} needs the package {package}: pip install 'fewstep[track]'")


def start(names: Sequence[str], out: Path | None, step: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run that goes on from ``step``, ``config`` beside the curves."""
    return [_TRACKERS[name][1](out, step, config) for name in names]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that a kill cut short is left out.

    Raises:
        ValueError: a line that is none; says which.
    """
    lines = read_text(file).split("\n")
    # What follows the last newline is empty, or torn.
    return [_record(line, f"line {number} of {file}") for number, line in enumerate(lines[:-1], 1)]


def _record(line: str, where: str) -> dict[str, Any]:
    record = parse_json(line, where)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{where} is no record of a step ({shown(record)}): take that line out")
    return record
