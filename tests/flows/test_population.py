"""Weights and systematic resampling: each particle goes on as often as its weight says, the mean weight is kept."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.common.randomness import generator, sample_generators
from fewstep.flows.population import Particles, Population, systematic

F64 = torch.float64


@pytest.fixture
def weights() -> Tensor:
    return torch.tensor([0.05, 0.0, 0.45, 0.2, 0.3], dtype=F64)


def test_each_goes_on_as_often_as_its_weight_says(weights: Tensor) -> None:
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    rows = systematic(weights.log().expand(1000, 5), u)
    counts = torch.nn.functional.one_hot(rows, 5).sum(1).double()
    torch.testing.assert_close(counts.mean(0), 5 * weights, rtol=0, atol=1e-9)
    assert ((counts - 5 * weights).abs() < 1).all()  # rounded up or down, no more
    assert not counts[:, 1].any()


def test_a_draw_is_by_weight(weights: Tensor) -> None:
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    rows = systematic(weights.log().expand(1000, 5), u, count=1)
    torch.testing.assert_close(torch.bincount(rows[:, 0], minlength=5) / 1000.0, weights.float(), rtol=0, atol=1e-3)
    x = torch.arange(10.0)[:, None]
    each = torch.full((10,), -math.inf)
    each[3] = each[9] = 0.0
    none = torch.zeros(0)
    assert Particles(x, each, none, none, torch.zeros(2)).draw(generator(0)).tolist() == [[3.0], [9.0]]


def test_weights_gather_until_they_are_resampled_and_then_go_into_the_normalizer() -> None:
    first, second = torch.tensor([[0.1, 0.2, 0.3, 0.4], [9.0, 0.0, 0.0, 0.0]], dtype=F64), torch.rand(8, dtype=F64)
    population = Population(8, 2, 0.5, first, generator(0))
    population.weigh(first.flatten())
    rows = population.resample()
    assert rows[:4].tolist() == [0, 1, 2, 3]  # enough are effective
    assert rows[4:].tolist() == [4, 4, 4, 4]
    population.weigh(second)
    particles = population.particles(torch.zeros(8, 1))
    kept, renewed = first[0] + second[:4], second[4:]
    mean = [kept.exp().mean().log(), first[1].exp().mean().log() + renewed.exp().mean().log()]
    torch.testing.assert_close(particles.log_normalizer, torch.stack(mean))
    torch.testing.assert_close(particles.log_weights, torch.cat([kept.log_softmax(0), renewed.log_softmax(0)]))
    assert particles.ancestors.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert particles.unique.tolist() == [4, 1]
    w = first.softmax(1)
    torch.testing.assert_close(particles.ess[0], 1 / w.square().sum(1))
    assert particles.ess.shape == (2, 2)


@pytest.mark.parametrize("least", [0.0, 1.0])
def test_never_and_always(least: float) -> None:
    population = Population(6, 1, least, torch.zeros(1), generator(0))
    population.weigh(torch.arange(6.0))
    moved = population.resample().tolist() != list(range(6))
    assert moved == bool(least)


def test_the_mean_is_by_weight_in_each_population() -> None:
    log_weights = torch.tensor([0.25, 0.75, 0.5, 0.5]).log()
    particles = Particles(torch.zeros(4, 2), log_weights, torch.ones(1, 2), torch.arange(4), torch.zeros(2))
    values = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 1.0], [3.0, 3.0]])
    assert particles.mean(values).tolist() == [[1.0, 3.0], [2.0, 2.0]]
    assert particles.mean(values[:, 0]).tolist() == [1.0, 2.0]


def test_a_population_is_resampled_by_the_generator_of_its_first_row() -> None:
    def resampled(rows: range) -> Tensor:
        population = Population(len(rows), len(rows) // 8, 1.0, torch.zeros(1), sample_generators(0, rows))
        population.weigh(torch.arange(float(len(rows))) % 8)
        return population.resample()

    both = resampled(range(16))
    assert torch.equal(both[8:] - 8, resampled(range(8, 16)))
    assert not torch.equal(both[:8], both[8:] - 8)
