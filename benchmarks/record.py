"""The form of a results file: what was measured, by which command, at which commit, with which seeds, where.

A file of ``benchmarks/results`` is one table. Numbers keep the digits they are quoted with (0.070
stays 0.070). What nobody wrote down at the time is null, and a note says so: ``"seeds: not recorded"``.

    from record import here, write
    write(Path("sampling.json"), title="Sampling", columns=["network", "ratio"], rows=rows, **here(seeds=[0]))
"""

import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

FOLDER = Path(__file__).parent / "results"
NOT_RECORDED = "not recorded"
Number = int | Decimal
# A number, a text, nothing, or several numbers by name: {"mean": 0.125, "std": 0.002}.
Cell = Number | str | None | dict[str, Number | str | None]


class Results(BaseModel):
    """One table of measured numbers, and where it comes from.

    ``formats`` says how a column is shown, in Python's format language: ``"{:.3f}"`` for a number, ``"{mean} ± {std}"``
    for several by name. ``group`` names a column whose value heads the rows that share it. ``notes`` are whole
    sentences: the setting that the numbers need to be read.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    commands: list[str]
    commit: str | None
    seeds: list[int] | None
    machine: str | None
    date: str | None = None
    notes: list[str] = []
    group: str | None = None
    formats: dict[str, str] = {}
    columns: list[str]
    rows: list[list[Cell]]

    @model_validator(mode="after")
    def _whole(self) -> "Results":
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns: {row}")
        unknown = [name for name in [*self.formats, *([self.group] if self.group else [])] if name not in self.columns]
        if unknown:
            raise ValueError(f"no column is called {unknown[0]!r}; there are: {', '.join(self.columns)}")
        for key in ("commands", "commit", "seeds", "machine"):
            if not getattr(self, key) and f"{key}: {NOT_RECORDED}" not in self.notes:
                raise ValueError(f"{key} is empty: give it, or add the note '{key}: {NOT_RECORDED}'")
        return self

    @property
    def sentences(self) -> list[str]:
        """The notes without those that only say what is missing."""
        return [note for note in self.notes if not note.endswith(f": {NOT_RECORDED}")]


def spread(values: Sequence[float]) -> Any:
    """The cell of one number at several seeds: mean and standard deviation; of one seed it alone, of none nothing."""
    if not values:
        return None
    mean = float(f"{statistics.mean(values):.3g}")
    return mean if len(values) == 1 else {"mean": mean, "std": float(f"{statistics.stdev(values):.2g}")}


def read(path: Path) -> Results:
    """A results file, its numbers with all their digits.

    Raises:
        ValueError: it is not of the form; the message names the file.
    """
    try:
        return Results.model_validate(json.loads(path.read_text(), parse_float=Decimal))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write(path: Path, **facts: Any) -> Results:
    """Checks the facts (the fields of :class:`Results`) and writes them, a row a line. Floats keep 6 digits."""
    results = Results.model_validate({**facts, "rows": [[_exact(cell) for cell in row] for row in facts["rows"]]})
    head = [
        f" {json.dumps(name)}: {_text(value)}"
        for name, value in results
        if name != "rows" and value != _DEFAULTS.get(name, ...)
    ]
    rows = ",\n".join(f"  {_text(row)}" for row in results.rows)
    path.write_text("{\n" + ",\n".join(head) + ',\n "rows": [\n' + rows + "\n ]\n}\n")
    print(f"{path} has the results")
    return results


_DEFAULTS = {name: field.default for name, field in Results.model_fields.items() if not field.is_required()}


def here(seeds: Sequence[int] | None = None, notes: Iterable[str] = ()) -> dict[str, Any]:
    """The facts of the run that calls it: its command, commit, machine and day, and the seeds it names."""
    notes, commit = list(notes), None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = _git("rev-parse", "--short", "HEAD") + (
            "" if not _git("status", "--porcelain", "--untracked-files=no") else ", changed"
        )
    missing = [f"{key}: {NOT_RECORDED}" for key, value in (("commit", commit), ("seeds", seeds)) if not value]
    script = Path(sys.argv[0]).resolve()
    with contextlib.suppress(ValueError):
        script = script.relative_to(Path(__file__).resolve().parent.parent)
    return {
        "commands": [shlex.join(["python", str(script), *sys.argv[1:]])],
        "commit": commit,
        "seeds": None if seeds is None else list(seeds),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "notes": [*notes, *missing],
    }


def machine() -> str:
    """Cores, GPU, Python, torch and the load, in one line."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = ", load " + " / ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else ""
    return (
        f"{platform.machine()}, {cores} cores, {gpu}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}{load}"
    )


def _git(*words: str) -> str:
    return subprocess.check_output(
        ["git", *words], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
    ).strip()


def _exact(cell: Any) -> Any:
    """A float as a decimal of 6 digits; what is not finite as text."""
    if isinstance(cell, dict):
        return {name: _exact(value) for name, value in cell.items()}
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return Decimal(f"{cell:.6g}") if cell - cell == 0 else str(cell)
    return cell


def _text(value: Any) -> str:
    """JSON on one line, with decimals as numbers that keep their digits."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {_text(each)}" for name, each in value.items())
            + "}"
        )
    return json.dumps(value, ensure_ascii=False)
