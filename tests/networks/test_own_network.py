"""A network of one's own goes the whole way: a recipe or Python, a run, an export that carries its class, and back;
its code runs where it is trusted alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.common.options import find_object

CODE = """
from dataclasses import dataclass

import torch
from torch import nn

from fewstep.flows.paths import Linear


class Net(nn.Module):
    def __init__(self, width: int = 4, times: int = 2) -> None:
        super().__init__()
        self.config = {"width": width, "times": times}
        self.layers = nn.Sequential(nn.Linear(2 + times, width), nn.Tanh(), nn.Linear(width, 2))
        self.shape = (2,)

    def forward(self, x, *times):
        return self.layers(torch.cat([x, torch.stack(times, dim=1)], dim=1))


@dataclass(frozen=True)
class Halved(Linear):
    factor: float = 0.5


def make(size: int = 8) -> nn.Module:
    return Net(size)
"""
FEW: Any = {"steps": 2, "batch": 8, "device": "cpu", "quiet": True}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def _check_export(model: Any, export: Path) -> None:
    """The export gives the same samples, and runs no code unasked."""
    noise = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"names code, .*network\.py:\w+ \(network\).*--trust \(trust=True"):
        fewstep.load(export)
    again = fewstep.load(export, trust=True)
    assert torch.equal(fewstep.sample(again, noise, steps=2), fewstep.sample(model, noise, steps=2))
    assert str(Path.cwd()) not in (export / "config.json").read_text()
    assert "trust=True" in (export / "README.md").read_text()


@pytest.mark.takes_seconds
def test_from_a_recipe_and_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--student.network", "mine.py:make", "--student.options.size", "6", "--training.chunk", "8"]
    few = ["--steps", "2", "--training.batch", "8", "--evaluation.count", "0", "--out", "runs/own"]
    assert main(["distill", "checkerboard-itvm", "--student", "mine.py:make", *flags, *few]) == 0
    assert main(["export", "runs/own", "own"]) == 0
    assert "fewstep sample own --steps 2 --trust" in capsys.readouterr().err.replace(str(home) + "/", "")
    assert json.loads((home / "own" / "config.json").read_text())["network"]["options"] == {"size": 6}
    _check_export(fewstep.load("runs/own"), home / "own")
    (home / "mine.py").unlink()  # the export stands alone
    assert main(["sample", "own", "--trust", "--count", "4", "--out", "x.npy"]) == 0
    assert main(["sample", "own", "--count", "4", "--out", "x.npy"]) == 2


def test_from_python_and_back(home: Path) -> None:
    net, path = find_object("mine.py:Net", torch.nn.Module), find_object("mine.py:Halved", fewstep.Linear)
    student = fewstep.FlowMap(net(5), path())
    result = fewstep.fit(student, fewstep.MeanFlow(), torch.randn(16, 2), out="runs/own", **FEW)
    noise = torch.randn(4, 2)
    again = fewstep.load("runs/own")  # this user's fewstep wrote it
    assert torch.equal(again.velocity(noise, 0.5), result.ema.velocity(noise, 0.5))
    fewstep.export(result.ema, "own")
    _check_export(result.ema, home / "own")
    fewstep.export("runs/own", "own-too")
    (home / "runs").rename(home / "received")
    with pytest.raises(ValueError, match="names code"):
        fewstep.load("received/own")
    fewstep.load("received/own", trust=True)


def test_one_that_says_no_shape_is_exported(home: Path) -> None:
    net = find_object("mine.py:Net", torch.nn.Module)(4)
    del net.shape
    fewstep.export(fewstep.FlowMap(net), "own")
    _check_export(fewstep.FlowMap(net), home / "own")
    assert "torch.randn(4, ...)" in (home / "own" / "README.md").read_text()


def test_what_does_not_stand_alone_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "beside.py").write_text("width = 4\n")
    (home / "mine.py").write_text(CODE.replace("import torch\n", "import beside\nimport torch\n", 1))
    import sys

    sys.path.insert(0, str(home))
    try:
        net = find_object("mine.py:Net", torch.nn.Module)
    finally:
        sys.path.remove(str(home))
    del sys.modules["beside"]
    with pytest.raises(ValueError, match="does not make it again where it stands alone"):
        fewstep.export(fewstep.FlowMap(net(4)), "own")
    assert not (home / "own").exists()

    class Local(torch.nn.Linear):
        pass

    nowhere: dict[str, Any] = {}
    exec("import torch\nclass Typed(torch.nn.Identity): pass", nowhere)
    for made in (Local(2, 2), nowhere["Typed"]()):
        with pytest.raises(ValueError, match="put the class in a file of its own"):
            fewstep.export(fewstep.FlowMap(made), "own")
    network = net(4)
    network.config = {"width": 7, "times": 2}
    with pytest.raises(ValueError, match="cannot be made anew from its config"):
        fewstep.export(fewstep.FlowMap(network), "own")
    fewstep.fit(fewstep.FlowMap(network), fewstep.MeanFlow(), torch.randn(16, 2), out="run", **{**FEW, "quiet": False})
    assert "cannot be loaded, sampled or exported later" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_one_that_says_neither_its_shape_nor_its_options(home: Path) -> None:
    """Its run knows the first, and what names it the second."""
    bare = CODE.replace('        self.config = {"width": width, "times": times}\n', "").replace(
        "        self.shape = (2,)\n", ""
    )
    assert bare.count("self.") == 2
    (home / "mine.py").write_text(bare)
    few = ["--steps", "2", "--training.batch", "8", "--training.chunk", "8", "--evaluation.count", "0"]
    named = ["--student", "mine.py:Net", "--student.options.width", "6"]
    assert main(["distill", "checkerboard-itvm", *named, *few, "--out", "runs/own"]) == 0

    network = find_object("mine.py:Net", torch.nn.Module)(5)
    network.config = {"width": 5}  # of this one alone, not of those that its class makes
    fewstep.fit(fewstep.FlowMap(network), fewstep.MeanFlow(), torch.randn(16, 2), out="runs/python", **FEW)
    for name in ("own", "python"):
        assert main(["export", f"runs/{name}", name]) == 0
        _check_export(fewstep.load(f"runs/{name}"), home / name)
        assert main(["sample", name, "--trust", "--count", "4", "--out", f"{name}.npy"]) == 0
        assert main(["export", name, f"{name}-again", "--trust"]) == 0
        _check_export(fewstep.load(name, trust=True), home / f"{name}-again")
    # Of one in memory nobody knows the shape.
    fewstep.export(fewstep.FlowMap(network), "memory")
    assert "torch.randn(4, ...)" in (home / "memory" / "README.md").read_text()


@pytest.mark.takes_seconds
def test_a_run_that_is_not_known_goes_on_where_a_flag_names_its_code(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs are from before it was written down who wrote them."""
    few = ["--training.batch", "8", "--training.chunk", "8", "--evaluation.count", "0", "--out", "runs/own"]
    words = ["distill", "checkerboard-itvm", "--student.network", "mine.py:Net", "--student.options", "{}", *few]
    assert main([*words, "--steps", "2"]) == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "another"))
    monkeypatch.setattr("fewstep.common.trust._written", {})
    assert main(["distill", "runs/own", "--steps", "4"]) == 2
    assert main([*words, "--steps", "4"]) == 0
    assert main(["distill", "runs/own", "--steps", "6"]) == 0  # now it is known
