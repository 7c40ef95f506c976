"""The benchmark of every method on every set: its sets, what it calls first, and that it goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import every_set
import numpy as np
import pytest
import set_parts
import torch
from PIL import Image
from record import read

from fewstep.evaluation.extractor import extract


def test_seven_gaussians_have_unit_variance() -> None:
    field = set_parts.seven_gaussians()
    mean = field.weights @ field.means
    variance = field.weights @ ((field.means - mean).square().mean(1) + field.scales.square())
    assert mean.abs().max() < 1e-6
    assert variance.item() == pytest.approx(1, abs=1e-6)
    assert len(field.weights.unique()) == len(field.scales.unique()) == 7


def test_darcy_fields_are_averaged_and_brought_to_unit_scale(tmp_path: Path) -> None:
    fields = torch.arange(1000.0)[:, None, None] + torch.zeros(1000, 16, 16)
    fields[0, :2, :2] = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    torch.save({"x": fields, "y": fields}, tmp_path / "darcy_train_16.pt")
    train, test = (np.load(file) for file in set_parts.darcy_files(tmp_path, tmp_path))
    assert (train.shape, test.shape) == ((800, 64), (200, 64))
    assert train.mean() == pytest.approx(0, abs=1e-5)
    assert train.std() == pytest.approx(1, abs=1e-5)
    assert (train[0, 0] - train[0, 1]) * fields[:800].mean((1, 2)).std().item() == pytest.approx(6.0, rel=1e-2)
    assert test.min() > train.max()  # by the training rows' mean, not their own


def sheet(folder: Path, name: str, images: np.ndarray) -> None:
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(folder / name)


def cifar(folder: Path, level: tuple[float, ...]) -> np.ndarray:
    """Sheets of 50 images a batch whose channels have these means, to the pixel."""
    images = np.empty((50, 32, 32, 3), np.uint8)
    for channel, mean in enumerate(level):
        below, count = int(mean), images[..., channel].size
        flat = np.full(count, below, np.uint8)
        flat[: round((mean - below) * count)] += 1
        images[..., channel] = flat.reshape(50, 32, 32)
    for name in [*(f"data_batch_{n}.png" for n in range(1, 6)), "test_batch.png"]:
        sheet(folder, name, images)
    (folder / "train_lables.json").write_text(json.dumps([n % 10 for n in range(250)]))
    (folder / "test_lables.json").write_text(json.dumps([n % 10 for n in range(50)]))
    return images


def test_cifar_comes_from_its_sheets(tmp_path: Path) -> None:
    images = cifar(tmp_path, set_parts.CIFAR_MEANS)
    train, test = (np.load(file) for file in set_parts.cifar_files(tmp_path, tmp_path))
    assert train["images"].shape == (250, 3, 32, 32)
    assert (test["images"][7] == images[7].transpose(2, 0, 1)).all()
    assert test["class_labels"][13] == 3


def test_other_sheets_are_refused(tmp_path: Path) -> None:
    cifar(tmp_path, (125.0, 122.0, 113.0))
    with pytest.raises(ValueError, match="is not CIFAR-10: its channels' means"):
        set_parts.cifar_files(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="no darcy_train_16"):
        set_parts.darcy_files(tmp_path, tmp_path)


def test_the_resnet_is_the_published_one(tmp_path: Path) -> None:
    network = set_parts.ResNet20().eval()
    assert sum(weight.numel() for weight in network.parameters()) == 269_722  # as its authors count it
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert extract(network, images).shape == (3, network.num_features)
    torch.save({"state_dict": {f"module.{name}": w for name, w in network.state_dict().items()}}, tmp_path / "a.th")
    assert torch.equal(set_parts.resnet20(tmp_path / "a.th").classify(images), network.classify(images))
    with pytest.raises(FileNotFoundError, match="set FEWSTEP_DATA"):
        set_parts.resnet20(tmp_path / "b.th")


def rows_of(values: dict[str, list[list[float]]], metric: str = "rmse") -> list[dict[str, Any]]:
    """``values[method][seed][call]`` as the rows of a comparison."""
    return [
        {"model": method, "seed": seed, "nfe": calls, metric: value}
        for method, seeds in values.items()
        for seed, each in enumerate(seeds)
        for calls, value in zip((1, 2, 4), each, strict=True)
    ]


def test_first_is_the_best_or_within_one_deviation() -> None:
    values = {
        "ITVM": [[1.0, 2.0, 3.0], [1.2, 2.0, 3.0]],  # 1.1 ± .14, 2, 3
        "PSD": [[1.2, 2.1, 2.0], [1.2, 2.1, 2.0]],  # 1.2, within that deviation; 2.1, without one; 2
        "LMD": [[1.5, 2.3, 2.9], [1.5, 2.7, 3.7]],  # 2.5 ± .28
    }
    cells = every_set.spread(rows_of(values), "rmse")
    leads = {method: every_set.leading(cells, method, "rmse") for method in values}
    assert leads == {"ITVM": [1, 2], "PSD": [1, 4], "LMD": []}
    shares = every_set.spread(rows_of({"ITVM": [[0.9] * 3], "PSD": [[0.5] * 3]}, "recall"), "recall")
    assert every_set.leading(shares, "ITVM", "recall") == [1, 2, 4]
    assert every_set.leading(shares, "PSD", "recall") == []


def test_lines_begin_with_what_the_set_is_judged_by_and_the_best() -> None:
    values = {"PSD": [[2.0] * 3], "ITVM:ema=0.5,ends=0.1": [[1.0] * 3], "teacher": [[3.0] * 3]}
    rows = [{**row, "sliced_w2": 0.1} for row in rows_of(values)]
    tree = {"rows": rows, "steps": {"PSD": 10, "ITVM:ema=0.5,ends=0.1": 9}}
    found = every_set.lines("spiral", tree)
    assert found[:3] == [
        ["spiral", "ITVM, ema=0.5, ends=0.1", "rmse", 9, 1.0, 1.0, 1.0, None, "1, 2, 4"],
        ["spiral", "PSD", "rmse", 10, 2.0, 2.0, 2.0, None, "-"],
        ["spiral", "teacher, Euler", "rmse", None, 3.0, 3.0, 3.0, None, None],
    ]
    assert {line[2] for line in found[3:]} == {"sliced_w2"}


@pytest.mark.takes_seconds
def test_a_set_is_measured_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.json"
    quick = ["--seconds", "0.05", "--seeds", "0", "--set", "evaluation.count=50", "--out", str(out)]

    def call(*words: str) -> list[list[Any]]:
        monkeypatch.setattr("sys.argv", ["every_set.py", str(tmp_path), *words, *quick])
        every_set.main()
        return read(out).rows

    assert {row[1] for row in call("seven-gaussians", "--methods", "ITVM")} == {"ITVM", "teacher, Euler"}
    before = (tmp_path / "seven-gaussians" / "ITVM-seed0" / "quality.json").stat().st_mtime_ns
    assert {row[1] for row in call("seven-gaussians", "--methods", "PSD")} == {"ITVM", "PSD", "teacher, Euler"}
    assert (tmp_path / "seven-gaussians" / "ITVM-seed0" / "quality.json").stat().st_mtime_ns == before
    assert {row[2] for row in call()} >= {"rmse", "sliced_w2", "energy", "histogram_kl"}
    quick[0] = "--cpu-seconds"
    with pytest.raises(ValueError, match="has times of the wall clock: --cpu-seconds wants another folder"):
        call("seven-gaussians", "--methods", "ITVM")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # it is set by this, and is to be as it was after the test
    call("spiral", "--methods", "ITVM")
    assert "spiral 0.05 s of the processor, one thread, seven-gaussians 0.05 s." in read(out).notes[0]
