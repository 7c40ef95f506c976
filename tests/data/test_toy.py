"""The densities of the plane: what they draw against their closed forms."""

import math

import pytest
import torch
from PIL import Image

from fewstep.data import densities, load_data
from fewstep.data.toy import silhouette, swiss_roll, two_moons
from fewstep.flows import exact

N = 200_000
NAMES = ["checkerboard", "two-moons", "eight-gaussians", "spiral", "pinwheel", "swiss-roll", "silhouette"]


def points(toy, n=N, seed=0):
    return toy.rows(torch.arange(n), torch.Generator().manual_seed(seed)).data


@pytest.mark.parametrize("name", NAMES)
def test_mean_zero_and_standard_deviation_one(name):
    toy = load_data(name)
    x = points(toy, 1_000_000)
    assert x.shape == (1_000_000, 2)
    assert x.dtype == torch.float32
    assert toy.shape == (2,)
    assert toy.size is None
    # The mean of so many points strays by 0.001, the variance by at most 0.0015.
    assert x.mean(0).abs().max() < 0.004
    # The heart and the spiral keep their proportions: only the mean of its variances is 1.
    var = x.double().var(0).mean(0, keepdim=True) if name in ("silhouette", "spiral") else x.double().var(0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=0.006, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_everything(name):
    toy = load_data(name)
    assert torch.equal(points(toy, 100, seed=3), points(toy, 100, seed=3))
    assert not torch.equal(points(toy, 100, seed=3), points(toy, 100, seed=4))


@pytest.mark.parametrize("make", [two_moons, swiss_roll])
def test_scale_accounts_for_the_noise(make):
    torch.testing.assert_close(points(make(noise=1.0)).var(0), torch.ones(2), atol=0.015, rtol=0)


def test_checkerboard_boxes_are_the_board_of_the_closed_form():
    boxes = densities.checkerboard().sides
    assert boxes.shape == (8, 2, 2)
    assert boxes.dtype == torch.float64
    side = math.sqrt(3) / 2
    torch.testing.assert_close(boxes[..., 1] - boxes[..., 0], torch.full((8, 2), side, dtype=torch.float64))
    cells = (boxes[..., 0] / side + 2).round().int()
    assert sorted(map(tuple, cells.tolist())) == [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    # Uniform within boxes of equal size: the variance of an axis is that of the centres and side^2 / 12.
    variance = boxes.mean(-1).square().mean(0) + side**2 / 12
    torch.testing.assert_close(variance, torch.ones(2, dtype=torch.float64))


def test_checkerboard_fills_each_box_evenly_and_nothing_else():
    x, boxes = points(load_data("checkerboard")), densities.checkerboard().sides
    inside = ((x[:, None] >= boxes[..., 0] - 1e-6) & (x[:, None] <= boxes[..., 1] + 1e-6)).all(-1)
    assert inside.any(1).all()
    assert (inside.float().mean(0) - 1 / 8).abs().max() < 0.004  # five standard deviations
    place = (x - boxes[0, 0, 0]) / (math.sqrt(3) / 2) % 1
    counts = torch.histc(place[:, 0], 10, 0, 1) / N
    assert (counts - 0.1).abs().max() < 0.004


def test_eight_gaussians_sit_on_a_circle():
    toy, field = load_data("eight-gaussians"), exact.eight_gaussians()
    torch.testing.assert_close(field.means.norm(dim=1), torch.full((8,), 8 / math.sqrt(33)))
    nearest = torch.cdist(points(toy), field.means).min(1)
    assert (nearest.indices.bincount() / N - 1 / 8).abs().max() < 0.004
    # Mean squared distance to the own centre: 2 scale^2.
    assert nearest.values.square().mean().item() == pytest.approx(2 * field.scales[0].item() ** 2, rel=0.02)


def test_the_heart_is_two_lobes_over_a_point():
    x = points(load_data("silhouette"))
    assert x[:, 0].mean().abs() < 0.01
    tip, lobes = x[x[:, 1] < -2], x[x[:, 1] > 1.5]
    assert tip[:, 0].abs().max() < 0.5
    assert (lobes[:, 0].abs() > 0.3).float().mean() > 0.95  # the notch between them


def test_silhouette_of_dark_pixels_is_uniform_and_upright(tmp_path):
    # An L: a column of 4 dark pixels and one to the right at its foot.
    picture = Image.new("L", (3, 5), 255)
    for pixel in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]:
        picture.putpixel(pixel, 20)
    picture.save(tmp_path / "L.png")
    centres = torch.tensor([[0.0, 0], [0, -1], [0, -2], [0, -3], [1, -3]])
    scale = (centres.var(0, correction=0).mean() + 1 / 12).sqrt()
    for toy in (silhouette(picture), silhouette(tmp_path / "L.png")):
        x = points(toy) * scale + centres.mean(0)
        away = (x[:, None] - centres).abs().amax(-1)
        nearest = away.min(1)
        assert nearest.values.max() < 0.5 + 1e-5
        assert (nearest.indices.bincount() / N - 1 / 5).abs().max() < 0.005
        assert nearest.values.median().item() == pytest.approx(0.5 * math.sqrt(0.5), abs=0.005)


def test_silhouette_takes_opaque_pixels_where_some_are_transparent():
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 2, 8))  # white, but opaque: 2 wide, 8 high
    x = points(silhouette(picture))
    assert (x[:, 1].var() / x[:, 0].var()).item() == pytest.approx(16, rel=0.02)


def test_silhouette_without_a_shape_says_so():
    with pytest.raises(ValueError, match="no opaque or dark pixel"):
        silhouette(Image.new("L", (4, 4), 255))
