"""Noise paired with data by optimal transport: the best of all pairings, with nothing lost and no condition moved."""

from copy import deepcopy
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from toys.training import Gaussian, Rows

from fewstep.common.randomness import generator, normal
from fewstep.data import ArrayData
from fewstep.data.batch import Batch, Data
from fewstep.data.couplings import Coupled, couple
from fewstep.flows.sampling import sample
from fewstep.generation.reflow import make_pairs
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.datasets import make_data
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.batches import Batches

SMALL = {
    "name": "small",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "checkerboard",
    "coupling": "ot",
    "objective": "FlowMatching",
    "training": {"steps": 4, "batch": 32, "chunk": 16, "quiet": True},
    "evaluation": {"count": 0},
}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_POINTS", 32)
    monkeypatch.setattr(judge, "_POINTS", 32)


def length(noise: torch.Tensor, data: torch.Tensor) -> float:
    return float((noise - data).double().square().sum())


@pytest.mark.parametrize(("rows", "shape"), [(5, (2,)), (6, (1, 2, 3)), (6, (1,))])
def test_no_permutation_is_shorter(rows: int, shape: tuple[int, ...]) -> None:
    draw = generator(rows, *shape)
    noise, data = torch.randn(2, rows, *shape, generator=draw)
    shortest = min(length(noise[list(order)], data) for order in permutations(range(rows)))
    assert length(couple(noise, data), data) == pytest.approx(shortest, rel=1e-6)
    assert length(noise, data) > 1.01 * shortest


def test_on_the_line_the_order_is_kept() -> None:
    """In one dimension, optimal transport sorts."""
    noise, data = torch.randn(2, 200, 1, generator=generator(0))
    coupled = couple(noise, 3 + data.exp())
    torch.testing.assert_close(coupled.flatten()[data.flatten().argsort()], noise.flatten().sort().values)


def test_the_assignment_is_in_float64() -> None:
    """Far from the origin, float32 products are all alike."""
    noise = torch.tensor([[0.0, 1e-4], [0.0, 0.0], [0.0, 2e-4]])
    data = torch.tensor([[1e6, 0.0], [1e6, 1.0], [1e6, 2.0]])
    assert couple(noise, data)[:, 1].tolist() == pytest.approx([0.0, 1e-4, 2e-4])
    shifted = noise + torch.tensor([1e3, 0.0])
    assert couple(shifted, data)[:, 1].tolist() == pytest.approx([0.0, 1e-4, 2e-4])


def test_every_row_is_kept_and_conditions_stay() -> None:
    index, data = torch.randperm(1000, generator=generator(1))[:128], Rows(1000)
    batch = Coupled(data).rows(index, generator(7))
    draw = generator(7)
    plain = data.rows(index, draw)  # the data sees the generator first, as it does without a coupling
    noise = normal(plain.data, draw)
    assert torch.equal(batch.data, plain.data)
    assert torch.equal(batch.cond["row"], index)
    assert batch.noise is not None
    assert not torch.equal(batch.noise, noise)
    assert torch.equal(batch.noise.sort(0).values, noise.sort(0).values)
    assert length(batch.noise, batch.data) < 0.7 * length(noise, batch.data)


def test_noise_is_still_standard_normal() -> None:
    coupled = Coupled(Gaussian())
    noise = torch.cat([coupled.rows(torch.zeros(64), generator(i)).noise for i in range(300)])  # pyright: ignore
    spread = 1 / len(noise) ** 0.5
    assert noise.mean(0).abs().max() < 4 * spread
    assert (noise.T.cov() - torch.eye(2)).abs().max() < 6 * spread
    assert abs(float((noise < 0.5).double().mean()) - 0.6915) < 3 * spread


def test_rows_do_not_depend_on_the_number_of_processes() -> None:
    data = Coupled(Rows(500))
    whole, _ = Batches(data, 64, 16, seed=3).micro(5, 0)
    parts = [
        Batches(data, 64, 16, seed=3, accumulate=2, rank=rank, processes=2).micro(5, i)[0]
        for rank in (0, 1)
        for i in (0, 1)
    ]
    for name in ("data", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    # Within a chunk no permutation is better, over two chunks one is.
    assert whole.noise is not None
    first = slice(16)
    assert torch.equal(couple(whole.noise[first], whole.data[first]), whole.noise[first])
    assert length(couple(whole.noise, whole.data), whole.data) < length(whole.noise, whole.data) - 1e-3


def test_more_rows_than_a_group_are_assigned_in_groups() -> None:
    index = torch.arange(30)
    batch = Coupled(Rows(30), group=10).rows(index, generator(0))
    whole = Coupled(Rows(30)).rows(index, generator(0))
    assert batch.noise is not None
    assert whole.noise is not None
    for part, data in zip(batch.noise.split(10), batch.data.split(10), strict=True):
        assert torch.equal(couple(part, data), part)
    assert length(whole.noise, whole.data) < length(batch.noise, batch.data)
    assert torch.equal(whole.noise.sort(0).values, batch.noise.sort(0).values)


def test_what_else_the_data_says_is_passed_on() -> None:
    pictures = torch.arange(12 * 4, dtype=torch.uint8).view(12, 1, 2, 2)
    data = Coupled(ArrayData(pictures, {"class_labels": np.arange(12)}, classes=("a", "b")))
    assert isinstance(data, Data)
    assert (data.shape, data.size, data.classes) == ((1, 2, 2), 12, ("a", "b"))
    assert data.cond["class_labels"].tolist() == list(range(12))
    assert torch.equal(data.denormalize(torch.ones(1)), torch.tensor([255.0]))
    assert getattr(Coupled(Gaussian()), "cond", None) is None
    assert deepcopy(data).size == 12


def test_what_cannot_be_coupled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown coupling 'OTT': did you mean 'ot'\? Known: ot"):
        Coupled(Gaussian(), "OTT")
    with pytest.raises(ValueError, match=r"comes with its own: say coupling: independent"):
        Coupled(Coupled(Gaussian()))
    with pytest.raises(ValueError, match=r"group is 0"):
        Coupled(Gaussian(), group=0)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2\), data \(4, 2\)"):
        couple(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"not finite"):
        couple(torch.zeros(3, 2), torch.full((3, 2), torch.nan))

    class Paired(Gaussian):
        def rows(self, index: torch.Tensor, generator: torch.Generator) -> Batch:
            return Batch(torch.zeros(len(index), 2), noise=torch.ones(len(index), 2))

    with pytest.raises(ValueError, match=r"the data \(Paired\) comes with its own"):
        Coupled(Paired()).rows(torch.arange(3), generator(0))


def test_the_recipe_couples() -> None:
    recipe = load_recipe(SMALL)
    data = make_data(recipe, None, None)
    assert isinstance(data, Coupled)
    assert data.rows(torch.zeros(4), generator(0)).noise is not None
    plain = load_recipe(SMALL, {"coupling": "independent"})
    assert not isinstance(make_data(plain, None, None), Coupled)
    assert recipe.fingerprint()["coupling"] == "ot"
    assert recipe.fingerprint() != plain.fingerprint()
    assert load_recipe({key: value for key, value in SMALL.items() if key != "coupling"}) == plain
    with pytest.raises(ValueError, match=r"coupling is 'sinkhorn': input should be 'independent', 'ot' or"):
        load_recipe(SMALL, {"coupling": "sinkhorn"})


def test_a_run_trains_on_coupled_rows_and_keeps_its_coupling(tmp_path: Path) -> None:
    losses = {}
    for name in ("ot", "independent"):
        done = run(load_recipe(SMALL, {"coupling": name}), tmp_path / name)
        losses[name] = done.result.losses["loss"]
    assert losses["ot"] < 0.9 * losses["independent"]
    with pytest.raises(ValueError, match=r"another recipe: coupling is absent there and ot here"):
        run(load_recipe(SMALL), tmp_path / "independent")


def test_a_run_on_coupled_rows_has_no_score(tmp_path: Path) -> None:
    run(load_recipe(SMALL), tmp_path / "coupled")
    field = load(tmp_path / "coupled")
    assert field.coupling == "ot"
    with pytest.raises(ValueError, match="trained with the coupling 'ot'"):
        sample(field, torch.randn(3, 2), 2, eps="kappa")
    make_pairs(field, tmp_path / "pairs", 32, steps=2)
    run(load_recipe({**SMALL, "data": str(tmp_path / "pairs"), "coupling": "independent"}), tmp_path / "straight")
    assert load(tmp_path / "straight").coupling == "reflow pairs"
    run(load_recipe(SMALL, {"coupling": "independent"}), tmp_path / "free")
    assert sample(load(tmp_path / "free"), torch.randn(3, 2), 2, eps="kappa").isfinite().all()


def test_a_run_from_before_there_was_a_coupling_goes_on(tmp_path: Path) -> None:
    run(load_recipe(SMALL, {"coupling": "independent"}), tmp_path)
    file = tmp_path / "recipe.yaml"
    old = file.read_text().replace("coupling: independent\n", "")
    assert old != file.read_text()
    file.write_text(old)
    assert run(load_recipe(tmp_path, {"steps": "6"}), tmp_path).result.step == 6


def test_within_labels_noise_stays_normal_for_each_label():
    """Two classes at +-2: by ``ot`` the noise of a class is shifted towards it, within labels it is not; what is left
    of the straightening is the less for it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (64 * 300,), generator=generator)
    data = 4.0 * labels[:, None] - 2 + 0.3 * torch.randn(len(labels), 1, generator=generator)
    found = {}
    for coupling in ("ot", "ot-within-labels"):
        coupled = Coupled(ArrayData(data, {"class_labels": labels}), coupling, group=64)
        batch = coupled.rows(torch.arange(len(labels)), torch.Generator().manual_seed(1))
        of_one = batch.noise[batch.cond["class_labels"] == 1]
        found[coupling] = float(of_one.mean()), float(of_one.std()), float((batch.data - batch.noise).square().mean())
        assert torch.equal(batch.data, data)
    assert found["ot"][0] == pytest.approx(0.79, abs=0.05)
    assert found["ot-within-labels"][0] == pytest.approx(0.0, abs=0.03)
    assert found["ot-within-labels"][1] == pytest.approx(1.0, abs=0.03)
    assert found["ot"][2] < 0.5 * found["ot-within-labels"][2] < 0.5 * 5.2
    with pytest.raises(ValueError, match="ot-within-labels needs data with class labels"):
        Coupled(ArrayData(data), "ot-within-labels").rows(torch.arange(4), torch.Generator())
