"""A condition of several numbers, any of which may be unknown."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import FlowMap, FlowMatching, Guided, NetworkField, fit, load, sample
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Dropped
from fewstep.flows.signature import takes
from fewstep.networks import MLP
from fewstep.runs.datasets import make_data
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

NAN = float("nan")


def test_a_number_that_is_not_known_is_nan() -> None:
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=2, vector=3)
    x, t = torch.randn(4, 2), torch.rand(4)
    told = torch.randn(4, 3)
    nothing = torch.full((4, 3), NAN)
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t, vector=nothing))
        some = told.clone()
        some[:, 1] = NAN
        assert len({float(network(x, t, vector=v).sum()) for v in (told, some, nothing, 0 * told)}) == 4
        # Nothing of a number that is not known is left.
        weight: Any = network.vector
        weight.weight[:, 1] = 1e9
        assert network(x, t, vector=some).abs().max() < 1e3
        field = NetworkField(network)
        guided = Guided(field, 2.5, null={"vector": NAN})
        both = field(x, t, vector=nothing) + 2.5 * (field(x, t, vector=told) - field(x, t, vector=nothing))
        torch.testing.assert_close(guided(x, t, vector=told), both)
        student = FlowMap.from_field(field, guidance=True)
        assert torch.equal(student.velocity(x, t, vector=told), field(x, t, vector=told))
    for wrong in (told[:, :2], told[:2], told[0]):
        with pytest.raises(ValueError, match=r"vector of shape .* for an MLP made with vector=3: \(B, 3\) is needed"):
            network(x, t, vector=wrong)
    plain = MLP(2)
    assert "vector" not in plain.config
    assert takes(field, "vector")
    with pytest.raises(ValueError, match="for an MLP made with vector=0"):
        plain(x, t, vector=told)


@pytest.mark.takes_seconds
def test_a_gaussian_about_the_vector() -> None:
    """x ~ N(v, 0.1^2), v ~ N(0, I), dropped in a quarter of the rows: with v samples lie about it, without they are
    N(0, 1.01), and what is in between is told by one of its numbers."""
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(4000, 2, generator=draw)
    data = Dropped(ArrayData(v + 0.1 * torch.randn(4000, 2, generator=draw), {"vector": v}), 0.25, {"vector": NAN})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        field = NetworkField(MLP(2, width=64, depth=3, vector=2))
    fit(field, FlowMatching(), data, steps=400, batch=128, lr=5e-3, ema=None, quiet=True)
    z, told = torch.randn(1000, 2, generator=draw), v[:1000]
    assert (sample(field, z, 20, vector=told) - told).square().mean().sqrt() < 0.3
    free = sample(field, z, 20, vector=torch.full_like(told, NAN))
    assert abs(free.std() - math.sqrt(1.01)) < 0.15
    assert (free - told).square().mean().sqrt() > 1.2


def test_whole_numbers_have_no_nan() -> None:
    labelled = ArrayData(torch.randn(4, 2), {"class_labels": torch.arange(4)})
    with pytest.raises(ValueError, match="null: class_labels is nan, and the condition class_labels has whole numbers"):
        Dropped(labelled, 1.0, {"class_labels": NAN}).rows(torch.arange(4), torch.Generator())
    guided = Guided(NetworkField(MLP(2, width=8, classes=3)), 2.0, null={"class_labels": 2.5})
    with pytest.raises(ValueError, match=r"null: class_labels is 2\.5"):
        guided(torch.randn(2, 2), 0.5, class_labels=torch.tensor([0, 1]))


@pytest.mark.takes_seconds
def test_a_run_and_its_export_know_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    np.savez("told.npz", data=draw.normal(size=(16, 2)), vector=draw.normal(size=(16, 3)))
    recipe = {
        "name": "told", "data": {"name": "told.npz", "conditions": ["vector"]}, "objective": "FlowMatching",
        "student": {"network": "mlp", "options": {"width": 16, "depth": 2, "vector": 3}},
        "drop": {"null": {"vector": NAN}},
        "training": {"steps": 2, "batch": 8, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    run(load_recipe(recipe), Path("run"))
    again = load_recipe("run")  # NaN, which is not itself, is the same recipe all the same
    assert again.drop is not None
    assert again.drop.null == {"vector": "nan"}
    run(again, Path("run"))
    data = make_data(load_recipe({**recipe, "drop": {"share": 1, "null": {"vector": 0.5}}}), None, None)
    assert data.rows(torch.arange(3), generator(0)).cond["vector"].eq(0.5).all()
    assert main(["sample", "run", "--count", "4", "--steps", "2", "--out", "x.npz"]) == 0
    found = np.load("x.npz")
    np.testing.assert_allclose(found["vector"], np.load("told.npz")["vector"][:4], rtol=1e-6)
    assert main(["export", "run", "out"]) == 0
    x, told = torch.randn(4, 2), torch.from_numpy(found["vector"])
    models: list[Any] = [load("run"), load("out")]
    with torch.no_grad():
        assert torch.equal(*(model(x, 0.3, vector=told) for model in models))
