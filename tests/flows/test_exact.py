"""Exact fields against Bayes' rule done by brute force, the continuity equation, and arithmetic of 60 digits."""

import math

import mpmath
import numpy as np
import pytest
import torch

from fewstep.common.randomness import generator
from fewstep.data import densities
from fewstep.flows import solvers
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import (
    BoxesField,
    CheckerboardField,
    GaussianField,
    MixtureField,
    eight_gaussians,
)
from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated

F64 = torch.float64
DDPM = Tabulated.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
PATHS = [Linear(), Trigonometric(), VariancePreserving(), DDPM]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)

MEANS = torch.tensor([[-1.0, 0.3], [1.2, 0.8], [0.1, -1.4]], dtype=F64)
SCALES = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
# Sides of different lengths, some shared, some touching.
BOXES = torch.tensor([[[-1.5, -0.5], [0.0, 1.0]], [[-0.5, 1.5], [0.0, 0.25]], [[0.5, 1.5], [-2.0, -0.5]]], dtype=F64)
LOW, HIGH = BOXES.unbind(-1)
SHARES = (HIGH - LOW).prod(1) / 3


def mixture(path=None):
    return MixtureField(MEANS, SCALES, WEIGHTS, path)


def boxes(path=None):
    return BoxesField(BOXES, path)


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


def spread(count=7):
    """Times between the ends, and as many points."""
    t = torch.linspace(0.03, 0.97, count, dtype=F64)
    return torch.randn(count, 2, generator=generator(0), dtype=F64) * 1.5, t


def log_gaussian(x, field, path, t):
    a, s = path.alpha(t), path.sigma(t)
    cov = a * a * (field.basis * field.variances @ field.basis.T) + s * s * torch.eye(2, dtype=F64)
    return torch.distributions.MultivariateNormal(a * field.mean, cov).log_prob(x)


def log_mixture(x, path, t):
    a, s = path.alpha(t), path.sigma(t)
    variance = a * a * SCALES**2 + s * s
    squares = (x - a * MEANS).square().sum(1)
    return torch.logsumexp(WEIGHTS.log() - squares / (2 * variance) - torch.log(2 * math.pi * variance), 0)


def log_boxes(x, path, t):
    """Not for tails: a plain difference of two Gaussian integrals."""
    a, s = path.alpha(t), path.sigma(t)
    mass = torch.special.ndtr((x - a * LOW) / s) - torch.special.ndtr((x - a * HIGH) / s)
    return torch.log((mass / a).prod(1).sum() / 3)


# Continuity: dp/dt + div(p v) = 0 fixes how the density moves. With the densities above it tests every exact field.


@by_path
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "boxes"])
def test_continuity_equation_and_score(gaussian, path, kind):
    field = {"gaussian": gaussian.on(path), "mixture": mixture(path), "boxes": boxes(path)}[kind]
    log_density = {
        "gaussian": lambda x, t: log_gaussian(x, gaussian, path, t),
        "mixture": lambda x, t: log_mixture(x, path, t),
        "boxes": lambda x, t: log_boxes(x, path, t),
    }[kind]
    for log_ratio in (-2.0, -0.5, 0.7, 1.6):
        t = path.time_at(torch.tensor(log_ratio, dtype=F64))
        for x in torch.tensor([[0.2, -0.3], [-0.9, 0.6], [1.1, 1.0]], dtype=F64):
            score = torch.func.grad(log_density)(x, t)
            change = torch.func.grad(log_density, argnums=1)(x, t)
            velocity = field(x[None], t)[0]
            divergence = torch.func.jacrev(lambda x, t=t: field(x[None], t)[0])(x).trace()
            close(change + divergence + velocity @ score, torch.zeros((), dtype=F64), 1e-9)
            close(field.score(x[None], t)[0], score, 1e-10)


# Gaussian


@by_path
def test_gaussian_velocity_is_the_closed_form(gaussian, path):
    # (1/2) C' C^-1 with a dense solve, no eigenvectors.
    x, t = spread()
    cov, one = gaussian.basis * gaussian.variances @ gaussian.basis.T, torch.eye(2, dtype=F64)
    for i in range(len(t)):
        a, s, a_dot, s_dot = path.coefficients(t[i])
        gain = torch.linalg.solve(a * a * cov + s * s * one, x[i] - a * gaussian.mean)
        expected = a_dot * gaussian.mean + (a * a_dot * cov + s * s_dot * one) @ gain
        close(gaussian.on(path)(x, t)[i], expected, 1e-11)


@by_path
def test_gaussian_flow_obeys_its_equations(gaussian, path, points):
    field = gaussian.on(path)
    s, t, m = 0.2, torch.full((64,), 0.9, dtype=F64), 0.6
    end, rate = torch.func.jvp(lambda t: field.flow(points, s, t), (t,), (torch.ones_like(t),))
    close(rate, field(end, t), 1e-11)  # Lagrangian
    close(field.flow(field.flow(points, s, m), m, t), end, 1e-11)
    close(field.flow(end, t, s), points, 1e-11)
    close(field.flow(points, 0.3, 0.3), points, 1e-14)
    # Eulerian: the end does not change along the path through (x, s).
    rows = torch.full_like(t, s)
    tangent = (field(points, rows), torch.ones_like(rows))
    drift = torch.func.jvp(lambda x, s: field.flow(x, s, t), (points, rows), tangent)[1]
    close(drift, torch.zeros_like(drift), 1e-11)


def test_gaussian_flow_carries_noise_to_the_data(gaussian):
    # An affine map: where it sends 0 and the axes says everything.
    axes = torch.cat([torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
    ends = gaussian.flow(axes, 0.0, 1.0)
    close(ends[0], gaussian.mean, 1e-14)
    jacobian = (ends[1:] - ends[0]).T
    close(jacobian @ jacobian.T, torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=F64), 1e-14)


def test_gaussian_solve_meets_the_closed_flow(gaussian, points):
    solved = integrate(gaussian, points, torch.tensor([0.0, 1.0], dtype=F64), "adaptive", tolerance=1e-10)
    close(solved, gaussian.flow(points, 0.0, 1.0), 1e-8)


def test_gaussian_images():
    mean = torch.randn(2, 3, 3, generator=generator(1), dtype=F64)
    half = torch.randn(18, 18, generator=generator(2), dtype=F64)
    field = GaussianField(mean, half @ half.T + torch.eye(18, dtype=F64))
    x = torch.randn(5, 2, 3, 3, generator=generator(3), dtype=F64)
    flat = GaussianField(mean.flatten(), half @ half.T + torch.eye(18, dtype=F64))
    assert field(x, 0.4).shape == x.shape
    close(field(x, 0.4).flatten(1), flat(x.flatten(1), 0.4))
    close(field.flow(x, 0.1, 0.8).flatten(1), flat.flow(x.flatten(1), 0.1, 0.8))
    assert field.data(4, generator(0)).shape == (4, 2, 3, 3)


# Mixture


def test_mixture_of_one_is_a_gaussian():
    field = MixtureField(MEANS[:1], SCALES[:1], WEIGHTS[:1])
    other = GaussianField(MEANS[0], SCALES[0] ** 2 * torch.eye(2, dtype=F64))
    x, t = spread()
    close(field(x, t), other(x, t))


@by_path
def test_mixture_velocity_by_quadrature(path):
    # Bayes' rule on a grid of data: E[data given x_t = x], and with it the velocity.
    field = mixture(path)
    axis = torch.linspace(-7, 7, 561, dtype=F64)
    data = torch.cartesian_prod(axis, axis)
    variance = SCALES**2
    squares = (data[:, None] - MEANS).square().sum(-1)
    log_prior = torch.logsumexp(WEIGHTS.log() - squares / (2 * variance) - variance.log(), 1)
    for log_ratio in (-1.5, 0.0, 1.5):
        t = path.time_at(torch.tensor(log_ratio, dtype=F64))
        a, s, a_dot, s_dot = path.coefficients(t)
        x = torch.tensor([0.4, -0.2], dtype=F64)
        weights = torch.softmax(log_prior - (x - a * data).square().sum(1) / (2 * s * s), 0)
        mean = weights @ data
        close(field(x[None], t)[0], a_dot * mean + s_dot * (x - a * mean) / s, 1e-9)


def test_mixture_far_away():
    # The component that falls slowest rules: the widest.
    x = torch.tensor([[300.0, -400.0]], dtype=F64)
    wide = MixtureField(MEANS[2:], SCALES[2:], WEIGHTS[2:])
    for t in (0.5, 1.0):
        close(mixture()(x, t), wide(x, t))
    assert mixture()(x, 0.0).isfinite().all()


# Boxes


def digits(x, a, s):
    """The velocity's two parts, E[data given x] and E[noise given x], with 60 digits; x, a, s as floats are exact."""
    with mpmath.workdps(60):
        a, s = mpmath.mpf(a), mpmath.mpf(s)
        masses, means = [], []
        for box in BOXES.tolist():
            mass, mean = mpmath.mpf(1), []
            for position, (low, high) in zip(x, box, strict=True):
                near, far = (mpmath.mpf(position) - a * high) / s, (mpmath.mpf(position) - a * low) / s
                sign = -1 if near + far > 0 else 1  # in the left tail, where erfc keeps its digits
                l, u = sorted((sign * near, sign * far))
                rise = (mpmath.erfc(-u / mpmath.sqrt(2)) - mpmath.erfc(-l / mpmath.sqrt(2))) / 2
                noise = sign * (mpmath.npdf(l) - mpmath.npdf(u)) / rise
                mass *= rise
                mean.append(noise)
            masses.append(mass)
            means.append(mean)
        noise = [sum(m * n[i] for m, n in zip(masses, means, strict=True)) / sum(masses) for i in range(2)]
        data = [(mpmath.mpf(p) - s * n) / a for p, n in zip(x, noise, strict=True)]
        return [float(d) for d in data], [float(n) for n in noise]


@pytest.mark.parametrize("t", [1e-9, 1e-4, 5e-3, 0.02, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-7])
def test_boxes_to_the_last_digits(t):
    t = float(torch.tensor(t, dtype=F64))
    a, s = t, 1 - t
    # Inside, on a corner, near an edge, between boxes, outside, far outside.
    points = [(0.3, 0.1), (-0.5, 0.25), (1.499, -0.7), (0.1, -0.2), (2.0, 1.7), (-30.0, 60.0)]
    velocity = boxes()(torch.tensor(points, dtype=F64), t)
    for x, v in zip(points, velocity, strict=True):
        data, noise = digits(x, a, s)
        expected = torch.tensor(data, dtype=F64) - torch.tensor(noise, dtype=F64)
        # An offset of (x - a low) / s, rounded at x, is what the input itself leaves unsaid.
        torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12 + 1e-15 / s)


@by_path
def test_boxes_by_quadrature(path):
    # Gauss-Legendre in every box: nothing of the closed form.
    nodes, weights = (torch.tensor(v, dtype=F64) for v in np.polynomial.legendre.leggauss(40))
    x = torch.tensor([0.45, 0.15], dtype=F64)
    for log_ratio in (-1.5, 0.0, 1.0):
        t = path.time_at(torch.tensor(log_ratio, dtype=F64))
        a, s, a_dot, s_dot = path.coefficients(t)
        total, first = torch.zeros((), dtype=F64), torch.zeros(2, dtype=F64)
        for low, high in zip(LOW, HIGH, strict=True):
            sides = [(low[i] + high[i]) / 2 + (high[i] - low[i]) / 2 * nodes for i in range(2)]
            data = torch.cartesian_prod(*sides)
            area = torch.cartesian_prod(weights, weights).prod(1) * (high - low).prod() / 4
            density = area * torch.exp(-(x - a * data).square().sum(1) / (2 * s * s))
            total, first = total + density.sum(), first + density @ data
        mean = first / total
        close(boxes(path)(x[None], t)[0], a_dot * mean + s_dot * (x - a * mean) / s, 1e-11)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=str)
def test_boxes_where_all_is_noise(path):
    # The data's mean, from areas 1, 0.5, 1.5 and middles of the boxes, and x itself as the noise.
    mean = torch.tensor([-1.0 + 0.25 + 1.5, 0.5 + 0.0625 - 1.875], dtype=F64) / 3
    x, t = torch.tensor([[0.3, 0.1], [-8.0, 5.0]], dtype=F64), torch.zeros(1, dtype=F64)
    close(boxes(path)(x, 0.0), path.alpha_dot(t) * mean + path.sigma_dot(t) * x)


@pytest.mark.parametrize("path", PATHS[:3], ids=str)
def test_boxes_where_all_is_data(path):
    # Inside a box no noise can be seen; outside, the nearest data counts.
    x = torch.tensor([[0.3, 0.1], [-1.0, 0.5], [2.0, 0.1], [1.0, 7.0], [-9.0, -9.0], [1.6, -0.6]], dtype=F64)
    nearest = torch.tensor([[0.3, 0.1], [-1.0, 0.5], [1.5, 0.1], [-0.5, 1.0], [-1.5, 0.0], [1.5, -0.6]], dtype=F64)
    velocity, rate = boxes(path)(x, 1.0), path.alpha_dot(torch.ones(1, dtype=F64))
    close(velocity[:2], rate * x[:2])
    close(velocity, rate * nearest, 1e-7)


@by_path
@pytest.mark.parametrize("make", [mixture, boxes], ids=["mixture", "boxes"])
def test_finite_with_finite_gradients_everywhere(path, make):
    field = make(path)
    x = torch.tensor([[0.0, 0.0], [0.3, 0.1], [-0.5, 0.25], [4.0, -7.0], [-1e3, 1e3]], dtype=F64)
    for t in (0.0, 1e-14, 1e-7, 1e-3, 0.02, 0.5, 0.98, 1 - 1e-3, 1 - 1e-9, 1.0):
        velocity, vjp = torch.func.vjp(lambda x, t=t: field(x, t), x)
        assert velocity.isfinite().all(), t
        assert vjp(torch.ones_like(x))[0].isfinite().all(), t


def test_gaussians_on_a_variance_preserving_path_are_finite_at_its_end(gaussian, points):
    path = VariancePreserving()
    for field in (gaussian.on(path), mixture(path)):
        close(field(points, 1.0), field(points, 1 - 1e-9), 1e-6)


def test_checkerboard():
    board = densities.checkerboard().sides
    assert board.shape == (8, 2, 2)
    middle, width = board.mean(-1), board[..., 1] - board[..., 0]
    # Mean 0, variance 1: of the middles, and of a uniform number within.
    close(middle.mean(0), torch.zeros(2, dtype=F64))
    close(middle.square().mean(0) + width.square().mean(0) / 12, torch.ones(2, dtype=F64))
    # Half of the board, filled cells touching in corners only: the point symmetry of a board.
    field = CheckerboardField()
    x = torch.randn(20, 2, generator=generator(0), dtype=F64)
    for t in (0.2, 0.9):
        close(field(-x, t), -field(x, t), 1e-11)
        close(field(x.flip(1), t), field(x, t).flip(1), 1e-11)


# What all share


@pytest.mark.takes_seconds
@pytest.mark.parametrize("make", [mixture, boxes], ids=["mixture", "boxes"])
def test_flows_compose_and_invert(make):
    field, x = make(), torch.randn(16, 2, generator=generator(5), dtype=F64)
    whole = field.flow(x, 0.0, 0.9)
    close(field.flow(field.flow(x, 0.0, 0.5), 0.5, 0.9), whole, 1e-6)
    close(field.flow(whole, 0.9, 0.0), x, 1e-6)
    assert torch.equal(field.flow(x, 0.4, 0.4), x)


def normal_points(count):
    """Points that fill the Gaussian of the plane evenly (Sobol): moments converge like 1 / count."""
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=F64)
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def test_mixture_flow_carries_noise_to_the_data():
    end = mixture().flow(normal_points(1024), 0.0, 1.0)
    mean = WEIGHTS @ MEANS
    cov = (WEIGHTS * SCALES**2).sum() * torch.eye(2, dtype=F64) + (MEANS - mean).T @ ((MEANS - mean) * WEIGHTS[:, None])
    close(end.mean(0), mean, 0.01)
    close(end.T.cov(correction=0), cov, 0.02)


@pytest.mark.takes_seconds
def test_boxes_flow_carries_noise_to_the_data():
    end = boxes().flow(normal_points(512), 0.0, 1 - 1e-3)
    inside = ((end[:, None] > LOW - 0.01) & (end[:, None] < HIGH + 0.01)).all(-1).double()
    assert inside.amax(1).mean() > 0.99
    close(inside.mean(0), SHARES, 0.02)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "boxes", "eight"])
def test_float32_in_float32_out(gaussian, kind):
    field = {"gaussian": gaussian, "mixture": mixture(), "boxes": boxes(), "eight": eight_gaussians()}[kind]
    x, t = spread()
    low = field(x.float(), t.float())
    assert low.dtype == torch.float32
    close(low.double(), field(x, t), 1e-5)
    assert field(x, t).dtype == F64
    assert field.flow(x.float(), 0.2, 0.6).dtype == torch.float32
    # A field made in float32 takes float64 points, too.
    single = GaussianField(gaussian.mean.float(), torch.eye(2)) if kind == "gaussian" else field
    assert single(x, t).dtype == F64
    assert single.flow(x, 0.2, 0.6).dtype == F64


@by_path
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "boxes"])
def test_rows_have_their_own_times(gaussian, path, kind):
    field = {"gaussian": gaussian, "mixture": mixture(), "boxes": boxes()}[kind].on(path)
    assert field.path == path
    x, t = spread(2)  # as many rows as components
    rows = torch.cat([field(x[i : i + 1], float(t[i])) for i in range(2)])
    close(field(x, t), rows, 1e-13)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "boxes", "eight"])
def test_data_has_the_moments_of_the_field(gaussian, kind):
    n = 40_000
    if kind == "gaussian":
        field, mean, cov = gaussian, gaussian.mean, torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=F64)
    elif kind == "mixture":
        field, mean = mixture(), WEIGHTS @ MEANS
        cov = (WEIGHTS * SCALES**2).sum() * torch.eye(2) + (MEANS - mean).T @ ((MEANS - mean) * WEIGHTS[:, None])
    elif kind == "boxes":
        field = boxes()
        middle = (LOW + HIGH) / 2
        mean = SHARES @ middle
        cov = torch.diag(SHARES @ (HIGH - LOW) ** 2 / 12) + (middle - mean).T @ ((middle - mean) * SHARES[:, None])
    else:
        field, mean, cov = eight_gaussians(), torch.zeros(2), torch.eye(2)
    x = field.data(n, generator(9))
    assert x.shape == (n, 2)
    close(x.mean(0).double(), mean.double(), 5 * 1.3 / n**0.5)
    close(x.T.cov().double(), cov.double(), 5 * 1.7 * 2**0.5 / n**0.5)
    assert torch.equal(field.data(8, generator(1)), field.data(8, generator(1)))
    if kind == "boxes":
        assert ((x[:, None] >= LOW - 1e-6) & (x[:, None] <= HIGH + 1e-6)).all(-1).any(1).all()
    # All data is where the field says that all noise goes.
    close(field(torch.zeros(1, 2, dtype=F64), 0.0)[0], mean.double(), 1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"mean has 2 numbers, cov shape \(3, 3\)"):
        GaussianField(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match="not positive definite: its least eigenvalue is -1"):
        GaussianField(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="3 means, 2 scales, 3 weights"):
        MixtureField(MEANS, SCALES[:2], WEIGHTS)
    with pytest.raises(ValueError, match="positive scales and weights"):
        MixtureField(MEANS, SCALES, WEIGHTS - 0.2)
    for wrong in (BOXES[0], BOXES.flip(-1), BOXES[..., :1]):
        with pytest.raises(ValueError, match="low < high are needed"):
            BoxesField(wrong)


def test_nothing_of_an_exact_field_trains(gaussian):
    for field in (gaussian, mixture(), boxes()):
        assert not list(field.parameters())


def test_the_flow_on_a_schedule_of_a_thousand_steps_ends():
    """The rates of a table jump at every step: an adaptive solve there takes a thousand small ones, or finds no end."""
    mean, x = torch.tensor([0.8, -0.4], dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    gauss = GaussianField(mean, 0.09 * torch.eye(2, dtype=torch.float64), DDPM)
    same = MixtureField(mean[None], torch.full((1,), 0.3, dtype=torch.float64), torch.ones(1), DDPM)
    for s, t in ((0.0, 1.0), (0.2, 0.9), (1.0, 0.0)):
        with count_calls(same) as counted:
            found = same.flow(x, s, t)
        torch.testing.assert_close(found, gauss.flow(x, s, t), atol=1e-7, rtol=1e-7)
        assert counted.count < 1000


def test_an_adaptive_solve_without_end_says_so(monkeypatch):
    monkeypatch.setattr(solvers, "LONGEST", 500)

    def jumping(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * torch.sign(torch.sin(1e7 * t))[:, None]

    with pytest.raises(ValueError, match="adaptive solver does not get from t = 0 to 1 at tolerance 1e-12"):
        integrate(jumping, torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 1.0]), "adaptive", tolerance=1e-12)
