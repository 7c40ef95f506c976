"""What is said while a command runs, in lines that can be read: errors, warnings, and what libraries log."""

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.common.errors import shortened


def one_line(error: BaseException) -> str:
    """What an error says, in a line that can be read."""
    return shortened(as_flags(str(error)))


def as_flags(text: str) -> str:
    """An error in one line; what Python calls resume=False and overwrite=True are flags here."""
    text = " ".join(text.split())
    for python, flag in (("resume=False", "--fresh"), ("overwrite=True", "--overwrite")):
        text = text.replace(f"{python} ({flag})", flag).replace(python, flag)
    return text


def tell_torchrun(error: BaseException) -> None:
    """Leave an error where torchrun looks for the first of all, which it shows at its end. What one process says of
    another that has ended is never the first."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        line, moment = one_line(error), time.time() + getattr(error, "follows", 0.0)
        more = {"py_callstack": line, "timestamp": f"{moment:.0f}"}
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": {"message": line, "extraInfo": more}}))


# Where diffusers finds it installed, it is imported with each model, and says which faster kernels are not there.
_SILENT = "bitsandbytes.backends.cpu.ops"


@contextmanager
def short_messages() -> Iterator[None]:
    """Warnings as notes of one line, lines of logs no longer than that, and none of what is of no use here."""
    usual, warnings.formatwarning = warnings.formatwarning, _note
    records, silent = logging.getLogRecordFactory(), logging.getLogger(_SILENT)
    logging.setLogRecordFactory(partial(_short_record, records))
    level = silent.level
    silent.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = usual
        logging.setLogRecordFactory(records)
        silent.setLevel(level)


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """A warning as one line, without the place in the code."""
    return f"note: {shortened(str(message))}\n"


def _short_record(make: Callable[..., logging.LogRecord], *args: Any, **more: Any) -> logging.LogRecord:
    """What diffusers and transformers log, in a line that can be read: they repeat whole captions."""
    record = make(*args, **more)
    record.msg, record.args = shortened(record.getMessage()), ()
    return record
