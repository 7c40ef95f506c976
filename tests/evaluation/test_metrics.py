"""Distances between point clouds, against closed forms."""

import math

import pytest
import torch

from fewstep.data.densities import Boxes, checkerboard
from fewstep.data.toy import checkerboard as board
from fewstep.evaluation import points
from fewstep.evaluation.points import (
    energy_distance,
    error_quantiles,
    histogram_kl,
    mmd,
    outside,
    rmse,
    sliced_wasserstein,
)
from fewstep.flows.exact import CheckerboardField


def normal(rows: int, dims: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantiles(rows: int) -> torch.Tensor:
    """A normal sample without noise: one point in the middle of each of ``rows`` equally likely slices, (rows, 1)."""
    return torch.special.ndtri((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[:, None]


def test_a_few_rows_that_are_far_off_rule_the_rmse_alone():
    x, y = torch.zeros(1001, 2), torch.zeros(1001, 2)
    y[:, 0] = torch.arange(1001) / 1e4
    y[-5:, 0] = 4.0
    assert rmse(x, y) > 0.28
    assert error_quantiles(x, y) == pytest.approx([0.05, 0.099], abs=1e-6)
    away = (x - y).double().norm(dim=1)
    shares = [0.0, 0.123, 0.5, 0.99, 1.0]
    expected = torch.quantile(away, torch.tensor(shares, dtype=torch.float64)).tolist()
    assert error_quantiles(x, y, shares) == pytest.approx(expected, abs=1e-12)
    assert error_quantiles(x[:1], y[:1] + 1) == pytest.approx([2**0.5] * 2)


def test_rmse_sums_over_components():
    x = torch.zeros(10, 2, 3)
    assert rmse(x, x + 0.5) == pytest.approx(0.5 * math.sqrt(6), abs=1e-12)
    y = x.clone()
    y[0, 0, 0] = 4.0  # one row of ten is off by 4: the root of 16 / 10
    assert rmse(x, y) == pytest.approx(math.sqrt(1.6), abs=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_sliced_wasserstein_of_a_shift(dims: int):
    x = normal(300, dims)
    shift = torch.arange(1, dims + 1, dtype=torch.float64)
    # E over directions of (d . theta)^2 is |d|^2 / D; 4000 directions leave a few per cent of noise.
    expected = float(shift.norm()) / math.sqrt(dims)
    assert sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(expected, rel=0.03)


def test_sliced_wasserstein_of_a_scaling():
    x = normal(500, 3)
    # Along any direction the sorted order is kept, so W2^2 is the mean of (x . theta)^2, and D times its mean |x|^2.
    expected = math.sqrt(float(x.square().sum(dim=1).mean()) / 3)
    assert sliced_wasserstein(x, 2 * x, projections=4000) == pytest.approx(expected, rel=0.02)


def test_sliced_wasserstein_is_blind_to_order_dtype_and_block(monkeypatch: pytest.MonkeyPatch):
    x, y = normal(200), normal(150, seed=1) * 1.5
    first = sliced_wasserstein(x, y, projections=50, seed=3)
    assert first == pytest.approx(sliced_wasserstein(x.flip(0), y, projections=50, seed=3), abs=1e-12)
    assert first == pytest.approx(sliced_wasserstein(y, x, projections=50, seed=3), abs=1e-12)
    assert first != sliced_wasserstein(x, y, projections=50, seed=4)
    monkeypatch.setattr(points, "_PROJECTIONS", 7)
    assert first == pytest.approx(sliced_wasserstein(x, y, projections=50, seed=3), abs=1e-12)
    assert sliced_wasserstein(x, x) == 0.0


def test_sliced_wasserstein_of_equal_and_unequal_numbers_agree():
    x, y = normal(200), normal(200, seed=1) * 1.5
    twice = torch.cat([y, y])  # the same distribution, by the other way of computing it
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(x, twice), rel=1e-9)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 1.0), (0.0, 0.5), (-1.2, 2.0)])
def test_sliced_wasserstein_of_two_gaussians(shift: float, scale: float):
    # Of N(0, I) and N(d, s^2 I), W2^2 along a direction is (d . theta)^2 + (s - 1)^2, and |d|^2 / D + (s - 1)^2 on
    # average.
    x, y = normal(20_000, 4), normal(20_000, 4, seed=1)
    expected = math.sqrt(shift**2 + (scale - 1) ** 2)
    assert sliced_wasserstein(x, scale * y + shift, projections=500) == pytest.approx(expected, rel=0.03, abs=0.02)


def test_sliced_wasserstein_sees_what_mean_and_variance_do_not():
    # Of N(0, 1) and of +-1, both of mean 0 and variance 1: W2^2 = E (|z| - 1)^2 = 2 - 2 sqrt(2 / pi).
    signs = torch.ones(2000, 1, dtype=torch.float64)
    signs[::2] = -1
    expected = math.sqrt(2 - 2 * math.sqrt(2 / math.pi))
    assert sliced_wasserstein(quantiles(2000), signs, projections=1) == pytest.approx(expected, rel=1e-3)


def test_outside_of_boxes_in_closed_form():
    boxes = Boxes(torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[2.0, 4.0], [0.0, 1.0]]]))
    points = torch.tensor([[0.5, 0.5], [3.0, 1.0], [1.5, 0.5], [0.5, 1.1], [4.0 + 5e-7, -5e-7], [4.0 + 1e-4, 0.0]])
    assert boxes.inside(points).tolist() == [True, True, False, False, True, False]
    assert outside(points, boxes.inside) == pytest.approx(0.5)


def test_outside_of_the_checkerboard():
    density, draw = checkerboard(), torch.Generator().manual_seed(0)
    points = density.draw(50_000, draw)
    cell = math.sqrt(3) / 2
    for inside in (density.inside, board().inside, CheckerboardField().inside):
        assert inside is not None
        assert outside(points, inside) == 0.0
        assert outside(points + torch.tensor([cell, 0.0]), inside) == 1.0
        assert outside(points + torch.tensor([cell / 4, 0.0]), inside) == pytest.approx(0.25, abs=0.01)
    # Half of a square that holds the board is filled.
    square = (torch.rand(50_000, 2, generator=draw) * 4 - 2) * cell
    assert outside(square, density.inside) == pytest.approx(0.5, abs=0.01)
    # A blur of h << cell takes h sqrt(2 / pi) / cell of the points over an edge, on each of two axes.
    h = 0.02
    blurred = points + h * torch.randn(points.shape, generator=draw)
    expected = 2 * h * math.sqrt(2 / math.pi) / cell
    assert outside(blurred, density.inside) == pytest.approx(expected, rel=0.06)


def test_energy_distance_of_two_points_each():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert energy_distance(x, y) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2, abs=1e-12)


def test_energy_distance_of_two_normals():
    # In one dimension, of N(0,1) and N(d,1): E|x - y| is the mean of a folded normal of variance 2.
    d = 1.5
    folded = math.sqrt(4 / math.pi) * math.exp(-(d**2) / 4) + d * math.erf(d / 2)
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    x = quantiles(2000)
    assert energy_distance(x, x + d) == pytest.approx(expected, abs=2e-3)


def test_mmd_of_two_normals():
    # E k(x, y) of N(0,1) and N(d,1) with the kernel of bandwidth h is h / sqrt(h^2 + 2) exp(-d^2 / (2 (h^2 + 2))).
    d, h = 1.0, 0.8
    same = h / math.sqrt(h**2 + 2)
    expected = 2 * same - 2 * same * math.exp(-(d**2) / (2 * (h**2 + 2)))
    x = quantiles(2000)
    y = x + d
    assert mmd(x, y, [h]) == pytest.approx(expected, abs=2e-3)
    assert mmd(x, y, [h, 2.0]) == pytest.approx((mmd(x, y, [h]) + mmd(x, y, [2.0])) / 2, abs=1e-12)


@pytest.mark.parametrize("distance", [energy_distance, mmd], ids=["energy", "mmd"])
def test_unbiased_at_equal_distributions(distance):
    # 30 points: the biased estimate would be near 2 E k / 30, some ten standard errors away.
    values = torch.tensor([distance(normal(30, 2, 2 * seed), normal(30, 2, 2 * seed + 1)) for seed in range(300)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))
    assert values.min() < 0


@pytest.mark.parametrize("distance", [energy_distance, mmd], ids=["energy", "mmd"])
def test_blocks_do_not_change_the_sum(distance, monkeypatch: pytest.MonkeyPatch):
    x, y = normal(101), normal(67, seed=1)
    whole = distance(x, y)
    monkeypatch.setattr(points, "_ROWS", 10)
    assert distance(x, y) == pytest.approx(whole, abs=1e-12)
    assert distance(y, x) == pytest.approx(whole, abs=1e-12)


def test_median_bandwidth_does_not_depend_on_scale():
    x, y = normal(100), normal(100, seed=1) + 1
    assert mmd(1000 * x, 1000 * y) == pytest.approx(mmd(x, y), rel=1e-9)


def test_histogram_kl_between_known_shares():
    centres = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    reference = centres.repeat_interleave(torch.tensor([5, 1, 1, 1]), dim=0)
    model = centres.repeat_interleave(torch.tensor([1, 1, 1, 1]), dim=0)
    box = [(0.0, 1.0), (0.0, 1.0)]
    expected = 5 / 8 * math.log(5 / 2) + 3 / 8 * math.log(1 / 2)
    assert histogram_kl(model, reference, bins=2, range=box) == pytest.approx(expected, abs=1e-8)
    assert histogram_kl(reference, reference, bins=2, range=box) == 0.0
    # The other direction is another number: the data come first.
    backwards = 1 / 4 * math.log(2 / 5) + 3 / 4 * math.log(2)
    assert histogram_kl(reference, model, bins=2, range=box) == pytest.approx(backwards, abs=1e-8)


def test_histogram_kl_counts_empty_bins_and_what_flies_off():
    reference = torch.tensor([[0.25], [0.75]])
    box = [(0.0, 1.0)]
    empty = histogram_kl(torch.tensor([[0.25], [0.25]]), reference, bins=2, range=box, epsilon=1e-6)
    assert empty == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-6), abs=1e-4)
    # Half of the model's points lie outside: each bin has half of its share left.
    outside = histogram_kl(torch.tensor([[0.25], [0.75], [9.0], [-9.0]]), reference, bins=2, range=box)
    assert outside == pytest.approx(math.log(2), abs=1e-8)


def test_histogram_kl_between_uniform_boxes():
    # Uniform on [0,1]^2 against uniform on [0,2] x [0,1]: log 2, plus the noise floor that the docstring states.
    x, y = torch.rand(2, 40_000, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 2
    floor = 400 * (1 / 20_000 + 1 / 40_000) / 2
    assert histogram_kl(x, y, bins=20, range=[(0, 1), (0, 1)]) == pytest.approx(math.log(2) + floor, abs=0.01)


def test_histogram_edges_belong_to_the_box():
    # The default box ends at the reference's own extremes: the largest point must be in the last bin, not outside.
    reference = torch.tensor([[0.0], [1.0]])
    assert histogram_kl(torch.tensor([[0.01], [0.99]]), reference, bins=2) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmse(torch.zeros(3, 2), torch.zeros(4, 2)), r"\(3, 2\) and y \(4, 2\)"),
        (lambda: energy_distance(torch.zeros(3, 2), torch.zeros(3, 5)), "x has 2 dimensions and y has 5"),
        (lambda: energy_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "at least 2"),
        (lambda: sliced_wasserstein(torch.zeros(3), torch.zeros(3)), r"\(N, D\)"),
        (lambda: mmd(normal(3), normal(3), [0.0]), "must be positive"),
        (lambda: histogram_kl(normal(3), normal(3), range=[(0, 1)]), "each of the 2 axes"),
        (lambda: histogram_kl(normal(3, 8), normal(3, 8)), "project the points"),
        (lambda: outside(torch.tensor([[math.nan, 0.0]]), checkerboard().inside), "1 of 1 rows of x are not finite"),
        (lambda: rmse(torch.tensor([[float("nan")], [1.0]]), torch.zeros(2, 1)), "1 of 2 rows of x are not finite"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.takes_seconds
def test_many_points_fit_in_memory():
    """12,000 points against 12,000: the matrix of all distances would take 1.2 GB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    energy_distance(normal(12_000), normal(12_000, seed=1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
