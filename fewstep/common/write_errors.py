"""What cannot be written, as one line: the file, the cause and the way out."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.common.user_folders import cache_folder

_ELSEWHERE = "write to another place"
_CAUSES = {
    "ENOSPC": ("the disk is full, {free:,} bytes are free", "Free some space, or write to another disk"),
    "EDQUOT": ("your share of the disk is used up", "Free some space, or write to another disk"),
    "EFBIG": ("no file may be that large there", f"See ulimit -f, or {_ELSEWHERE}"),
    "EROFS": ("the disk is read-only", f"Mount it for writing, or {_ELSEWHERE}"),
    "EACCES": ("you may not write there", f"Change its permissions (chmod), or {_ELSEWHERE}"),
    "EPERM": ("you may not write there", f"Change its permissions (chmod), or {_ELSEWHERE}"),
    "ENAMETOOLONG": ("the name is too long", "Take a shorter one"),
    "ENOTDIR": ("{file} is a file, and a folder is needed there", "Take another name"),
    "EEXIST": ("{file} is a file, and a folder is needed there", "Take another name"),
    "EISDIR": ("there is a folder of that name", "Take another name"),
    "EIO": ("the disk has an error (EIO)", f"Look at its health, or {_ELSEWHERE}"),
    "ESTALE": ("the network disk is gone (ESTALE)", f"Mount it again, or {_ELSEWHERE}"),
}
# Those that tell by themselves that something was to be written.
NEVER_OF_READING = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")} - {None}
_BY_NUMBER = {getattr(errno, name): said for name, said in _CAUSES.items() if hasattr(errno, name)}


class WriteError(OSError):
    """A file that cannot be written: a full disk, a folder that is read-only. What was there before is whole."""


@contextmanager
def cannot_write(target: Path, then: str = "") -> Iterator[None]:
    """Errors of writing ``target`` within, as one line. Others stay as they are.

    Args:
        then: what else is to be known, at the end of the line.

    Raises:
        WriteError: that line.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (failed := write_error(error, target, then)) is None:
            raise
        raise failed from error


def write_error(error: Exception, target: Path | None = None, then: str = "") -> WriteError | None:
    """The line for an error of writing; None for an error of another kind, or of a file that is not the target.

    Args:
        error: an OSError, or what a library written in Rust made of one.
    """
    code, named = None, getattr(error, "filename", None)
    if isinstance(error, OSError):
        code = error.errno
    elif found := re.search(r"\bos error (\d+)", str(error)):
        code = int(found[1])
    if code not in _BY_NUMBER or (named is not None and target is not None and not _is_of(target, named)):
        return None
    place = target or Path(os.fsdecode(named or "a file"))
    on_the_way = [place.absolute(), *place.absolute().parents]
    cause, way_out = _BY_NUMBER[code]
    free = shutil.disk_usage(next(p for p in on_the_way if _is(p.exists))).free
    file = next((p for p in on_the_way if _is(p.is_file)), place)
    if cache_folder().absolute() in on_the_way:
        way_out += " for what is kept, named by FEWSTEP_CACHE"
    return WriteError(f"could not write {place}: {cause.format(free=free, file=file)}. {way_out}{then}")


def _is(asked: Callable[[], bool]) -> bool:
    try:
        return asked()
    except OSError:  # a name that is too long
        return False


def _is_of(target: Path, named: str | bytes) -> bool:
    """Whether a file is the target, in it or on the way to it, under the name too that the target has at first."""
    file, goal = Path(os.path.abspath(os.fsdecode(named))), Path(os.path.abspath(target))
    if file in goal.parents:
        return True
    if goal.parent not in file.parents:
        return False
    first = file.relative_to(goal.parent).parts[0]
    return first == goal.name or first.startswith(f".{goal.name[:200]}.")
