"""How many threads of the CPU torch computes with, and how they wait for each other.

By default torch takes a thread for each core, and a thread that is done with its part spins for milliseconds until the
others are. That is fastest on a machine that nobody else uses; beside one other busy program it can be 40 times slower
than one thread, as the spinning threads take the time of the one that is waited for. So here threads spin for some ten
microseconds at most, then sleep, and a training takes only as many as it gains by.

``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``, ``OMP_WAIT_POLICY`` and their like are the user's: where they are set, they
hold. Nothing heavy is imported here, as the wait is settled before torch is.
"""

import os
import sys
import time
from collections.abc import Callable

_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Turns of the spin of GNU's OpenMP, which torch's wheels for Linux have: about what it takes to fall asleep and be
# woken. What it comes to is measured by `python benchmarks/overhead.py --parts threads`.
_SPIN = "1000"
# What twice the threads must gain to be taken, and how long is measured at most.
GAIN, _SECONDS = 1.25, 1.0

_spins = False


def wait_asleep() -> None:
    """Have OpenMP's threads sleep where they wait. It reads this once, as torch is imported: too late after that."""
    global _spins
    if any(name in os.environ for name in _WAITS):
        return
    if "torch" in sys.modules:
        _spins = True
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # of every OpenMP
    os.environ["GOMP_SPINCOUNT"] = _SPIN


def most() -> int:
    """The most threads that a training may take: torch's number, and one core left alone where threads spin."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), max(1, cores - 1)) if _spins else torch.get_num_threads()


def is_settled() -> bool:
    """Whether the user has said how many threads there are."""
    return any(name in os.environ for name in _NUMBERS)


def fastest(work: Callable[[], object]) -> int:
    """The number of threads to do ``work`` with, as often as comes: the fewest of which twice as many gain little.

    Measured by the CPU time of the calling thread. It has its share of the work and waits for the others; but time in
    which another program has its core does not count, so that a machine that is busy at this moment chooses as one that
    is not. torch is left with the number it has.
    """
    import torch

    before = torch.get_num_threads()
    try:
        best = count = most()
        least = _cost(work, count)
        while count > 1:
            count = max(1, count // 2)
            if (cost := _cost(work, count)) > GAIN * least:
                break
            best, least = count, min(cost, least)
        return best
    finally:
        torch.set_num_threads(before)


def _cost(work: Callable[[], object], count: int) -> float:
    """Seconds of the calling thread for one time with so many threads: the least of a few, after one to warm up."""
    import torch

    torch.set_num_threads(count)
    work()
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < _SECONDS):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)
