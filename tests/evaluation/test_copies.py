"""Whether samples are copies of training rows, in closed form and through ``evaluate``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.arrays import ArrayData
from fewstep.evaluation import copies, inputs, measure
from fewstep.evaluation.copies import comparable, memorisation, nearness
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.points import quantiles
from fewstep.flows.exact import GaussianField
from fewstep.flows.maps import FlowMap


def uniform(rows: int, dims: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nearness_by_hand():
    training = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 10.0], [0.0, 10.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0], [0.0, 10.0], [0.0, 9.0]])
    assert nearness(x, training).tolist() == pytest.approx([1 / 2, 0, 4 / 5, 0, 1])


@pytest.mark.parametrize("dims", [1, 2, 4])
def test_nearness_of_fresh_draws_is_a_power_of_its_share(dims: int):
    # Where density is flat, a share r^D of the rows has d1 / d2 below r.
    found = nearness(uniform(4000, dims), uniform(30_000, dims, seed=1))
    for share in (0.05, 0.25, 0.5):
        assert float((found <= share ** (1 / dims)).double().mean()) == pytest.approx(share, abs=0.03)


def test_copies_are_told_from_fresh_draws_and_from_blur():
    training, held_out, fresh = uniform(8000, 6), uniform(4000, 6, 1), uniform(4000, 6, 2)
    assert memorisation(training[:1000], held_out, training) == 1.0
    # Of fresh draws the share that was chosen, with a standard deviation of sqrt(2 share (1 - share) / 4000).
    for share in (0.05, 0.2):
        noise = math.sqrt(2 * share * (1 - share) / 4000)
        assert memorisation(fresh, held_out, training, share) == pytest.approx(share, abs=4 * noise)
    half = torch.cat([training[:500], fresh[:500]])
    assert memorisation(half, held_out, training) == pytest.approx(0.525, abs=0.02)
    assert memorisation(training[:1000] + 0.01 * (uniform(1000, 6, 3) - 0.5), held_out, training) > 0.99
    # Drawn together, as by blur: near to training rows, by distance, but to none in particular.
    dull = 0.5 + 0.1 * (fresh - 0.5)
    assert memorisation(dull, held_out, training) < 0.1


def test_no_block_of_rows_changes_it_and_a_copy_is_exact_far_from_the_origin(monkeypatch: pytest.MonkeyPatch):
    x, training = uniform(50, 3), uniform(333, 3, 1)
    whole = nearness(x, training)
    for block in (1, 7, 332):
        monkeypatch.setattr(copies, "_BLOCK", block)
        torch.testing.assert_close(nearness(x, training), whole)
    assert nearness(training + 1e4, training + 1e4).max() == 0.0


def test_large_images_are_compared_by_means_of_squares():
    x = torch.arange(2 * 64 * 64.0).view(1, 2, 64, 64)
    assert comparable(x).shape == (1, 2, 32, 32)
    assert comparable(x)[0, 0, 0, 0] == x[0, 0, :2, :2].mean()
    assert comparable(torch.zeros(1, 3, 33, 20)).shape == (1, 3, 17, 10)
    assert torch.equal(comparable(x[..., :32, :32]), x[..., :32, :32])
    assert torch.equal(comparable(x[0, 0]), x[0, 0])


@pytest.mark.parametrize("shapes", [((3, 2), (9, 3)), ((3, 2), (1, 2))])
def test_rows_that_cannot_be_near(shapes: Any):
    with pytest.raises(ValueError, match=r"2 rows of one shape are needed"):
        nearness(*(torch.zeros(shape) for shape in shapes))


class Given(nn.Module):
    """The average velocity of a map to given rows, the i-th for the i-th sample of a batch."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return (self.rows[: len(x)] - x) / (t - s)[:, None]


@pytest.mark.parametrize("is_copy", [True, False])
def test_evaluate_tells_copies_from_fresh_rows(is_copy: bool):
    field = GaussianField(torch.zeros(3), torch.eye(3))
    training, data, fresh = (field.data(n, torch.Generator().manual_seed(n)) for n in (3000, 2400, 1100))
    model = FlowMap(Given(training if is_copy else fresh))
    options: dict[str, Any] = {"data": data, "steps": (1,), "count": 1100, "batch": 1100}
    found = evaluate(model, training=training, **options)
    assert list(found.rows[0]) == ["model", "steps", "nfe", "sliced_w2", "energy", "memorisation"]
    assert found.rows[0]["memorisation"] == pytest.approx(1.0 if is_copy else 0.05, abs=0.04)
    assert found.floor["memorisation"] == pytest.approx(0.05, abs=0.04)
    assert found.facts["training"] == 3000
    alone = evaluate(model, training=training, metrics=["memorisation"], **options)
    assert list(alone.rows[0].values())[3:] == [found.rows[0]["memorisation"]]
    without = evaluate(model, **options)
    assert "training" not in without.facts
    assert without.rows[0].items() <= found.rows[0].items()


def test_it_is_the_quantile_of_held_out_rows_and_of_the_first_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_HELD_OUT", 5)
    monkeypatch.setattr(measure, "_COPIES", 25)
    training, data = uniform(90, 2).float(), uniform(100, 2, 1).float()
    samples = torch.cat([training[:10], uniform(30, 2, 2).float()])
    found = evaluate(
        FlowMap(Given(samples)), data=data, training=training, steps=(1,), count=40, batch=40, metrics=["memorisation"]
    )
    held_out = data[torch.randperm(100, generator=inputs.generator(0, inputs._ROWS))[:5]]
    (limit,) = quantiles(nearness(held_out, training), (0.05,))
    expected = float((nearness(samples[:25], training) <= limit).double().mean())
    assert found.rows[0]["memorisation"] == expected
    assert expected >= 0.4


def test_of_many_training_rows_some_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    data = ArrayData(torch.zeros(500, 2, 4))
    assert torch.equal(inputs.trained_rows(data, 0), torch.arange(500))
    monkeypatch.setattr(inputs, "_MEMORY", 32 * 100)
    some = inputs.trained_rows(data, 0)
    assert len(some) == 100
    assert torch.equal(some, some.sort().values)
    assert len(some.unique()) == 100
    assert not torch.equal(some, inputs.trained_rows(data, 1))
    monkeypatch.setattr(inputs, "_MOST", 7)
    assert len(inputs.trained_rows(data, 0)) == 7


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (torch.zeros(9, 3), r"training \(3,\) and data \(2,\) differ in the shape of a sample"),
        (torch.zeros(1, 2), "training has 1 rows to be near to"),
    ],
)
def test_training_rows_that_cannot_be_are_refused_at_once(training: Tensor, message: str):
    class Untouched(nn.Module):
        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        evaluate(FlowMap(Untouched()), data=torch.zeros(9, 2), training=training)
    with pytest.raises(ValueError, match=r"'memorisation' cannot be had here.* training rows that are not the data"):
        evaluate(FlowMap(Untouched()), data=torch.zeros(9, 2), metrics=["memorisation"])
