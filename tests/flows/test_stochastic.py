"""Sampling by SDEs: the marginals of the ODE at any strength of noise, orders, both directions, what is refused."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fewstep.common.randomness import generator, sample_generators
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.flows.sampling import check_options, sample, sample_noise
from fewstep.flows.solvers import integrate
from fewstep.flows.stochastic import STEPS, STRENGTHS, integrate_sde, kappa, places_along, quiet_step, strength
from fewstep.flows.tabulated import Tabulated
from fewstep.flows.times import step_grid
from fewstep.networks import MLP

F64 = torch.float64
SHORT = Tabulated((1.0, 0.5, 0.0, -1.0, -3.0))
PATHS = [Linear(), Trigonometric(), VariancePreserving(), SHORT]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
NAMED = {"ODE": 0.0, "constant": 0.5, "capped": lambda t: kappa(Linear(), t).clamp(max=2), **{n: n for n in STRENGTHS}}
by_eps = pytest.mark.parametrize("eps", NAMED.values(), ids=NAMED)


def one_gaussian(path=None):
    """N(1, 1/4) on the line."""
    return GaussianField(torch.ones(1, dtype=F64), torch.full((1, 1), 0.25, dtype=F64), path)


def law(eps, times, solver="euler", last_step="tweedie", start=(0.0, 1.0), path=None):
    """Mean and variance at the last time, exactly: a step of a sampler on a Gaussian is ``x -> k x + b + n z``, and the
    three numbers are read off where x and z are 0 or 1."""
    field = one_gaussian(path)
    x, z = torch.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]], dtype=F64)
    places = places_along(field.path, times, eps, x)
    mean, variance = start
    for i in range(len(places) - 1):
        here, there = places[i : i + 2]
        if last_step != "none" and i == len(places) - 2:
            b, first, noisy = quiet_step(last_step, field, x, here, there).flatten().tolist()
        else:
            b, first, noisy = STEPS[solver](field, x, here, there, lambda _: z).flatten().tolist()
        mean, variance = (first - b) * mean + b, (first - b) ** 2 * variance + (noisy - b) ** 2
    return mean, variance


def grid(steps):
    return step_grid(steps)


# The law


# The reference's table, to its digits: N(1, 1/4), Euler-Maruyama, the last step without noise.
TABLE = {
    "ODE": [0.1856, 0.2356, 0.2471],
    "linear": [0.2364, 0.2462, 0.2492],
    "increasing-decreasing": [0.2614, 0.2503, 0.2500],
}


@pytest.mark.parametrize("name", TABLE)
def test_the_variance_after_10_50_and_250_steps(name):
    found = [law(NAMED[name], grid(n)) for n in (10, 50, 250)]
    assert [variance for _, variance in found] == pytest.approx(TABLE[name], abs=5e-5)
    assert [mean for mean, _ in found] == pytest.approx([1.0] * 3, abs=1e-12)


@pytest.mark.parametrize("solver", STEPS)
@by_eps
def test_every_strength_has_the_law_of_the_data(eps, solver):
    mean, variance = law(eps, grid(1000), solver)
    assert mean == pytest.approx(1, abs=1e-9)
    assert variance == pytest.approx(0.25, abs=2e-2 if solver == "ancestral" else 1e-3)


# A strength that is smooth, and 0 at the ends, where a score may not be: the orders are those of theory.
@pytest.mark.takes_seconds
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ancestral", 1)])
@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_the_weak_order_of_a_solver(solver, order, path):
    end = torch.full((1,), 0.8, dtype=F64)
    a, s = path.alpha(end).item(), path.sigma(end).item()
    exact = a * a * 0.25 + s * s
    errors = [
        law(lambda t: t * (1 - t) + 0.3, 0.8 * grid(n), solver, "none", path=path)[1] - exact for n in (200, 400, 800)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", STEPS)
@by_eps
def test_backwards_it_adds_noise_along_the_same_law(eps, solver):
    if eps == "kappa" and solver != "ancestral":  # as kappa grows, no step is short enough
        with pytest.raises(ValueError, match="eps='kappa' is infinite at t = 0, where this grid ends: take solver="):
            integrate_sde(one_gaussian(), torch.ones(1, 1, dtype=F64), grid(9).flip(0), Linear(), eps, solver)
        return
    mean, variance = law(eps, grid(1000).flip(0), solver, "none", start=(1.0, 0.25))
    assert mean == pytest.approx(0, abs=3e-3)
    assert variance == pytest.approx(1, abs=1e-2)


def test_backwards_by_kappa_the_ancestral_step_is_the_noising_itself():
    """x_t given x_s = x is N((a_t / a_s) x, ...) whatever the data: exact in one step of any length."""
    field, times = one_gaussian(), torch.tensor([1.0, 0.3], dtype=F64)
    x, z = torch.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]], dtype=F64)
    here, there = places_along(Linear(), times, "kappa", x)
    found = STEPS["ancestral"](field, x, here, there, lambda _: z).flatten().tolist()
    assert found == pytest.approx([0.0, 0.3, 0.7], abs=1e-12)


def test_ancestral_steps_are_those_of_ddpm():
    """x_t given x_s and x1 = D, as the posterior of two Gaussians says it."""
    s, t = 0.3, 0.5
    field, x = one_gaussian(), torch.tensor([[0.7]], dtype=F64)
    here, there = places_along(Linear(), torch.tensor([s, t], dtype=F64), "kappa", x)
    data = x + (1 - s) * field(x, s)
    # x_s = (s / t) x_t + noise of this power, and x_t = t D + (1 - t) noise.
    power = (1 - s) ** 2 - (s / t) ** 2 * (1 - t) ** 2
    precision = 1 / (1 - t) ** 2 + (s / t) ** 2 / power
    mean = (t * data / (1 - t) ** 2 + (s / t) * x / power) / precision
    step = STEPS["ancestral"]
    assert float(step(field, x, here, there, torch.zeros_like)) == pytest.approx(float(mean), abs=1e-12)
    spread = step(field, x, here, there, torch.ones_like) - step(field, x, here, there, torch.zeros_like)
    assert float(spread) ** 2 == pytest.approx(1 / precision, abs=1e-12)


def test_what_ancestral_steps_keep_of_the_noise():
    """exp(-integral of eps / s^2), on the linear path: (1 - t') / (1 - t) for sigma, with number e
    exp(e / (1 - t) - e / (1 - t'))."""
    times, x = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=F64), torch.zeros(1, 1, dtype=F64)
    s = (1 - times).tolist()

    def keeps(eps, times=times):
        return [place.keeps for place in places_along(Linear(), times, eps, x)[:-1]]

    assert keeps("sigma") == pytest.approx([b / a for a, b in pairwise(s)], abs=1e-12)
    assert keeps(0.5) == pytest.approx([math.exp(0.5 / a - 0.5 / b) for a, b in pairwise(s)], abs=1e-12)
    assert keeps("kappa") == pytest.approx([0.0, 0.2 * 0.5 / (0.5 * 0.8), 0.5 * 0.1 / (0.9 * 0.5)], abs=1e-12)
    assert keeps(lambda t: (1 - t) / t)[1:] == pytest.approx(keeps("kappa")[1:], abs=1e-12)
    assert keeps(0.5, times.flip(0)) == pytest.approx(keeps(0.5)[::-1], abs=1e-12)


def test_kappa_and_the_score(gaussian):
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    torch.testing.assert_close(kappa(Linear(), t), (1 - t) / t)
    torch.testing.assert_close(kappa(Trigonometric(), t), (math.pi / 2) / torch.tan(math.pi * t / 2))
    for path in PATHS:
        x = torch.randn(5, 2, generator=generator(0), dtype=F64)
        field = gaussian.on(path)
        place = places_along(path, torch.tensor([0.3, 1.0], dtype=F64), "kappa", x)[0]
        v = field(x, 0.3)
        torch.testing.assert_close(place.score(x, v), field.score(x, 0.3))
        drift = (place.alpha_dot / place.alpha) * x + 2 * place.eps * place.score(x, v)  # f + 2 kappa S
        torch.testing.assert_close(place.drift(field, x, 1), drift)


@pytest.mark.takes_seconds
@by_path
def test_samples_on_any_path(gaussian, path):
    n, g = 20_000, generator(3)
    field = gaussian.on(path)
    start, _ = path.sample(torch.randn(n, 2, generator=g, dtype=F64), gaussian.data(n, g), 0.0)
    end = sample(field, start, 60, eps="kappa", last_step="none" if path is SHORT else None, generator=g, solver="heun")
    one = torch.ones(1, dtype=F64)
    a, s = path.alpha(one), path.sigma(one)
    cov = a * a * torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=F64) + s * s * torch.eye(2, dtype=F64)
    assert ((end.mean(0) - a * gaussian.mean).abs() < 5 * (cov.diagonal() / n).sqrt() + 0.01).all()
    assert ((end.T.cov() - cov).abs() < 0.08).all()


# What is called, drawn and passed on


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("ancestral", 6), ("heun", 11)])
def test_calls(gaussian, points, solver, calls):
    with count_calls(gaussian) as made:
        sample(gaussian, points, 6, eps="linear", solver=solver)
    assert made.count == calls


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_samples_do_not_depend_on_the_batch(solver, dtype):
    torch.manual_seed(0)
    field = NetworkField(MLP(3, width=8, classes=4)).to(dtype)
    labels = torch.arange(6) % 4

    def draw(rows):
        generators = sample_generators(5, rows)
        noise = sample_noise((len(rows), 3), generators, dtype)
        return sample(field, noise, 4, eps="kappa", solver=solver, generator=generators, class_labels=labels[rows])

    whole = draw(range(6))
    assert whole.dtype == dtype
    assert whole.isfinite().all()
    assert not whole.requires_grad
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.cat([draw(range(4)), draw(range(4, 6))]), whole, rtol=0, atol=tolerance)


def test_any_rank_and_guidance():
    class Net(nn.Module):
        def forward(self, x, t, class_labels):
            return x * (class_labels.reshape(-1, *[1] * (x.ndim - 1)) + 1)

    field = Guided(NetworkField(Net()), 2.0, null={"class_labels": 3})
    noise = torch.randn(2, 3, 4, 5)
    out = sample(
        field, noise, 3, eps=lambda t: 0.5 * (1 - t), generator=generator(0), class_labels=torch.tensor([0, 1])
    )
    assert out.shape == noise.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_no_noise_is_the_ode(gaussian, points, solver):
    found = sample(gaussian, points, 7, eps=0.0, solver=solver, last_step="euler")
    want = integrate(gaussian, points, grid(7)[:-1], solver)
    torch.testing.assert_close(found, integrate(gaussian, want, grid(7)[-2:], "euler"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
@pytest.mark.parametrize("last_step", ["tweedie", "euler", "mean"])
def test_the_last_step_has_no_noise(gaussian, points, last_step, path):
    field = gaussian.on(path)
    x = integrate_sde(field, points, grid(5)[:-1], path, 0.5, generator=generator(1))
    found = sample(field, points, 5, eps=0.5, last_step=last_step, generator=generator(1))
    v, score = field(x, 0.8), field.score(x, 0.8)
    ends = {"tweedie": path.from_velocity(v, x, 0.8, "data"), "euler": x + 0.2 * v, "mean": x + 0.2 * (v + 0.5 * score)}
    torch.testing.assert_close(found, ends[last_step], rtol=0, atol=1e-12)
    if last_step == "tweedie":  # as if nothing is said
        assert torch.equal(sample(field, points, 5, eps=0.5, generator=generator(1)), found)
    noisy = sample(field, points, 5, eps=0.5, last_step="none", generator=generator(1))
    assert (noisy - found).abs().max() > 0.1


# What cannot be


@pytest.mark.parametrize(
    ("eps", "says"),
    [
        ("kapa", "did you mean 'kappa'"),
        (-0.1, r"eps=-0.1 is -0.1 at t = 0"),
        (float("nan"), "eps=nan is nan"),
        (float("inf"), "eps=inf is inf at t = 0.01"),
        (lambda t: t - 0.5, r"eps\(t\) is -0.5 at t = 0"),
        (lambda t: torch.ones(3), r"eps\(t\) has shape \(3,\) at 65 times"),
        (True, "eps is True: a number"),
        ([0.1], r"eps is \[0.1\]: a number, a function of times"),
    ],
)
def test_a_strength_that_cannot_be(gaussian, points, eps, says):
    with count_calls(gaussian) as made, pytest.raises(ValueError, match=says):
        sample(gaussian, points, 5, eps=eps)
    assert made.count == 0


def test_refusals(gaussian, points):
    with pytest.raises(ValueError, match="unknown strength of noise"):
        check_options(gaussian, 2, eps="kapa")  # of a command, before prompts are encoded
    student = FlowMap(MLP(2, width=8, times=2))
    with pytest.raises(ValueError, match="noise along the ODE of a velocity field; a flow map has gamma"):
        sample(student, points, 2, eps="kappa")
    with pytest.raises(ValueError, match="unknown solver of an SDE 'midpoint'"):
        sample(gaussian, points, 2, eps="kappa", solver="midpoint")
    with pytest.raises(ValueError, match="unknown solver 'ancestral'"):
        sample(gaussian, points, 2, solver="ancestral")
    with pytest.raises(ValueError, match="unknown last step 'tweedy': did you mean 'tweedie'"):
        sample(gaussian, points, 2, eps="kappa", last_step="tweedy")
    with pytest.raises(ValueError, match="last_step='mean' is how a sampler with noise ends: give eps too"):
        sample(gaussian, points, 2, last_step="mean")
    with pytest.raises(ValueError, match="a grid of two or more times is needed that rises or falls"):
        integrate_sde(gaussian, points, torch.tensor([0.0, 0.5, 0.4]), Linear(), "kappa")


@pytest.mark.parametrize("inner", [False, True])
def test_a_score_that_does_not_hold(gaussian, points, inner):
    field = NetworkField(MLP(2, width=8).double())
    field.coupling = "ot"
    coupled = field.on(Trigonometric()) if inner else field
    with count_calls(coupled) as made:
        with pytest.raises(ValueError, match=r"eps='kappa' needs noise that is independent .* coupling 'ot'"):
            sample(coupled, points, 2, eps="kappa")
        with pytest.raises(ValueError, match="the score needs noise that is independent"):
            coupled.score(points, 0.5)
    assert made.count == 0
    sample(coupled, points, 2)  # its ODE is what it was trained for
    field = NetworkField(MLP(2, width=8).double())
    field.distilled = "a consistency model"
    with pytest.raises(ValueError, match="needs a velocity, and the model is a consistency model"):
        sample(field, points, 2, eps="kappa")


def test_infinite_strength_at_an_end_alone():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    assert strength("kappa", Linear(), t).tolist() == [math.inf, 1.0, 0.0]
    assert strength(lambda t: (1 - t) / t, Linear(), t).tolist() == [math.inf, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"eps\(t\) is inf at t = 0.5"):
        strength(lambda t: 1 / (t - 0.5).abs(), Linear(), t)
