"""What is printed: tables, progress, and what to type next."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_RECENT = 60.0  # seconds back that a speed is a mean of
_MARK = 1.0  # seconds between two marks in them
_LINE = 10.0  # seconds between two lines where there is no terminal, more in long work


def say(text: str) -> None:
    """For the one who waits, on stderr."""
    print(text, file=sys.stderr)


def say_next(commands: Sequence[str]) -> None:
    """What to type next, on stderr, so that the output proper can be piped."""
    say("next:\n" + "\n".join(f"  {command}" for command in commands))


# The columns of words, not numbers.
_WORDS = ("model", "metric", "method", "part", "GPU", "with")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for the terminal; None is a dash."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    # Where there is no terminal, no line may break.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown; None is a dash."""
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    """``3s``, ``2m 05s``, ``1h 20m``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


class Pace:
    """How fast something goes, as a mean over the last minute: what was before (a slow start, a machine that was busy
    for a while, another start of the same run) says nothing of what is to come.

    Args:
        now: when it starts, in seconds. done: how many were done before. fraction: of the whole, in [0, 1].
    """

    def __init__(self, now: float, done: float = 0, fraction: float = 0.0) -> None:
        self._marks = deque([(now, done, fraction)])

    def __call__(self, now: float, done: float, fraction: float) -> tuple[float, float]:
        """How many a second, and how many seconds are left; 0 where nothing was done yet."""
        if now - self._marks[-1][0] >= _MARK:
            self._marks.append((now, done, fraction))
        # The last mark from before that minute stays: one of a few slow steps may take longer.
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RECENT:
            self._marks.popleft()
        then, first, before = self._marks[0]
        seconds, more = max(now - then, 1e-9), fraction - before
        return (done - first) / seconds, (1.0 - fraction) * seconds / more if more > 0 else 0.0


def is_line_due(waited: float, elapsed: float, left: float) -> bool:
    """Whether to print a line where there is no terminal: each ten seconds, more rarely in long work.

    Args:
        waited: seconds since the last line. elapsed: since the start. left: until the end.
    """
    return waited >= max(_LINE, (elapsed + left) / 100)


@contextmanager
def progress_bar(text: str, quiet: bool) -> Iterator[Callable[[float, float], None] | None]:
    """Shows how much is done, with its speed and the time that is left, on stderr: a bar on a terminal, a line now and
    then elsewhere. Gives what takes how many are done and the whole of it; None where nothing is shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar(text)
    else:
        say(text)
        yield _lines(text)


def adding(progress: Callable[[float, float], None] | None, total: float) -> Callable[[float], None]:
    """Adds up how much more is done each time, and tells ``progress`` of it and of the whole."""
    done: float = 0

    def tick(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tick


def _lines(text: str) -> Callable[[float, float], None]:
    start = last = time.perf_counter()
    pace = Pace(start)

    def show(done: float, total: float) -> None:
        nonlocal last
        now = time.perf_counter()
        speed, left = pace(now, done, done / total)
        if done < total and is_line_due(now - last, now - start, left):
            last = now
            say(f"{text}: {done / total:.0%}  {speed:.3g}/s  {duration(left)} left")

    return show


def _bar(text: str) -> Iterator[Callable[[float, float], None]]:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        """How many are done in a second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g}/s")

    with Progress(*Progress.get_default_columns(), Speed(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
