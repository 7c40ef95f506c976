"""Flow maps: the identity, the laws of composition on the exact map, and students that start as their teachers."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap, load_by_name
from fewstep.flows.paths import Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.predictions import KINDS
from fewstep.flows.tabulated import Tabulated
from fewstep.flows.times import step_grid
from fewstep.networks import MLP, SecondTime, sinusoidal

F64 = torch.float64
DDPM = Tabulated.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
NATIVES = [Linear(), Trigonometric(), VariancePreserving(), DDPM, Reversed(1000.0)]
by_native = pytest.mark.parametrize("native", NATIVES, ids=lambda p: type(p).__name__)
by_kind = pytest.mark.parametrize("kind", KINDS)


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


class Garbage(nn.Module):
    """Enormous numbers."""

    def forward(self, x, s, t):
        return 1e30 * (x + 1)


class Mine(nn.Module):
    """A network of one's own, with one time."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.body = nn.Linear(2, 32)
        self.head = nn.Linear(32, 2)

    def time(self, s):
        return self.embed(sinusoidal(s, 16, low=0.5, high=30.0))

    def forward(self, x, s):
        return self.head(torch.tanh(self.body(x) + self.time(s)))


class MineWithTwoTimes(Mine):
    """The same with a second time: the one line that the documentation asks for."""

    def __init__(self):
        super().__init__()
        self.second_time = SecondTime(32)

    def forward(self, x, s, t):
        return self.head(torch.tanh(self.body(x) + self.time(s) + self.second_time(t)))


# The identity


@by_native
@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_identity_where_no_time_passes_whatever_the_network_says(native, kind, dtype):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    flow_map = FlowMap(Garbage(), native, kind, path=Linear())
    for t in (torch.linspace(0, 1, 9, dtype=dtype), 0.0, 1e-7, 0.3, 1.0):
        assert torch.equal(flow_map(x, t, t), x)


def test_the_identity_for_images_in_half_precision():
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert torch.equal(FlowMap(Garbage())(x, torch.tensor([0.2, 0.9]), torch.tensor([0.2, 0.9])), x)


# The exact map


def times(rows=64):
    return torch.rand(3, rows, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_the_exact_map_is_the_flow(gaussian, gaussian_map, points):
    s, _, t = times()
    close(gaussian_map(points, s, t), gaussian.flow(points, s, t), 1e-13)
    close(gaussian_map.velocity(points, s), gaussian(points, s), 1e-13)
    close(gaussian_map(points, 0.0, 1.0), gaussian.flow(points, 0.0, 1.0), 1e-13)


def test_composition_inverse_and_both_derivatives(gaussian, gaussian_map, points):
    s, m, t = times()
    end = gaussian_map(points, s, t)
    close(gaussian_map(gaussian_map(points, s, m), m, t), end, 1e-13)
    close(gaussian_map(end, t, s), points, 1e-12)
    one = torch.ones_like(t)
    lagrangian = torch.func.jvp(lambda t: gaussian_map(points, s, t), (t,), (one,))[1]
    close(lagrangian, gaussian(end, t), 1e-12)
    tangents = (gaussian(points, s), one)
    eulerian = torch.func.jvp(lambda x, s: gaussian_map(x, s, t), (points, s), tangents)[1]
    close(eulerian, torch.zeros_like(eulerian), 1e-12)


@pytest.mark.parametrize("grid", ["uniform", "shifted", "quadratic"])
def test_through_composes(gaussian, gaussian_map, points, grid):
    for steps in (1, 2, 5):
        close(gaussian_map.through(points, step_grid(steps, grid)), gaussian.flow(points, 0.0, 1.0), 1e-13)
    back = torch.tensor([1.0, 0.4, 0.0], dtype=F64)
    close(gaussian_map.through(gaussian.flow(points, 0.0, 1.0), back), points, 1e-12)


def test_a_time_belongs_to_its_row(gaussian_map, points):
    square, s, t = points[:2], torch.tensor([0.1, 0.6], dtype=F64), torch.tensor([0.9, 0.3], dtype=F64)
    rows = [gaussian_map(square[i : i + 1], float(s[i]), float(t[i])) for i in range(2)]
    close(gaussian_map(square, s, t), torch.cat(rows), 1e-15)


# What a network predicts


def test_a_data_predictor_in_numbers():
    # X_{s,t} = x + (t - s) / (1 - s) (F - x), so that the map to the data is the prediction.
    torch.manual_seed(0)
    network = MLP(2, width=16, times=2).double()
    nn.init.normal_(network.second_time.last.weight)
    flow_map = FlowMap(network, Linear(), "data")
    x = torch.randn(5, 2, dtype=F64)
    s, t = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.9], dtype=F64), torch.linspace(0.1, 1, 5, dtype=F64)
    one = torch.ones_like(t)
    with torch.no_grad():
        close(flow_map(x, s, t), x + ((t - s) / (1 - s))[:, None] * (network(x, s, t) - x), 1e-14)
        close(flow_map(x, s, one), network(x, s, one), 1e-14)


def test_a_noise_predictor_in_numbers():
    # v = (x - F) / s on the linear path, for t the second time alike.
    network = MLP(2, width=16, times=2).double()
    x, s, t = torch.randn(3, 2, dtype=F64), torch.tensor([0.1, 0.5, 1.0], dtype=F64), torch.full((3,), 0.7, dtype=F64)
    with torch.no_grad():
        u = FlowMap(network, Linear(), "noise").average_velocity(x, s, t)
        close(u, (x - network(x, s, t)) / s[:, None], 1e-14)


@by_native
def test_networks_are_asked_in_their_own_time(native):
    seen = []

    class Net(nn.Module):
        def forward(self, x, s, t, **cond):
            seen.append((s, t, cond))
            return x

    labels = torch.arange(2)
    FlowMap(Net(), native, "v", path=native)(torch.zeros(2, 3), 0.25, 0.75, class_labels=labels)
    (s, t, cond), unit = seen[0], {Linear(): 1, DDPM: 999, Reversed(1000.0): 1000}.get(native, 1)
    falls = native in (DDPM, Reversed(1000.0))
    torch.testing.assert_close(s, torch.full((2,), (0.75 if falls else 0.25) * unit))
    torch.testing.assert_close(t, torch.full((2,), (0.25 if falls else 0.75) * unit))
    assert cond["class_labels"] is labels


# Students


@by_native
@by_kind
def test_a_student_starts_as_its_teacher_to_the_last_bit(native, kind):
    torch.manual_seed(0)
    teacher = NetworkField(MLP(2, width=32, classes=3), native, kind).on(Linear())
    student = FlowMap.from_field(teacher)
    assert (student.path, student.native, student.prediction) == (Linear(), native, kind)
    x, t = torch.randn(65, 2), torch.linspace(0, 1, 65)
    labels = torch.arange(65) % 3
    assert torch.equal(student.velocity(x, t, class_labels=labels), teacher(x, t, class_labels=labels))
    # The second time is silent: all average velocities out of x are that velocity.
    for end in (0.0, 0.4, 1.0):
        assert torch.equal(
            student.average_velocity(x, t, end, class_labels=labels), student.velocity(x, t, class_labels=labels)
        )


def test_one_step_wakes_the_second_time_and_leaves_the_teacher():
    torch.manual_seed(0)
    teacher = NetworkField(MLP(2, width=32))
    before = deepcopy(teacher.state_dict())
    student = FlowMap.from_field(teacher)
    x, s = torch.randn(8, 2), torch.full((8,), 0.2)
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    (student.average_velocity(x, s, 0.9) - 3).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert (student.average_velocity(x, s, 0.9) - student.average_velocity(x, s, 0.4)).abs().max() > 1e-4
        assert not torch.equal(student.velocity(x, s), teacher(x, s))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_network_of_ones_own():
    torch.manual_seed(0)
    teacher = NetworkField(Mine(), VariancePreserving(), "noise").on(Linear())
    network = MineWithTwoTimes()
    with pytest.warns(UserWarning, match=r"MineWithTwoTimes .* second_time\.first, second_time\.last$"):
        student = FlowMap.from_field(teacher, network)
    assert student.network is network
    x, t = torch.randn(33, 2), torch.linspace(0, 1, 33)
    assert torch.equal(student.velocity(x, t), teacher(x, t))
    assert torch.equal(student.average_velocity(x, t, 0.3), teacher(x, t))


def test_without_a_network_to_start_from():
    for field in (CheckerboardField(), Guided(CheckerboardField(), 2.0, weak=CheckerboardField())):
        with pytest.raises(ValueError, match=r"CheckerboardField has no network .* network=MLP\(2, times=2\)"):
            FlowMap.from_field(field)
    network = MLP(2, width=8, times=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = FlowMap.from_field(CheckerboardField(path=Trigonometric()), network)
    assert student.network is network
    assert (student.path, student.prediction) == (Trigonometric(), "velocity")


def test_a_guided_teacher_gives_the_weights_of_the_field_inside():
    field = NetworkField(MLP(2, width=8, classes=4), DDPM, "noise").on(Linear())
    student = FlowMap.from_field(Guided(Guided(field, 2.0, null={"class_labels": 3}), 1.5, null={"class_labels": 2}))
    x, labels = torch.randn(4, 2), torch.arange(4)
    assert torch.equal(student.velocity(x, 0.4, class_labels=labels), field(x, 0.4, class_labels=labels))


def test_errors_of_a_network_that_does_not_fit():
    with pytest.raises(ValueError, match="Mine has no second time and fewstep cannot add one"):
        FlowMap.from_field(NetworkField(Mine()))
    with pytest.raises(ValueError, match=r"6 weights .* Mine have no place in MLP, the first is 'body\.bias'.*names"):
        FlowMap.from_field(NetworkField(Mine()), MLP(2, times=2))
    wide, kept = MLP(2, width=16, times=2), MLP(2, width=16, times=2)
    kept.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match=r"'input\.weight' is \(8, 2\) in the teacher and \(16, 2\) in the student"):
        FlowMap.from_field(NetworkField(MLP(2, width=8)), wide)
    # Nothing was loaded on the way to the error.
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), kept.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown prediction kind 'eps'"):
        FlowMap(MLP(2, times=2), prediction="eps")
    with pytest.raises(ValueError, match="one time a sample"):
        FlowMap(MLP(2, times=2))(torch.zeros(4, 2), torch.zeros(4), torch.zeros(3))


def test_load_by_name_says_what_is_new():
    teacher, student = Mine(), MineWithTwoTimes()
    with pytest.warns(UserWarning, match="new in it"):
        new = load_by_name(student, teacher)
    assert new == [f"second_time.{layer}.{part}" for layer in ("first", "last") for part in ("bias", "weight")]
    assert torch.equal(student.body.weight, teacher.body.weight)
    with pytest.warns(UserWarning, match="Mine has no weight that its teacher lacks: where is its second time"):
        assert load_by_name(Mine(), teacher) == []


def test_a_map_says_what_it_is():
    text = repr(FlowMap(MLP(2, width=8, times=2), DDPM, "noise", path=Linear()))
    assert "native=Tabulated(1000 steps" in text
    assert "prediction='noise', path=Linear()" in text
