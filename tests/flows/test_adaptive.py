"""As many steps as each sample needs."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.flows.adaptive import sample_adaptive
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample

F64 = torch.float64


class Bent(nn.Module):
    """``X_{s,t}(x) = x + a (t - s)^2``: off by ``a / 2`` between one step and two, a each row's own."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, bend: Tensor) -> Tensor:
        return (bend * (t - s)).reshape(-1, *[1] * (x.ndim - 1)) * torch.ones_like(x)


@pytest.mark.parametrize("shape", [(1,), (2, 3, 3)], ids=str)
def test_each_sample_takes_the_steps_that_it_needs(shape: tuple[int, ...]):
    # A step of length h and its halves differ by a h^2 / 2: with a = 0, .5, 2, 32 the tolerance .25 holds for
    # h = 1, 1, 1/2, 1/8.
    bend, noise = torch.tensor([0, 0.5, 2.0, 32.0], dtype=F64), torch.zeros(4, *shape, dtype=F64)
    model = FlowMap(Bent())
    with count_calls(model) as calls:
        found = sample_adaptive(model, noise, 0.25, bend=bend)
    assert found.steps.tolist() == [2, 2, 4, 16]
    # Two halves for each interval of the tree, and the whole of the first one and of every second half.
    assert found.tried.tolist() == [3, 3, 2 * 3 + 2, 2 * 15 + 8]
    assert calls.rows == int(found.tried.sum())
    assert (found.tried <= 3 * found.steps).all()
    # n equal steps of length 1/n end at a / n.
    expected = (bend / found.steps).reshape(4, *[1] * len(shape)).expand(4, *shape)
    torch.testing.assert_close(found.samples, expected, rtol=0, atol=1e-12)
    for row in range(4):
        alone = sample_adaptive(model, noise[row : row + 1], 0.25, bend=bend[row : row + 1])
        assert torch.equal(alone.samples[0], found.samples[row])


def test_no_step_is_shorter_than_the_shortest():
    model, bend = FlowMap(Bent()), torch.tensor([1e9], dtype=F64)
    found = sample_adaptive(model, torch.zeros(1, 2, dtype=F64), 0.25, most=8, bend=bend)
    assert (int(found.steps[0]), int(found.tried[0])) == (8, 3 * 8 - 2)


def test_an_exact_map_takes_one_step_and_its_halves(gaussian_map: FlowMap, gaussian: GaussianField, points: Tensor):
    found = sample_adaptive(gaussian_map, points, 1e-9)
    assert found.steps.unique().tolist() == [2]
    assert found.tried.unique().tolist() == [3]
    torch.testing.assert_close(found.samples, gaussian.flow(points, 0.0, 1.0), rtol=0, atol=1e-12)
    assert torch.equal(found.samples, sample(gaussian_map, points, 2))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_field_comes_as_near_as_is_asked(solver: str):
    field = eight_gaussians()
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    ends = field.flow(noise, 0.0, 1.0, tolerance=1e-6)
    errors, steps = [], []
    for tolerance in (0.3, 0.05, 0.01):
        found = sample_adaptive(field, noise, tolerance, solver=solver, most=256)
        errors.append(float((found.samples - ends).norm(dim=1).median()))
        steps.append(float(found.steps.double().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.06
    assert steps == sorted(steps)
    assert found.steps.unique().numel() > 1


class Bad(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * math.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tolerance": 0.0}, "tolerance is 0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"most": 12}, "a power of 2"),
        ({"most": 1}, "a power of 2"),
        ({"solver": "adaptive"}, "finds its own steps"),
        ({"solver": "rk4"}, "unknown solver"),
        ({"model": NetworkField(Bad())}, "not finite"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(change: dict, says: str):
    given = {"model": eight_gaussians(), "noise": torch.zeros(2, 2, dtype=F64), "tolerance": 0.1} | change
    with pytest.raises(ValueError, match=says):
        sample_adaptive(**given)


def test_a_consistency_model_has_no_halves():
    student = FlowMap(Bent())
    student.gamma = 1.0
    with pytest.raises(ValueError, match="only knows the way to t = 1"):
        sample_adaptive(student, torch.zeros(2, 2), 0.1)


class Shifted(nn.Module):
    def forward(self, x: Tensor, t: Tensor, by: Tensor) -> Tensor:
        return by - x


def test_conditions_are_one_each_or_one_for_all():
    field, noise = NetworkField(Shifted()), torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for_all = sample_adaptive(field, noise, 0.01, by=torch.tensor(1.0, dtype=F64))
    one_each = sample_adaptive(field, noise, 0.01, by=torch.ones(5, 1, dtype=F64))
    assert torch.equal(for_all.samples, one_each.samples)
    with pytest.raises(ValueError, match="the condition 'by' has 3 rows, the noise 5"):
        sample_adaptive(field, noise, 0.01, by=torch.ones(3, 1, dtype=F64))
