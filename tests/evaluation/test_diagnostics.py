"""Residuals of a flow map's identities: nothing for the exact map, the right amount for a map that is off."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.evaluation.diagnostics import POSITIONS, VELOCITIES, diagnose, endpoint_rmse
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import CheckerboardField, GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.trajectories import teacher_states

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
STD = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
FIELD = GaussianField(MEAN, torch.diag(STD**2))


class ExactVelocity(nn.Module):
    """u(x, s, t) of data N(MEAN, diag(STD^2)) on the linear path, written without a division by t - s."""

    def __init__(self, slope: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.slope, self.shift = slope, shift  # faults: of the later time alone, and of everything

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        s, t = s[:, None], t[:, None]
        std_s, std_t = ((STD**2 * r**2 + (1 - r) ** 2).sqrt() for r in (s, t))
        growth = (STD**2 * (s + t) - (2 - s - t)) / ((std_s + std_t) * std_s)
        return MEAN + growth * (x - s * MEAN) + self.slope * (t - s) + self.shift


def noise(rows: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_test_map_is_the_closed_form():
    s, t = torch.rand(2, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    std_s, std_t = ((STD**2 * r**2 + (1 - r) ** 2).sqrt() for r in (s[:, None], t[:, None]))
    expected = t[:, None] * MEAN + std_t / std_s * (noise() - s[:, None] * MEAN)
    torch.testing.assert_close(FlowMap(ExactVelocity())(noise(), s, t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data", [None, MEAN + STD * noise(seed=5)], ids=["teacher's states", "path's states"])
def test_the_exact_map_has_no_residuals(data: Tensor | None):
    diagnosis = diagnose(FlowMap(ExactVelocity()), FIELD, noise(), data, times=6)
    upper = torch.ones(6, 6).triu().bool()
    for name, values in diagnosis.residuals.items():
        where = torch.eye(6).bool() if name == "tangent" else upper
        assert torch.equal(values.isfinite(), where), name
        assert values[where].max() < 1e-9, name
    summary = diagnosis.summary()
    assert set(summary) == {*VELOCITIES, *POSITIONS, "speed", "spread"}
    assert max(summary[name] for name in VELOCITIES + POSITIONS) < 1e-9


def test_a_fault_of_the_diagonal_shows_in_its_true_size():
    diagnosis = diagnose(FlowMap(ExactVelocity(shift=0.1)), FIELD, noise(), times=5)
    # Every component of u is off by 0.1: by 0.1 sqrt(3) as a vector.
    torch.testing.assert_close(diagnosis.residuals["tangent"].diagonal(), torch.full((5,), 0.1 * math.sqrt(3)).double())
    speed = diagnosis.speed
    assert diagnosis.summary()["tangent"] == pytest.approx(0.1 * math.sqrt(3) / speed)
    for name in ("lagrangian", "eulerian", "composition", "inverse"):
        assert diagnosis.summary()[name] > 1e-3, name


def test_a_fault_off_the_diagonal_is_invisible_to_the_tangent():
    diagnosis = diagnose(FlowMap(ExactVelocity(slope=0.2)), FIELD, noise(), times=[0.0, 0.5, 1.0])
    assert diagnosis.residuals["tangent"].nan_to_num().max() < 1e-9
    # X is off by 0.2 (t - s)^2, so that two halves of an interval are off by less than the whole.
    composition = diagnosis.residuals["composition"]
    assert composition.diagonal().max() < 1e-9
    assert composition[0, 2] > composition[0, 1] > 1e-3
    lagrangian, eulerian = diagnosis.residuals["lagrangian"], diagnosis.residuals["eulerian"]
    assert lagrangian[0, 2] > 0.1
    # d_s of 0.2 (t - s)^2 in three components, and nothing else: the fault does not depend on x.
    assert float(eulerian[0, 2]) == pytest.approx(0.4 * math.sqrt(3), abs=1e-9)
    assert float(eulerian[1, 2]) == pytest.approx(0.2 * math.sqrt(3), abs=1e-9)


def test_units_are_those_of_the_states():
    diagnosis = diagnose(FlowMap(ExactVelocity()), FIELD, noise(4000), times=[0.0, 1.0])
    # Variance of the states: 3 at t = 0 and |STD|^2 at t = 1.
    assert diagnosis.spread == pytest.approx(math.sqrt((3 + float(STD.square().sum())) / 2), rel=0.03)
    # v_0 = MEAN - x and v_1 = x at t = 1: |MEAN|^2 + 3, and the second moment of the data.
    squares = float(MEAN.square().sum()) + 3, float((MEAN**2 + STD**2).sum())
    assert diagnosis.speed == pytest.approx(math.sqrt(sum(squares) / 2), rel=0.03)


def test_conditions_reach_both_models_and_attention_has_its_derivative():
    class Attention(nn.Module):
        """A network with fused attention, which has no forward-mode derivative, and a class."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 3)
            self.inner = nn.Linear(1, 8)

        def forward(self, x: Tensor, s: Tensor, t: Tensor | None = None, *, class_labels: Tensor) -> Tensor:
            x = x + self.embed(class_labels) * s[:, None] + (0 if t is None else (t - s)[:, None])
            tokens = self.inner(x[..., None])[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(-1)

    torch.manual_seed(0)
    network = Attention()
    labels = torch.arange(4) % 3
    flow_map, field = FlowMap(network), NetworkField(network, Linear())
    diagnosis = diagnose(flow_map, field, torch.randn(4, 3), times=3, class_labels=labels)
    assert diagnosis.residuals["tangent"].nan_to_num().max() == 0
    assert all(math.isfinite(value) for value in diagnosis.summary().values())
    other = diagnose(flow_map, field, torch.randn(4, 3), times=3, class_labels=labels.flip(0))
    assert other.summary() != diagnosis.summary()


def test_group_norm_has_its_derivative_in_any_memory_layout():
    class Norm(nn.Module):
        """The normed image, whatever the times, through a layout like that which convolutions return."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4).double()

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            late = (t - s)[:, None, None, None]
            return self.norm((x * (1 + late)).contiguous(memory_format=torch.channels_last))

    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = Norm()
    field = NetworkField(Still(), Linear())
    diagnosis = diagnose(FlowMap(norm), field, x, times=[0.0, 1.0])
    # The norm is blind to the factor 1 + (t - s), up to its eps: d_t X is the normed image, |.|^2 = 144 of 144 parts.
    assert float(diagnosis.residuals["lagrangian"][0, 1]) == pytest.approx(12.0, abs=1e-3)


def test_diagnosis_leaves_no_graph():
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return self.weight * x + t[:, None]

    diagnosis = diagnose(FlowMap(Affine()), FIELD, noise(), times=3)
    assert not any(values.requires_grad for values in diagnosis.residuals.values())


def test_teacher_states_agree_with_the_closed_form():
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    exact = teacher_states(FIELD, noise(), times)
    assert torch.equal(exact[0], noise())
    torch.testing.assert_close(exact[2], MEAN + STD * noise(), rtol=1e-10, atol=1e-10)

    class Bare(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return FIELD(x, t)

    field = NetworkField(Bare(), Linear())
    with count_calls(field) as calls:
        solved = teacher_states(field, noise(), times)
    assert calls.count == 2 * (20 + 45)  # 64 Heun steps in all, each leg rounded up
    error = (solved - exact).abs().amax(dim=(1, 2))
    assert error[0] == 0
    assert 1e-9 < error[2] < 2e-3
    finer = teacher_states(field, noise(), times, steps=128)
    assert (finer - exact).abs().max() < error[2] / 3  # second order


def test_endpoint_rmse_of_map_and_field():
    start = noise(50)
    assert endpoint_rmse(FlowMap(ExactVelocity()), FIELD, start, steps=3) < 1e-12
    # A shift of u moves the end of one step by 0.1 in each component.
    off = FlowMap(ExactVelocity(shift=0.1))
    assert endpoint_rmse(off, FIELD, start, steps=1) == pytest.approx(0.1 * math.sqrt(3), abs=1e-12)
    ends = teacher_states(FIELD, start, torch.ones(1))[-1]
    assert endpoint_rmse(off, ends, start, batch_size=7) == pytest.approx(0.1 * math.sqrt(3), abs=1e-12)
    # One Euler step of the teacher ends at MEAN whatever the noise.
    expected = math.sqrt(float((STD * start).square().sum(dim=1).mean()))
    assert endpoint_rmse(FIELD, FIELD, start, steps=1) == pytest.approx(expected, abs=1e-9)
    assert endpoint_rmse(FIELD, FIELD, start, steps=8, solver="heun") < expected / 10


def test_endpoint_rmse_splits_conditions_with_the_rows():
    class ByClass(nn.Module):
        def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return class_labels[:, None].to(x) + 0 * x

    start, labels = noise(5), torch.arange(5)
    ends = start + labels[:, None]
    assert endpoint_rmse(FlowMap(ByClass()), ends, start, batch_size=2, class_labels=labels) < 1e-12


def test_checkerboard_is_diagnosed_at_its_sharp_end():
    start = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    flow_map = FlowMap(Still())
    summary = diagnose(flow_map, CheckerboardField(), start, times=3).summary()
    assert all(math.isfinite(value) for value in summary.values())
    assert summary["tangent"] == pytest.approx(1.0, abs=1e-5)  # a map that stands still misses all of v
    assert summary["composition"] == summary["inverse"] == 0.0


class Still(nn.Module):
    def forward(self, x: Tensor, s: Tensor, t: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("times", [[0.5, 0.2], [0.0, 1.5], [0.3]])
def test_bad_times(times: list[float]):
    with pytest.raises(ValueError, match="rise within"):
        diagnose(FlowMap(ExactVelocity()), FIELD, noise(), times=times)
