"""Reflected diffusion: kernel, path, field and samplers against closed forms, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.flows.exact_spaces import BoxesInBoxField, heat_of_intervals
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.heat import SWITCH, by_eigenfunctions, by_images, heat_kernel, reflect
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.reflected import Reflected
from fewstep.flows.sampling import sample
from fewstep.flows.sources import starting_points
from fewstep.flows.spaces import Box
from fewstep.flows.stochastic import integrate_sde
from fewstep.networks import MLP
from fewstep.objectives import ITVM, ReflectedDiffusion

F64 = torch.float64
TWO = torch.tensor([[[0, 0.2]], [[0.6, 0.9]]], dtype=F64)
HALF = torch.tensor([0.5, 0.5], dtype=F64)
STARTS, ENDS = torch.tensor([[0.1], [0.4], [0.6], [0.95]], dtype=F64), torch.tensor([[0.04], [0.16], [0.66], [0.87]])


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


def grid(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    places = torch.linspace(0, 1, 101, dtype=dtype)
    return places[:, None], places[None]


# The kernel


@pytest.mark.parametrize("series", [by_eigenfunctions, by_images, heat_kernel])
@pytest.mark.parametrize(
    ("tau", "density", "score"), [(0.02, 0.0877219597, 12.4682055), (0.1, 0.6417671258, 1.3680497517)]
)
def test_the_kernel_and_its_score_are_known_numbers(series: Any, tau: float, density: float, score: float) -> None:
    log, slope = series(one(0.2), one(0.7), one(tau))
    assert float(log.exp()) == pytest.approx(density, abs=1e-10)
    assert float(slope) == pytest.approx(score, abs=1e-7)


def test_both_series_are_one_kernel_where_both_converge() -> None:
    x, y = grid()
    for tau, in_density in ((5e-3, 1e-9), (1e-2, 1e-12), (SWITCH, 1e-12)):
        waves, images = by_eigenfunctions(x, y, one(tau)), by_images(x, y, one(tau))
        assert (waves[0].exp() - images[0].exp()).abs().max() < in_density
    # At 5e-3 what is left out is 2 exp(-21^2 pi^2 tau) = 7e-10 at the corners; away from them a half of it.
    waves, images = by_eigenfunctions(one(0.5), one(0.4), one(5e-3)), by_images(one(0.5), one(0.4), one(5e-3))
    assert abs(float(waves[0].exp() - images[0].exp())) < 3e-10
    waves, images = by_eigenfunctions(x, y, one(1e-2)), by_images(x, y, one(1e-2))
    assert (waves[1] - images[1])[images[0] > -20].abs().max() < 2e-5
    few, many = by_eigenfunctions(x, y, one(SWITCH), 8), by_eigenfunctions(x, y, one(SWITCH), 40)
    assert (few[1] - many[1]).abs().max() < 1e-12
    # Twenty eigenfunctions are not enough for little noise.
    assert (by_eigenfunctions(x, y, one(1e-3))[1] - by_images(x, y, one(1e-3))[1]).abs().max() > 1e3


@pytest.mark.parametrize("tau", [5e-5, 1e-2, SWITCH, 0.3, 12.5])
def test_the_kernel_is_a_density_that_no_wall_lets_through(tau: float) -> None:
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(400))
    x, y = (nodes[:, None] + 1) / 2, torch.tensor([[0.0, 0.013, 0.5, 0.98]], dtype=F64)
    log, score = heat_kernel(x, y, one(tau))
    if tau > 1e-4:  # else it is narrower than the nodes are near
        assert torch.allclose((log.exp() * weights[:, None] / 2).sum(0), one(1.0), atol=1e-10)
    x.requires_grad_()
    slope = torch.autograd.grad(heat_kernel(x, y, one(tau))[0].sum(0).sum(), x)[0]
    assert torch.allclose(slope[:, 0], score.sum(1), rtol=1e-9, atol=1e-9)
    walls = torch.tensor([[0.0], [1.0]], dtype=F64)
    assert heat_kernel(walls, y, one(tau))[1].abs().max() < 1e-9 / tau


@pytest.mark.parametrize("tau", [5e-5, 1e-3, 1e-2, 1.1e-2, 0.09, 0.11, 12.5])
def test_the_kernel_is_itself_in_float32(tau: float) -> None:
    """Within seven deviations of y, where its draws are; by twenty eigenfunctions alone it is not."""
    x, y = grid(torch.float32)
    t = torch.tensor([tau])
    near = ((x - y).abs() < 7 * math.sqrt(2 * tau)).expand(101, 101)
    wanted = heat_kernel(x.double(), y.double(), t.double())
    found = heat_kernel(x, y, t)
    assert (found[0] - wanted[0])[near].abs().max() < 3e-5
    assert math.sqrt(2 * tau) * (found[1] - wanted[1])[near].abs().max() < 5e-4  # of the noise that networks predict
    if tau == 1.1e-2:
        twenty = by_eigenfunctions(x, y, t)
        assert not (twenty[1] - wanted[1])[near].abs().max() < 10


def test_draws_are_those_of_the_kernel() -> None:
    assert torch.allclose(
        reflect(torch.tensor([-0.3, 0.4, 1.2, 2.3, -1.7, 5.5])), torch.tensor([0.3, 0.4, 0.8, 0.3, 0.3, 0.5])
    )
    tau, y, z = 0.08, 0.2, torch.randn(200_000, dtype=F64, generator=generator(0))
    x = reflect(y + math.sqrt(2 * tau) * z)
    edges = torch.linspace(0, 1, 11, dtype=F64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))
    places = edges[:-1, None] + (nodes + 1) / 20
    mass = (heat_kernel(places, one(y), one(tau))[0].exp() * weights / 20).sum(1)
    assert torch.allclose(torch.histc(x, 10, 0, 1) / len(x), mass, atol=5e-3)


# The path


def test_a_state_and_its_velocity_are_those_of_the_kernel_in_any_cube() -> None:
    path, unit = Reflected(-1, 3, 0.01, 2.0), Reflected(0, 1, 0.01, 2.0)
    t = torch.rand(64, dtype=F64, generator=generator(1))
    data, z = (
        torch.rand(64, 3, dtype=F64, generator=generator(2)),
        torch.randn(64, 3, dtype=F64, generator=generator(3)),
    )
    sigma = 0.01 * 200 ** (1 - t)
    assert torch.allclose(path.sigma(t), 4 * sigma)
    assert torch.allclose(unit.sigma_dot(t), (unit.sigma(t + 1e-6) - unit.sigma(t - 1e-6)) / 2e-6, rtol=1e-6)
    x, dx = unit.sample(data, data, t, z)
    assert torch.allclose(x, reflect(data + sigma[:, None] * z))
    score = heat_kernel(x, data, (sigma**2 / 2)[:, None])[1]
    assert torch.allclose(dx, math.log(200) * sigma[:, None] ** 2 * score, atol=1e-12)
    wide_x, wide_dx = path.sample(data, 4 * data - 1, t, z)
    assert torch.allclose(wide_x, 4 * x - 1, atol=1e-12)
    assert torch.allclose(wide_dx, 4 * dx, atol=1e-9)
    assert torch.allclose(path.time_of(path.alpha(t), path.sigma(t)), t)
    images, own = torch.rand(5, 1, 4, 3), torch.randn(5, 1, 4, 3)
    many, flat = (
        path.sample(images, images, 0.4, own),
        path.sample(images.flatten(1), images.flatten(1), 0.4, own.flatten(1)),
    )
    assert torch.equal(many[1].flatten(1), flat[1])
    half = path.sample(images.bfloat16(), images.bfloat16(), 0.9, own.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    assert torch.equal(
        half[1], path.sample(images, images.bfloat16().float(), 0.9, own.bfloat16().float())[1].bfloat16()
    )
    # What a network predicts.
    kinds = {"score": score, "noise": -sigma[:, None] * score, "data": x + sigma[:, None] ** 2 * score, "velocity": dx}
    for kind, value in kinds.items():
        assert torch.allclose(unit.from_velocity(dx, x, t, kind), value, atol=1e-9), kind
        assert torch.allclose(unit.to_velocity(value, x, t, kind), dx, atol=1e-9), kind


def test_what_a_reflected_path_is_not_is_said() -> None:
    with pytest.raises(ValueError, match="low is below high"):
        Reflected(1, 1)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        Reflected(sigma_max=0.001)
    with pytest.raises(ValueError, match="draws from its kernel: pass z"):
        Reflected().sample(torch.zeros(2, 1), torch.zeros(2, 1), 0.5)
    with pytest.raises(ValueError, match="are to have the same ends"):
        NetworkField(MLP(2), Reflected(0, 1), space=Box(-1, 1))
    for path, why in (
        (Reflected(-1, 1), "are to have the same ends"),
        (Linear(), r"or Reflected\(low, high\), not on Linear"),
    ):
        with pytest.raises(ValueError, match=why):
            BoxesInBoxField(TWO, Box(0, 1), path=path)
    with pytest.raises(ValueError, match="is no velocity on Reflected"):
        NetworkField(MLP(2), Linear(), path=Reflected())
    with pytest.raises(ValueError, match="is no velocity on Linear"):
        NetworkField(MLP(2), Reflected()).on(Linear())
    field = NetworkField(MLP(2), Reflected(), "noise")
    assert field.space == FlowMap.from_field(field).space == Box()
    for needs_normal in (
        fewstep.log_likelihood,
        lambda m, x: fewstep.steer(m, x, 2, fewstep.Reward(lambda x: x.sum(1))),
    ):
        with pytest.raises(ValueError, match="starts from other data"):
            needs_normal(field, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"LSD is for R\^n"):
        fewstep.LSD().check_data(torch.zeros(4, 2), FlowMap(MLP(2, times=2), Reflected()))
    with pytest.raises(ValueError, match="trains a field on a Reflected path, not on Linear"):
        ReflectedDiffusion().check_student(NetworkField(MLP(2)))
    with pytest.raises(ValueError, match=r"student is on Reflected.*teacher on Interpolant"):
        ITVM(BoxesInBoxField(TWO, Box(0, 1))).check_student(FlowMap(MLP(1, times=2), Reflected(0, 1)))


# The field of boxes


def boxes(path: Reflected | None = None, labels: Tensor | None = None) -> BoxesInBoxField:
    return BoxesInBoxField(TWO, Box(0, 1), HALF, labels, path or Reflected(0, 1))


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.0999, 0.1001, 1.0])
def test_the_law_of_an_interval_is_the_integral_of_the_kernel(tau: float) -> None:
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))
    x = torch.linspace(0, 1, 41, dtype=F64)[:, None, None]
    log, score = heat_of_intervals(x[:, 0, 0], TWO[:, 0], torch.full_like(x[:, 0, 0], tau))
    for k, (low, high) in enumerate(TWO[:, 0].tolist()):
        kernel, slope = heat_kernel(x[:, 0], (low + high) / 2 + (high - low) / 2 * nodes[None], one(tau))
        mass = (kernel.exp() * weights / 2).sum(1)
        assert torch.allclose(log[:, k], mass.log(), atol=1e-11)
        assert torch.allclose(score[:, k], (kernel.exp() * slope * weights / 2).sum(1) / mass, atol=1e-9)


@pytest.mark.takes_seconds
def test_the_probability_flow_ends_at_the_quantiles() -> None:
    assert torch.allclose(boxes().flow(STARTS, 0.0, 1.0), ENDS.double(), atol=1e-6)
    wide = BoxesInBoxField(4 * TWO - 1, Box(-1, 3), HALF, path=Reflected(-1, 3, sigma_max=5.0))
    assert torch.allclose(wide.flow(4 * STARTS - 1, 0.0, 1.0), 4 * ENDS.double() - 1, atol=4e-6)
    # The map is the quantile of the blurred data: its distribution function at the end is that of the start.
    nodes = torch.linspace(0, 1, 20_001, dtype=F64)[:, None]
    at = boxes(Reflected(0, 1, 0.05, 3.0))
    log, _ = heat_of_intervals(nodes[:, 0], TWO[:, 0], torch.full((20_001,), 0.05**2 / 2, dtype=F64))
    share = torch.cumulative_trapezoid(log.exp().mean(1), nodes[:, 0])
    starts = torch.linspace(0.02, 0.98, 9, dtype=F64)[:, None]
    ends = at.flow(starts, 0.0, 1.0)
    assert torch.allclose(share[(ends[:, 0] * 20_000).round().long() - 1], starts[:, 0], atol=2e-4)


def test_the_field_is_the_mean_of_the_conditional_velocities_and_points_inwards() -> None:
    field, draw = boxes(), generator(4)
    data = field.data(400_000, draw).double()
    z = torch.randn(data.shape, dtype=F64, generator=draw)
    for t in (0.45, 0.7):
        x, dx = field.path.sample(data, data, t, z)
        near = (x - 0.35).abs()[:, 0] < 0.01
        within = 4 * float(dx[near].std()) / math.sqrt(int(near.sum()))
        assert float(dx[near].mean()) == pytest.approx(float(field(one(0.35)[:, None], t)), abs=within)
    x, t = torch.linspace(0, 1, 201, dtype=F64)[:, None], torch.linspace(0, 1, 201, dtype=F64)
    for s in t[::20].tolist():
        assert field(x, s).isfinite().all()
        ends = field.path.from_velocity(field(x, s), x, s, "data")
        assert ends.min() > -1e-12  # D = x + sigma^2 S lies in the box, so a step of 1 / L at most stays there
        assert ends.max() < 1 + 1e-12
        assert field(x[[0, -1]], s).abs().max() < 1e-9
    assert torch.allclose(field.score(x, 0.6), field(x, 0.6) / (math.log(150) * field.path.sigma(t[120]) ** 2))
    moved = BoxesInBoxField(TWO, Box(0, 1), HALF).on(Reflected(0, 1))
    assert torch.equal(moved(x, t), field(x, t))
    labelled, which = boxes(labels=torch.tensor([0, 1])), torch.full((201,), 1)
    alone = BoxesInBoxField(TWO[1:], Box(0, 1), path=Reflected(0, 1))
    assert torch.allclose(labelled(x, t, class_labels=which), alone(x, t))
    assert torch.allclose(labelled(x, t, class_labels=which + 1), field(x, t))


# Samplers


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("solver", "eps"), [("euler", "kappa"), ("heun", "kappa"), ("ancestral", "kappa"), ("euler", 0.02)]
)
def test_the_reflected_sde_has_the_law_of_the_data(solver: str, eps: Any) -> None:
    field, draw = boxes(), generator(5)
    x = sample(field, starting_points(field, (2500, 1), draw), 60, solver=solver, eps=eps, generator=draw).double()
    assert x.min() >= 0
    assert x.max() <= 1
    assert torch.allclose(torch.quantile(x[:, 0], STARTS[:, 0]), ENDS[:, 0].double(), atol=0.025)


def test_a_step_of_the_sde_is_eulers_and_the_wall_reflects_it_and_holds_one_without_noise() -> None:
    """Away from walls ``x + 2 L sigma^2 S h + sqrt(2 L h) sigma z``; beyond, its mirror image."""
    path, space, h = Reflected(0, 1), Box(0, 1), 0.1
    x, score = torch.full((1000, 1), 0.1, dtype=F64), -0.02
    times, draw = torch.tensor([0.5, 0.6], dtype=F64), generator(6)
    rate = float(path.rate * path.sigma(times[0]) ** 2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, rate * score)

    made = integrate_sde(velocity, x, times, path, "kappa", generator=draw, space=space)
    z = torch.randn(1000, 1, dtype=F64, generator=generator(6))
    free = x + h * 2 * rate * score + math.sqrt(2 * rate * h) * z
    assert (free < 0).any()
    assert torch.allclose(made, reflect(free), atol=1e-12)
    held = integrate_sde(lambda x, t: torch.full_like(x, -9.0), x, times, path, "kappa", last_step="euler", space=space)
    assert (held == 0).all()


def test_guidance_stays_in_the_box_by_sde_and_ode() -> None:
    field = boxes(labels=torch.tensor([0, 1]))
    guided = Guided(field, 4.0, null={"class_labels": 2})
    start, which = starting_points(field, (500, 1), generator(7)), torch.arange(500) % 2
    for options in ({"eps": "kappa", "generator": generator(8)}, {}):
        x = sample(guided, start, 50, class_labels=which, **options)  # pyright: ignore[reportArgumentType]
        assert 0 <= x.min() <= x.max() <= 1
        right = torch.where(which == 1, x[:, 0] > 0.4, x[:, 0] < 0.4)
        assert right.double().mean() > 0.99
