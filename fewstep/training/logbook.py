"""What a run says while it trains: the lines of ``metrics.jsonl``, the trackers, the progress bar."""

import time
from collections.abc import Sequence
from typing import Self

from fewstep.common.console import duration
from fewstep.training import trackers
from fewstep.training.progress import Progress
from fewstep.training.run import Run
from fewstep.training.run_files import METRICS


class Logbook:
    """The trackers and the progress bar of a run; a context manager that closes them.

    Args:
        run: as it starts or goes on.
        steps: the last step, None where time ends the run.
        track: trackers beside ``metrics.jsonl``, which is written wherever there is a run folder.
        is_main: whether this process writes and shows anything.
        quiet: no bar and no lines.
    """

    def __init__(self, run: Run, steps: int | None, track: Sequence[str], is_main: bool, quiet: bool) -> None:
        self._lines = trackers.JsonLines(run.out / METRICS, run.step) if is_main and run.out else None
        self._trackers: list[trackers.Tracker] = [self._lines] if self._lines else []
        if is_main:
            self._trackers += trackers.start(track, run.out, run.step, run.fingerprint)
        self._bar = Progress(steps, run.step, run.progress, quiet or not is_main)
        self._mark = (run.step, time.perf_counter())
        if run.step:
            self._bar.note(f"going on from step {run.step}")

    def speed(self, run: Run) -> float:
        """Steps per second since the last call."""
        (step, then), self._mark = self._mark, (run.step, time.perf_counter())
        return (run.step - step) / (self._mark[1] - then)

    def write(self, run: Run, done: float) -> None:
        """After a step: what was logged in it, as one line; and the bar, with the share of the training that is done
        now (``run.progress`` is what the step was made with)."""
        if run.record:
            for tracker in self._trackers:
                tracker.log(run.step, run.record)
            run.record = {}
        self._bar.update(run.step, done, run.losses.get("loss"))

    def sync(self) -> None:
        """All lines down to the disk: a checkpoint is about to stand for them."""
        if self._lines is not None:
            self._lines.sync()

    def end(self, run: Run, stopped: str) -> None:
        """The last words."""
        what = {"done": "done", "time": "time is up", "interrupted": "stopped as asked"}[stopped]
        again = "; the same command goes on from here" if stopped == "interrupted" and run.out else ""
        self._bar.note(f"{what}: step {run.step} after {duration(run.seconds)}{again}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
