"""What kills the process that it runs in, once."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.captions import Rows
from fewstep.data.sources import listed


def die_once(mark: Path) -> None:
    """SIGKILL to this process, unless the file is there that this leaves."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def squares(folder: Path) -> Callable[[int], tuple[int, int]]:
    """Squares of whole numbers, and who made them; 3 kills its process the first time, and 7 is refused."""

    def square(number: int) -> tuple[int, int]:
        if number == 3:
            die_once(folder / "died")
        if number == 7:
            raise ValueError("7 has no square here")
        return number * number, os.getpid()

    return square


def reading(read: Callable[[slice], Any], row: int, mark: Path, rows: slice) -> Any:
    """As ``read``, which kills its process when it comes to a row for the first time."""
    if rows.start <= row < rows.stop:
        die_once(mark)
    return read(rows)


def dying_rows(folder: Path, row: int, mark: Path) -> Rows:
    """The images of a folder, one of which kills who reads it, once."""
    rows = listed(folder).rows
    return replace(rows, read=partial(reading, rows.read, row, mark))
