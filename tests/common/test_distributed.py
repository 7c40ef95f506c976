"""Several processes train as one does: the same rows, noise, losses and weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys.places import ROOT, TESTS
from toys.processes import torchrun
from toys.training import PLAYERS, Matching, Rows, Student, players

from fewstep.common import distributed
from fewstep.common.distributed import World, choose_device, environment
from fewstep.training.fit import fit

# Four trainings one after another in the same processes.
SCRIPT = """
import atexit, os, signal, sys
from pathlib import Path
import torch
from toys.training import PLAYERS, Matching, Rows, Student, players
from fewstep.training.fit import fit

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def threads_left():
    tasks = Path("/proc/self/task").glob("*/comm")
    (folder / f"threads-{rank}").write_text("".join(sorted(task.read_text() for task in tasks)))

atexit.register(threads_left)  # called after the group is left, since it is registered before

def train(name, **options):
    options = {"steps": 12, "batch": 32, "chunk": 4, "seed": 5, "log_every": 3, "quiet": True, **options}
    # Each process begins with weights of its own: the main one's are those that train.
    student = Student(dropout=0.0, seed=rank)
    student.unused = torch.nn.Linear(2, 2)
    return fit(student, Matching(), Rows(1000), out=folder / name, **options)

def stop(run):  # in the main process alone
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: None)  # or it would end the process, once all is written
train("joined")
stopped = train("resumed", accumulate=2, callbacks=[stop])
assert (stopped.stopped, stopped.step) == ("interrupted", 5), stopped
result = train("resumed", accumulate=2)
weights = torch.cat([p.detach().flatten() for p in result.student.network.parameters()])
(folder / f"weights-{rank}").write_bytes(weights.numpy().tobytes())
try:
    train("odd", batch=24, chunk=8)
except ValueError as error:
    (folder / f"error-{rank}").write_text(str(error))
# Two players, of which the student moves in each second step alone.
fit(*players(rank), out=folder / "players", **PLAYERS)
# Last, since it ends the trainings: a folder that the processes do not share.
try:
    train("resumed" if rank == 0 else "alone")
except ValueError as error:
    (folder / f"apart-{rank}").write_text(str(error))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "train.py").write_text(SCRIPT)
    done = torchrun(folder / "train.py", folder)
    # Where a step uses all parameters, torch says so from C++, once a process.
    assert done.stderr.count("find_unused_parameters=True") <= 2
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    options = {"steps": 12, "batch": 32, "chunk": 4, "seed": 5, "log_every": 3, "quiet": True, "device": "cpu"}
    fit(Student(dropout=0.0, seed=0), Matching(), Rows(1000), out=out, **options)
    return out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["joined", "resumed"])
def test_two_processes_have_the_losses_and_weights_of_one(one, two, name):
    """The second was stopped by a signal to one process, and accumulates."""
    alone, together = lines(one), lines(two / name)
    assert [line["step"] for line in together] == [3, 6, 9, 12]
    for a, b in zip(alone, together, strict=True):
        for key in ("loss", "loss/match", "loss/slow", "grad_norm", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-6, abs=1e-6), key
    final = "checkpoints/step-00000012"
    for file in ("model.safetensors", "ema.safetensors", "target.safetensors"):
        expected, found = load_file(one / final / file), load_file(two / name / final / file)
        for key in [key for key in expected if key.startswith("network")]:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.takes_seconds
def test_two_processes_move_both_players_as_one_does(two, tmp_path):
    fit(*players(), out=tmp_path, **PLAYERS)
    for a, b in zip(lines(tmp_path), lines(two / "players"), strict=True):
        assert b.keys() == a.keys()
        for key in (key for key in a if key.startswith(("loss", "grad_norm"))):
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), key
    assert "loss/fake" in a
    final = "checkpoints/step-00000008"
    for file in ("model.safetensors", "ema.safetensors", "objective.safetensors"):
        expected, found = load_file(tmp_path / final / file), load_file(two / "players" / final / file)
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_all_processes_end_with_the_same_weights(two):
    assert (two / "weights-0").read_bytes() == (two / "weights-1").read_bytes()


def test_a_batch_that_cannot_be_shared_is_refused_by_all(two):
    errors = [(two / f"error-{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "batch=24 cannot be shared equally by 2 process(es)" in errors[0]
    assert "multiple of 16" in errors[0]


def test_a_folder_that_is_not_shared_is_noticed(two):
    for rank, step in ((0, 12), (1, 0)):
        assert f"different checkpoints in {two}" in (two / f"apart-{rank}").read_text()
        assert f"process {rank}: step {step}" in (two / f"apart-{rank}").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are told by Linux")
def test_no_thread_of_the_group_outlives_it(two: Path) -> None:
    """One that lets go of a tensor while Python ends aborts a process whose training went well."""
    for rank in (0, 1):
        threads = (two / f"threads-{rank}").read_text()
        assert "python" in threads
        assert "gloo" not in threads


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(ValueError, match=f"the device '{name}' cannot be used: there is cpu"):
        choose_device(name, World())
    assert choose_device("cpu", World()) == torch.device("cpu")


def test_where_the_launcher_put_us(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == World(0, 1, 0)
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    assert environment() == World(0, 1, 0)  # inside a job, but started by hand
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert environment() == World(5, 8, 1)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert environment() == World(2, 4, 0)
    assert not environment().is_main


# A process that trains without end, until it is killed or alone.
ENDLESS = """
import sys
import torch
from toys.training import Matching, Rows, Student
from fewstep.common.errors import TrainingError
from fewstep.training.fit import fit

def tick(run):
    if run.step == 5:
        print("going", flush=True)

student = Student(dropout=0.0)
student.unused = torch.nn.Linear(2, 2)  # else torch says that there is none
try:
    fit(student, Matching(), Rows(100), steps=10**6, batch=8, chunk=4, quiet=True, callbacks=[tick])
except TrainingError as error:
    sys.exit(f"error: {error}")
"""


def by_hand(rank, port, patience):
    paths = [str(TESTS), str(ROOT)]
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, **world, "FEWSTEP_PATIENCE": str(patience), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(paths)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", ENDLESS], env=env, **pipes)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.takes_seconds
def test_a_process_whose_others_never_come_says_so():
    ports = [free_port() for _ in range(2)]
    alone = [by_hand(rank, port, 1) for rank, port in enumerate(ports)]
    for rank, process in enumerate(alone):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert len(said.splitlines()) == 1, said
        assert said.startswith(f"error: process {rank} of 2: not all came to 127.0.0.1:{ports[rank]} within 1 seconds")
        assert "unset RANK and WORLD_SIZE; FEWSTEP_PATIENCE=SECONDS waits longer" in said
        assert len(said) < 400


@pytest.mark.takes_seconds
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_can_be_stopped(number):
    port = free_port()
    process = by_hand(0, port, 100)
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == -number, said[-2000:]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_of_a_process_that_is_killed_says_one_line(victim):
    port = free_port()
    both = [by_hand(rank, port, 100) for rank in (0, 1)]
    assert both[0].stdout.readline() == "going\n"
    both[victim].kill()
    said = both[1 - victim].communicate(timeout=120)[1]
    both[victim].communicate()
    assert both[1 - victim].returncode == 1
    assert len(said.splitlines()) == 1, said
    assert said.startswith(f"error: process {1 - victim} of 2: another process of this run has ended, or cannot be")
    assert "Start all of them again, by the same command" in said
    assert len(said) < 400


@pytest.mark.parametrize("said", ["ten", "0", "-1", "nan", "1e300"])
def test_how_long_others_are_waited_for_is_a_number_of_seconds(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PATIENCE", said)
    with pytest.raises(ValueError, match=f"FEWSTEP_PATIENCE is '{said}'"):
        distributed._longest_wait()
    monkeypatch.setenv("FEWSTEP_PATIENCE", "2.5")
    assert distributed._longest_wait().total_seconds() == 2.5


def test_numbers_are_summed_over_processes_but_not_where_one_is_alone(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values: values.mul_(3))
    numbers = torch.tensor([1.0, 2.0])
    assert distributed.summed(numbers).tolist() == [3.0, 6.0]
    assert numbers.tolist() == [1.0, 2.0]
    with distributed.alone():
        assert distributed.summed(numbers).tolist() == [1.0, 2.0]
    assert distributed.summed(numbers).tolist() == [3.0, 6.0]
