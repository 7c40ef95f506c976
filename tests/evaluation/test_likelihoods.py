"""Likelihoods as metrics: of rows of the data, by name alone, the same whatever the batch; what has none."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.cli import main
from fewstep.data import ArrayData
from fewstep.data.batch import Batch
from fewstep.evaluation import likelihoods
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.likelihoods import LEVEL, likelihood
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "_STEPS", 12)


@pytest.fixture
def field() -> GaussianField:
    return GaussianField(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.1], [0.1, 0.3]]))


class Labelled(nn.Module):
    """The velocity of N(label, 1/4) in each of 16 numbers of an image."""

    classes = 3

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        mean, t = class_labels.reshape(-1, 1, 1, 1) / 2 - 0.5, t.reshape(-1, 1, 1, 1)
        rate = (0.25 * t - (1 - t)) / (0.25 * t * t + (1 - t) ** 2)
        return mean + rate * (x - t * mean)


def images(rows: int) -> ArrayData:
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (rows,), generator=draw)
    pixels = torch.randint(0, 256, (rows, 1, 4, 4), generator=draw, dtype=torch.uint8)
    return ArrayData(pixels, {"class_labels": labels})


@pytest.mark.takes_seconds
def test_points_are_judged_by_their_exact_density(field: GaussianField) -> None:
    options = {"teacher": field, "steps": (1,), "teacher_steps": (1, 2), "count": 200}
    found = evaluate(FlowMap(MLP(2, width=8, depth=2, times=2)), metrics=["nll", "energy"], **options)
    entropy = 1 + math.log(2 * math.pi) + 0.5 * math.log(0.5 * 0.3 - 0.01)
    assert [row["model"] for row in found.rows] == ["student", "teacher", "teacher"]
    assert found.rows[1]["nll"] == found.rows[2]["nll"] == pytest.approx(entropy, abs=4 / 200**0.5)
    assert found.rows[0]["nll"] > entropy
    assert set(found.floor) == {"energy"}
    again = evaluate(field, metrics=["nll"], batch=70, **options)  # alone, in other batches
    assert again.rows[0]["nll"] == pytest.approx(found.rows[1]["nll"], rel=1e-5)
    assert "nll" not in evaluate(field, **options).rows[0]  # by name alone


def test_images_are_judged_in_bits_of_their_bytes_under_their_own_labels() -> None:
    model, data = NetworkField(Labelled()), images(90)
    found = evaluate(model, data=data, steps=(1,), count=90, metrics=["bits_per_dim"], seed=3)
    # By hand: the mean over the same rows of the density, which over one level is all but constant.
    rows = data.rows(torch.arange(90), torch.Generator())
    mean = rows.cond["class_labels"].reshape(-1, 1, 1, 1) / 2 - 0.5
    nats = ((rows.data - mean).square() / 0.5 + 0.5 * math.log(2 * math.pi * 0.25)).double().mean()
    assert found.rows[0]["bits_per_dim"] == pytest.approx(float(nats) / math.log(2) + math.log2(127.5), abs=0.03)
    other = evaluate(model, data=data, steps=(1,), count=90, batch=40, metrics=["bits_per_dim"], seed=3)
    assert other.rows[0]["bits_per_dim"] == pytest.approx(found.rows[0]["bits_per_dim"], rel=1e-5)


def test_each_row_has_signs_of_its_own() -> None:
    """Of more than 32 numbers the divergence is estimated, and does not hang on the batches."""
    torch.manual_seed(0)
    model, x = NetworkField(MLP(40, width=16)), torch.randn(6, 40)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    values = [likelihood(model, [Batch(part) for part in x.split(most)], seed=2) for most in (6, 2)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert likelihood(model, [Batch(x)], seed=3) != pytest.approx(values[0], rel=1e-3)


def test_a_consistency_model_has_none(field: GaussianField) -> None:
    student = FlowMap(MLP(2, width=8, depth=2, times=2))
    student.gamma = 1.0
    found = evaluate(student, teacher=field, steps=(1,), teacher_steps=(1,), count=50, metrics=["nll"])
    assert found.rows[0]["nll"] is None
    assert found.rows[1]["nll"] is not None


def test_refusals(field: GaussianField) -> None:
    data = images(20)
    with pytest.raises(ValueError, match="metric 'nll' cannot be had here, only bits_per_dim"):
        evaluate(NetworkField(Labelled()), data=data, count=20, metrics=["nll"])
    with pytest.raises(ValueError, match="metric 'bits_per_dim' cannot be had here"):
        evaluate(field, teacher=field, count=20, metrics=["bits_per_dim"])
    with pytest.raises(ValueError, match="under their own conditions: leave cond out"):
        evaluate(NetworkField(Labelled()), data=data, count=20, metrics=["bits_per_dim"], cond={"class_labels": 3})
    floats = ArrayData(torch.randn(20, 1, 4, 4), data.cond)
    with pytest.raises(ValueError, match="bits_per_dim is of images of 8 bits in"):
        evaluate(NetworkField(Labelled()), data=floats, count=20, steps=(1,), metrics=["bits_per_dim"])
    field.distilled = "a consistency model"
    with count_calls(field) as made, pytest.raises(ValueError, match="a likelihood needs a velocity"):
        evaluate(field, teacher=field, count=20, metrics=["nll"])
    assert made.count == 0
    between = NetworkField(MLP(2, width=8), Interpolant())
    with pytest.raises(ValueError, match="a likelihood needs a path that starts from normal noise"):
        evaluate(between, data=torch.zeros(20, 2), count=20, metrics=["nll"])
    assert LEVEL == 2 / 255
    assert likelihood.__doc__


@pytest.mark.takes_seconds
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32))
    recipe = {
        "name": "small", "data": "points.npy", "objective": "FlowMatching",
        "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
        "training": {"steps": 4, "batch": 32, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    run(load_recipe(recipe), tmp_path / "run")
    capsys.readouterr()
    assert main(["evaluate", "run", "--steps", "1", "--count", "100", "--metrics", "nll", "energy"]) == 0
    assert "nll" in capsys.readouterr().out
    assert main(["evaluate", "run", "--steps", "1", "--count", "100", "--metrics", "nll"]) == 0
    assert main(["evaluate", "run", "--steps", "1", "--count", "100", "--metrics", "nlll"]) == 2
    assert "did you mean 'nll'" in capsys.readouterr().err
    rows = fewstep.load_data("points.npy")
    found = fewstep.evaluate(fewstep.load("run"), data=rows, steps=(1,), count=100, metrics=["nll"])
    assert 3 < found.rows[0]["nll"] < 8
