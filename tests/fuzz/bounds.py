"""A case in a process of its own, with bounds, and what was wrong about it."""

import json
import linecache
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewstep
from fewstep import cli
from fuzz.cases import Case
from fuzz.edits import apply

CPU = 10  # seconds
MEMORY = 500  # megabytes
LINE = 400  # characters
_WALL = 60  # seconds, of a case that waits
_REFUSED = 2000  # megabytes: what would take more is refused by the system at once
# Where files cost nothing, if there is such a place.
SCRATCH = next((place for place in ("/dev/shm", tempfile.gettempdir()) if os.access(place, os.W_OK)), None)
_CODE = Path(fewstep.__file__).parent


@dataclass(frozen=True)
class Fault:
    """``kind`` is the same for faults of one cause, ``said`` all that is known of this one."""

    case: int
    kind: str
    said: str


def run_all(cases: Sequence[Case], world: Path, jobs: int = 1) -> Iterator[tuple[int, Fault | None]]:
    """Each case with its number, as it is done."""
    waiting, running = list(enumerate(cases))[::-1], dict[int, _Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop()
            child = _Child(number, case, world)
            running[child.pid] = child
        for pid, child in list(running.items()):
            if child.is_done():
                del running[pid]
                yield child.number, child.fault()
        time.sleep(0.003)


class _Child:
    """A process for one case."""

    def __init__(self, number: int, case: Case, world: Path) -> None:
        self.number, self.memory, self.start, self.hung = number, 0.0, time.monotonic(), False
        self.place = Path(tempfile.mkdtemp(prefix="fewstep-fuzz-", dir=SCRATCH))
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _live(case, world, self.place)
            finally:
                os._exit(77)
        self.usage: Any = None
        self.first = _megabytes(self.pid)

    def is_done(self) -> bool:
        done, self.status, self.usage = os.wait4(self.pid, os.WNOHANG)
        if done:
            return True
        self.memory = max(self.memory, _megabytes(self.pid) - self.first)
        if time.monotonic() - self.start > _WALL or self.memory > 2 * MEMORY:
            self.hung = time.monotonic() - self.start > _WALL
            os.kill(self.pid, signal.SIGKILL)
        return False

    def fault(self) -> Fault | None:
        kind, said = self._judged()
        errors = self.place / "stderr"
        tail = errors.read_text(errors="replace")[-3000:] if errors.is_file() else ""
        shutil.rmtree(self.place, ignore_errors=True)
        return None if kind is None else Fault(self.number, kind, f"{said}\n{tail}")

    def _judged(self) -> tuple[str | None, str]:
        used = self.usage.ru_utime + self.usage.ru_stime
        if self.memory > MEMORY:
            return "memory", f"{self.memory:.0f} MB"
        if self.hung:
            return "hang", f"{_WALL} s"
        if os.WIFSIGNALED(self.status):
            name = signal.Signals(os.WTERMSIG(self.status)).name
            return ("cpu" if name == "SIGXCPU" else f"killed by {name}"), f"{used:.1f} s"
        if not (self.place / "result").is_file():
            return "the fuzzer itself", "no result"
        result = json.loads((self.place / "result").read_text())
        if result["traceback"]:
            return f"traceback: {result['where']}", result["traceback"]
        if result["raw"]:
            return f"raw: {result['where']}", result["raw"]
        if result["code"] not in (0, 1, 2):
            return f"exit code {result['code']}", ""
        for line in (self.place / "stderr").read_text(errors="replace").split("\n"):
            if line.startswith("Traceback (most"):
                return "traceback on stderr", ""
            if len(line) > LINE and not line.startswith("  fewstep "):  # a command to type is as long as it is
                return f"long line: {line[:40]}", f"{len(line)} characters"
        return None, ""


def _megabytes(pid: int) -> float:
    """Memory of a process that is its own."""
    try:
        with open(f"/proc/{pid}/status") as status:
            return next((int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon")), 0.0)
    except OSError:
        return 0.0


def _live(case: Case, world: Path, place: Path) -> None:
    """What the process does; never returns."""
    os.setpgid(0, 0)
    work = place / "work"
    shutil.copytree(world, work)
    os.chdir(work)
    os.environ["XDG_CACHE_HOME"] = os.environ["FEWSTEP_CACHE"] = os.environ["FEWSTEP_DATA"] = str(place / "cache")
    for edit in case.edits:
        apply(edit)
    for number, name in ((0, os.devnull), (1, str(place / "stdout")), (2, str(place / "stderr"))):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + (_REFUSED << 20),) * 2)
    result = judged(list(case.argv))
    sys.stdout.flush()
    sys.stderr.flush()
    (place / "result").write_text(json.dumps(result))
    os._exit(0)


def judged(argv: list[str]) -> dict[str, Any]:
    """A command run in this process: its exit code, and what it raised that is no refusal of fewstep's own."""
    result: dict[str, Any] = {"code": None, "traceback": "", "raw": "", "where": ""}
    refused: list[BaseException] = []
    said = cli.one_line

    def noted(error: BaseException) -> str:
        refused.append(error)
        return said(error)

    cli.one_line = noted
    try:
        result["code"] = cli.main(argv)
    except SystemExit as left:
        result["code"] = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        result |= {"traceback": "".join(traceback.format_exception(error))[-6000:], "where": _where(error)}
    finally:
        cli.one_line = said
    for error in refused:
        if not _is_own(error):
            result |= {"raw": "".join(traceback.format_exception(error))[-6000:], "where": _where(error)}
    return result


def _is_own(error: BaseException) -> bool:
    """Whether fewstep raised it on purpose: by a ``raise`` of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:  # made in the place of another
        return True
    last = frames[-1]
    return Path(last.filename).is_relative_to(_CODE) and "raise " in linecache.getline(last.filename, last.lineno or 0)


def _where(error: BaseException) -> str:
    """The last place in fewstep that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_CODE)]
    if not frames:
        return type(error).__name__
    last = frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).relative_to(_CODE)}:{last.lineno} {last.name}"
