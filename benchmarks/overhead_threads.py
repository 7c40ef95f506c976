"""The part `threads` of overhead.py: steps a second of ``fit`` by how many threads there are and how they wait.

Children train when they are told to. (!) marks what is under 0.7 of the best."""

import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from overhead_common import network_of
from record import here, write

CORES = len(os.sched_getaffinity(0))
# What a child of the part `threads` has in its environment; the first imports torch before fewstep, which leaves it.
WAYS = {
    "torch's default": {"OMP_NUM_THREADS": str(CORES)},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "sleep at once": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
    "fewstep": {},
}
NOTE = (
    "Steps of `fit` (ITVM) a second, and in brackets the share of the best of the row: with torch's default threads "
    "(one a core, which spin), with one, with as many that sleep at once (`OMP_WAIT_POLICY=PASSIVE`), and as fewstep "
    "settles it. Alone (idle), and beside a program that takes one of the cores (busy). Medians of {rounds} rounds."
)
NETWORKS = {"mlp": "checkerboard's MLP", "unet": "Fashion-MNIST's U-Net", "dit": "a DiT"}


def child(way: str) -> None:
    if way == "torch's default":
        import torch  # noqa: F401
    import fewstep

    made = {}
    for line in sys.stdin:
        kind, seconds = line.split()
        student, teacher, data, batch = made.setdefault(kind, network_of(kind))
        stamps: list[float] = []
        threads: list[int] = []

        def note(run: Any, stamps: list[float] = stamps, threads: list[int] = threads) -> None:
            stamps.append(time.perf_counter())
            threads.append(run.threads)

        fewstep.fit(
            student, fewstep.ITVM(teacher), data, max_seconds=float(seconds), batch=batch, chunk=batch, quiet=True,
            callbacks=[note],
        )  # fmt: skip
        steps = [b - a for a, b in pairwise(stamps)] or [float(seconds)]
        print(json.dumps({"rate": 1 / statistics.median(steps), "threads": threads[0]}), flush=True)


def measure_threads(rounds: int, out: Path) -> None:
    """Measures, and writes a results file of its own: a row a network, alone and beside a busy program."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    children = {
        way: subprocess.Popen(
            [sys.executable, __file__, way], env=env | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )
        for way, more in WAYS.items()
    }  # fmt: skip

    def ask(way: str, kind: str, seconds: float) -> dict[str, Any]:
        process: Any = children[way]
        process.stdin.write(f"{kind} {seconds}\n")
        return json.loads(process.stdout.readline())

    rows: list[list[Any]] = []
    for kind in NETWORKS:
        for way in WAYS:
            ask(way, kind, 0.5)  # made, and warm
        for state in ("idle", "busy"):
            rates: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for n in range(rounds):
                for way in list(WAYS)[:: 1 if n % 2 else -1]:
                    busy = [sys.executable, "-S", "-c", "while True: pass"]
                    neighbour = subprocess.Popen(busy) if state == "busy" else None
                    time.sleep(0.3)
                    rates[way].append(ask(way, kind, 1.5 if kind == "mlp" else 4.0))
                    if neighbour is not None:
                        neighbour.kill()
                        neighbour.wait()
            middle = {way: statistics.median(r["rate"] for r in some) for way, some in rates.items()}
            best = max(middle.values())
            cells = [{"rate": rate, "share": rate / best} for rate in middle.values()]
            threads = sorted({r["threads"] for r in rates["fewstep"]})
            rows.append([f"{NETWORKS[kind]}, {state}", *cells, ", ".join(map(str, threads))])
            shown = ", ".join(
                f"{way} {rate:.3g}{' (!)' if rate < 0.7 * best and way == 'fewstep' else ''}"
                for way, rate in middle.items()
            )
            print(f"threads: {kind}, {state}: {shown} steps/s; fewstep took {threads}", flush=True)
    for process in children.values():
        process.kill()
    write(
        out, title="Threads", columns=["network", *WAYS, "its threads"], rows=rows,
        formats=dict.fromkeys(WAYS, "{rate:.3g} ({share:.2f})"), **here(seeds=[0], notes=[NOTE.format(rounds=rounds)]),
    )  # fmt: skip


if __name__ == "__main__":
    child(sys.argv[1])
