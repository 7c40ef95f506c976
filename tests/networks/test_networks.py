"""The small MLP and the second time that makes a network a student's."""

import pytest
import torch
from torch import nn

from fewstep.networks import MLP, SecondTime, sinusoidal, with_second_time


def inputs(rows=5, dim=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, dim, generator=g, dtype=dtype)
    s, t = torch.rand(2, rows, generator=g, dtype=dtype)
    return x, s, t


def test_sinusoidal_in_numbers():
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    features = sinusoidal(t, 6, low=1.0, high=100.0)
    frequencies = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    expected = torch.cat([(0.5 * frequencies).sin(), (0.5 * frequencies).cos()])
    torch.testing.assert_close(features[1], expected, rtol=0, atol=1e-13)
    assert features[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert sinusoidal(t, 2).shape == (2, 2)


def test_a_second_time_is_silent_until_it_is_trained():
    second = SecondTime(8)
    t = torch.rand(4)
    assert torch.equal(second(t), torch.zeros(4, 8))
    (second(t) - 1).square().sum().backward()
    grads = [p.grad for p in second.last.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    torch.optim.SGD(second.parameters(), 0.1).step()
    assert (second(t)[0] - second(t)[1]).abs().max() > 1e-4


def test_the_scale_of_a_second_time_is_its_unit():
    torch.manual_seed(0)
    unit, thousands = SecondTime(8), SecondTime(8, scale=1000.0)
    nn.init.normal_(unit.last.weight)
    thousands.load_state_dict(unit.state_dict())
    t = torch.rand(4)
    torch.testing.assert_close(thousands(1000 * t), unit(t))
    assert SecondTime(8, frequencies=16).first.in_features == 16


def test_mlp_shapes_and_sizes():
    x, s, t = inputs()
    assert MLP(3, width=16)(x, s).shape == (5, 3)
    assert MLP(3, width=16, times=2)(x, s, t).shape == (5, 3)
    deep, shallow = MLP(3, width=16, depth=6), MLP(3, width=16, depth=1)
    assert (len(deep.hidden), len(shallow.hidden)) == (5, 0)
    assert shallow(x, s).shape == (5, 3)


def test_mlp_uses_all_it_is_given():
    torch.manual_seed(0)
    net = MLP(3, width=16, depth=2, times=2, classes=4)
    nn.init.normal_(net.second_time.last.weight)
    x, s, t = inputs()
    labels = torch.tensor([0, 1, 2, 3, 0])
    out = net(x, s, t, class_labels=labels)
    for other in (
        net(x + 0.1, s, t, class_labels=labels),
        net(x, s + 0.1, t, class_labels=labels),
        net(x, s, t + 0.1, class_labels=labels),
        net(x, s, t, class_labels=(labels + 1) % 4),
    ):
        assert ((out - other).abs().amax(1) > 1e-5).all()
    # Rows do not see each other.
    torch.testing.assert_close(net(x[1:2], s[1:2], t[1:2], class_labels=labels[1:2]), out[1:2])


def test_mlp_precisions():
    x, s, _ = inputs(dtype=torch.float64)
    assert MLP(3, width=8).double()(x, s).dtype == torch.float64
    # Half precision takes its times in float32: 0.5 and 0.501 are one number in bfloat16.
    net = MLP(3, width=64).bfloat16()
    close_times = torch.tensor([0.5, 0.5009])
    features = sinusoidal(close_times, 64, low=0.5, high=30.0).bfloat16()
    assert not torch.equal(features[0], features[1])
    assert net(x[:2].bfloat16(), close_times).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_mlp_is_layers_with_the_activation_between(activation):
    torch.manual_seed(0)
    net, (x, s, _) = MLP(3, width=16, depth=3, activation=activation), inputs()
    between = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU()}[activation]
    first = net.input(x) + net.time(sinusoidal(s, 64, low=0.5, high=30.0))
    torch.testing.assert_close(
        net(x, s), nn.Sequential(between, net.hidden[0], between, net.hidden[1], between, net.output)(first)
    )
    assert MLP(**net.config).activation is net.activation
    assert ("activation" in net.config) == (activation != "gelu")  # what older versions wrote is read, and they read it


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_second_time_is_the_same_function_to_the_bit(classes, activation, dtype):
    torch.manual_seed(0)
    teacher = MLP(3, width=16, depth=3, classes=classes, activation=activation).to(dtype).requires_grad_(False)
    student = with_second_time(teacher)
    x, s, t = inputs(dtype=dtype)
    cond = {"class_labels": torch.tensor([0, 1, 2, 3, 0])} if classes else {}
    assert torch.equal(student(x, s, t, **cond), teacher(x, s, **cond))
    # A copy that trains, of a teacher that need not.
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        student.input.weight.add_(1.0)
    assert not torch.equal(student(x, s, t, **cond), teacher(x, s, **cond))
    assert student.config == {**teacher.config, "times": 2}


def test_errors():
    x, s, t = inputs()
    with pytest.raises(ValueError, match="made with classes: class_labels"):
        MLP(3, classes=4)(x, s)
    with pytest.raises(ValueError, match="unknown activation of an MLP 'rleu': did you mean 'relu'"):
        MLP(3, activation="rleu")
    with pytest.raises(ValueError, match="MLP with times=1 was called with 2"):
        MLP(3)(x, s, t)
    with pytest.raises(ValueError, match="MLP with times=2 was called with 1"):
        MLP(3, times=2)(x, s)
    with pytest.raises(ValueError, match=r"Linear has no second time .* adds SecondTime\(dim\)\(t\) .* network=\.\.\."):
        with_second_time(nn.Linear(2, 2))
