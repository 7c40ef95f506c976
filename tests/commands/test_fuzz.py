"""Commands with damaged and odd input end in one line, in bounds; and whether the fuzzer would notice."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz import bounds
from fuzz.cases import Case
from fuzz.edits import Edit
from toys.places import TESTS

from fewstep.commands import recipes


def _fuzzed(count: int, seed: int) -> subprocess.CompletedProcess[str]:
    """The fuzzer in a process of its own, which its cases part from."""
    words = [sys.executable, "-m", "fuzz", "--count", str(count), "--seed", str(seed), "--jobs", str(os.cpu_count())]
    return subprocess.run(words, cwd=TESTS, capture_output=True, text=True)


@pytest.mark.takes_seconds
def test_eighty_cases_end_in_one_line() -> None:
    found = _fuzzed(80, seed=0)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_five_thousand_cases_end_in_one_line(seed: int) -> None:
    found = _fuzzed(5000, seed)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


def _fault(world: Path, edits: tuple[Edit, ...] = ()) -> str | None:
    """The kind of fault of a command that reads nothing."""
    [(_, fault)] = bounds.run_all([Case(("recipes",), edits)], world)
    return None if fault is None else fault.kind


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (lambda: 0, None),
        (lambda: 1 // 0, "traceback: ZeroDivisionError"),
        (lambda: int("x"), "raw: ValueError"),
        (lambda: 77, "exit code 77"),
        (lambda: print("x" * 500, file=sys.stderr), "exit code None"),
        (lambda: print("x" * 500, file=sys.stderr) or 0, "long line"),
        (lambda: (bytearray(300 << 20) and time.sleep(1)) or 0, None),
        (lambda: (b"x" * (700 << 20) and time.sleep(1)) or 0, "memory"),
        (lambda: os.kill(os.getpid(), 11) or 0, "killed by SIGSEGV"),
        (lambda: os._exit(0), "the fuzzer itself"),
    ],
)
def test_the_fuzzer_notices(
    does: Callable[[], Any], kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "run", lambda args: does())
    found = _fault(tmp_path)
    assert (found is None) == (kind is None)
    assert kind is None or str(found).startswith(kind)


@pytest.mark.takes_seconds
def test_the_fuzzer_notices_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "CPU", 1)

    def busy(*_: object) -> int:
        while True:
            pass

    monkeypatch.setattr(recipes, "run", busy)
    assert _fault(tmp_path) == "cpu"
