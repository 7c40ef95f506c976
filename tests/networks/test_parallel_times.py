"""Several times in one call: the Fourier layer is a circulant matrix, and the adapter knows its times alone."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from toys.unet import tiny_unet

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Batch, Pairs
from fewstep.flows.trajectories import teacher_states
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP, FourierLayer, ParallelTimes

F64 = torch.float64
TIMES = [0.25, 0.5, 0.75, 1.0]


def layer_of(weight: Tensor, count: int) -> FourierLayer:
    """With the complex weight (modes, C, C)."""
    layer = FourierLayer(weight.shape[1], count, len(weight)).double()
    layer.weight.data = torch.view_as_real(weight)
    return layer


def applied(layer: FourierLayer, rows: Tensor) -> Tensor:
    """S to rows (K, C), by what the layer adds: ``leaky_relu`` undone."""
    added = (layer(rows) - rows).detach()
    return torch.where(added > 0, added, added / 0.01)


def dense(layer: FourierLayer, channels: int = 1) -> Tensor:
    """S as a matrix (K C, K C)."""
    size = layer.count * channels
    return torch.stack([applied(layer, row.view(-1, channels)).flatten() for row in torch.eye(size, dtype=F64)], 1)


@pytest.mark.parametrize(("count", "modes"), [(4, 2), (4, 3), (5, 1), (5, 3), (1, 1), (2, 2)])
def test_the_layer_is_a_circulant_matrix(count: int, modes: int) -> None:
    torch.manual_seed(count)
    matrix = dense(layer_of(torch.randn(modes, 1, 1, dtype=torch.complex128), count))
    for shift in range(count):
        assert torch.allclose(matrix.roll((shift, shift), (0, 1)), matrix, atol=1e-14)
    assert int(torch.linalg.matrix_rank(matrix, atol=1e-9)) == min(2 * modes - 1, count)


def test_all_modes_are_any_circulant_matrix_of_blocks() -> None:
    count, channels = 6, 3
    blocks = torch.randn(count, channels, channels, dtype=F64)  # what k adds to k + n, out by in
    layer = layer_of(torch.fft.rfft(blocks, dim=0).transpose(1, 2), count)
    wanted = torch.cat([torch.cat([blocks[(i - j) % count] for j in range(count)], 1) for i in range(count)], 0)
    assert torch.allclose(dense(layer, channels), wanted, atol=1e-12)


def test_two_of_three_modes_do_not_see_what_alternates() -> None:
    weight = torch.randn(3, 1, 1, dtype=torch.complex128)
    alternating = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
    assert float(applied(layer_of(weight[:2], 4), alternating).abs().max()) < 1e-15
    assert float(applied(layer_of(weight, 4), alternating).abs().max()) > 0.1


def test_no_weight_is_no_change_and_the_first_weights_are_nearly_none() -> None:
    h = torch.randn(8, 16, 5, 5)
    assert torch.equal(layer_of(torch.zeros(2, 16, 16, dtype=torch.complex64), 4).float()(h), h)
    near = FourierLayer(16, 4, 2)
    assert 0 < float((near(h) - h).detach().abs().max()) < 0.5
    assert near(h.bfloat16()).dtype == torch.bfloat16
    plain = near(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(near(h), plain)  # in full precision
    first = torch.view_as_complex(near.weight.detach())
    modes = torch.fft.rfft(h.view(2, 4, 16, 25), dim=1)[:, :2]
    mixed = torch.fft.irfft(torch.einsum("bmip,mio->bmop", modes, first), n=4, dim=1).reshape(h.shape)
    assert torch.allclose(near(h), h + leaky_relu(mixed), atol=1e-6)


def tiny(modes: int = 2, **options: Any) -> ParallelTimes:
    torch.manual_seed(0)
    return ParallelTimes(MLP(2, width=16, depth=3, times=2, **options), TIMES, modes)


def test_rows_of_one_sample_at_all_times_share_a_call_and_others_are_computed_alike() -> None:
    network, x = tiny(3, classes=3), torch.randn(5, 2)
    labels, calls = torch.tensor([0, 1, 2, 0, 1]), []
    network.network.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    rows, t = x.repeat_interleave(4, 0), torch.tensor(TIMES).repeat(5)
    whole = network(rows, torch.zeros(20), t, class_labels=labels.repeat_interleave(4))
    assert calls == [20]
    order = torch.randperm(20)
    mixed = network(rows[order], torch.zeros(20), t[order], class_labels=labels.repeat_interleave(4)[order])
    assert calls == [20, 80]
    assert torch.allclose(mixed, whole[order], atol=1e-6)
    ends = fewstep.sample(fewstep.FlowMap(network), x, 1, class_labels=labels)
    assert torch.allclose(ends, x + whole.view(5, 4, 2)[:, -1], atol=1e-6)
    # The times see each other: what another time is told changes this one, however little at first.
    for module in network.modules():
        if isinstance(module, FourierLayer):
            module.weight.data *= 100
    nn.init.normal_(network.get_parameter("network.second_time.last.weight"))
    whole = network(rows, torch.zeros(20), t, class_labels=labels.repeat_interleave(4))
    network.times[1] = 0.4
    again = network(x, torch.zeros(5), torch.ones(5), class_labels=labels)
    assert not torch.allclose(again, whole.view(5, 4, 2)[:, -1])


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.6), (0.25, 0.5), (0.0, 0.0), (0.5, 0.5)])
def test_other_times_are_refused(s: float, t: float) -> None:
    with pytest.raises(ValueError, match=r"from 0 to \[0.25, 0.5, 0.75, 1.0\] alone"):
        fewstep.FlowMap(tiny())(torch.randn(3, 2), s, t)


def test_what_has_no_layers_or_modes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 modes"):
        ParallelTimes(MLP(2, times=2), [0.5, 1.0], 3)
    with pytest.raises(ValueError, match="0 layers"):
        ParallelTimes(nn.Linear(2, 2), TIMES)
    own = ParallelTimes(nn.Sequential(nn.Linear(2, 3)), TIMES, layers=["0"])
    assert len(list(own.parameters())) == 3
    with pytest.raises(ValueError, match="around an MLP alone"):
        fewstep.export(fewstep.FlowMap(own), "nowhere")


def test_a_unet_starts_near_its_teacher_and_as_it_without_weights() -> None:
    field = fewstep.NetworkField(fewstep.networks.UNet(tiny_unet()))  # pyright: ignore[reportAttributeAccessIssue]
    student = fewstep.FlowMap.from_field(field)
    times = [750.0, 500.0, 250.0, 0.0]
    torch.manual_seed(1)
    network = ParallelTimes(deepcopy(student.network), times, start=1000.0)
    x, s = torch.randn(8, *network.shape), torch.full((8,), 1000.0)
    t, plain = torch.tensor(times).repeat(2), student.network(x, s, torch.tensor(times).repeat(2))
    with torch.no_grad():
        near = network(x, s, t)
        assert 0 < float((near - plain).abs().max()) < 0.2 * float(plain.abs().max())
        for module in network.modules():
            if isinstance(module, FourierLayer):
                module.weight.zero_()
        assert torch.allclose(network(x, s, t), plain, atol=1e-5)
    network(x, s, t).square().mean().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "fourier" in n)


def test_copies_and_exports_are_the_same_network(tmp_path: Path) -> None:
    student, x = fewstep.FlowMap(tiny()), torch.randn(6, 2)
    copy = deepcopy(student)
    assert torch.equal(fewstep.sample(copy, x, 1), fewstep.sample(student, x, 1))
    next(p for n, p in copy.named_parameters() if "fourier" in n).data.fill_(1.0)
    assert not torch.allclose(fewstep.sample(copy, x, 1), fewstep.sample(student, x, 1))
    fewstep.export(copy, tmp_path / "model")
    assert torch.equal(fewstep.sample(fewstep.load(tmp_path / "model"), x, 1), fewstep.sample(copy, x, 1))
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["network"]["options"]["modes"] = 4
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="4 modes"):
        fewstep.load(tmp_path / "model")


class Exact(nn.Module):
    """The average velocity from the noise of a Gaussian, ``(C_t^(1/2) - 1) z / t``, t > 0."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return ((0.3 * t * t + (1 - t) ** 2).sqrt() - 1)[:, None] / t[:, None] * x


def gaussian_states(count: int, times: list[float]) -> Batch:
    field = fewstep.GaussianField(torch.zeros(2, dtype=F64), 0.3 * torch.eye(2, dtype=F64))
    noise = torch.randn(count, 2, dtype=F64, generator=generator(0))
    states = teacher_states(field, noise, torch.tensor([*times, 1.0], dtype=F64)).transpose(0, 1)
    return Batch(states[:, -1], {}, noise, states[:, :-1], torch.tensor(times, dtype=F64).expand(count, -1))


def test_the_states_of_a_gaussian_are_linear_in_the_noise_and_have_no_loss() -> None:
    batch, objective = gaussian_states(7, TIMES[:-1]), fewstep.Trajectory(diagonal=0.0, parallel=True)
    loss = objective(fewstep.FlowMap(Exact()), batch, generator=generator(1))
    assert float(loss.total) < 1e-14
    assert loss.times["chord"].tolist() == [[0.0, t] for _ in range(7) for t in TIMES]
    off = objective(fewstep.FlowMap(tiny().double()), batch, generator=generator(1))
    assert float(off.total.detach()) > 0.01


@pytest.mark.takes_seconds
def test_it_learns_the_whole_path_in_one_call(tmp_path: Path) -> None:
    teacher = fewstep.MixtureField(torch.tensor([[-1.5, 0.0], [1.5, 0.0]]), torch.tensor([0.3, 0.3]), torch.ones(2) / 2)
    make_pairs(teacher, tmp_path / "states", 4000, steps=40, states=TIMES[:-1], batch=4000)
    pairs = Pairs(tmp_path / "states")
    torch.manual_seed(0)
    student = fewstep.FlowMap(ParallelTimes(MLP(2, width=48, depth=3, times=2), TIMES))
    objective = fewstep.Trajectory(diagonal=0.0, parallel=True)
    fewstep.fit(student, objective, pairs, 500, batch=64, lr=4e-3, ema=0.98, quiet=True)
    noise = torch.randn(1000, 2, generator=generator(5))
    states = teacher_states(teacher, noise, torch.tensor(TIMES))
    at = torch.tensor(TIMES).repeat(1000)
    path = student(noise.repeat_interleave(4, 0), 0.0, at).detach().view(1000, 4, 2).transpose(0, 1)
    errors = (path - states).square().sum(-1).mean(1).sqrt()
    assert float(errors.max()) < 0.3
    euler = fewstep.sample(teacher, noise, 4)
    assert float(errors[-1]) < 0.7 * float((euler - states[-1]).square().sum(1).mean().sqrt())


def test_states_are_kept_at_times_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reflow", "checkerboard", "--count", "6", "--steps", "8", "--states", "0.25,0.5", "--out", "a"]) == 0
    assert "with 2 states between" in capsys.readouterr().out
    rows = Pairs("a").rows(torch.arange(6), generator(0))
    assert rows.states is not None
    assert rows.times is not None
    assert torch.equal(rows.times, torch.tensor([0.25, 0.5]).expand(6, 2))
    assert rows.noise is not None
    exact = teacher_states(fewstep.CheckerboardField(), rows.noise, torch.tensor([0.25, 0.5]))
    assert torch.allclose(rows.states.transpose(0, 1), exact, atol=0.02)
    for at in ("0.3", "0.5,0.25", "0.5,1", "0,0.5", "0.25,0.25"):
        assert main(["reflow", "checkerboard", "--count", "6", "--steps", "8", "--states", at, "--out", "b"]) == 2
        assert "multiples of a step, 1 / 8" in capsys.readouterr().err
    assert main(["reflow", "checkerboard", "--count", "6", "--steps", "8", "--states", "0.25", "--out", "a"]) == 2


def test_in_parallel_there_are_states_and_no_diagonal() -> None:
    with pytest.raises(ValueError, match="in parallel all rows are at s = 0: say 0"):
        fewstep.Trajectory(fewstep.CheckerboardField(), parallel=True)
    objective = fewstep.Trajectory(fewstep.CheckerboardField(), diagonal=0.0, parallel=True)
    with pytest.raises(ValueError, match=r"--states 0\.25,0\.5,0\.75"):
        fewstep.fit(fewstep.FlowMap(tiny()), objective, torch.randn(8, 2), 1, quiet=True)
