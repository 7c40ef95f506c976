"""What is printed: tables, progress, and what to type next."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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


def print_evaluation(evaluation: Any) -> None:
    """Its table, where there is one."""
    if evaluation is not None:
        print_table(*evaluation.table())


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


@contextmanager
def progress_bar(text: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, with its speed and the time that is left, one line elsewhere; both on stderr. None
    stands for a bar that is not there."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        """How many are done in a second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g}/s")

    console = Console(stderr=True)
    if quiet or not sys.stderr.isatty():
        if not quiet:
            console.print(text, highlight=False)
        yield None
        return
    with Progress(*Progress.get_default_columns(), Speed(), console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
