"""What is seen of a training: metrics, trackers, progress."""

import math
import sys

import pytest
from toys.training import lines, train

from fewstep.common.console import Pace, duration, progress_bar
from fewstep.training import trackers
from fewstep.training.progress import Progress


def test_lines_hold_the_means_of_every_step(tmp_path):
    train(tmp_path / "each", steps=10)
    train(tmp_path / "some", steps=10, log_every=4, warmup=5, lr=0.1)
    each, some = lines(tmp_path / "each"), lines(tmp_path / "some")
    assert [line["step"] for line in each] == list(range(1, 11))
    assert [line["step"] for line in some] == [4, 8, 10]
    assert set(each[0]) == {
        *("step", "loss", "loss/match", "loss/slow", "grad_norm"),
        *("lr", "steps_per_second", "rows_per_second", "seconds"),
    }
    assert some[0]["lr"] == pytest.approx(0.1 * 0.8 * 0.5 * (1 + math.cos(math.pi * 0.3)))
    constant = {"steps": 8, "lr": 1e-9}
    train(tmp_path / "one", **constant)
    train(tmp_path / "four", log_every=4, **constant)
    ones = [line["loss"] for line in lines(tmp_path / "one")]
    assert [line["loss"] for line in lines(tmp_path / "four")] == pytest.approx([sum(ones[:4]) / 4, sum(ones[4:]) / 4])


def test_metrics_are_cut_to_the_step_gone_on_from(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "a":')
    book = trackers.JsonLines(file, 2)
    book.log(3, {"b": 0.5})
    book.close()
    assert trackers.read_metrics(file) == [{"step": 1, "a": 1}, {"step": 2}, {"step": 3, "b": 0.5}]


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, steps=3, track=["tensorboard"])
    train(tmp_path, steps=5, track=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss/match")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx([line["loss/match"] for line in lines(tmp_path)])


STAND_IN = """
calls = []
def init(**options): calls.append(("init", options))
def log(values, step): calls.append(("log", step, dict(values)))
def finish(): calls.append(("finish",))
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_the_numbers(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    out = tmp_path / "fast"
    train(out, steps=3, log_every=3, track=[name], fingerprint={"data": "moons"})
    calls = __import__(name).calls
    monkeypatch.delitem(sys.modules, name)
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    options = calls[0][1]
    assert options["project"] == "fewstep"
    assert options["name"] == "fast"
    assert options["resume"] == "allow"
    assert options["config"]["data"] == "moons"
    assert calls[1][1] == 3
    assert calls[1][2]["loss"] == lines(out)[0]["loss"]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package trackio: pip install 'fewstep\[track\]'"):
        train(tmp_path, track=["trackio"])
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_there_are_plain_lines_on_stderr(capsys, monkeypatch):
    clock = iter(range(0, 10_000))
    monkeypatch.setattr("fewstep.training.progress.time.perf_counter", lambda: float(next(clock)))
    progress = Progress(100)
    for step in range(1, 101):
        progress.update(step, step / 100, 0.25)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    shown = err.splitlines()
    assert len(shown) == 10
    assert shown[4] == " 50%  step 50/100  loss 0.25  1 steps/s  50s left"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("fewstep.training.progress._REDRAW", 0.0)
    clock = iter(range(0, 10_000))
    monkeypatch.setattr("fewstep.training.progress.time.perf_counter", lambda: float(next(clock)))
    progress = Progress(4)
    progress.update(2, 0.5, 0.125)
    progress.close()
    err = capsys.readouterr().err
    assert "50%" in err
    assert "step 2/4  loss 0.125  2 steps/s" in err
    assert [duration(s) for s in (3.2, 125, 4800)] == ["3s", "2m 05s", "1h 20m"]


def test_speed_and_time_left_are_those_of_the_last_minute():
    pace = Pace(0.0, done=500, fraction=0.5)  # as a run that goes on
    for second in range(1, 301):  # two steps a second, then one in two seconds
        done = 500 + (2 * second if second <= 100 else 200 + (second - 100) // 2)
        speed, left = pace(second, done, done / 1000)
        if second == 100:
            assert (speed, left) == (pytest.approx(2.0), pytest.approx(150.0))
    assert speed == pytest.approx(0.5, abs=0.02)
    assert left == pytest.approx(200 / 0.5, rel=0.05)


def test_one_step_of_minutes_has_a_speed():
    pace = Pace(0.0)
    assert pace(300, 1, 0.25) == (pytest.approx(1 / 300), pytest.approx(900))
    assert pace(600, 2, 0.5) == (pytest.approx(1 / 300), pytest.approx(600))


def test_long_work_without_a_terminal_says_how_far_it_is(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fewstep.common.console.time.perf_counter", lambda: clock[0])
    with progress_bar("evaluating", quiet=False) as show:
        for done in range(1, 101):
            clock[0] = done / 2
            show(done, 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "evaluating",
        "evaluating: 20%  2/s  40s left",
        "evaluating: 40%  2/s  30s left",
        "evaluating: 60%  2/s  20s left",
        "evaluating: 80%  2/s  10s left",
    ]


def test_quiet_says_nothing(capsys):
    train()
    assert capsys.readouterr() == ("", "")
