"""Models that the command samples, and the command itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys.families import tiny_pipeline
from toys.sampling import NAMES, Draw
from toys.unet import tiny_student

import fewstep
from fewstep.cli import main


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exports of maps of images, by class and without, a text model and a DiT whose classes have names."""
    folder = tmp_path_factory.mktemp("models")
    fewstep.export(tiny_student(), folder / "plain")
    fewstep.export(tiny_student(classes=5), folder / "classes")
    tiny_pipeline("sd").save_pretrained(folder / "sd")
    dit = tiny_pipeline("dit")
    dit.save_pretrained(folder / "dit")
    index = json.loads((folder / "dit" / "model_index.json").read_text())
    (folder / "dit" / "model_index.json").write_text(json.dumps({**index, "id2label": NAMES}))
    return folder


@pytest.fixture
def draws(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """``draws("plain", "--seed", "3")``: what the command writes."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> np.ndarray:
        assert main(["sample", str(models / name), "--device", "cpu", "--out", "x.npy", *words]) == 0
        return np.load("x.npy")

    return run


@pytest.fixture
def refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is said to a command that cannot be; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> str:
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert main(["sample", str(models / name), "--device", "cpu", *words]) == 2
        assert sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    return run
