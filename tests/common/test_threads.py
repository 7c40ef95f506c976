"""Threads: how they wait is settled before torch is there, how many a training takes by what it gains by them."""

import os
import subprocess
import sys
import time

import pytest
import torch
from toys.places import ROOT
from toys.training import Gaussian, Matching, Student

from fewstep.common import threads
from fewstep.training import checkpoints
from fewstep.training.fit import fit

SAYS = (
    "; import os; from fewstep.common import threads; "
    "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'), threads.most())"
)


def says(code: str, **given: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    env |= {"PYTHONPATH": str(ROOT), **given}
    done = subprocess.run([sys.executable, "-c", code + SAYS], capture_output=True, text=True, env=env, check=True)
    return done.stdout.split()


@pytest.mark.takes_seconds
def test_threads_sleep_where_they_wait_unless_the_user_or_torch_was_first():
    cores = len(os.sched_getaffinity(0))
    assert says("import fewstep")[:2] == ["PASSIVE", threads._SPIN]
    assert says("import fewstep", OMP_WAIT_POLICY="ACTIVE")[:2] == ["ACTIVE", "None"]
    assert says("import fewstep", GOMP_SPINCOUNT="7")[:2] == ["None", "7"]
    assert says("import fewstep", OMP_NUM_THREADS="1") == ["PASSIVE", threads._SPIN, "1"]
    # Too late: they spin, and one core is left to whoever else is there.
    assert says("import torch, fewstep") == ["None", "None", str(max(1, cores - 1))]


def spend(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.takes_seconds
def test_as_many_threads_as_it_gains_by(monkeypatch):
    monkeypatch.setattr(threads, "most", lambda: 8)
    before = torch.get_num_threads()
    assert threads.fastest(lambda: spend(0.02 / torch.get_num_threads())) == 8
    assert threads.fastest(lambda: spend(0.005)) == 1
    assert threads.fastest(lambda: spend(0.005 + 0.02 * max(0, 2 - torch.get_num_threads()))) == 2
    assert threads.fastest(lambda: spend(0.002 * torch.get_num_threads())) == 1
    # Others have the cores at this moment: time passes, and it is nobody's work.
    waits = lambda: time.sleep(0.004 * torch.get_num_threads()) or spend(0.02 / torch.get_num_threads())  # noqa: E731
    assert threads.fastest(waits) == 8
    assert torch.get_num_threads() == before


def train(out=None, steps=3, student=None):
    student, objective = student or Student(), Matching()
    fit(student, objective, Gaussian(), steps, out=out, batch=16, quiet=True, callbacks=[lambda run: seen.append(run)])
    return student, objective


seen: list = []


@pytest.fixture
def unsettled(monkeypatch):
    for name in threads._NUMBERS:
        monkeypatch.delenv(name, raising=False)
    seen.clear()


def test_a_run_goes_on_with_the_threads_it_had(monkeypatch, tmp_path, unsettled):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(threads, "fastest", lambda work: 5)
    train(tmp_path)
    assert numbers == [5, torch.get_num_threads()]  # and puts back what torch had
    assert checkpoints.read_state(tmp_path / "checkpoints" / "step-00000003")["threads"] == 5
    monkeypatch.setattr(threads, "fastest", lambda work: 1 / 0)
    train(tmp_path, steps=6)
    assert seen[-1].threads == 5
    # The user's number holds, from the first step and later.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train(tmp_path, steps=9)
    assert seen[-1].threads == torch.get_num_threads()


def test_a_run_killed_before_its_first_checkpoint_begins_with_the_threads_it_had(monkeypatch, tmp_path, unsettled):
    def killed(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(threads, "fastest", lambda work: 5)
    with pytest.raises(KeyboardInterrupt):
        fit(Student(), Matching(), Gaussian(), 3, out=tmp_path, batch=16, quiet=True, callbacks=[killed])
    assert not checkpoints.steps_in(tmp_path / "checkpoints")
    monkeypatch.setattr(threads, "fastest", lambda work: 1 / 0)
    train(tmp_path)
    assert seen[-1].threads == 5


def test_measuring_changes_nothing(monkeypatch, unsettled):
    plain, plain_objective = train()
    calls = []
    monkeypatch.setattr(threads, "fastest", lambda work: calls.append([work() for _ in range(3)]) or 1)
    measured, objective = train()
    assert len(calls) == 1
    for one, other in ((plain, measured), (plain_objective, objective)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
