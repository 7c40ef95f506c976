"""Derivatives of a network along a direction, by all three ways of taking them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import Perturbed, batch_of, loss_of

from fewstep.common.randomness import generator
from fewstep.flows.exact import GaussianField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import AYF, LSD, SCM
from fewstep.objectives.derivative import derivative, time_derivative


def swirl(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(3 * t).sin() * x[:, 0] ** 2, x[:, 1] * t**3 + x[:, 0]], dim=1)


@pytest.mark.parametrize("mode", ["forward", "float32", "difference"])
def test_derivatives_of_a_closed_form(mode: str):
    x = torch.randn(50, 2, generator=generator(1), dtype=torch.float64)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    dx = torch.randn(50, 2, generator=generator(2), dtype=torch.float64)
    value, slope = derivative(swirl, (x, t), (dx, torch.full_like(t, 2.0)), mode)
    expected = torch.stack(
        [
            6 * (3 * t).cos() * x[:, 0] ** 2 + 2 * (3 * t).sin() * x[:, 0] * dx[:, 0],
            6 * x[:, 1] * t**2 + dx[:, 1] * t**3 + dx[:, 0],
        ],
        dim=1,
    )
    inside = slice(None) if mode != "difference" else slice(1, -1)
    assert (slope - expected)[inside].abs().max() < (1e-7 if mode == "difference" else 1e-13)
    assert (slope - expected).abs().max() < 2e-3  # first order at the ends, where the step is one-sided
    assert (value - swirl(x, t))[inside].abs().max() < (1e-7 if mode == "difference" else 1e-15)
    _, of_time = time_derivative(lambda t: swirl(x, t), t, mode)
    assert (of_time[:, 1] - 3 * x[:, 1] * t**2)[inside].abs().max() < 1e-7


def test_the_difference_is_of_second_order():
    """In float32 its step is h = 2e-4: an error of h^2 f''' / 6, which is beyond rounding for a fast function."""
    t = torch.tensor([0.3, 0.6])
    errors = []
    for speed in (200.0, 400.0, 800.0):
        _, slope = time_derivative(lambda t, w=speed: (w * t).sin()[:, None], t, "difference")
        errors.append(slope[:, 0] / (speed * (speed * t).cos()) - 1)
        torch.testing.assert_close(errors[-1], torch.full_like(t, -(speed**2) * 4e-8 / 6), rtol=0.15, atol=2e-4)


@pytest.mark.parametrize("direction", [1.0, -1.0, 0.0])
def test_no_time_leaves_its_range(direction: float):
    seen: list[Tensor] = []
    t = torch.tensor([0.0, 1e-4, 0.5, 1 - 1e-4, 1.0])

    def function(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x * t[:, None]

    along = (torch.ones(5, 1), torch.full((5,), direction))
    _, slope = derivative(function, (torch.ones(5, 1), t), along, "difference")
    assert len(seen) == 2
    assert all((times >= 0).all() and (times <= 1).all() for times in seen)
    torch.testing.assert_close(slope[:, 0], t + direction, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("mode", ["forward", "float32", "difference"])
def test_what_a_derivative_keeps(mode: str):
    network, x, t = MLP(2, width=8, depth=2), torch.randn(4, 2), torch.full((4,), 0.5)
    with torch.no_grad():
        assert not any(out.requires_grad for out in time_derivative(lambda t: network(x, t), t, mode))
    value, slope = time_derivative(lambda t: network(x, t), t, mode)
    assert value.requires_grad
    slope.square().sum().backward()
    assert all(layer.weight.grad is not None for layer in (network.time, *network.hidden, network.output))
    if mode != "forward":  # autocast would spoil it
        outside = slope.detach()
        with torch.autocast("cpu", torch.bfloat16):
            _, slope = time_derivative(lambda t: network(x, t), t, mode)
        assert torch.equal(slope, outside)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_dropout_is_the_same_in_both_calls(mode: str):
    torch.manual_seed(5)
    x, t = torch.ones(64, 8), torch.full((64,), 0.5)
    value, slope = time_derivative(lambda t: nn.functional.dropout(x * t[:, None], 0.5), t, mode)
    kept = value != 0
    assert 0.3 < float(kept.double().mean()) < 0.7
    torch.testing.assert_close(slope, 2.0 * kept, rtol=1e-4, atol=1e-4)  # another mask would give hundreds
    after = torch.rand(1)
    torch.manual_seed(5)
    nn.functional.dropout(x, 0.5)
    assert torch.equal(after, torch.rand(1))  # as after one call


@pytest.mark.parametrize("method", [LSD, SCM, AYF])
def test_modes_agree_in_an_objective(gaussian: GaussianField, method: Any):
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3))
    losses = [
        float(loss_of(method(gaussian, jvp=mode), student, batch_of(gaussian)).total.detach())
        for mode in ("forward", "float32", "difference")
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0] != losses[2]
