"""Chains of fields: blocks of Gaussians in closed form, times and edges, and all that a chain has no path for."""

import math
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.given import as_data
from fewstep.flows.calls import count_calls
from fewstep.flows.chained import Chained, ChainedPath
from fewstep.flows.description import describe, made_again
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import sample, sample_states
from fewstep.flows.signature import classes_of, shape_of
from fewstep.flows.trajectories import flow_of, teacher_states
from fewstep.networks import MLP
from fewstep.training.blocks import Noised

F64 = torch.float64
LENGTHS = (0.1, 0.15, 0.225)


class Linearly(VelocityField):
    """The exact velocity from x0 to x1, jointly Gaussian: ``E[x1 - x0 | x_t] = Cov(x1 - x0, x_t) / Var(x_t) x_t``."""

    def __init__(self, var0: float, var1: float, cov: float) -> None:
        super().__init__()
        self.path, self.numbers = Interpolant(), (var0, var1, cov)

    def forward(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        var0, var1, cov = self.numbers
        s = 1 - t
        return ((t * var1 - s * var0 + (s - t) * cov) / (t * t * var1 + s * s * var0 + 2 * s * t * cov))[:, None] * x


def student_of(chain: Chained) -> fewstep.FlowMap:
    return fewstep.FlowMap.from_field(chain, MLP(1, width=8, depth=2, times=2))


def gaussian_blocks(variance: float) -> list[Linearly]:
    """The blocks of N(0, variance), from noise to data."""
    blocks = []
    for g in LENGTHS:
        e = math.exp(-g)
        noised = e * e * variance + 1 - e * e
        blocks.append(Linearly(noised, variance, e * variance))
        variance = noised
    return [*blocks, Linearly(1.0, variance, 0.0)][::-1]


@pytest.mark.parametrize("variance", [0.04, 0.49, 3.0])
def test_blocks_of_a_gaussian_scale_by_the_root_of_the_variances_and_lead_to_the_data(variance: float) -> None:
    chain, x = Chained(gaussian_blocks(variance)), torch.randn(5, 1, dtype=F64)
    for block in gaussian_blocks(variance):
        var0, var1, _ = block.numbers
        assert torch.allclose(flow_of(block, x, 0.0, 1.0, steps=400), math.sqrt(var1 / var0) * x, rtol=1e-5)
    assert torch.allclose(flow_of(chain, x, 0.0, 1.0, steps=1600), math.sqrt(variance) * x, rtol=1e-5)
    # After all blocks but the last: 1 + (V - 1) exp(-2 sum g); back through all of them: the noise.
    left = 1 + (variance - 1) * math.exp(-2 * sum(LENGTHS))
    assert torch.allclose(flow_of(chain, x, 1.0, 0.25, steps=1600), math.sqrt(left / variance) * x, rtol=1e-5)
    assert torch.allclose(flow_of(chain, x, 1.0, 0.0, steps=1600), x / math.sqrt(variance), rtol=1e-5)


def test_data_and_their_noisier_selves_have_the_moments_of_an_ornstein_uhlenbeck_step() -> None:
    data = as_data(0.7 * torch.randn(400_000, 1, dtype=torch.float32))
    for length in (0.3, math.inf):
        batch = Noised(data, length).rows(torch.arange(400_000), torch.Generator().manual_seed(0))
        assert batch.noise is not None
        e = math.exp(-length)
        x, y = batch.data[:, 0].double(), batch.noise[:, 0].double()
        assert abs(float(y.var()) - (e * e * 0.49 + 1 - e * e)) < 0.01
        assert abs(float((x * y).mean()) - e * 0.49) < 0.01


def test_each_block_has_its_stretch_of_time_to_itself() -> None:
    """Rows at several times, and with conditions, are the formula's; an edge belongs to the block that begins there."""

    class Named(VelocityField):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.path, self.number = Linear(), number

        def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
            return (self.number + t + 10 * cond["class_labels"])[:, None] * x

    edges = (0.0, 0.3, 0.7, 1.0)
    chain, x = Chained([Named(100.0), Named(200.0), Named(300.0)], edges), torch.ones(7, 1, dtype=F64)
    t = torch.tensor([0.9, 0.0, 0.3, 0.29, 0.7, 1.0, 0.5], dtype=F64)
    labels, which = torch.arange(7), [2, 0, 1, 0, 2, 2, 1]
    expected = [
        (100.0 * (n + 1) + (float(t[i]) - edges[n]) / (edges[n + 1] - edges[n]) + 10 * i) / (edges[n + 1] - edges[n])
        for i, n in enumerate(which)
    ]
    assert torch.allclose(chain(x, t, class_labels=labels)[:, 0], torch.tensor(expected, dtype=F64), rtol=1e-12)
    # 0.7 in float32 is below 0.7, and means the edge all the same.
    at_edge = chain(x.float(), torch.full((7,), 0.7), class_labels=labels)
    assert torch.allclose(at_edge[:, 0], (300 + 10 * labels) / 0.3, rtol=1e-5)


def test_midpoint_is_of_second_order_across_edges_and_heun_is_not() -> None:
    chain, x = Chained(gaussian_blocks(0.04)), torch.ones(1, 1, dtype=F64)
    end = flow_of(chain, x, 0.0, 1.0, steps=6400)

    def order(solver: str) -> float:
        errors = [float((sample(chain, x, n, solver=solver) - end).abs()) for n in (64, 128)]
        return math.log2(errors[0] / errors[1])

    assert order("midpoint") > 1.8
    assert 0.8 < order("heun") < 1.3
    assert 0.8 < order("euler") < 1.3
    states = teacher_states(chain, x, torch.tensor([0.1, 0.5, 1.0], dtype=F64), steps=6400)
    assert torch.allclose(states[-1], end, rtol=1e-7)


def test_a_chain_of_networks_is_called_once_a_step_and_says_what_its_blocks_say() -> None:
    blocks = [NetworkField(MLP(3, width=8, depth=2, classes=4), Interpolant()) for _ in range(2)]
    blocks[1].class_names = ("a", "b", "c", "d")
    chain = Chained(blocks)
    assert (shape_of(chain), classes_of(chain), chain.class_names) == ((3,), 4, ("a", "b", "c", "d"))
    noise, labels = torch.randn(6, 3), torch.arange(6) % 4
    with count_calls(chain) as calls:
        x = sample(chain, noise, 4, class_labels=labels)
    assert calls.count == 4
    by_hand = noise
    for block in blocks:
        by_hand = sample(block, by_hand, 2, class_labels=labels)
    assert torch.allclose(x, by_hand, atol=1e-6)
    assert torch.equal(sample_states(chain, noise, 4, class_labels=labels)[:, -1], x)


def test_a_student_of_a_chain_is_made_again_from_its_description() -> None:
    student = fewstep.FlowMap.from_field(Chained(gaussian_blocks(1.0), (0, 0.4, 0.5, 0.7, 1)), MLP(1, times=2))
    again = made_again(describe(student))
    assert again.path.same_as(student.path)
    assert not again.path.same_as(ChainedPath((0.0, 0.25, 0.5, 0.75, 1.0)))
    with pytest.raises(ValueError, match="predicts the velocity there, not data"):
        fewstep.FlowMap(MLP(1, times=2), student.path, "data")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda chain, x: chain.score(x, 0.5), "has its ODE alone"),
        (lambda chain, x: chain.on(Linear()), "no other path"),
        (lambda chain, x: chain.path.sample(x, x, 0.5), "no path but its ODE"),
        (lambda chain, x: sample(chain, x, 4, eps="kappa"), "without eps"),
        (lambda chain, x: sample(student_of(chain), x, 2, gamma=0.5), "no noised data"),
        (lambda chain, x: fewstep.sdedit(chain, x, 4, strength=0.5), "no path but its ODE"),
        (lambda chain, x: fewstep.FlowMap.from_field(chain), "has no network to start from"),
        (lambda chain, x: fewstep.export(chain, "nowhere"), "kept as its folder"),
        (lambda chain, x: NetworkField(MLP(1), Linear(), path=chain.path), "predicts the velocity there"),
        (lambda chain, x: Chained([]), "a chain has fields"),
        (lambda chain, x: Chained(list(chain.fields), (0, 0.5, 1)), "4, and 3 edges"),
        (lambda chain, x: Chained([chain.fields[0]] * 2, (0, 0.5, 0.9)), "rise from 0 to 1"),
        (lambda chain, x: Chained([chain.fields[0]] * 2, (0, math.nan, 1)), "rise from 0 to 1"),
        (lambda chain, x: Chained([cast(Any, nn.Linear(1, 1))]), "a part of a chain is a Linear"),
        (
            lambda chain, x: Chained([NetworkField(MLP(1), Interpolant(), "data", space=fewstep.Box(0, 1))]),
            "one of them lives in a Box",
        ),
    ],
)  # fmt: skip
def test_what_has_no_path_is_refused_in_one_line(asked: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        asked(Chained(gaussian_blocks(0.5)), torch.randn(4, 1))
    assert "\n" not in str(caught.value)


def test_methods_without_states_of_the_ode_are_refused_before_the_training() -> None:
    chain, rows = Chained(gaussian_blocks(0.5)), torch.randn(300, 1)
    student = student_of(chain)
    for objective in (fewstep.ITVM(chain), fewstep.FlowMatching(), fewstep.PSD(), fewstep.MeanFlow(chain)):
        with pytest.raises(ValueError, match="has states of its ODE alone: take Trajectory"):
            fewstep.fit(student, objective, rows, 1, quiet=True)
    for objective in (fewstep.Trajectory(chain, solver_steps=4), fewstep.ITVM(chain, starts="own")):
        assert fewstep.fit(student, objective, rows, 1, batch=32, quiet=True).step == 1


def test_flows_go_both_ways_through_every_part() -> None:
    chain, x = Chained(gaussian_blocks(0.3), (0, 0.1, 0.5, 0.6, 1)), torch.randn(4, 1, dtype=F64)
    whole = flow_of(chain, x, 0.05, 0.93, steps=900)
    stops = (0.05, 0.1, 0.3, 0.55, 0.93)
    for s, t in pairwise(stops):
        x = flow_of(chain, x, s, t, steps=900)
    assert torch.allclose(x, whole, rtol=1e-5)
    shift = fewstep.GaussianField(torch.ones(1, dtype=F64), 0.5 * torch.eye(1, dtype=F64))  # commutes with no scale
    chain = Chained([shift, *gaussian_blocks(0.3)])
    end = flow_of(chain, x, 0.0, 1.0, steps=900)
    assert torch.allclose(flow_of(chain, end, 1.0, 0.0, steps=900), x, rtol=1e-4)
