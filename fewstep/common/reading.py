"""Files that others wrote, read with care: what is there, text in UTF-8, JSON; and what is said of those that are
damaged."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.common.errors import briefly

TEXTS = (".txt", ".md", ".rst")  # the suffixes of files that are texts

# How files in other encodings begin; those of UTF-32 first, since its mark begins with that of UTF-16.
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def no_file(path: Path) -> str | None:
    """Why there is no file to be read at a path; None where there is one. Nothing is opened: a pipe may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError for a name that cannot be one
        if path.is_symlink():
            return f"it is a link to {os.readlink(path)}, which is not there"
        return "there is no such file" if isinstance(error, FileNotFoundError | ValueError) else briefly(error)
    return None if stat.S_ISREG(mode) else f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')} and no file"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the mark that some programs put before it; lines end in a newline.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, or in another encoding.
    """
    if why := no_file(path):
        raise (ValueError if path.exists() else FileNotFoundError)(f"{path} cannot be read: {why}")
    content = path.read_bytes()
    other = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = other or f"no text in UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(f"{path} is {wrong}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} has bytes of zero, as {other or 'UTF-16'} has: save it as text in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: str) -> Any:
    """A value from JSON; ``where`` is what to call the text.

    Raises:
        ValueError: it is no JSON, or its brackets are nested too deep to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "its brackets are nested too deep" if isinstance(error, RecursionError) else briefly(error)
        raise ValueError(f"{where} is not JSON ({why})") from None


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Whatever a reader stumbles over in a damaged file becomes one line that names the file.

    Raises:
        ValueError: in the place of any error. FileNotFoundError: stays one.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"cannot read {what}: {briefly(error)}") from error


def check_memory(what: str | Path, wanted: int, way_out: str) -> None:
    """That the machine has so many bytes of memory.

    Raises:
        ValueError: it has less; says the ``way_out``.
    """
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > there:
        raise ValueError(
            f"{what} takes {wanted / 1e9:.4g} GB of memory, and the machine has {there / 1e9:.4g}: {way_out}"
        )
