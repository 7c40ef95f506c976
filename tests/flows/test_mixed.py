"""Mixed fields: the weighted law of the walk is the product of powers, point by point, of Gaussians and mixtures."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from test_steering import ByClass
from torch import Tensor, nn

from fewstep.common.randomness import generator
from fewstep.flows.exact import ExactField, GaussianField, MixtureField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.kernels import sde_step
from fewstep.flows.maps import FlowMap
from fewstep.flows.mixed import Mixed, MixedWalk
from fewstep.flows.paths import Linear, Path, Trigonometric
from fewstep.flows.sampling import sample_noise
from fewstep.flows.steering import steer

F64 = torch.float64


def mixture(means: list[float], variances: list[float], weights: list[float]) -> MixtureField:
    m, v, w = (torch.tensor(value, dtype=F64) for value in (means, variances, weights))
    return MixtureField(m[:, None], v.sqrt(), w)


def gaussian(mean: float, variance: float) -> GaussianField:
    return GaussianField(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64))


# The mixtures and Gaussians of the tables.
U, C = mixture([-1.0, 1.5], [0.25, 0.16], [0.4, 0.6]), mixture([1.5, 0.6], [0.16, 0.09], [0.7, 0.3])
Q1, Q2 = gaussian(0.0, 1.0), gaussian(1.0, 0.25)


def log_density(field: ExactField, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """log q_t of points x (B, 1)."""
    means, scales = getattr(field, "means", None), getattr(field, "scales", None)
    if means is None:
        means, scales, weights = field.mean[:, None], field.variances.sqrt(), torch.ones(1, dtype=F64)
    else:
        weights = field.weights
    variance = a * a * scales**2 + s * s
    log = -0.5 * (x - a * means[:, 0]) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()
    return torch.logsumexp(weights.log() + log, 1)


# Point by point


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("powers", [(2.5, -1.5), (0.3, 0.7), (1.0, 1.0), (0.0, 2.0), (-0.3, 0.8)])
def test_the_weight_makes_up_for_the_drift(path: Path, strength: float, powers: tuple[float, float]) -> None:
    """``d_t log p = L* p / p + dlog w / dt`` at any point, where p is the product of powers, and of the Gaussian that
    brings their sum to 1; the wrong sign misses by units."""
    fields, t0, h = (C.on(path), U.on(path)), 0.4, 1e-3
    walk = MixedWalk(
        Mixed(dict(zip(fields, powers, strict=True)), scale=1.3),
        torch.tensor([t0, t0 + h, 1.0], dtype=F64),
        lambda t: strength * (1 - t),
        torch.zeros(1, dtype=F64),
    )
    here, there = walk.grid[:2]
    x = torch.linspace(-2, 3, 41, dtype=F64)[:, None].requires_grad_()
    t = torch.tensor(t0, dtype=F64, requires_grad=True)
    a, s = path.alpha(t), path.sigma(t)
    parts = [power * log_density(field, x, a, s) for power, field in zip(powers, fields, strict=True)]
    parts.append((1 - sum(powers)) * log_density(gaussian(0.0, 1.3**2), x, a, s))
    log_p = sum(parts)
    assert isinstance(log_p, Tensor)
    rate_of_p = torch.stack([torch.autograd.grad(value, t, retain_graph=True)[0] for value in log_p])
    (slope,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, retain_graph=True)
    v, rate = walk.velocity_and_rate(here, x, {})
    mean, std = sde_step(here, there, x, v)
    step = there.t - here.t
    drift, eps = (mean - x) / step, std**2 / (2 * step)
    assert eps == pytest.approx(strength * 0.6)
    (divergence,) = torch.autograd.grad(drift.sum(), x, retain_graph=True)
    flow = -divergence - drift * slope + eps * (bend + slope**2)
    missed = rate_of_p - flow[:, 0] - rate
    assert missed.abs().max() < 1e-7
    if powers == (2.5, -1.5):
        assert (missed + 2 * rate).abs().max() > 1


@pytest.mark.takes_seconds
@pytest.mark.parametrize("strength", ["none", "kappa"])
@pytest.mark.parametrize(
    ("powers", "target", "unweighted"),
    [
        ((1.5, -0.5), (12 / 11, 2 / 11), {"none": (1.23845, 0.125), "kappa": (1.16667, 0.15625)}),
        ((2.0, -1.0), (8 / 7, 1 / 7), {"none": (1.38017, 0.0625), "kappa": (1.25, 0.109375)}),
        ((3.0, -2.0), (1.2, 0.1), {"none": (1.5, 0.015625), "kappa": (1.3125, 0.066602)}),
        ((1.0, 1.0), (0.8, 0.2), {}),
        ((2.0, 0.0), (1.0, 0.125), {}),
        ((0.5, 0.0), (1.0, 0.5), {}),
    ],
)
def test_the_table_of_gaussians(
    powers: tuple[float, float], target: tuple[float, float], unweighted: dict[str, Any], strength: str
) -> None:
    """Mean and variance of the weighted law, carried from t = 0 to 1 by the walk's own drift ``al x + be`` and rate
    ``-c x^2 / 2 + d x`` (Kalman-Bucy): ``V' = 2 al V + 2 eps - c V^2`` and ``m' = al m + be + V (d - c m)``."""
    probe = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)

    def eps(t: Tensor) -> Tensor:
        return torch.zeros_like(t) if strength == "none" else ((1 - t) / t).clamp(max=50.0)

    mixed = Mixed({Q2: powers[0], Q1: powers[1]})

    def moved(t: float, y: Any, is_weighted: bool) -> list[float]:
        walk = MixedWalk(mixed, torch.tensor([t, (1 + t) / 2, 1.0], dtype=F64), eps, probe)
        here, there = walk.grid[:2]
        v, rate = walk.velocity_and_rate(here, probe, {})
        mean, std = sde_step(here, there, probe, v)
        step = there.t - here.t
        drift, noise = ((mean - probe) / step)[:, 0].tolist(), std**2 / (2 * step)
        al, be = (drift[2] - drift[0]) / 2, drift[1]
        low, zero, high = rate.tolist()
        c, d = (-(low + high - 2 * zero), (high - low) / 2) if is_weighted else (0.0, 0.0)
        m, variance = y
        return [al * m + be + variance * (d - c * m), 2 * al * variance + 2 * noise - c * variance**2]

    def end(is_weighted: bool) -> tuple[float, float]:
        made = solve_ivp(moved, (0.0, 1 - 1e-7), [0.0, 1.0], "LSODA", rtol=1e-9, atol=1e-11, args=(is_weighted,))
        m, variance = made.y[:, -1]
        excess = mixed.total - 1  # the last of the weights: N(0, 1)^(B - 1)
        inverse = 1 / variance + excess
        return m / variance / inverse, 1 / inverse

    assert end(True) == pytest.approx(target, abs=2e-6)
    if strength in unweighted:
        assert end(False) == pytest.approx(unweighted[strength], abs=2e-4 if strength == "kappa" else 2e-5)


# Particles


def log_mass(powers: dict[Any, float]) -> tuple[float, float, float]:
    """Mean, variance and log of the mass of ``prod q_i^b_i`` at t = 1, by sums on a grid."""
    x = torch.linspace(-8, 8, 40_001, dtype=F64)[:, None]
    one, none = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    parts = [power * log_density(field, x, one, none) for field, power in powers.items()]
    p = torch.stack(parts).sum(0).exp() * (x[1, 0] - x[0, 0])
    mean = float((p * x[:, 0]).sum() / p.sum())
    return mean, float((p * (x[:, 0] - mean) ** 2).sum() / p.sum()), float(p.sum().log())


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "powers",
    [{Q2: 2.0, Q1: -1.0}, {Q1: 1.0, Q2: 1.0}, {Q2: 2.0}, {Q2: 0.5}],
    ids=["guidance", "product", "colder", "hotter"],
)
def test_particles_of_gaussians(powers: dict[Any, float]) -> None:
    noise = sample_noise((20_000, 1), generator(0), F64)
    particles = steer(Q2, noise, 100, Mixed(powers), generator=generator(1))
    mean = float(particles.mean(particles.x))
    variance = float(particles.mean((particles.x - mean).square()))
    assert (mean, variance, float(particles.log_normalizer)) == pytest.approx(log_mass(powers), abs=0.03)


def total_variation(x: Tensor, weights: Tensor, powers: dict[Any, float]) -> float:
    """Between a weighted sample and ``prod q_i^b_i``, in 60 bins from -2 to 3."""
    edges = torch.linspace(-2, 3, 61, dtype=F64)
    fine = torch.cat([torch.linspace(float(a), float(b), 51, dtype=F64)[:-1] for a, b in pairwise(edges)])[:, None]
    fine = fine + 0.05 / 60
    one, none = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    log_p = torch.stack([power * log_density(f, fine, one, none) for f, power in powers.items()]).sum(0)
    mass = log_p.exp().reshape(60, 50).sum(1)
    where = torch.bucketize(x[:, 0].contiguous(), edges) - 1
    inside = (where >= 0) & (where < 60)
    found = torch.zeros(60, dtype=F64).index_add(0, where[inside], weights[inside])
    return float((found - mass / mass.sum()).abs().sum() / 2)


@pytest.mark.takes_seconds
def test_guidance_that_samples_what_it_says() -> None:
    """Total variation from c^2.5 u^-1.5: .65 by guidance's ODE, .35 with weights alone, < .07 with noise too."""
    powers: dict[Any, float] = {C: 2.5, U: -1.5}
    noise = sample_noise((20_000, 1), generator(0), F64)
    for eps, weighted, low, high in ((torch.zeros_like, False, 0.6, 0.7), (torch.zeros_like, True, 0.3, 0.4),
                                     (None, False, 0.3, 0.5), (None, True, 0.0, 0.07)):  # fmt: skip
        particles = steer(C, noise, 50, Mixed(powers), eps=eps, ess=0.5 if weighted else 0.0, generator=generator(1))
        weights = particles.log_weights.exp() if weighted else torch.full((20_000,), 1 / 20_000, dtype=F64)
        assert low < total_variation(particles.x, weights, powers) < high, (eps, weighted)


# Guided fields, conditions


def test_what_guidance_means_to_sample() -> None:
    """N(label, 1/4) guided away from label 0 by 3 is N(3 label, 1/4): here weights are equal but for their rounding."""
    field = NetworkField(ByClass())
    guided = Guided(field, 3.0, null={"class_labels": 0})
    labels, noise = torch.ones(2000, dtype=torch.long), sample_noise((2000, 1), generator(0), F64)
    mixed = Mixed.of(guided)
    assert mixed.total == 1
    particles = steer(guided, noise, 50, mixed, generator=generator(1), class_labels=labels)
    mean = float(particles.mean(particles.x))
    assert mean == pytest.approx(3.0, abs=0.05)
    assert float(particles.mean((particles.x - mean).square())) == pytest.approx(0.25, abs=0.04)
    one, _ = MixedWalk(mixed, torch.tensor([0.3, 1.0]), torch.zeros_like, noise).velocity_and_rate(
        MixedWalk(mixed, torch.tensor([0.3, 1.0]), torch.zeros_like, noise).grid[0], noise, {"class_labels": labels}
    )
    torch.testing.assert_close(one, guided(noise, 0.3, class_labels=labels), rtol=0, atol=1e-6)


def test_autoguidance_is_a_mixture_of_two_models() -> None:
    mixed = Mixed.of(Guided(Q2, 2.0, weak=Q1))
    powers = {getattr(field, "field", field): power for field, power in mixed.powers.items()}
    assert powers == {Q2: 2.0, Q1: -1.0}


def test_a_guided_field_may_be_a_part() -> None:
    guided = Guided(Q2, 2.0, weak=Q1)
    particles = steer(
        guided, sample_noise((64, 1), generator(0), F64), 20, Mixed({guided: 1.0}), generator=generator(1)
    )
    assert particles.ess.min() == pytest.approx(64)


class Zero(nn.Module):
    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return 0 * x


@pytest.mark.parametrize(
    ("powers", "says"),
    [
        ({}, r"Mixed takes fields and their powers"),
        ([Q1, Q2], r"Mixed takes fields and their powers"),
        ({FlowMap(Zero()): 1.0}, r"a flow map has no density in its few steps"),
        ({Zero(): 1.0}, r"a part of Mixed is a Zero, and a VelocityField is needed"),
        ({Q1: math.nan}, r"the power nan is no finite number"),
        ({Q1: True}, r"the power True"),
        ({Q1: 1.0, Q2: -1.0}, r"the powers sum to 0: a density needs a sum above 0"),
        ({Q1: 1.0, Q2.on(Trigonometric()): 1.0}, r"fields on Linear\(\) and on Trigonometric\(\).*field.on\(path\)"),
    ],
)
def test_what_is_refused(powers: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mixed(powers)


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale is 0.0"):
        Mixed({Q1: 2.0}, scale=0.0)
    with pytest.raises(ValueError, match=r"has no one target"):
        Mixed.of(Guided(Q2, 2.0, (0.2, 0.8), weak=Q1))
    with pytest.raises(ValueError, match=r"greedy=True climbs a Reward"):
        steer(Q1, torch.zeros(4, 1, dtype=F64), 4, Mixed({Q1: 2.0}), greedy=True)
    paired = gaussian(0.0, 1.0)
    paired.coupling = "ot"
    for mixed in (Mixed({Q1: 1.0, paired: 1.0}), Mixed.of(Guided(Q1, 2.0, weak=paired))):
        with pytest.raises(ValueError, match=r"Mixed needs noise that is independent of the data"):
            steer(Q1, torch.zeros(4, 1, dtype=F64), 4, mixed)
    with pytest.raises(ValueError, match=r"numbers that are not finite"):
        steer(Q1, torch.full((4, 1), 1e200, dtype=F64), 4, Mixed({Q1: 2.0}))
