"""Whose a run folder is: one process at a time, one recipe, and nothing that fewstep did not write."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toys.places import ROOT
from toys.training import Matching, Rows, Student

from fewstep.cli import main
from fewstep.common import locks
from fewstep.common.locks import BusyError, NoLocksError, owned
from fewstep.runs import run as runs
from fewstep.runs.compare import compare_methods
from fewstep.runs.loading import open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import evaluate_run, run
from fewstep.training import checkpoints, fingerprint, folder, run_files
from fewstep.training.fit import fit

POINTS: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 4, "batch": 16, "quiet": True, "checkpoint_every": 2},
    "evaluation": {"steps": [1], "teacher_steps": [1], "count": 0, "every": 1000},
}
LONG = ["--training.steps", "1000000", "--training.log_every", "1", "--training.checkpoint_every", "5"]


def trained(out: Path, **overrides: str) -> Path:
    run(load_recipe(POINTS, {key.replace("__", "."): value for key, value in overrides.items()}), out)
    return out


def fewstep(*words: object) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fewstep", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if file.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{file} did not come")


@pytest.mark.takes_seconds
def test_a_training_owns_its_folder_until_it_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(POINTS)
    (tmp_path / "points.yaml").write_text(recipe.as_yaml())
    first = fewstep("distill", "points.yaml", *LONG, "--out", "run")
    try:
        wait_for(tmp_path / "run" / folder.RECIPE, first)  # long before there is a checkpoint
        before = (tmp_path / "run" / "recipe.yaml").read_text()
        for more in ([], ["--fresh"], ["--objective.ema", "0.7", "--fresh"]):
            assert main(["distill", "points.yaml", "--out", "run", *more]) == 2
            said = capsys.readouterr().err
            assert f"run is being trained by process {first.pid} on " in said
            assert "distill points.yaml --training.steps 1000000" in said
            assert "wait for it, stop it, or take another folder (--out)" in said
            assert len(said) < 400
        with pytest.raises(BusyError):
            fit(Student(), Matching(), Rows(100), steps=1, out=tmp_path / "run", quiet=True, resume=False)
        assert (tmp_path / "run" / "recipe.yaml").read_text() == before
        wait_for(tmp_path / "run" / "checkpoints" / "reached", first)
        evaluate_run(tmp_path / "run", count=8)  # which changes nothing that the training has
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1))
    done = max(checkpoints.steps_in(tmp_path / "run" / "checkpoints"))
    assert main(["distill", "points.yaml", "--out", "run", "--steps", str(done + 1), "--training.log_every", "1"]) == 0
    assert not (tmp_path / "run" / locks.LOCK).exists()


@pytest.mark.takes_seconds
def test_two_that_start_at_once_and_one_that_trains(tmp_path: Path) -> None:
    recipe = tmp_path / "points.yaml"
    recipe.write_text(load_recipe(POINTS).as_yaml())
    both = [fewstep("distill", recipe, "--steps", "300", "--out", tmp_path / "run") for _ in range(2)]
    ends = [process.communicate()[1] for process in both]
    # Where the first was done before the second began, that found all done.
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0]), ends
    for process, said in zip(both, ends, strict=True):
        assert process.returncode == 0 or "is being trained by process" in said
    assert open_run(tmp_path / "run").step == 300


def test_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    place = tmp_path / "a" / "run"
    with owned(place, "trained"), owned(place, "evaluated"):
        assert os.listdir(place) == [locks.LOCK]
        code = "import sys, pathlib, fewstep.common.locks as l\nl.owned(pathlib.Path(sys.argv[1]), '').__enter__()"
        other = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True)
        assert f"is being trained by process {os.getpid()} on " in other.stderr
    assert os.listdir(tmp_path) == []  # nor what was made around it
    place.mkdir(parents=True)
    (place / locks.LOCK).write_text("{}")  # of a process that was killed
    with owned(place, "trained"):
        pass
    assert os.listdir(place) == []

    def unsupported(*_: object) -> None:
        raise NoLocksError("no locks available")

    monkeypatch.setattr(locks, "lock", unsupported)
    with owned(place, "trained"):
        pass
    assert "cannot be locked (no locks available): see to it that no other process" in str(recwarn.list[-1].message)


def test_a_comparison_owns_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(stream: object) -> bool:
        return False

    monkeypatch.setattr(locks, "lock", busy)
    with pytest.raises(BusyError, match="is being written by another process"):
        compare_methods(POINTS, ["ITVM"], steps=1, out=tmp_path / "compare")


# The recipe


@pytest.mark.takes_seconds
def test_the_recipe_counts_before_there_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, recipe = tmp_path / "run", load_recipe(POINTS)
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.training.fit.Logbook", None)  # it ends as the training begins
        with pytest.raises(TypeError):
            run(recipe, out)
    before = (out / "recipe.yaml").read_text()
    other = load_recipe(POINTS, {"objective.ema": "0.7"})
    with pytest.raises(ValueError, match=r"another recipe: objective\.ema is 0\.5 there and 0\.7 here.*--fresh"):
        run(other, out)
    assert (out / "recipe.yaml").read_text() == before
    assert run(other, out, fresh=True).result.step == 4


class Wrong(Matching):
    """What fails in its first step."""

    def forward(self, *given: Any, **more: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.takes_seconds
def test_a_start_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    out, refused = tmp_path / "run", load_recipe(POINTS, {"training.precision": "fp16", "training.device": "cpu"})
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        run(refused, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        run(refused, out)
    with pytest.raises(ValueError, match="the first step failed"):
        fit(Student(), Wrong(), Rows(100), steps=2, batch=16, out=out, quiet=True)
    assert os.listdir(out) == []
    # One that was there stays, and what the teacher drew for it, which may have taken hours.
    before = sorted(file.name for file in trained(out).rglob("*"))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run(refused, out)
    assert sorted(file.name for file in out.rglob("*")) == before
    drawn = tmp_path / "drawn" / run_files.TEACHER_SAMPLES_FILE

    def draw() -> None:
        with folder.unless_refused(drawn.parent):
            folder.begin(drawn.parent)
            drawn.write_bytes(b"hours")
            raise ValueError("not so")

    with pytest.raises(ValueError, match="not so"):
        draw()
    assert run_files.is_ours(drawn.parent)
    assert drawn.is_file()


@pytest.mark.takes_seconds
def test_a_recipe_that_was_edited_is_not_what_the_checkpoint_is_of(tmp_path: Path, capsys: Any) -> None:
    out = trained(tmp_path / "run")
    recipe = out / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(f"# a note of mine\n{text.replace('count: 0', 'count: 8')}")  # of how it is judged
    assert open_run(out).step == 4
    assert run(load_recipe(out, {"evaluation.count": "0"}), out).result.step == 4
    assert (out / "recipe-1.yaml").read_text().startswith("# a note of mine")  # set aside, not lost
    recipe.write_text(text.replace("ema: 0.5,", "ema: 0.7,", 1))
    assert recipe.read_text() != text
    said = r"recipe.yaml is not what the checkpoint of the run was trained by: .*ema is 0\.5.* there and 0\.7 here"
    for read in (lambda: open_run(out), lambda: evaluate_run(out)):
        with pytest.raises(ValueError, match=said):
            read()
    for command in (["sample", str(out)], ["export", str(out)], ["evaluate", str(out)]):
        assert main(command) == 2
        assert "is not what the checkpoint of the run was trained by" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_runs_of_before_there_was_a_mark_go_on(tmp_path: Path) -> None:
    out = trained(tmp_path / "run")
    (out / run_files.MARK).unlink()
    assert run(load_recipe(POINTS, {"steps": "6"}), out).result.step == 6
    (out / run_files.MARK).unlink()
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.jsonl").unlink()  # killed before its first checkpoint
    assert run(load_recipe(POINTS), out).result.step == 4


# What is thrown away


@pytest.mark.takes_seconds
def test_fresh_takes_what_fewstep_wrote_and_nothing_else(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", evaluation__count="8", evaluation__every="2")
    mine = [
        "samples/holiday.jpg",
        "samples/step-00000002.png.txt",
        "notes.txt",
        "model/weights",
        "checkpoints/.DS_Store",
    ]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    ours = {p for p in out.rglob("*") if p.is_file() and p.relative_to(out).as_posix() not in mine}
    folder.throw_away(out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == sorted(
        [*mine, "recipe.yaml", "run.json"]
    )
    assert out / "samples" / "step-00000002.png" in ours
    assert out / "report.html" in ours


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("flour: 500 g\n", ["samples/holiday.jpg"]),
        ("# mine\ndata: eight-gaussians\nobjective: MeanFlow\n", []),
        ("", []),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_folder_with_somebodys_own_recipe_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, more: list[str], flags: list[str]
) -> None:
    (tmp_path / "cake" / "samples").mkdir(parents=True)
    for name, text in {"recipe.yaml": recipe, **dict.fromkeys(more, "mine")}.items():
        (tmp_path / "cake" / name).write_text(text)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    own = str(tmp_path / "points.yaml")
    Path(own).write_text(load_recipe(POINTS).as_yaml())
    assert main(["train", own, "--out", str(tmp_path / "cake"), *flags]) == 2
    assert "recipe.yaml was not written by fewstep" in (said := capsys.readouterr().err)
    assert "--out runs/cake" in said
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {**before, Path(own): after[Path(own)]} == after


# Killed while it starts afresh


def kill_at(call: int, out: Path, recipe: Any) -> bool:
    """Start afresh in a process that is killed at one of its changes of the disk; whether it came so far."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = call

    def counted(function: Any) -> Any:
        def wrapped(*words: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*words, **more)

        return wrapped

    for name in ("replace", "unlink", "rmdir", "mkdir", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    runs._begin(out, recipe, fresh=True)
    folder.prepare(out, recipe.fingerprint(), resume=False)
    os._exit(0)


@pytest.mark.takes_seconds
def test_killed_at_any_change_of_a_fresh_start_no_checkpoint_passes_as_another_recipes(tmp_path: Path) -> None:
    whole, call = trained(tmp_path / "whole", evaluation__every="2"), 0
    old, other = load_recipe(whole), load_recipe(POINTS, {"objective.ema": "0.7", "name": "other"})
    left = set()
    while True:
        out = shutil.copytree(whole, tmp_path / f"run-{call}")
        if not kill_at(call, out, other):
            break
        call += 1
        assert run_files.is_ours(out)
        now = load_recipe(out)
        steps = checkpoints.steps_in(out / "checkpoints")
        left.add((tuple(steps), now.name))
        if steps:
            assert now.as_dict() == old.as_dict()
            assert open_run(out).step == steps[-1]
            with pytest.raises(ValueError, match="belongs to another recipe"):
                fingerprint.check_recipe(out, other.fingerprint())
        else:
            with pytest.raises(FileNotFoundError):
                open_run(out)
    assert call > 12
    assert {((2, 4), "points"), ((4,), "points"), ((), "points"), ((), "other")} <= left
    assert run(other, out, fresh=True).result.step == 4


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["m/teacher", "./teacher", "teacher"])
def test_a_teacher_that_moved_is_named_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = {"name": "t", "data": "eight-gaussians", "objective": "FlowMatching", "student": POINTS["student"]}
    run(load_recipe({**teacher, "training": POINTS["training"], "evaluation": POINTS["evaluation"]}), Path(name))
    recipe = {**POINTS, "teacher": name, "student": "auto"}
    run(load_recipe(recipe), Path("run"))
    os.rename(name, "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"^{name} is the teacher of the run in run, and is not there") as e:
        open_run("run")
    assert "say where it is now: teacher.source in run/recipe.yaml" in str(e.value)
    assert len(str(e.value)) < 400
    file = Path("run/recipe.yaml")
    file.write_text(file.read_text().replace(f"source: {name}", "source: elsewhere"))
    assert open_run("run").step == 4
    assert run(load_recipe("run", {"steps": "6"}), Path("run")).result.step == 6
    # While the old one is there, another is another.
    shutil.copytree("elsewhere", name)
    file.write_text(file.read_text().replace("source: elsewhere", f"source: {name}"))
    with pytest.raises(ValueError, match=f"teacher.source is elsewhere there and {name} here"):
        open_run("run")


def test_what_moved_is_a_place_that_is_left_for_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("new", "lib", "checkerboard"):
        Path(name).mkdir()
    for name in ("lib/net.py", "other.py"):
        Path(name).touch()
    differing = lambda key, then, now: bool(fingerprint._differing({key: then}, {key: now}))  # noqa: E731
    for then, now in (("old", "new"), ("./old", "new"), ("/gone/old", "./new"), ("owner/name", "new")):
        assert not differing("data.name", then, now)
        assert not differing("teacher.source", then, now)
    for key in ("student.network", "teacher.source", "objective.name"):
        assert not differing(key, "net.py:Net", "lib/net.py:Net")
        assert differing(key, "net.py:Net", "lib/net.py:Other")  # another class
        assert differing(key, "other.py:Net", "lib/net.py:Net")  # both are there
        assert differing(key, "pack.net:Net", "lib/net.py:Net")  # a module is no place
    # What fewstep brings along, the hub, and what is nowhere.
    for then, now in (
        ("spiral", "new"), ("old", "checkerboards"), ("fewstep:x", "new"), ("hf:a/b", "new"), ("a/b", "c/d"),
        ("a/b", None), (None, "new"),
    ):  # fmt: skip
        assert differing("data.name", then, now)
    assert differing("student.network", "mlp", "unet")
