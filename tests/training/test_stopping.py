"""How trainings stop and go on: time, signals, numbers that are not finite, other runs in the folder."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from toys.places import ROOT
from toys.training import Broken, Gaussian, Student, lines, train, weights

from fewstep.common.errors import TrainingError
from fewstep.training.schedules import schedule_factor


def test_time_can_end_a_run(tmp_path, monkeypatch):
    """By a clock that ticks once a step."""
    clock = iter(range(10_000))
    monkeypatch.setattr("fewstep.training.fit.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    result = train(tmp_path, steps=None, max_seconds=20.0, lr=0.1)
    assert (result.stopped, result.step, result.seconds) == ("time", 19, 20.0)
    for step, line in enumerate(lines(tmp_path), start=1):
        assert line["lr"] == pytest.approx(0.1 * schedule_factor("cosine", step / 20))
    both = train(steps=5, max_seconds=1000)
    assert (both.stopped, both.step) == ("done", 5)


def test_time_goes_on_where_it_was(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("fewstep.training.fit.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    train(tmp_path, steps=None, max_seconds=20.0)
    longer = train(tmp_path, steps=None, max_seconds=30.0)
    assert (longer.step, longer.seconds) == (28, 30.0)


class Drawn(Gaussian):
    """Data that are made when they are first needed."""

    def __init__(self, first):
        self.first = first

    def rows(self, index, generator):
        first, self.first = self.first, lambda: None
        first()
        return super().rows(index, generator)


def test_what_data_make_first_is_no_time_of_the_training(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("fewstep.training.fit.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    made = train(tmp_path, steps=None, max_seconds=20.0, data=Drawn(lambda: [next(clock) for _ in range(1000)]))
    assert (made.stopped, made.step, made.seconds) == ("time", 19, 20.0)
    assert torch.equal(weights(made), weights(train(steps=None, max_seconds=20.0)))


def test_ctrl_c_while_data_are_made_stops_at_once_and_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=Drawn(lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert torch.equal(weights(train(tmp_path, data=Drawn(lambda: None))), weights(train()))


def test_parts_make_the_bits_of_the_whole(tmp_path):
    whole = train(tmp_path / "whole", steps=20, log_every=4)

    class Death(BaseException):
        pass

    def stop(run):
        raise Death

    for at in (7, 13, 18):
        with pytest.raises(Death):
            train(
                tmp_path / "parts",
                steps=20,
                log_every=4,
                checkpoint_every=5,
                callbacks=[lambda run, at=at: stop(run) if run.step == at else None],
            )
    parts = train(tmp_path / "parts", steps=20, log_every=4, checkpoint_every=5)
    assert torch.equal(weights(whole), weights(parts))
    for name in ("model", "ema", "target", "objective", "optimizer-student"):
        file = f"checkpoints/step-00000020/{name}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), name
    clock = {"steps_per_second", "rows_per_second", "seconds"}
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}


def test_a_finished_run_returns_at_once_and_a_longer_one_goes_on(tmp_path):
    first = train(tmp_path)
    calls = []
    again = train(tmp_path, student=Student(seed=5), callbacks=[lambda run: calls.append(run.step)])
    assert calls == []
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(first.ema.network[0].weight, again.ema.network[0].weight)
    assert again.losses == first.losses
    longer = train(tmp_path, steps=15, callbacks=[lambda run: calls.append(run.step)])
    assert calls == [13, 14, 15]
    assert longer.step == 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_with_a_checkpoint(tmp_path, number):
    def press(run):
        if run.step == 7:
            os.kill(os.getpid(), number)

    heard = []
    own = signal.signal(signal.SIGTERM, lambda *_: heard.append(sorted(p.name for p in tmp_path.rglob("step-*"))))
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        stopped = train(tmp_path, callbacks=[press])
        assert (stopped.stopped, stopped.step) == ("interrupted", 7)
        assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000007"]
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        # SIGTERM comes through, after all is written; Ctrl-C is answered by the stop.
        assert heard == ([["step-00000007"]] if number == signal.SIGTERM else [])
    finally:
        signal.signal(signal.SIGTERM, own)
    assert torch.equal(weights(train(tmp_path)), weights(train()))


SCRIPT = """
import os, signal, sys
import torch, fewstep
from fewstep.networks import MLP

def press(run):
    if run.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)

fewstep.fit(
    fewstep.NetworkField(MLP(2, width=8, depth=2)), fewstep.FlowMatching(), torch.randn(64, 2), steps=9, batch=8,
    out=sys.argv[1], callbacks=[press], device="cpu",
)
print("the script went on")
"""
COMMAND = """
import os, signal, sys
from fewstep.cli import main
from fewstep.training import fit

update = fit.update

def pressing(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return update(*args)

fit.update = pressing
words = "train checkerboard-itvm --objective FlowMatching --steps 9 --evaluation.count 4".split()
few = ["--training.batch", "16", "--training.chunk", "16"]
print("went on with", main([*words, *few, "--out", sys.argv[1]]))
"""


@pytest.mark.takes_seconds
@pytest.mark.parametrize("script", [SCRIPT, COMMAND])
def test_sigterm_ends_the_process_once_the_run_is_whole(tmp_path, script):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGTERM, done.stderr[-2000:]
    assert "went on" not in done.stdout
    assert "stopped as asked" in done.stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def press(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[press])
    assert signal.getsignal(signal.SIGINT) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"step 8: loss/match = nan on rows with s in \[0\.\d+, 0\.\d+\], t in"):
        train(tmp_path, objective=Broken(at=8), checkpoint_every=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))
    with pytest.raises(TrainingError, match="step 8"):
        train(tmp_path, objective=Broken(at=8), checkpoint_every=3)


def test_a_gradient_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainingError, match=r"step 4: grad_norm = (nan|inf) though the loss is finite"):
        train(objective=Broken(at=4, what="gradient"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no fewstep run"):
        train(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.pt").write_text("mine too")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="nothing in it is overwritten"):
        train(tmp_path, resume=False)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_run_of_another_recipe_is_not_continued(tmp_path):
    recipe = {"data": {"name": "checkerboard"}, "objective": {"name": "ITVM", "ema": 0.9}}
    train(tmp_path, fingerprint=recipe)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = {"data": {"name": "two-moons"}, "objective": {"name": "ITVM"}}
    with pytest.raises(ValueError, match="another recipe") as caught:
        train(tmp_path, fingerprint=other, lr=0.5)
    for words in (
        "data.name is checkerboard there and two-moons here",
        "objective.ema is 0.9 there and absent here",
        "training.lr is 0.001 there and 0.5 here",
        "--out",
        "resume=False",
    ):
        assert words in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(tmp_path, fingerprint={**recipe, "training": {"steps": 99, "log_every": 7}}, checkpoint_every=2)
    fresh = train(tmp_path, fingerprint=other, lr=0.5, steps=3, resume=False)
    assert fresh.step == 3
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_an_option_that_a_method_got_later_is_what_it_is_by_default(tmp_path):
    """A run from before AlphaFlow had a schedule goes on, with the one that it had."""
    before = {"objective": {"name": "AlphaFlow", "sharpness": 25.0}}
    train(tmp_path, fingerprint=before)
    with pytest.raises(ValueError, match=r"objective\.schedule is sigmoid there and exponential here"):
        train(tmp_path, fingerprint={"objective": {**before["objective"], "schedule": "exponential"}})
    today = {"objective": {**before["objective"], "schedule": "sigmoid", "last": 3e-4}}
    assert train(tmp_path, fingerprint=today, steps=14).step == 14
    with pytest.raises(ValueError, match=r"objective\.name is AlphaFlow there and MeanFlow here"):
        train(tmp_path, fingerprint={"objective": {"name": "MeanFlow", "sharpness": 25.0}})
