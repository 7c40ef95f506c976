"""A clean stop on Ctrl-C or SIGTERM: the step is finished and a checkpoint written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if number == signal.SIGINT:
            # Not through sys.stderr, which this may have interrupted in the middle of a write.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextmanager
def catch() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM within; a second SIGINT raises KeyboardInterrupt. Only in the main thread: elsewhere
    Python allows no handlers, and the signals keep their old meaning."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
