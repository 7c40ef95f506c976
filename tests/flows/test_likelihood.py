"""Likelihoods against closed forms: by the ODE, by the SDE's bound, by a map; bits a dimension; what is refused."""

import math

import pytest
import torch
from torch import nn

from fewstep.common.randomness import generator, sample_generators
from fewstep.flows import likelihood
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import CheckerboardField, GaussianField, MixtureField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.likelihood import bits_per_dim, divergence, log_likelihood, normal_log_prob
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.networks import MLP

F64 = torch.float64


def line(path=None):
    """N(1, 1/4)."""
    return GaussianField(torch.ones(1, dtype=F64), torch.full((1, 1), 0.25, dtype=F64), path)


POINTS = torch.tensor([[1.5], [1.6]], dtype=F64)
TRUE = torch.tensor([-0.7257913526, -0.9457913526], dtype=F64)


def mixture():
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=F64)
    scales, weights = torch.tensor([[0.3, 0.5, 0.4], [0.5, 0.3, 0.2]], dtype=F64)
    x = torch.randn(40, 2, generator=generator(0), dtype=F64)
    squares = (x[:, None] - means).square().sum(-1)
    log_p = torch.logsumexp(weights.log() - squares / (2 * scales**2) - (2 * math.pi * scales**2).log(), dim=1)
    return MixtureField(means, scales, weights), x, log_p


def close(found, want, tolerance):
    torch.testing.assert_close(found, want.to(found), rtol=0, atol=tolerance)


# By the ODE


@pytest.mark.takes_seconds
@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_a_gaussian(path):
    field = line(path)
    close(log_likelihood(field, POINTS, solver="adaptive", tolerance=1e-11), TRUE, 1e-10)
    close(log_likelihood(field, POINTS), TRUE, 1e-4)
    errors = [float((log_likelihood(field, POINTS, steps=n) - TRUE).abs().max()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.takes_seconds
def test_a_mixture():
    field, x, log_p = mixture()
    close(log_likelihood(field, x, solver="adaptive", tolerance=1e-11), log_p, 5e-9)
    close(log_likelihood(field, x, steps=400), log_p, 1e-3)
    close(log_likelihood(field.float(), x.float(), steps=400), log_p, 2e-3)


@pytest.mark.takes_seconds
def test_a_board_has_the_density_of_its_squares():
    field = CheckerboardField()
    inside = torch.tensor([[0.5, 0.5], [-1.5, 0.4], [1.4, 1.7]], dtype=F64)
    inside = inside[field.inside(inside)]
    assert len(inside)
    area = float((field.boxes[..., 1] - field.boxes[..., 0]).prod(1).sum())
    close(log_likelihood(field, inside, steps=100), torch.full((len(inside),), -math.log(area)), 5e-3)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_any_rank_in_chunks(shape, chunk):
    root = torch.randn(6, 6, generator=generator(1), dtype=F64)
    cov, mean = root @ root.T / 6 + 0.3 * torch.eye(6, dtype=F64), torch.arange(6, dtype=F64) / 3
    field = GaussianField(mean.reshape(shape), cov)
    x = torch.randn(5, *shape, generator=generator(2), dtype=F64)
    law = torch.distributions.MultivariateNormal(mean, cov)
    close(log_likelihood(field, x, steps=200, chunk=chunk), law.log_prob(x.flatten(1)), 2e-3)


def test_the_divergence_is_exact_and_its_estimate_unbiased():
    """Of a random network against its Jacobian; over all signs, Hutchinson's mean is the trace."""
    torch.manual_seed(0)
    net = NetworkField(MLP(3, width=16).double())
    x, t = torch.randn(4, 3, dtype=F64), torch.full((4,), 0.3, dtype=F64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda y: net(y[None], t[:1])[0], row) for row in x])
    v, div = divergence(net, x, t, None, 2)
    close(v, net(x, t).detach(), 1e-14)
    close(div, jacobians.diagonal(dim1=1, dim2=2).sum(1), 1e-13)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)  # all eight
    close(divergence(net, x, t, signs[:, None].expand(-1, 4, -1))[1], div, 1e-13)
    assert not v.requires_grad
    assert not div.requires_grad


@pytest.mark.takes_seconds
def test_probes_scatter_around_the_exact_value():
    field, x, _ = mixture()
    exact = log_likelihood(field, x[:5], steps=30)
    many = x[:5].repeat(400, 1)

    def scatter(probes):
        found = log_likelihood(field, many, steps=30, probes=probes, generator=generator(4)).reshape(400, 5) - exact
        assert (found.mean(0).abs() < 4 * found.std(0) / 20 + 1e-9).all()
        return found.std(0)

    one, four = scatter(1), scatter(4)
    assert (one > 0.02).any()
    assert ((one / four - 2).abs() < 0.4).all()  # they are averaged


def test_signs_are_drawn_once_and_belong_to_a_sample():
    """With a linear field of constant Jacobian A the estimate is z' A z at every time: each value is one of those."""
    root = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)

    class Net(nn.Module):
        def forward(self, x, t):
            return x @ root

    field, x = NetworkField(Net()), torch.zeros(8, 2, dtype=F64)
    draws = sample_generators(3, range(8))
    found = log_likelihood(field, x, probes=1, steps=7, generator=draws) - normal_log_prob(x)
    assert found.abs().tolist() == pytest.approx([2.0] * 8)  # -z' A z is 2 or -2: signs drawn anew would average
    assert found.min() < 0 < found.max()
    again = log_likelihood(field, x[:3], probes=1, steps=7, generator=sample_generators(3, range(3)))
    close(again, found[:3] + normal_log_prob(x)[:3], 1e-12)


def test_calls():
    field = NetworkField(MLP(3, width=8).double())
    x = torch.zeros(2, 3, dtype=F64)
    for options, calls in [
        ({"steps": 5}, 10),
        ({"steps": 5, "solver": "euler"}, 5),
        ({"steps": 5, "method": "sde"}, 6),
    ]:
        with count_calls(field) as made:
            log_likelihood(field, x, **options)
        assert made.count == calls


def test_conditions_guidance_and_training_mode():
    torch.manual_seed(0)
    field = NetworkField(MLP(2, width=16, classes=4))
    x, labels = torch.randn(6, 2), torch.arange(6) % 4
    whole = log_likelihood(field, x, steps=10, class_labels=labels)
    alone = log_likelihood(field, x[4:5], steps=10, class_labels=labels[4:5])
    close(whole[4:5], alone, 1e-5)
    guided = Guided(field, 2.0, null={"class_labels": 3})
    found = log_likelihood(guided, x, steps=10, class_labels=labels)
    same = labels == 3  # guided away from itself
    close(found[same], whole[same], 1e-4)
    assert ((found - whole)[~same].abs() > 1e-3).any()
    assert not whole.requires_grad
    assert all(p.grad is None for p in field.parameters())


def test_a_diffusion_model_as_a_flow():
    """The optimal noise prediction for N(1, 1/4) on the variance-preserving path, on the linear one."""
    path = VariancePreserving()

    class Net(nn.Module):
        def forward(self, x, t):
            a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
            return s * (x - a) / (a * a * 0.25 + s * s)

    field = NetworkField(Net(), path, prediction="noise").on(Linear())
    close(log_likelihood(field, POINTS, steps=200), TRUE, 2e-3)


# By the SDE


def bound(monkeypatch, field, x, steps, eps):
    """The bound at x (1, 1) without chance: the log-ratio is quadratic in the noises, so that its mean is the value
    without noise and half its second differences along each."""
    rows = torch.cat([torch.zeros(1, steps), torch.eye(steps), -torch.eye(steps)]).to(F64)
    columns = iter(rows.T)
    monkeypatch.setattr(likelihood, "normal", lambda x, _: next(columns)[:, None])
    value = log_likelihood(field, x.expand(len(rows), 1), method="sde", steps=steps, eps=eps)
    still, plus, minus = value[0], value[1 : steps + 1], value[steps + 1 :]
    return float(still + 0.5 * (plus + minus - 2 * still).sum())


@pytest.mark.parametrize("eps", [0.7, "sigma", lambda t: 0.2 + t * (1 - t)])
def test_the_bound_by_the_sde(monkeypatch, eps):
    """-0.9457913526 is reached as the steps get short, from below; the error falls with them."""
    found = {n: bound(monkeypatch, line(), POINTS[1:], n, eps) for n in (100, 200, 400)}
    errors = [float(TRUE[1]) - value for value in found.values()]
    assert all(0 < error < 0.1 for error in errors)
    assert errors[0] > 1.6 * errors[1] > 2.5 * errors[2]
    assert 2 * found[400] - found[200] == pytest.approx(float(TRUE[1]), abs=3e-3)


def test_the_bound_is_below_the_density_of_the_sampler(monkeypatch):
    """Of four coarse steps of Euler-Maruyama, whose law is known: any backward kernel gives a bound."""
    field, steps, eps = line(), 4, 0.7
    mean, variance, h = 0.0, 1.0, 1 / steps
    for i in range(steps):
        zero, one = (field(x, i * h) + eps * field.score(x, i * h) for x in torch.tensor([[[0.0]], [[1.0]]], dtype=F64))
        slope = float(one - zero)
        mean, variance = mean + h * (slope * mean + float(zero)), (1 + h * slope) ** 2 * variance + 2 * eps * h
    for x in (0.2, 1.0, 1.6):
        density = -0.5 * math.log(2 * math.pi * variance) - (x - mean) ** 2 / (2 * variance)
        found = bound(monkeypatch, field, torch.tensor([[x]], dtype=F64), steps, eps)
        assert density - 1.0 < found < density


@pytest.mark.takes_seconds
def test_paths_are_averaged_and_their_own():
    field, x, log_p = mixture()
    draws = sample_generators(1, range(20))
    found = log_likelihood(field, x[:20], method="sde", steps=100, probes=8, generator=draws)
    assert float((log_p[:20] - found).mean()) == pytest.approx(0.1, abs=0.1)
    again = log_likelihood(field, x[:3], method="sde", steps=100, probes=8, generator=sample_generators(1, range(3)))
    close(again, found[:3], 1e-9)


# By a map


def test_by_the_flow_of_an_exact_field():
    close(log_likelihood(line(), POINTS, method="map"), TRUE, 1e-10)
    close(log_likelihood(line(), POINTS, method="map", steps=3), TRUE, 1e-10)


@pytest.mark.takes_seconds
def test_by_the_flow_of_a_mixture(monkeypatch):
    field, x, log_p = mixture()
    flow = field.flow
    monkeypatch.setattr(field, "flow", lambda x, s, t: flow(x, s, t, tolerance=1e-11))
    close(log_likelihood(field, x[:10], method="map"), log_p[:10], 1e-8)


def test_by_a_map_that_goes_both_ways(gaussian, gaussian_map, points):
    law = torch.distributions.MultivariateNormal(gaussian.mean, gaussian.basis * gaussian.variances @ gaussian.basis.T)
    for steps in (1, 2):
        close(log_likelihood(gaussian_map, points, method="map", steps=steps), law.log_prob(points), 1e-11)
    close(log_likelihood(gaussian_map, points, steps=400), law.log_prob(points), 1e-3)  # its u(x, t, t)


def test_a_map_that_does_not_come_back_is_refused(points):
    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=16, times=2).double())
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with pytest.raises(ValueError, match=r"the map does not come back: .* method='ode' takes its velocity"):
        log_likelihood(student, points, method="map")


# Bits, and what cannot be


@pytest.mark.parametrize(("level", "bits"), [(1 / 127.5, 6.994353), (1 / 256, 8.0), (1 / (256 * 0.3), 6.263034)])
def test_bits_per_dim(level, bits):
    assert float(bits_per_dim(torch.zeros(1), 784, level)) == pytest.approx(bits, abs=1e-6)
    assert float(bits_per_dim(torch.tensor(-784 * math.log(2)), 784, level)) == pytest.approx(bits + 1, abs=1e-5)


def test_bits_of_uniform_bytes_are_eight():
    """What knows nothing of bytes in [-1, 1] says density 1/2 a dimension."""
    log_p = torch.full((3,), -784 * math.log(256 / 127.5), dtype=F64)
    close(bits_per_dim(log_p, 784), torch.full((3,), 8.0, dtype=F64), 1e-12)
    for dims, level in [(0, 0.1), (3, 0.0), (3, float("nan")), (3, math.inf)]:
        with pytest.raises(ValueError, match="bits a dimension need one number or more and a level above 0"):
            bits_per_dim(torch.zeros(1), dims, level)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "od"}, "unknown method of log_likelihood 'od'"),
        ({"solver": "rk4"}, "unknown solver 'rk4'"),
        ({"steps": 0}, "steps is 0, probes None and chunk 16"),
        ({"probes": 0}, "steps is 100, probes 0"),
        ({"chunk": 0}, "and chunk 0: one at least"),
        ({"method": "sde", "eps": 0.0}, "eps=0.0 is 0 or infinite at a time"),
        ({"method": "sde", "eps": "kappa"}, "eps='kappa' is 0 or infinite at a time"),
        ({"method": "sde", "eps": "kapa"}, "unknown strength of noise"),
    ],
)
def test_options_that_cannot_be(gaussian, points, options, says):
    with count_calls(gaussian) as made, pytest.raises(ValueError, match=says):
        log_likelihood(gaussian, points, **options)
    assert made.count == 0


def test_refusals(gaussian, points):
    with pytest.raises(ValueError, match="1 of 8 rows of x are not finite"):
        log_likelihood(gaussian, torch.cat([points[:7], torch.full((1, 2), float("nan"), dtype=F64)]))
    with pytest.raises(ValueError, match=r"float32 or float64 is needed, not torch.bfloat16"):
        log_likelihood(gaussian, points.bfloat16())
    with pytest.raises(ValueError, match="takes a VelocityField or a FlowMap, not a Linear"):
        log_likelihood(nn.Linear(2, 2), points)  # pyright: ignore
    with pytest.raises(ValueError, match="method='map' needs a FlowMap or an exact field, not a NetworkField"):
        log_likelihood(NetworkField(MLP(2, width=8)), points, method="map")
    with pytest.raises(ValueError, match="a sample has 5000 numbers, and a Jacobian is taken whole of 4096 at most"):
        log_likelihood(FlowMap(MLP(2, times=2)), torch.zeros(1, 5000), method="map")
    with pytest.raises(ValueError, match="method='sde' needs a VelocityField"):
        log_likelihood(FlowMap(MLP(2, width=8, times=2)), points, method="sde")
    field = NetworkField(MLP(2, width=8).double())
    field.coupling = "ot"
    log_likelihood(field, points, steps=2)  # its ODE is what it is
    with pytest.raises(ValueError, match="method='sde' needs noise that is independent of the data"):
        log_likelihood(field, points, method="sde")
    field.distilled = "a consistency model"
    with pytest.raises(ValueError, match="a likelihood needs a velocity, and the model is a consistency model"):
        log_likelihood(field, points)


class _OneByOne(torch.autograd.Function):
    """The identity, whose way back looks at memory as diffusers' U-Nets have it: no batch of gradients does that."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,) = gradients
        gradient.is_contiguous(memory_format=torch.channels_last)
        return gradient


@pytest.mark.parametrize("probes", [None, 3])
def test_networks_whose_way_back_takes_no_batch_go_one_by_one(probes):
    field, x = line(), torch.randn(3, 1, 1, 2, generator=generator(0), dtype=F64)
    signs = None if probes is None else torch.ones(probes, *x.shape, dtype=F64)
    t = torch.full((3,), 0.5, dtype=F64)

    def velocity(x, t):
        return field(x.reshape(-1, 1), t.repeat_interleave(2)).reshape(x.shape)

    want = divergence(velocity, x, t, signs)
    found = divergence(lambda x, t: velocity(_OneByOne.apply(x), t), x, t, signs)
    for a, b in zip(found, want, strict=True):
        close(a, b, 1e-12)
