"""What several processes gain, what shards cost, and what encoding costs beside its VAE: ratios, on the CPU.

    python benchmarks/processes.py FOLDER --parts train    # a part at a time is kept in FOLDER; minutes each
    python benchmarks/processes.py FOLDER --parts          # the table, of what FOLDER has

* train: rows a second of two processes over twice those of one, of ``fit`` (DDP) and of loops of plain torch: two that
  know nothing of each other, which is what the cores allow, and two that share gradients by torch's DDP.
* rows: the same of ``fit`` with four times the rows in an update.
* shard: the time of a step with ``shard="fsdp2"`` over that with DDP, of two processes.
* encode: the time of ``fewstep.encode`` over that of a loop over the VAE alone, and over one that reads the images too.
* sample: the time of ``fewstep sample`` by one process over twice that of two.
* memory: bytes of all tensors of a process over those planned, of a twin of Flux on 1, 2 and 4.

The clock, without what Python imports; processes of one thread each, which are started once and do all of it. A ratio
is of two neighbours in a round. Twins are DiTs of 64 tokens (processes_work.py); the rows are those of an update.
Where other programs run beside, give it the cores: ``chrt -r 20 python ...``, and say so by --note.

Writes benchmarks/results/processes.json (or --out).
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from record import FOLDER, here, write

WORK = Path(__file__).with_name("processes_work.py")
TWINS = {"small": "1.4 M, 32 rows", "larger": "8.0 M, 16 rows"}
STEPS = {"small": 8, "larger": 6}


class Team:
    """Processes that were started together, and do each task together."""

    def __init__(self, size: int) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": str(size)}
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | alone
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORK)], env=env | ({**place, "RANK": str(rank)} if size > 1 else {}), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
            )
            for rank in range(size)
        ]  # fmt: skip

    def begin(self, do: str, **task: Any) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, **task}) + "\n")

    def end(self) -> list[dict[str, Any]]:
        return [json.loads(process.stdout.readline()) for process in self.processes if process.stdout is not None]

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        """What the first process found."""
        self.begin(do, **task)
        return self.end()[0]

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()


@contextmanager
def teams(*sizes: int) -> Iterator[list[Team]]:
    with ExitStack() as stack:
        found = [Team(size) for size in sizes]
        for team in found:
            stack.callback(team.close)
        yield found


Ratios = dict[str, list[float]]
Keep = Callable[[Ratios], object]  # what is known after each round


def in_turn(n: int, *work: Callable[[], float]) -> list[float]:
    """What each gives; every second round begins with the last."""
    found = {i: work[i]() for i in (range(len(work)) if n % 2 else reversed(range(len(work))))}
    return [found[i] for i in range(len(work))]


def measure_train(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    with teams(1, 1, 2) as (one, other, two):

        def apart(**task: Any) -> float:
            for team in (one, other):
                team.begin("plain", share=2, **task)
            return sum(team.end()[0]["rows"] for team in (one, other))

        for n in range(rounds):
            for twin, size in TWINS.items():
                how = {"twin": twin, "steps": STEPS[twin]}
                for name in ("ITVM", "FlowMatching"):
                    both, alone = in_turn(
                        n,
                        lambda how=how, name=name: two.ask("fit", method=name, **how)["rows"],
                        lambda how=how, name=name: one.ask("fit", method=name, **how)["rows"],
                    )
                    found.setdefault(f"fit, {name}: {size}", []).append(both / (2 * alone))
                ddp, alone, independent = in_turn(
                    n,
                    lambda how=how: two.ask("plain", share=2, together=True, **how)["rows"],
                    lambda how=how: one.ask("plain", **how)["rows"],
                    lambda how=how: apart(**how),
                )
                found.setdefault(f"plain torch, DDP: {size}", []).append(2 * ddp / (2 * alone))
                found.setdefault(f"plain torch, two apart: {size}", []).append(independent / (2 * alone))
            keep(found)
    return found


def measure_rows(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    with teams(1, 2) as (one, two):
        for n in range(rounds):
            how = {"twin": "larger", "method": "ITVM", "steps": 4, "rows": 64}
            both, alone = in_turn(
                n,
                lambda how=how: two.ask("fit", **how)["rows"],
                lambda how=how: one.ask("fit", **how)["rows"],
            )
            found.setdefault("fit, ITVM: 8.0 M, 64 rows", []).append(both / (2 * alone))
            keep(found)
    return found


def measure_shard(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    with teams(2) as (two,):
        for n in range(rounds):
            for twin, size in TWINS.items():
                how = {"twin": twin, "steps": STEPS[twin], "method": "ITVM"}
                shards, whole = in_turn(
                    n,
                    lambda how=how: two.ask("fit", shard="fsdp2", **how)["rows"],
                    lambda how=how: two.ask("fit", **how)["rows"],
                )
                found.setdefault(f"fsdp2 over DDP: {size}", []).append(whole / shards)
            keep(found)
    return found


def measure_encode(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    with teams(1) as (one,), tempfile.TemporaryDirectory() as folder:
        one.ask("pipeline", folder=folder)
        for n in range(-1, rounds):
            ours, bare, reading = in_turn(
                n,
                lambda n=n: one.ask("encode", folder=folder, out=f"{folder}/{n}", batch=16)["seconds"],
                lambda: one.ask("encode_bare", folder=folder, batch=16, is_read=False)["seconds"],
                lambda: one.ask("encode_bare", folder=folder, batch=16, is_read=True)["seconds"],
            )
            if n >= 0:
                found.setdefault("over the VAE alone, pixels in memory", []).append(ours / bare)
                found.setdefault("over a loop that reads the images too", []).append(ours / reading)
    return found


def measure_sample(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    with teams(1, 2) as (one, two), tempfile.TemporaryDirectory() as folder:
        for n in range(-1, rounds):
            count = 192 if n >= 0 else 4
            both, alone = in_turn(
                n,
                lambda count=count: two.ask("sample", out=f"{folder}/two.npy", count=count)["seconds"],
                lambda count=count: one.ask("sample", out=f"{folder}/one.npy", count=count)["seconds"],
            )
            if n >= 0:
                print(f"sample: {alone:.2f} s by one process, {both:.2f} s by two", flush=True)
                found.setdefault("fewstep sample, two processes", []).append(alone / (2 * both))
                keep(found)
    return found


def measure_memory(rounds: int, keep: Keep) -> Ratios:
    found: Ratios = {}
    for size in (1, 2, 4):
        with teams(size) as (team,):
            team.begin("kept")
            found[f"kept over planned, {size} process{'es' * (size > 1)}"] = [
                each["kept"] / each["planned"] for each in team.end()
            ]
    return found


MEASURES = {
    "train": measure_train, "rows": measure_rows, "shard": measure_shard, "encode": measure_encode,
    "sample": measure_sample, "memory": measure_memory,
}  # fmt: skip


def table(folder: Path, out: Path, more: str | None) -> None:
    rows, commands = [], []
    for part in MEASURES:
        file = folder / f"{part}.json"
        measured: Ratios = json.loads(file.read_text()) if file.is_file() else {}
        if measured:
            rounds = max(map(len, measured.values())) if part != "memory" else 1
            commands.append(f"python benchmarks/processes.py {folder} --parts {part} --rounds {rounds}")
        for case, ratios in measured.items():
            cell = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            rows.append([part, case, {name: round(value, 3) for name, value in cell.items()}, len(ratios)])
    note = (
        "Ratios of neighbours in a round: their median, and the lowest and highest. The clock; processes of one "
        "thread. Of memory, each process is a value."
    )
    facts = here(seeds=[0], notes=[note, *([more] if more else [])])
    write(
        out, title="Several processes, shards and encoding: ratios", group="part",
        formats={"ratio": "{median} ({low} to {high})"}, columns=["part", "case", "ratio", "of"], rows=rows,
        **{**facts, "commands": [*commands, *facts["commands"]]},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Several processes, shards and encoding: ratios on the CPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", help="a sentence on how the parts were measured")
    parser.add_argument("--out", type=Path, default=FOLDER / "processes.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        keep: Keep = lambda found, part=part: (args.folder / f"{part}.json").write_text(json.dumps(found))  # noqa: E731
        found = MEASURES[part](args.rounds, keep)
        keep(found)
        for case, ratios in found.items():
            print(f"{part}: {case}: {' '.join(f'{ratio:.3f}' for ratio in ratios)}", flush=True)
    if not args.parts:
        table(args.folder, args.out, args.note)


if __name__ == "__main__":
    main()
