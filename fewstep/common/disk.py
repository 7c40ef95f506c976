"""Files and folders that are whole or absent, and what killed processes left of them."""

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fewstep.common.locks import LOCK, NoLocksError, is_at, lock
from fewstep.common.write_errors import cannot_write

_PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
_ABANDONED = 86_400  # seconds after which a part is nobody's, where there are no locks
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part of it.

    Folders on the way are made. If writing fails, the old file stays and nothing is left beside it.

    Raises:
        WriteError: it cannot be written; says why, and the way out.
    """
    with cannot_write(path), _part(path, content) as part:
        os.replace(part, path)


def create_file(path: Path, content: bytes) -> bool:
    """Write ``content`` to ``path``, whole, where there is no such file; False where there is one already. Of several
    processes that come at once, one is the first.

    Raises:
        WriteError: it cannot be written; says why, and the way out.
    """
    with cannot_write(path), _part(path, content) as part:
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(part, path)
    return True


def is_part(name: str) -> bool:
    """Whether a file of this name is one that is being written, or was when its process was killed."""
    return _PART.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Remove the parts of files that killed processes left in a folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    for file in (folder / name for name in names if is_part(name)):
        with suppress(OSError), file.open("rb") as stream:
            if _is_abandoned(stream, file):
                file.unlink()


@contextmanager
def replace_folder(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place at the end, in one instant where the system can exchange two.
    Where it fails, what was there stays, and nothing is left behind; if the process is killed, the next one that writes
    or reads there puts it right (:func:`put_right`).

    Args:
        keep: what is there at the end stays, and the new folder goes: another process was first.

    Raises:
        WriteError: it cannot be written; says why, and the way out.
    """
    with cannot_write(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        put_right(folder)
        place, stream = _new_place(folder)
        new, old = place / "new", place / "old"
        try:
            new.mkdir()
            yield new
            if folder.exists() and not keep and not exchange(new, folder):
                folder.rename(old)
            if not folder.exists():
                new.rename(folder)
        finally:
            if old.exists() and not folder.exists():  # stopped between the two: what was there goes back
                old.rename(folder)
            shutil.rmtree(place, ignore_errors=True)
            stream.close()


def put_right(folder: Path) -> None:
    """Finish or take back what killed processes left of writing a folder."""
    names = os.listdir(folder.parent) if folder.parent.is_dir() else []
    ours = re.compile(re.escape(_beside(folder)) + "[a-z0-9]{8}")
    for place in (folder.parent / name for name in names if ours.fullmatch(name)):
        with suppress(OSError):
            if not set(os.listdir(place)) <= {LOCK, "new", "old"}:
                continue
            with (place / LOCK).open("rb") as stream:
                if not _is_abandoned(stream, place / LOCK):
                    continue
                if (place / "old").exists() and not folder.exists():
                    (place / "new").rename(folder)  # it was whole before the old one was moved
                shutil.rmtree(place)


def _beside(folder: Path) -> str:
    return f".{folder.name[:200]}."


def _new_place(folder: Path) -> tuple[Path, IO[bytes]]:
    """A folder beside another, and the lock in it by which all know that somebody is at work there."""
    while True:
        place = folder.parent / f"{_beside(folder)}{secrets.token_hex(4)}"
        place.mkdir(mode=0o700)
        try:
            stream = (place / LOCK).open("xb")
        except OSError:
            place.rmdir()
            raise
        with suppress(NoLocksError):
            if not lock(stream):
                continue
        if is_at(stream, place / LOCK):
            return place, stream


def _is_abandoned(stream: IO[Any], file: Path) -> bool:
    """Whether no process holds the lock of an open file, or, where there are no locks, nobody wrote it for a day."""
    try:
        return lock(stream)
    except NoLocksError:
        return time.time() - file.stat().st_mtime > _ABANDONED


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders or files in one instant; False where the system cannot.

    Raises:
        OSError: it can, and these two it cannot.
    """
    name, flag = ("renameatx_np", 2) if sys.platform == "darwin" else ("renameat2", 2)
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if os.name == "posix" else None
    if function is None:
        return False
    here = -2 if sys.platform == "darwin" else -100  # AT_FDCWD
    if function(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(flag)) == 0:
        return True
    if (code := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def _part(path: Path, content: bytes) -> Iterator[Path]:
    """The content beside ``path``, locked while it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb", buffering=0) as stream:
                with suppress(NoLocksError):
                    lock(stream)
                if not is_at(stream, part):  # swept before it was locked
                    continue
                view = memoryview(content)
                while view:
                    view = view[stream.write(view) :]
                if os.name == "nt":
                    stream.close()
                yield part
            return
        finally:
            part.unlink(missing_ok=True)
