"""A real process, killed at random moments and in the middle of a checkpoint: the bits of one never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from toys.places import ROOT, TESTS

STEPS = 400

# Arguments: steps, folder, and which call of which function is to wait for its killer, in the middle of a checkpoint.
SCRIPT = """
import os, sys, time
from pathlib import Path
from toys.training import Matching, Rows, Student
from fewstep.training import checkpoints
from fewstep.training.fit import fit

steps, out, kind, call = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def waiting(function):
    count = 0
    def wrapped(*args, **options):
        nonlocal count
        # Of renames, those of a whole checkpoint count: records of the run are renamed too.
        count += kind != "replace" or Path(args[0]).name.startswith(".tmp-")
        if count == call:
            if kind == "save_file":
                Path(args[1]).write_bytes(b"half a file")
            if kind == "rmtree":
                next(Path(args[0]).iterdir()).unlink()
            print("inside", flush=True)
            time.sleep(60)
        return function(*args, **options)
    return wrapped

if kind == "save_file":
    checkpoints.save_file = waiting(checkpoints.save_file)
if kind == "replace":
    checkpoints.os.replace = waiting(os.replace)
if kind == "rmtree":
    checkpoints.shutil.rmtree = waiting(checkpoints.shutil.rmtree)

def tick(run):
    if run.step % 10 == 0:
        print("step", run.step, flush=True)

fit(Student(), Matching(), Rows(1000), steps=steps, batch=32, chunk=8, seed=3, out=out, checkpoint_every=25,
    log_every=10, warmup=20, callbacks=[tick], quiet=True)
print("finished", flush=True)
"""


def start(script, out, kind="none", call=0):
    paths = [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script), str(STEPS), str(out), kind, str(call)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def kill_when(process, says, delay=0.0):
    for line in process.stdout:
        if line.strip() == says:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.takes_seconds
def test_killed_at_any_instant_it_ends_with_the_same_bits(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert start(script, tmp_path / "whole").communicate()[0].endswith("finished\n")

    out, draw = tmp_path / "killed", random.Random(0)
    folder = out / "checkpoints"
    # While it trains, at a random moment after a step that it has just reached.
    for reached in (20, 80, 160):
        assert kill_when(start(script, out), f"step {reached}", draw.uniform(0, 0.03)) == -signal.SIGKILL
    # In a checkpoint: half a file is written; all files are, but not renamed; the old one is half removed.
    # (The first removal is that of what the kill before left.)
    for kind, call, left in (("save_file", 3, ".tmp-"), ("replace", 1, ".tmp-"), ("rmtree", 2, ".old-")):
        before = max(p.name for p in folder.glob("step-*"))
        assert kill_when(start(script, out, kind, call), "inside") == -signal.SIGKILL
        aside = next(p for p in folder.iterdir() if p.name.startswith(left))
        assert len(list(aside.iterdir())) == {"save_file": 3, "replace": 6, "rmtree": 5}[kind]
        assert max(p.name for p in folder.glob("step-*")) >= before

    assert start(script, out).communicate()[0].endswith("finished\n")
    final = f"step-{STEPS:08d}"
    for name in ("model", "ema", "target", "objective", "optimizer-student"):
        files = [tmp_path / run / "checkpoints" / final / f"{name}.safetensors" for run in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    records = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("whole", "killed")]
    assert [r["step"] for r in records[1]] == list(range(10, STEPS + 1, 10))
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    assert sorted(p.name for p in folder.iterdir()) == ["reached", f"step-{STEPS - 25:08d}", final]


@pytest.mark.takes_seconds
def test_ctrl_c_leaves_a_checkpoint_and_ends_well(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = start(script, tmp_path / "run")
    for line in process.stdout:
        if line.strip() == "step 30":
            process.send_signal(signal.SIGINT)
            break
    assert process.stdout.read().endswith("finished\n")
    assert process.wait() == 0
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert 30 <= steps[-1] < STEPS
