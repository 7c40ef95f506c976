"""A flow as a loss: gradients draw by draw, and where they lead, against the closed forms of Gaussians."""

import math

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.common.randomness import generator, normal, sample_generators, uniform
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric
from fewstep.flows.priors import irfds, rfds, rfds_rev
from fewstep.networks import MLP

F64 = torch.float64
MEAN, X = 0.5, 1.3


def gaussian(variance: float = 0.49, path=None) -> GaussianField:
    return GaussianField(torch.full((1,), MEAN, dtype=F64), torch.full((1, 1), variance, dtype=F64), path)


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def image(rows: int, value: float = X) -> Tensor:
    return torch.full((rows, 1), value, dtype=F64, requires_grad=True)


def at(t: float, variance: float = 0.49) -> tuple[float, float]:
    """C_t and A_t = (t C - (1 - t)) / C_t."""
    c_t = t * t * variance + (1 - t) ** 2
    return c_t, (t * variance - (1 - t)) / c_t


def mean_over(function, low: float, high: float) -> float:
    """E over t uniform in (low, high), by Simpson's rule."""
    t = torch.linspace(low, high, 2001, dtype=F64)
    weights = torch.full_like(t, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    return float((weights * torch.tensor([function(float(one)) for one in t], dtype=F64)).sum() / weights.sum())


def test_rfds_draw_by_draw():
    field, x = gaussian(), image(5)
    draw = generator(0)
    t = (0.02 + 0.96 * uniform(5, draw, F64))[:, None]
    e = normal(x.detach(), draw)
    v = field(t * x.detach() + (1 - t) * e, t[:, 0])
    loss = rfds(field, x, generator=generator(0))
    torch.testing.assert_close(loss, (x - e - v).square().mean())
    torch.testing.assert_close(grad(loss, x), 2 * (x - e - v).detach() / 5)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_rfds_leads_to_the_mean_whatever_the_variance(t):
    """E grad = 2 (x - mu) (1 - t) / C_t."""
    rows = 400_000
    for variance in (0.49, 4.0):
        x = image(rows)
        mean = rows * grad(rfds(gaussian(variance), x, times=(t, t), generator=generator(1)), x)
        c_t, _ = at(t, variance)
        wanted = 2 * (X - MEAN) * (1 - t) / c_t
        assert float(mean.mean()) == pytest.approx(wanted, abs=5 * float(mean.std()) / math.sqrt(rows))
    x = image(rows, MEAN)
    mean = rows * grad(rfds(gaussian(), x, times=(t, t), generator=generator(1)), x)
    assert abs(float(mean.mean())) < 5 * float(mean.std()) / math.sqrt(rows)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_rfds_rev_has_the_gradient_of_its_closed_form(t):
    """-2 (x - mu) A_t (1 - t)^2 / C_t, of less spread than RFDS: late times drive away from the mean."""
    rows = 100_000
    x = image(rows)
    each = rows * grad(rfds_rev(gaussian(), x, times=(t, t), generator=generator(2)), x)
    c_t, a_t = at(t)
    wanted = -2 * (X - MEAN) * a_t * (1 - t) ** 2 / c_t
    assert float(each.mean()) == pytest.approx(wanted, abs=5 * float(each.std()) / math.sqrt(rows))
    assert (wanted < 0) == (t == 0.9)
    plain = rows * grad(rfds(gaussian(), x, times=(t, t), generator=generator(2)), x)
    assert float(each.std()) < float(plain.std())


@pytest.mark.parametrize(
    ("variance", "times", "ratio"),
    [(0.49, (0.0, 0.9999), 1.57), (0.49, (0.1, 0.8), 2.04), (1.0, (0.1, 0.8), 1.17), (1.0, (0.02, 0.98), 1.0)],
)
def test_irfds_has_its_own_fixed_point_and_not_that_of_the_ode(variance, times, ratio):
    """e* = (x - mu) E[(1 - t) / C_t] / E[t C / C_t]: 1.57 and 2.04 of x - mu for C = .49, where the ODE has 1.43."""
    field, rows = gaussian(variance), 40_000
    top = mean_over(lambda t: (1 - t) / at(t, variance)[0], *times)
    bottom = mean_over(lambda t: t * variance / at(t, variance)[0], *times)
    assert top / bottom == pytest.approx(ratio, abs=0.006)
    x, e = image(rows).detach(), image(rows, (X - MEAN) * top / bottom)
    told = {"normality": 0.0, "times": times}
    there = rows * grad(irfds(field, x, e, generator=generator(3), **told), e)
    assert abs(float(there.mean())) < 5 * float(there.std()) / math.sqrt(rows)
    other = image(rows, (X - MEAN) * top / bottom + 0.1)
    beside = rows * grad(irfds(field, x, other, generator=generator(3), **told), other)
    assert float((beside - there).mean()) == pytest.approx(0.2 * bottom, rel=0.02)


def test_irfds_asks_for_normal_noise_row_by_row():
    field = GaussianField(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))
    x = torch.zeros(2, 4, dtype=F64)
    noise = torch.tensor([[1.0, 1.0, 3.0, 3.0], [1.0, -1.0, 1.0, -1.0]], dtype=F64, requires_grad=True)
    with_it, without = (irfds(field, x, noise, normality=w, generator=generator(4)) for w in (1.0, 0.0))
    assert float((with_it - without).detach()) == pytest.approx((4.0 + 0.0) / 2)
    assert torch.equal(grad(with_it - without, noise)[1], torch.zeros(4, dtype=F64))


def test_with_a_map_rfds_leads_to_where_trajectories_end():
    """By hand, u of the exact map of N(mu, C): (X_{t,1}(x_t) - x_t) / (1 - t)."""
    field, x = gaussian(), image(5)

    class Exact(FlowMap):
        def average_velocity(self, x, s, t, **cond):
            return (field.flow(x, s, t) - x) / (t - s)[:, None]

    draw = generator(0)
    t = (0.02 + 0.96 * uniform(5, draw, F64))[:, None]
    e = normal(x.detach(), draw)
    x_t = t * x.detach() + (1 - t) * e
    end = field.flow(x_t, t[:, 0], 1.0)
    loss = rfds(Exact(nn.Identity()), x, generator=generator(0))
    torch.testing.assert_close(grad(loss, x), 2 * (x.detach() - end) / (1 - t) / 5)


def test_guidance_is_that_of_the_seeking_term_alone():
    asked = []

    class Net(nn.Module):
        def forward(self, x, t, class_labels):
            asked.append(class_labels.tolist())
            return x

    field = Guided(NetworkField(Net()), 3.0, null={"class_labels": 9})
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    told = {"class_labels": torch.tensor([1, 2]), "generator": generator(0), "guidance": torch.full((2,), 5.0)}
    rfds_rev(field, x, **told)
    assert asked == [[1, 2], [1, 2, 9, 9]]
    asked.clear()
    irfds(field, x.detach(), torch.randn(2, 1, 4, 4, requires_grad=True), **told)
    rfds(field, x, **told)
    assert asked == [[1, 2], [1, 2, 9, 9]]


@pytest.mark.takes_seconds
def test_a_renderer_learns_through_it_and_the_model_does_not():
    """The parameters of a renderer go to the mean by plain gradient descent; the network gets no gradient."""
    torch.manual_seed(0)
    field, weight = gaussian(), torch.tensor([3.0], dtype=F64, requires_grad=True)
    optimizer, draw = torch.optim.SGD([weight], lr=0.05), generator(5)
    for _ in range(200):
        loss = rfds(field, weight.expand(256, 1), generator=draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(weight.detach()) == pytest.approx(MEAN, abs=0.05)
    network = NetworkField(MLP(1, width=8))
    rfds(network, torch.randn(4, 1, requires_grad=True)).backward()
    assert all(p.grad is None for p in network.parameters())


def test_each_row_has_noise_and_time_of_its_own():
    field, x = gaussian(), image(4)
    whole = 4 * grad(rfds(field, x, generator=sample_generators(1, range(4))), x)
    part = 2 * grad(rfds(field, x[2:], generator=sample_generators(1, range(2, 4))), x)
    torch.testing.assert_close(whole[2:], part[2:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rfds(gaussian(path=Trigonometric()), image(1)), r"these losses are of the linear path: field\.on"),
        (lambda: rfds(FlowMap(MLP(1, width=8, times=2), path=Trigonometric()), image(1)), "teacher's"),
        (lambda: rfds(nn.Identity(), image(1)), "not a Identity"),
        (lambda: rfds_rev(gaussian(), image(1), times=(0.5, 1.0)), r"times are \(0.5, 1.0\)"),
        (lambda: rfds(gaussian(), image(1), times=(math.nan, 0.5)), "times are"),
        (lambda: irfds(gaussian(), image(1), image(2)), "they must agree"),
    ],
)
def test_refusals_are_a_line(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_names_are_public_and_a_diffusion_model_is_brought_there():
    assert (fewstep.rfds, fewstep.irfds, fewstep.rfds_rev) == (rfds, irfds, rfds_rev)
    field = gaussian(path=Trigonometric()).on(Linear())
    assert rfds(field, image(3)).isfinite()
