"""A clean stop on Ctrl-C or SIGTERM: the step is finished and a checkpoint written.

After Ctrl-C the call returns. SIGTERM is how a cluster or a system ends a process: once all is written it is sent
again, and does what it does without fewstep, which is to end the process if no handler was set."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.terminated = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        self.terminated |= number == signal.SIGTERM
        if number == signal.SIGINT:
            # Not through sys.stderr, which this may have interrupted in the middle of a write.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


# What signals meant before each of the blocks that catch them now, the outermost first.
_before: list[dict[int, Any]] = []


@contextmanager
def catch(*numbers: int) -> Iterator[Interrupt]:
    """Catch these signals within, SIGINT and SIGTERM if none is said; a second SIGINT raises KeyboardInterrupt. A
    SIGTERM is sent again at the end, unless that is an error. Only in the main thread: elsewhere Python allows no
    handlers, and the signals keep their old meaning."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    _before.append(before)
    try:
        yield interrupt
    finally:
        _before.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupt.terminated:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def let_through() -> Iterator[None]:
    """Within, signals do what they do without fewstep: where there is nothing yet to finish or to write."""
    if threading.current_thread() is not threading.main_thread() or not _before:
        yield
        return
    outermost = {number: handler for before in reversed(_before) for number, handler in before.items()}
    caught = {number: signal.signal(number, handler) for number, handler in outermost.items()}
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)
