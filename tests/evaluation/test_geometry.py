"""The shape of trajectories, against curves and flows whose shape is known."""

import math

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.evaluation.geometry import curve_of, geometry
from fewstep.evaluation.plots import geometry_figure
from fewstep.evaluation.style import png
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Trigonometric
from fewstep.flows.times import step_grid

F64 = torch.float64


def noise_of(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def normal_data(*deviations: float, mean: float = 0.0) -> GaussianField:
    size = len(deviations)
    return GaussianField(torch.full((size,), mean, dtype=F64), torch.diag(torch.tensor(deviations, dtype=F64) ** 2))


# Curves


def test_a_half_circle():
    angle = torch.linspace(0, math.pi, 201, dtype=F64)
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1)
    curve = curve_of(torch.stack([circle, 3 * circle.flip(1)], dim=1))
    assert curve.length == pytest.approx(math.pi / 2, abs=1e-4)
    torch.testing.assert_close(curve.off_chord, angle.sin() / 2, rtol=0, atol=1e-9)
    # Variance along the chord 1/2, across it 1/2 - (2/pi)^2.
    across = 0.5 - 4 / math.pi**2
    expected = torch.tensor([0.5 / (0.5 + across), 1, 1], dtype=F64)
    torch.testing.assert_close(curve.planarity, expected, rtol=0, atol=5e-3)
    assert curve.plane.shape == (2, 201, 2)
    assert (curve.plane[:, 0, 0] < curve.plane[:, -1, 0]).all()  # from left to right, the ends below
    assert (curve.plane[:, 0, 1] < curve.plane[:, 100, 1]).all()


def test_a_helix_is_in_no_plane():
    angle = torch.linspace(0, 4 * math.pi, 400, dtype=F64)
    curve = curve_of(torch.stack([angle.cos(), angle.sin(), angle / 6], dim=1)[:, None])
    assert curve.planarity[1] < 0.9
    assert curve.planarity[2] == pytest.approx(1.0, abs=1e-12)


def test_what_stands_still_is_straight():
    curve = curve_of(torch.ones(5, 2, 3, dtype=F64))
    assert curve.length == 1.0
    assert curve.off_chord.tolist() == [0.0] * 5
    assert curve.planarity.tolist() == [1.0] * 3
    assert curve.plane.isfinite().all()


# Flows


def test_one_axis_goes_there_and_back():
    found = geometry(normal_data(0.5), noise_of(6, 1), times=400, candidates=4)
    # x_t = x_0 std_t, whose deviation falls to .4472 at t = .8 and rises to .5.
    low = 0.2**0.5
    assert found.state.length == pytest.approx(((1 - low) + (0.5 - low)) / 0.5, abs=1e-4)
    assert found.state.off_chord.max() < 1e-12
    assert found.state.planarity.tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    # std' = (.25 t - (1 - t)) / std, std'' = .25 / std^3.
    t = found.middles
    std = (0.25 * t**2 + (1 - t) ** 2).sqrt()
    expected = (0.25 / std**3) / ((1.25 * t - 1) / std).abs()
    away = (t - 0.8).abs() > 0.1  # where the velocity is 0 the quotient has no limit
    torch.testing.assert_close(found.curvature[away].double(), expected[away], rtol=1e-2, atol=1e-3)


def test_two_deviations_on_three_axes_are_a_plane():
    found = geometry(normal_data(0.1, 0.1, 2.0), noise_of(6, 3))
    assert found.state.planarity[1] == pytest.approx(1.0, abs=1e-9)
    assert found.state.planarity[0] < 0.999
    assert found.denoised.planarity[1] == pytest.approx(1.0, abs=1e-9)


def test_straight_in_one_set_of_coordinates_and_not_in_another():
    # A data point: x_t / t leaves it on a line, D_t stands still. Elsewhere on the trigonometric path x_t is bent.
    point = normal_data(1e-6, 1e-6, mean=1.0)
    for path_field in (point, point.on(Trigonometric())):
        found = geometry(path_field, noise_of(6, 2), times=24)
        assert found.denoised.length == 1.0
        assert found.denoised.off_chord.max() < 1e-5
        assert found.off_chord_scaled[1:].max() < 1e-5
        assert found.off_chord_scaled[0].isnan()
    assert geometry(point, noise_of(6, 2)).state.off_chord.max() < 1e-5
    assert found.state.off_chord.max() > 0.1


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_slope_is_the_order_of_the_solver(solver: str, order: int):
    field = normal_data(1.4, 0.7)
    found = geometry(field, noise_of(8, 2), times=48, candidates=48, steps=(12, 24, 48), solver=solver)
    assert found.slope == pytest.approx(-order, abs=0.2)
    assert [grid.steps for grid in found.few] == [12, 24, 48]


class Still(nn.Module):
    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Velocity(nn.Module):
    def __init__(self, field: VelocityField) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.field(x, t)


def test_a_map_beside_its_teacher_and_what_it_costs():
    teacher, labels = NetworkField(Velocity(normal_data(0.5, 1.5))), torch.arange(5)
    found = geometry(FlowMap(Still()), noise_of(5, 2), teacher, class_labels=labels)
    alone = geometry(teacher, noise_of(5, 2), class_labels=labels)
    assert torch.equal(found.state.off_chord, alone.state.off_chord)  # the trajectories are the teacher's
    assert (found.rows, found.calls, alone.calls) == (5, 353, 734)
    # A map that stands still ends where it began, in any number of steps.
    errors = [grid.error for grid in found.few]
    assert max(errors) - min(errors) < 1e-12
    assert abs(found.slope) < 1e-9
    assert set(found.summary()) >= {"state_in_2_pc", "denoised_length", "error@8", "error@8_optimal", "slope"}


@pytest.mark.takes_seconds  # to draw it
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_any_rank_and_a_single_trajectory(shape: tuple[int, ...], rows: int):
    size = math.prod(shape)
    field = GaussianField(torch.zeros(shape, dtype=F64), torch.eye(size, dtype=F64) / 4)
    found = geometry(field, noise_of(rows, *shape).float(), times=8, candidates=4)
    assert (found.errors is None) == (rows == 1)
    assert found.few == [] if rows == 1 else len(found.few) == 3
    assert png(geometry_figure(found))[:4] == b"\x89PNG"
    assert math.isnan(found.slope) == (rows == 1)


def test_a_map_alone_is_held_against_its_own_finest():
    found = geometry(FlowMap(Still()), noise_of(4, 2), times=8, candidates=4)
    assert found.state.length == 1.0
    assert all(grid.error == grid.uniform_error == 0 for grid in found.few)
    assert math.isnan(found.slope)
    assert png(geometry_figure(found))[:4] == b"\x89PNG"


class Bad(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * math.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"times": 3, "candidates": 3}, "4 times at least"),
        ({"times": 10, "candidates": 4}, "times is 10 and candidates 4"),
        ({"noise": noise_of(0, 2)}, "no rows"),
        ({"model": NetworkField(Bad())}, "not finite"),
        ({"reference": nn.Identity()}, "the reference is a Identity"),
        ({"steps": (0,)}, "steps is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(change: dict, says: str):
    given = {"model": eight_gaussians(), "noise": noise_of(3, 2), "times": 8, "candidates": 4} | change
    with pytest.raises(ValueError, match=says):
        geometry(**given)


def test_a_single_trajectory_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite along its trajectories"):
        geometry(NetworkField(Bad()), noise_of(1, 2))


def test_the_public_name():
    assert fewstep.geometry is geometry
    assert step_grid(1).tolist() == [0, 1]
