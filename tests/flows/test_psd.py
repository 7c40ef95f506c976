"""PSD models against numbers known from elsewhere, and their flow against the quantiles of the density."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Prior
from fewstep.flows.paths import Trigonometric
from fewstep.flows.psd import PSDField, orbital
from fewstep.networks import MLP

F64 = torch.float64


def pair() -> PSDField:
    """``(k(x, 1) - k(x, -1))^2``, which is 0 at 0."""
    return PSDField(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, -1.0]), 1.0)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)[:, None]


def test_integrals_of_one_bump_and_of_two():
    one = PSDField(torch.zeros(1, 1), torch.ones(1), 0.5)
    assert float(one.mass(column(0), column(1))) * one.normalizer == pytest.approx(0.7468241328, abs=1e-10)
    two = pair()
    assert two.normalizer == pytest.approx(2.1673930271, abs=1e-10)
    assert two.normalizer == pytest.approx(math.sqrt(math.pi / 2) * (2 - 2 * math.exp(-2)), abs=1e-12)
    assert float(two.mass(column(0), column(1))) == pytest.approx(0.2144130722, abs=1e-10)
    assert float(two.covariance) == pytest.approx(1.40652, abs=1e-5)


def test_the_density_has_its_mass_and_its_zeros():
    field = orbital()
    side = torch.linspace(-6, 6, 401, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    density = field.log_prob(grid).exp()
    cell = float(side[1] - side[0]) ** 2
    assert float(density.sum()) * cell == pytest.approx(1, abs=1e-9)
    inside = ((grid > 0.3) & (grid < 1.2)).all(1)  # by the midpoint rule, to the width of a cell
    edge = (side[1] - side[0]) / 2
    low, high = grid[inside].amin(0) - edge, grid[inside].amax(0) + edge
    assert float(field.mass(low[None], high[None])) == pytest.approx(float(density[inside].sum()) * cell, rel=2e-3)
    assert (field.log_prob(torch.stack([side, side], dim=1)) < -60).all()
    moments = grid.T @ (density[:, None] * grid) * cell
    torch.testing.assert_close(moments, torch.eye(2, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(field.covariance, torch.eye(2, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("move", [lambda field: field, lambda field: field.on(Trigonometric())])
def test_the_flow_takes_quantiles_to_quantiles(move: Callable[[Any], Any]):
    x = column(-1, -0.1, 0.3, 1.5)
    y = move(pair()).flow(x, 0.0, 1.0)
    torch.testing.assert_close(y, column(-1.29792, -0.51076, 0.76994, 1.59833), rtol=0, atol=1e-5)
    quantile = pair().mass(torch.full_like(y, -50), y)
    torch.testing.assert_close(quantile, torch.special.ndtr(x[:, 0]), rtol=0, atol=3e-9)


def test_a_psd_model_of_positive_weights_is_the_gaussian_mixture():
    centres = torch.tensor([[0.0, 0.0], [1.5, -0.5]], dtype=F64)
    weights = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=F64)
    field = PSDField(centres, weights, 0.8)
    mixture = fewstep.MixtureField(field.means, torch.full((3,), math.sqrt(field.variance), dtype=F64), field.signed)
    x, t = torch.randn(64, 2, generator=generator(0), dtype=F64), torch.rand(64, generator=generator(1), dtype=F64)
    torch.testing.assert_close(field(x, t), mixture(x, t), rtol=0, atol=1e-12)
    assert field(x.float(), t.float()).dtype == torch.float32


def test_velocities_are_finite_far_away_and_on_the_zeros():
    field = orbital()
    x = torch.tensor([[1e3, -2e3], [0.0, 0.0], [1.0, 1.0], [-40.0, 40.0]], dtype=F64)
    for t in (0.0, 0.5, 0.999, 1.0):
        assert field(x, t).isfinite().all()
    torch.testing.assert_close(field(x, 0.0), -x, rtol=0, atol=1e-9)  # E[data] - x


def test_samples_by_boxes_have_the_distribution():
    x = pair().data(4000, generator(0))
    inside = float(((x >= 0) & (x <= 1)).double().mean())
    assert inside == pytest.approx(0.2144, abs=4 * math.sqrt(0.2144 * 0.7856 / 4000))
    assert float(x.square().mean()) == pytest.approx(1.40652, abs=0.08)
    ranks = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    exact = pair().mass(torch.full_like(x, -50), x).sort().values
    assert float((exact - ranks).abs().max()) < 1.95 / math.sqrt(4000)  # Kolmogorov-Smirnov, p = .001
    assert torch.equal(pair().data(100, generator(1)), pair().data(100, generator(1)))


def test_a_fit_is_near_a_density_known_up_to_a_constant():
    def laplace(x: Tensor) -> Tensor:
        return 7 * (-x.abs().sum(1) / 1.5).exp()

    centres, points = torch.linspace(-10, 10, 33)[:, None], torch.linspace(-12, 12, 1001)[:, None]
    field = PSDField.fitted(laplace, centres, points, eta=2.0)
    x = torch.linspace(-20, 20, 8001, dtype=F64)[:, None]
    difference = (field.log_prob(x).exp() - laplace(x) / 21).abs().sum() * 0.005 / 2
    assert float(difference) < 0.0078  # total variation


@pytest.mark.takes_seconds
def test_a_map_of_it_in_one_call_without_data():
    field = orbital()
    noise = torch.randn(500, 2, generator=generator(0))
    truth = field.flow(noise, 0.0, 1.0, tolerance=1e-6)
    torch.manual_seed(0)
    student = fewstep.FlowMap(MLP(2, width=48, depth=3, times=2))
    objective = fewstep.ITVM(field, starts="own")
    ema = fewstep.fit(student, objective, Prior([2]), 250, batch=256, chunk=256, lr=5e-3, ema=0.98, quiet=True).ema

    def error(model: Any, calls: int) -> float:
        return float((fewstep.sample(model, noise, calls) - truth).square().sum(1).mean().sqrt())

    assert error(ema, 1) < 0.8 * error(field, 4)


def test_what_is_no_density_is_refused():
    centres = torch.tensor([[0.0], [1.0]])
    wrong: list[tuple[Any, float, str]] = [
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1.0, "eigenvalue -1: their density is negative somewhere"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1.0, "symmetric"),
        (torch.zeros(2), 1.0, "leave no mass"),
        (torch.ones(3), 1.0, r"\(2, 1\) and weights \(3, 3\)"),
        (torch.ones(2), 0.0, "eta is 0"),
    ]
    for weights, eta, message in wrong:
        with pytest.raises(ValueError, match=message):
            PSDField(centres, weights, eta)
    points = torch.linspace(-1, 1, 9)[:, None]
    densities: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda x: x[:, 0], r"negative at \(-1\): -1"),
        (lambda x: 1 / x[:, 0].abs(), r"not finite at \(0\)"),
        (lambda x: 0 * x[:, 0], "0 at all points"),
        (lambda x: x.abs(), r"gave \(9, 1\) for points \(9, 1\)"),
    ]
    for density, message in densities:
        with pytest.raises(ValueError, match=message):
            PSDField.fitted(density, centres, points, 1.0)


def test_the_command_line_samples_it(tmp_path: Any, capsys: Any):
    assert main(["sample", "orbital", "--count", "4", "--steps", "2", "--out", str(tmp_path / "x.npy")]) == 0
    assert "4 samples, 2 network calls each" in capsys.readouterr().out
