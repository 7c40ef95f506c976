"""Who a folder belongs to: one process group at a time, by a lock that dies with its process."""

import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import no_link
from fewstep.common.write_errors import cannot_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
# The folders that this process, and this thread of it, already has.
_owned: ContextVar[frozenset[Path]] = ContextVar("owned", default=frozenset())


class BusyError(OSError):
    """A folder that another process is at work in; ``doing`` says at what."""

    def __init__(self, text: str, doing: str) -> None:
        super().__init__(text)
        self.doing = doing


class NoLocksError(OSError):
    """The file system, or the system, has no locks."""


def lock(stream: IO[Any]) -> bool:
    """Lock an open file, until it is closed or the process is gone; False where another process has locked it.

    Raises:
        NoLocksError: this cannot be told here.
    """
    if fcntl is None:
        raise NoLocksError("this system has no flock")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, EOPNOTSUPP and what else network disks say
        raise NoLocksError(str(error)) from None
    return True


def is_at(stream: IO[Any], file: Path) -> bool:
    """Whether an open file is still the one of this name: its last owner may just have removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


@contextmanager
def owned(folder: Path, doing: str) -> Iterator[None]:
    """Own a folder, which is made where there is none: no other process may within. What is owned already stays so.
    What was made and is still empty at the end is taken away again, with the folders around it.

    Args:
        doing: at what, as "trained"; other processes are told.

    Raises:
        BusyError: another process is at work in it; says which, since when and by what command.
        WriteError: the folder cannot be made or written.
    """
    place = folder.resolve()
    if place in _owned.get():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with cannot_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stream = _locked(folder, doing)
        before = _owned.set(_owned.get() | {place})
        try:
            yield
        finally:
            _owned.reset(before)
            with suppress(OSError):
                (folder / LOCK).unlink()
            stream.close()
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()  # where nothing was written


def _locked(folder: Path, doing: str) -> IO[Any]:
    """The lock file of a folder, locked, with what other processes are told in it."""
    file = folder / LOCK
    while True:
        stream = open(file, "ab+", buffering=0, opener=no_link)  # noqa: SIM115
        try:
            if not lock(stream):
                raise _in_use(folder, file)
        except NoLocksError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}): see to it that no other process writes there", stacklevel=4
            )
            return stream
        except BaseException:
            stream.close()
            raise
        if is_at(stream, file):
            break
        stream.close()
    program = Path(sys.argv[0])
    command = shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]])
    facts = {"doing": doing, "pid": os.getpid(), "host": platform.node(), "since": time.time(), "command": command}
    try:
        stream.truncate(0)
        stream.write(json.dumps(facts).encode())
    except OSError:
        file.unlink()
        stream.close()
        raise
    return stream


def _in_use(folder: Path, file: Path) -> BusyError:
    for _ in range(5):  # the other process may not have written it yet
        try:
            told = parse_json(read_text(file), LOCK)
            clock = time.localtime(told["since"])
            since = time.strftime("%H:%M" if time.time() - told["since"] < 43_200 else "%d %b %H:%M", clock)
            command = told["command"] if len(told["command"]) <= 120 else f"{told['command'][:117]}..."
            who, doing = f"process {told['pid']} on {told['host']} since {since} ({command})", str(told["doing"])
            break
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            time.sleep(0.05)
    else:
        who, doing = "another process", "written"
    return BusyError(f"{folder} is being {doing} by {who}: wait for it, stop it, or take another folder (--out)", doing)
