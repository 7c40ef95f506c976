"""What fewstep costs beside the work it is for: ratios, all in one run, medians of interleaved rounds.

    python benchmarks/overhead.py                        # all parts, some 15 minutes on two cores
    python benchmarks/overhead.py --parts threads fit --rounds 7 --out overhead.json

* threads: steps a second of ``fit`` with torch's default threads, with one, with threads that sleep at once, and as
  fewstep settles it; alone, and beside a program that takes one core.
* fit: a training of the checkerboard over a loop by hand with the same bits, for one chunk and for chunks of 64.
* loss: ITVM's loss over the same by hand, with networks that take no time.
* draw: one sample in one step over a bare call of a DiT of 4 million parameters, and what a step more takes by itself.
* start: CPU seconds of commands, and of importing torch alone.
* evaluation: the exact field of the checkerboard over the same with both of its forms at every row.
* derivative: MeanFlow and LMD with the derivative forward and by differences: time over flow matching, and how far the
  derivative is from that in float64.

CPU time on one thread, except for threads (the clock). Writes a results file (record.py), and threads.json beside it.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from overhead_calls import measure_derivative, measure_draw, measure_evaluation, measure_start
from overhead_common import Found
from overhead_threads import measure_threads
from overhead_training import measure_fit, measure_loss
from record import here, write

MEASURES: dict[str, Callable[[int], Found]] = {
    "start": measure_start, "fit": measure_fit, "loss": measure_loss, "draw": measure_draw,
    "evaluation": measure_evaluation, "derivative": measure_derivative,
}  # fmt: skip
PARTS = ("threads", *MEASURES)


def quantities(found: dict[str, Any], group: str = "") -> Iterator[tuple[str, float | str]]:
    """The numbers of a case, each with its name and that of the group that it is in."""
    for name, value in found.items():
        label = f"{group}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from quantities(value, f"{label}: ")
        else:
            yield label, value


def main() -> None:
    parser = argparse.ArgumentParser(description="What fewstep costs beside the work it is for.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    arguments = parser.parse_args()
    if "threads" in arguments.parts:  # before torch is imported here
        measure_threads(arguments.rounds, arguments.out.with_name("threads.json"))
    parts = [part for part in MEASURES if part in arguments.parts]
    if not parts:
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [
        [part, case, *pair]
        for part in parts
        for case, found in MEASURES[part](arguments.rounds).items()
        for pair in quantities(found)
    ]
    note = f"Medians of {arguments.rounds} interleaved rounds; CPU time on one thread. Ratios where no unit is said."
    write(
        arguments.out, title="What fewstep costs beside the work it is for", formats={"value": "{:.4g}"},
        columns=["part", "case", "quantity", "value"], rows=rows, **here(seeds=[0], notes=[note]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
