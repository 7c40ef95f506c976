"""How a run shows that it goes on: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

_REDRAW = 0.2  # seconds between two drawings of the bar
_LINE = 10.0  # seconds between two lines, more on long runs


class Progress:
    """The bar or the lines of one run.

    Args:
        steps: the last step, None where time ends the run.
        fraction: how much was done before (a resumed run), in [0, 1].
        quiet: show nothing.
    """

    def __init__(self, steps: int | None, fraction: float = 0.0, quiet: bool = False) -> None:
        self._total = f"/{steps}" if steps else ""
        self._start = self._shown_at = time.perf_counter()
        self._first = self._shown = fraction
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

    def update(self, step: int, fraction: float, loss: float | None, rate: float) -> None:
        """After a step: ``loss`` is the last one logged, ``rate`` in steps per second."""
        now = time.perf_counter()
        if self._quiet or now - self._shown_at < _REDRAW:
            return
        elapsed, done = now - self._start, fraction - self._first
        left = elapsed * (1.0 - fraction) / done if done > 0 else 0.0
        shown = "" if loss is None else f"  loss {loss:.4g}"
        text = f"step {step}{self._total}{shown}  {rate:.3g} steps/s  {duration(left)} left"
        if self._bar is not None:
            self._shown_at = now
            self._bar.update(self._task, completed=fraction, description=text, refresh=True)
        elif fraction - self._shown >= 0.1 or now - self._shown_at >= max(_LINE, (elapsed + left) / 100):
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


def duration(seconds: float) -> str:
    """``3s``, ``2m 05s``, ``1h 20m``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
