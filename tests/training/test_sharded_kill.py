"""Sharded processes of which one is killed, at any instant: all start again, and end with the bits of none killed."""

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from toys.killed import both
from toys.processes import environment

from fewstep.training import checkpoints

STEPS = 45
SCRIPT = f"""
import os, sys
from pathlib import Path
import torch
from toys.sharded import train

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
(folder / f"pid-{{rank}}-{{os.getpid()}}").touch()

def tick(run):
    (folder / f"step-{{rank}}").write_text(str(run.step))

train("dit", "ITVM", folder / "run", dtype=torch.float32, shard="fsdp2", steps={STEPS}, checkpoint_every=3,
    callbacks=[tick])
"""


def torchrun(folder: Path, restarts: int) -> "subprocess.Popen[bytes]":
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--monitor-interval", "0.1"]
    command = [sys.executable, *launch, "--max-restarts", str(restarts), str(folder / "train.py"), str(folder)]
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(command, env=environment(), stdout=said, stderr=said)


def check_ended(folder: Path, *processes: BaseProcess) -> None:
    for process in processes:
        process.join(400)
        assert process.exitcode == 0, (folder / "said.txt").read_text()[-4000:]


def wait_for(folder: Path, beyond: int) -> None:
    """Until a step is done that comes after this one."""
    file, end = folder / "step-0", time.monotonic() + 400
    while not file.exists() or int(file.read_text() or 0) <= beyond:
        assert time.monotonic() < end, (folder / "said.txt").read_text()[-4000:]
        time.sleep(0.01)


def check_alike(ours: Path, theirs: Path) -> None:
    first, second = (checkpoints.load(run / f"run/checkpoints/step-{STEPS:08d}").tensors for run in (ours, theirs))
    assert first.keys() == second.keys()
    for group in first:
        assert all(torch.equal(value, second[group][name]) for name, value in first[group].items()), group


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    check_ended(folder, *both(folder, STEPS))
    return folder


def check_killed(whole: Path, folder: Path, times: int) -> None:
    """One of two is killed some time after each of these steps, and the other ends by itself."""
    draw = random.Random(times)
    for place in sorted(draw.sample(range(1, STEPS - 6), times)):
        processes = both(folder, STEPS)
        wait_for(folder, place)
        time.sleep(draw.uniform(0, 0.3))
        victim = draw.choice((0, 1))
        processes[victim].kill()
        processes[1 - victim].join(100)
        assert processes[1 - victim].exitcode == 1
        processes[victim].join()
    check_ended(folder, *both(folder, STEPS))
    check_alike(whole, folder)


@pytest.mark.takes_seconds
def test_one_that_is_killed_costs_nothing_that_was_saved(whole: Path, tmp_path: Path) -> None:
    check_killed(whole, tmp_path / "run", 2)


@pytest.mark.slow
def test_one_that_is_killed_twenty_times(whole: Path, tmp_path: Path) -> None:
    check_killed(whole, tmp_path / "run", 20)


@pytest.mark.slow
def test_torchrun_starts_all_again_by_itself(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = torchrun(folder, 1)
    wait_for(folder, 10)
    _, _, pid = next(folder.glob("pid-1-*")).name.split("-")
    os.kill(int(pid), signal.SIGKILL)
    assert process.wait(400) == 0, (folder / "said.txt").read_text()[-4000:]
    assert len(list(folder.glob("pid-1-*"))) == 2
    check_alike(whole, folder)
