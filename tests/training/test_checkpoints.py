"""Checkpoints: whole or not there, verified when read, and an error that says what to do."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from toys.training import Gaussian, Matching, Student

from fewstep.common.errors import TrainingError
from fewstep.common.write_errors import WriteError
from fewstep.training import checkpoints
from fewstep.training.fit import fit


def train(out, **options):
    options = {"steps": 12, "batch": 16, "quiet": True, "checkpoint_every": 4, **options}
    return fit(Student(), Matching(), Gaussian(), out=out, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out)
    return out


@pytest.fixture
def out(run, tmp_path):
    """A run of 12 steps with checkpoints at 8 and 12."""
    return shutil.copytree(run, tmp_path / "run")


def test_what_is_saved_is_what_is_loaded(tmp_path):
    tensors = {
        "model": {"a": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "count": torch.tensor(7)},
        "views": {"t": torch.randn(4, 6).t(), "part": torch.arange(10)[2:5]},
        "none": {},
    }
    state = {"seconds": 0.1 + 0.2, "nested": {"betas": [0.9, 0.999]}}
    path = checkpoints.save(tmp_path, 70, tensors, state, keep=2)
    assert path == tmp_path / "step-00000070" == checkpoints.latest(tmp_path)
    back = checkpoints.load(path)
    assert back.step == 70
    assert {k: back.state[k] for k in state} == state
    assert set(back.tensors) == {"model", "views"}
    for group, values in back.tensors.items():
        for name, value in values.items():
            assert value.dtype == tensors[group][name].dtype
            assert torch.equal(value, tensors[group][name])
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_tied_weights_are_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    back = checkpoints.load(checkpoints.save(tmp_path, 1, {"model": tied.state_dict()}, {}, keep=1))
    assert torch.equal(back.tensors["model"]["0.weight"], tied[0].weight)
    assert torch.equal(back.tensors["model"]["1.weight"], tied[0].weight)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 99_999_999, 100_000_000):
        checkpoints.save(tmp_path, step, {"model": {"a": torch.zeros(1)}}, {}, keep=3)
    assert checkpoints.steps_in(tmp_path) == [3, 99_999_999, 100_000_000]
    assert checkpoints.latest(tmp_path).name == "step-100000000"
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("step-")) == ["reached"]


def test_an_optimizer_comes_back_bit_for_bit(out):
    """Adam's moments and step counts; a step after loading is the step of one that never stopped."""
    whole = train(out.parent / "longer", steps=16, schedule="constant")
    train(out.parent / "parts", steps=12, schedule="constant")
    parts = train(out.parent / "parts", steps=16, schedule="constant")
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [
        (out.parent / name / "checkpoints/step-00000016/optimizer-student.safetensors").read_bytes()
        for name in ("longer", "parts")
    ]
    assert moments[0] == moments[1]


def test_hidden_files_of_a_file_browser_do_no_harm(out):
    (out / "checkpoints" / ".DS_Store").write_text("")
    assert train(out).step == 12
    assert (out / "checkpoints" / ".DS_Store").exists()


def test_the_folder_lists_every_file(out):
    folder = out / "checkpoints" / "step-00000012"
    state = json.loads((folder / "state.json").read_text())["state"]
    names = {"model", "ema", "target", "objective", "optimizer-student"}
    assert set(state["files"]) == {f"{name}.safetensors" for name in names}
    assert {p.name for p in folder.iterdir()} == {*state["files"], "state.json"}
    assert state["fingerprint"]["training.batch"] == 16
    assert state["versions"]["torch"] == torch.__version__


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer-student.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), _truncate, _flip])
def test_damage_is_named_with_the_way_out(out, name, damage):
    file = out / "checkpoints" / "step-00000012" / name
    damage(file)
    with pytest.raises(TrainingError) as caught:
        train(out, steps=16)
    words = str(caught.value)
    assert str(file) in words
    assert "is missing" in words or "is damaged" in words
    assert f"Delete the folder {file.parent} to go back to step-00000008" in words
    # And that is what then happens.
    shutil.rmtree(file.parent)
    assert train(out).step == 12


def test_a_damaged_one_is_never_offered_to_go_back_to(out):
    for step in (8, 12):
        _flip(out / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
    with pytest.raises(TrainingError, match=r"no other checkpoint is whole.*resume=False"):
        train(out, steps=16)
    assert train(out, steps=5, resume=False).step == 5


def test_checkpoints_that_are_gone_are_no_silent_restart(out):
    for path in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="the run had reached step 12"):
        train(out)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"checkpoints is missing, though .*step 12"):
        train(out)
    for name in ("run.json", "recipe.yaml", "student.json"):
        (out / name).unlink()
    with pytest.raises(ValueError, match="holds no fewstep run"):
        train(out)


@pytest.mark.parametrize("file", ["optimizer-student.safetensors", "state.json"])
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, monkeypatch, file, kind):
    whole = train(tmp_path / "whole")
    save, write = checkpoints.save_file, type(tmp_path).write_text
    full = OSError(errno.ENOSPC, "No space left on device") if kind is OSError else SafetensorError("os error 28")

    def refuse(path):
        if path.name == file and "step-00000008" in str(path):
            path.write_bytes(b"half a fi")
            raise full

    def save_file(tensors, path):
        refuse(path)
        save(tensors, path)

    def write_text(path, text):
        refuse(path)
        return write(path, text)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    monkeypatch.setattr(type(tmp_path), "write_text", write_text)
    with pytest.raises(
        WriteError, match=rf"could not write .*step-00000008/{file}: the disk is full, [\d,]+ bytes"
    ) as e:
        train(tmp_path / "run")
    groups = checkpoints.load(tmp_path / "whole" / "checkpoints" / "step-00000012").tensors.values()
    needed = sum(tensor.nbytes for group in groups for tensor in group.values())
    assert f"that of step 8 has {needed:,} bytes" in str(e.value)
    assert "step-00000004 is whole and the same command goes on from it" in str(e.value)
    left = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-00000004", "reached"}
    monkeypatch.undo()
    train(tmp_path / "run")
    final = "checkpoints/step-00000012/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    assert whole.step == 12


@pytest.mark.parametrize("call", range(1, 8))
def test_death_at_every_rename_and_removal_leaves_a_run_that_goes_on(tmp_path, monkeypatch, call):
    """As a kill would: nothing after it runs, no clean-up either."""

    class Death(BaseException):
        pass

    count = 0

    def dying(function):
        def wrapped(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                raise Death
            return function(*args, **options)

        return wrapped

    whole = train(tmp_path / "whole", keep=1)
    monkeypatch.setattr(checkpoints.os, "replace", dying(checkpoints.os.replace))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", dying(checkpoints.shutil.rmtree))
    with pytest.raises(Death):
        train(tmp_path / "run", keep=1)
    monkeypatch.undo()
    again = train(tmp_path / "run", keep=1)
    for a, b in zip(whole.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000012", "reached"}


def test_checkpoints_come_by_time_too_and_change_no_bit(tmp_path):
    """A second apart by the run's clock, wherever a kill falls: the weights and the losses are the same."""
    whole = train(tmp_path / "whole", checkpoint_every=1000, log_every=3)
    assert checkpoints.steps_in(tmp_path / "whole" / "checkpoints") == [12]
    train(tmp_path / "often", steps=7, schedule="constant", checkpoint_every=1000, checkpoint_minutes=1e-9, keep=99)
    assert checkpoints.steps_in(tmp_path / "often" / "checkpoints") == list(range(1, 8))

    def stop(run):
        if run.step == 8:
            raise KeyboardInterrupt

    timed = {"checkpoint_every": 1000, "checkpoint_minutes": 1e-9, "log_every": 3, "keep": 99}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "timed", callbacks=[stop], **timed)
    again = train(tmp_path / "timed", **timed)
    for a, b in zip(whole.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "timed")
    ]
    assert lines[0] == lines[1]
