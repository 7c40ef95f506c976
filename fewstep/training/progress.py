"""How a run shows that it goes on: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from fewstep.common.console import Pace, duration, is_line_due

_REDRAW = 0.2  # seconds between two drawings of the bar


class Progress:
    """The bar or the lines of one run.

    Args:
        steps: the last step, None where time ends the run.
        step, fraction: how much was done before (a resumed run); the fraction in [0, 1].
        quiet: show nothing.
    """

    def __init__(self, steps: int | None, step: int = 0, fraction: float = 0.0, quiet: bool = False) -> None:
        self._total = f"/{steps}" if steps else ""
        self._start = self._shown_at = time.perf_counter()
        self._pace, self._shown = Pace(self._start, step, fraction), fraction
        self._quiet = quiet
        self._bar: Bar | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.description}"),
            )
            # No thread of its own: drawing happens between steps, never in the middle of one.
            self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()

    def update(self, step: int, fraction: float, loss: float | None) -> None:
        """After a step: ``loss`` is the last one logged."""
        now = time.perf_counter()
        if self._quiet or now - self._shown_at < _REDRAW:
            return
        speed, left = self._pace(now, step, fraction)
        shown = "" if loss is None else f"  loss {loss:.4g}"
        text = f"step {step}{self._total}{shown}  {speed:.3g} steps/s  {duration(left)} left"
        if self._bar is not None:
            self._shown_at = now
            self._bar.update(self._task, completed=fraction, description=text, refresh=True)
        elif fraction - self._shown >= 0.1 or is_line_due(now - self._shown_at, now - self._start, left):
            self._shown_at, self._shown = now, fraction
            self.note(f"{fraction:4.0%}  {text}")

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
