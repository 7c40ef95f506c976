"""Paths between two data sets against closed forms (arXiv 2303.08797), in float64."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import fewstep
from fewstep.common.randomness import generator, sample_generators
from fewstep.data import ArrayData, Pairs
from fewstep.data.couplings import Coupled
from fewstep.flows.interpolants import LATENTS, SHAPES, DenoisedField, Interpolant
from fewstep.flows.solvers import integrate
from fewstep.flows.sources import starting_points
from fewstep.networks import MLP
from fewstep.objectives.base import Batch

WITH_LATENT = [name for name in LATENTS if name != "none"]
# N(-1, 1/2) to N(1, 1/4).
M0, C0, M1, C1 = -1.0, 0.5, 1.0, 0.25


class GaussianHead(nn.Module):
    """What the velocity without its latent, or the latent, is expected to be between two Gaussians."""

    def __init__(self, path: Interpolant, head: str) -> None:
        super().__init__()
        self.path, self.head = path, head

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s, a_dot, s_dot = (c[:, None] for c in self.path.coefficients(t))
        g = self.path.gamma(t)[:, None]
        mean, variance = a * M1 + s * M0, a * a * C1 + s * s * C0 + g * g
        if self.head == "latent":
            return g / variance * (x - mean)
        return a_dot * M1 + s_dot * M0 + (a * a_dot * C1 + s * s_dot * C0) / variance * (x - mean)


def between_gaussians(path: Interpolant) -> DenoisedField:
    return DenoisedField(GaussianHead(path, "velocity"), GaussianHead(path, "latent"), path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("latent", LATENTS)
def test_the_conditional_velocity_is_the_rate_of_the_state(shape: str, latent: str) -> None:
    if (shape, latent) == ("mirror", "none") or latent == "brownian":
        return
    path = Interpolant(shape, latent, 0.7)
    start, data, z = torch.randn(3, 5, 2, 3, dtype=torch.float64, generator=generator(0)).unbind(0)
    t, h = torch.tensor([0.1, 0.3, 0.45, 0.6, 0.9], dtype=torch.float64), 1e-6
    _, dx = path.sample(start, data, t, z)
    later, before = (path.sample(start, data, t + step, z)[0] for step in (h, -h))
    torch.testing.assert_close((later - before) / (2 * h), dx, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("latent", WITH_LATENT)
def test_g_its_rate_and_their_product_agree(latent: str) -> None:
    path, h = Interpolant(latent=latent, scale=0.5), 1e-6
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(
        (path.gamma(t + h) - path.gamma(t - h)) / (2 * h), path.gamma_dot(t), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(path.gamma(t) * path.gamma_dot(t), path.gamma_rate(t))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.gamma(ends).abs().max() < 1e-15
    assert path.gamma_rate(ends).isfinite().all()


@pytest.mark.parametrize("latent", WITH_LATENT)
@pytest.mark.parametrize("shape", ["linear", "trigonometric"])
def test_the_flow_between_gaussians_is_the_same_for_every_latent(shape: str, latent: str) -> None:
    field = between_gaussians(Interpolant(shape, latent))
    x = torch.linspace(-3, 1, 9, dtype=torch.float64)[:, None]
    edge = 0.002 if latent == "brownian" else 0.0  # where its rate is infinite, the field holds it
    times = torch.tensor([edge, 1 - edge], dtype=torch.float64)
    end = integrate(field, x, times, "adaptive", tolerance=1e-11)
    path = field.path

    def moments(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, s, g = path.alpha(t), path.sigma(t), path.gamma(t)
        return a * M1 + s * M0, (a * a * C1 + s * s * C0 + g * g).sqrt()

    (mean_0, std_0), (mean_1, std_1) = moments(times[:1]), moments(times[1:])
    torch.testing.assert_close(end, mean_1 + std_1 / std_0 * (x - mean_0), rtol=1e-8, atol=1e-8)
    if not edge:
        torch.testing.assert_close(end, M1 + math.sqrt(C1 / C0) * (x - M0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("latent", WITH_LATENT)
def test_score_and_velocity_are_those_of_the_law(latent: str) -> None:
    field = between_gaussians(Interpolant(latent=latent))
    x, t = torch.randn(7, 1, dtype=torch.float64, generator=generator(1)), torch.full((7,), 0.3, dtype=torch.float64)
    path = field.path
    variance = path.alpha(t) ** 2 * C1 + path.sigma(t) ** 2 * C0 + path.gamma(t) ** 2
    mean = path.alpha(t) * M1 + path.sigma(t) * M0
    score = -(x - mean[:, None]) / variance[:, None]
    torch.testing.assert_close(field.score(x, t), score)
    # b = v - g g' S
    v, _ = field.heads(x, t)
    torch.testing.assert_close(field(x, t), v - path.gamma_rate(t)[:, None] * score)


@pytest.mark.parametrize("eps", [0.0, 0.5, lambda t: (t * (1 - t)) ** 2])
@pytest.mark.parametrize("latent", ["quadratic", "sine"])
def test_every_sde_between_gaussians_ends_at_the_data(latent: str, eps: object) -> None:
    """Its moments, by the scheme's own affine steps: exact up to the order of Euler-Maruyama."""
    field = between_gaussians(Interpolant(latent=latent))
    path, steps = field.path, 4000
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    mean, variance, errors = torch.tensor([[M0]], dtype=torch.float64), C0, []
    for t in grid[:-1]:
        amount = float(eps(t)) if callable(eps) else float(eps)  # type: ignore[arg-type]
        amount = amount if path.gamma(t) > 0 else 0.0
        drift = [field(x, t) + (amount * field.score(x, t) if amount else 0.0) for x in (mean, mean + 1)]
        mean, slope = mean + drift[0] / steps, float(drift[1] - drift[0])
        variance = (1 + slope / steps) ** 2 * variance + 2 * amount / steps
    errors = [float(mean) - M1, variance - C1]
    assert max(map(abs, errors)) < 2e-3


def test_the_sde_of_sample_is_this_one_and_fixes_each_sample() -> None:
    field = between_gaussians(Interpolant(latent="sine"))
    start = M0 + math.sqrt(C0) * torch.randn(20_000, 1, dtype=torch.float64, generator=generator(5))
    end = fewstep.sample(field, start, 100, eps=0.5, generator=generator(6))
    assert abs(float(end.mean()) - M1) < 0.02
    assert abs(float(end.var()) - C1) < 0.02
    wrong = fewstep.sample(field, start, 100, generator=generator(6))
    assert not torch.allclose(end, wrong)
    many = fewstep.sample(field, start[:6], 20, eps=0.5, generator=sample_generators(0, range(6)))
    few = fewstep.sample(field, start[4:6], 20, eps=0.5, generator=sample_generators(0, range(4, 6)))
    torch.testing.assert_close(many[4:], few)
    for options, says in (({"eps": "kappa"}, "kappa"), ({"eps": 1.0, "solver": "heun"}, "Euler-Maruyama")):
        with pytest.raises(ValueError, match=says):
            fewstep.sample(field, start[:2], 4, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it is euler, mean or none"):
        fewstep.sample(field, start[:2], 4, eps=1.0, last_step="tweedie")


def test_a_mirror_flows_by_its_score_alone() -> None:
    """``b = -g g' S``, so that data stay data: the authors' code has the other sign here."""
    path, variance = Interpolant("mirror", "sine"), 0.25

    class Latent(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            g = path.gamma(t)[:, None]
            return g / (variance + g * g) * x

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    field = DenoisedField(Nothing(), Latent(), path)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    half = integrate(field, x, torch.tensor([0.0, 0.5], dtype=torch.float64), "adaptive", tolerance=1e-11)
    torch.testing.assert_close(half, x * math.sqrt((variance + 1) / variance), rtol=1e-7, atol=1e-7)
    whole = integrate(field, half, torch.tensor([0.5, 1.0], dtype=torch.float64), "adaptive", tolerance=1e-11)
    torch.testing.assert_close(whole, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("latent", WITH_LATENT)
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_loss_is_least_at_the_closed_form(latent: str, antithetic: bool) -> None:
    """Its gradient by a factor and a shift of each head vanishes there, within the error of the mean."""
    path, rows = Interpolant(latent=latent), 100_000
    draw = generator(3)
    start = M0 + math.sqrt(C0) * torch.randn(rows, 1, dtype=torch.float64, generator=draw)
    data = M1 + math.sqrt(C1) * torch.randn(rows, 1, dtype=torch.float64, generator=draw)

    class Bent(nn.Module):
        def __init__(self, head: str) -> None:
            super().__init__()
            self.exact, self.by = GaussianHead(path, head), nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.by[0] * self.exact(x, t) + self.by[1] * x

    field = DenoisedField(Bent("velocity"), Bent("latent"), path)
    objective = fewstep.StochasticInterpolant(antithetic)
    objective.check_student(field)
    loss = objective(field, Batch(data, noise=start), generator=generator(4))
    gradient = torch.cat(torch.autograd.grad(loss.total, [*field.parameters()]))
    assert gradient.abs().max() < 0.03
    with torch.no_grad():
        for by in field.parameters():
            by[0] += 0.3
    worse = objective(field, Batch(data, noise=start), generator=generator(4))
    assert worse.total > loss.total + 0.01


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.by * x


def test_antithetic_rows_have_less_noise_in_their_gradient() -> None:
    """z and -z cancel in what is of first order in them."""
    path, spread = Interpolant(latent="quadratic", scale=5.0), {}
    rows = Batch(torch.full((64, 1), 2.0), noise=torch.ones(64, 1))
    for antithetic in (True, False):
        slopes = []
        for seed in range(40):
            head = Slope()
            loss = fewstep.StochasticInterpolant(antithetic)(
                DenoisedField(head, GaussianHead(path, "latent"), path), rows, generator=generator(seed)
            )
            slopes.append(torch.autograd.grad(loss.total, [head.by])[0])
        spread[antithetic] = float(torch.stack(slopes).std())
    assert spread[True] < 0.5 * spread[False]


def test_what_a_velocity_between_data_sets_does_not_say_is_refused() -> None:
    path = Interpolant(latent="quadratic")
    x, t = torch.zeros(2, 3), torch.full((2,), 0.5)
    field = fewstep.NetworkField(MLP(3), path)
    for kind in ("score", "data", "noise"):
        with pytest.raises(ValueError, match=f"no {kind}"):
            path.from_velocity(x, x, t, kind)
    with pytest.raises(ValueError, match="nothing of a score"):
        field.score(x, t)
    with pytest.raises(ValueError, match="no path is another"):
        field.on(fewstep.Linear())
    with pytest.raises(ValueError, match="predicts the velocity"):
        fewstep.NetworkField(MLP(3), path, "noise")
    with pytest.raises(ValueError, match="no path is another"):
        fewstep.NetworkField(MLP(3), fewstep.Linear(), path=path)
    with pytest.raises(ValueError, match="has a latent z"):
        path.sample(x, x, t)
    assert Interpolant(latent="brownian").sample(x, x, torch.zeros(2), x)[1].isfinite().all()  # held at that of 0.001
    with pytest.raises(ValueError, match="brings noise back"):
        fewstep.sample(fewstep.FlowMap(MLP(3, times=2), path), x, 2, gamma=0.5)
    with pytest.raises(ValueError, match="source is not known"):
        starting_points(field, (2, 3), generator(0))
    with pytest.raises(ValueError, match="has none"):
        DenoisedField(MLP(3), MLP(3), Interpolant())
    for wrong in ({"shape": "round"}, {"latent": "loud"}, {"latent": "sine", "scale": 0.0}, {"shape": "mirror"}):
        with pytest.raises(ValueError, match=r"shape|latent"):
            Interpolant(**wrong)  # type: ignore[arg-type]


def test_rows_come_with_rows_of_the_source() -> None:
    data, source = torch.arange(8.0)[:, None], 100 + torch.arange(5.0)[:, None]
    between = fewstep.Between(data, source)
    batch = between.rows(torch.tensor([3, 1, 6]), generator(0))
    assert batch.data.flatten().tolist() == [3, 1, 6]
    assert batch.noise is not None
    assert set(batch.noise.flatten().tolist()) <= set(source.flatten().tolist())
    paired = Coupled(between).rows(torch.arange(8), generator(0))
    assert paired.noise is not None
    order = paired.data.flatten().argsort()
    assert (paired.noise.flatten()[order].diff() >= 0).all()  # on a line optimal pairs are in order
    with pytest.raises(ValueError, match="must agree"):
        fewstep.Between(data, torch.zeros(4, 2))


def test_data_and_student_go_together() -> None:
    objective = fewstep.LSD()
    two, one = (fewstep.FlowMap(MLP(1, times=2), path) for path in (Interpolant(), fewstep.Linear()))
    data = ArrayData(torch.zeros(8, 1))
    with pytest.raises(ValueError, match="say nothing of the first"):
        objective.check_data(data, two)
    with pytest.raises(ValueError, match="starts from normal noise"):
        objective.check_data(fewstep.Between(data, data), one)
    objective.check_data(fewstep.Between(data, data), two)
    objective.check_data(data, one)
    assert Pairs.brings_noise


def test_samples_start_at_rows_of_the_source_sample_by_sample() -> None:
    field = fewstep.NetworkField(MLP(1), Interpolant())
    field.starts_from = fewstep.RowsOf(torch.arange(50.0)[:, None])
    many = starting_points(field, (6, 1), sample_generators(0, range(6)))
    few = starting_points(field, (2, 1), sample_generators(0, range(4, 6)))
    assert torch.equal(many[4:], few)
    assert len(many.unique()) > 3
    with pytest.raises(ValueError, match="its source has"):
        starting_points(field, (2, 3), generator(0))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("latent", ["none", "quadratic"])
def test_a_map_from_data_to_data_in_one_call(latent: str) -> None:
    """Gaussian to Gaussian: one call of the map ends where the flow does, and Euler's one step does not."""
    draw = generator(0)
    start = ArrayData(M0 + math.sqrt(C0) * torch.randn(20_000, 1, generator=draw))
    data = ArrayData(M1 + math.sqrt(C1) * torch.randn(20_000, 1, generator=draw))
    torch.manual_seed(0)
    student = fewstep.FlowMap(MLP(1, times=2, width=64, depth=2), Interpolant(latent=latent))
    settings: dict[str, Any] = {"steps": 700, "batch": 256, "chunk": 256, "lr": 2e-3, "warmup": 50, "ema": 0.98}
    fewstep.fit(student, fewstep.PSD(ends=0.25), fewstep.Between(data, start), **settings, quiet=True)
    x = torch.linspace(-2.4, 0.4, 21)[:, None]
    end = fewstep.sample(student, x, 1)
    wanted = M1 + math.sqrt(C1 / C0) * (x - M0)
    error = float((end - wanted).square().mean().sqrt())
    # One Euler step: x + b_0(x), b_0 = (M1 - M0) - (x - M0).
    euler = float((torch.full_like(x, M1) - wanted).square().mean().sqrt())
    assert error < 0.12 < 0.4 < euler


def test_what_needs_noise_at_the_start_is_refused_before_it_is_wrong() -> None:
    path, x = Interpolant(latent="quadratic"), torch.zeros(2, 3)
    field = DenoisedField(MLP(3), MLP(3), path)
    student = fewstep.FlowMap(MLP(3, times=2), path)
    calls = {
        "a likelihood": lambda: fewstep.log_likelihood(field, x),
        "steering": lambda: fewstep.steer(field, x, 2, fewstep.Reward(lambda x: x[:, 0])),
        "noise added": lambda: fewstep.sdedit(student, x, strength=0.5, steps=2),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"{what}.* needs a path that starts from normal noise"):
            call()
    with pytest.raises(ValueError, match="needs a path that starts from normal noise"):
        fewstep.steer(student, x, 2, fewstep.Reward(lambda x: x[:, 0]))


def test_the_shape_of_trajectories_between_data_sets_is_known() -> None:
    field = between_gaussians(Interpolant(latent="sine"))
    found = fewstep.geometry(field, torch.randn(8, 1, dtype=torch.float64, generator=generator(0)))
    assert found.summary()["state_in_2_pc"] > 0.9
