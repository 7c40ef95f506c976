"""The continuous U-Net: its solver against a closed form, its gradient, its second time, what a call costs."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.evaluation.points import rmse
from fewstep.networks import ContinuousUNet, continuous
from fewstep.networks.continuous import second_order
from fewstep.planning.counting import count_call

F64 = torch.float64


def small(dtype: torch.dtype = torch.float32, **options: Any) -> ContinuousUNet:
    torch.manual_seed(0)
    return ContinuousUNet((2, 6, 5), (4, 8), **{"steps": 2, **options}).to(dtype)


def inputs(rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    s, t = torch.rand(2, rows, generator=draw, dtype=dtype)
    return torch.randn(rows, 2, 6, 5, generator=draw, dtype=dtype), s, t


class Spring(nn.Module):
    """z'' = -w^2 z."""

    w = 2.0

    def forward(self, z: Tensor, dz: Tensor, tau: float, told: Tensor) -> Tensor:
        return -(self.w**2) * z


def test_a_spring_swings_as_its_closed_form_with_order_four() -> None:
    network = small(F64)
    stage: Any = network.down[0]
    stage.f, w = Spring(), Spring.w
    h = torch.randn(2, 4, 3, 3, dtype=F64)
    told = torch.zeros(2, 16, dtype=F64)
    exact = h * math.cos(w) + stage.start(h) / w * math.sin(w)
    errors = []
    for stage.steps in (4, 8, 16, 32):
        errors.append(float((stage(h, told) - exact).detach().abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(3.9 < order < 4.2 for order in orders), orders


def test_the_depth_and_the_slope_go_in_with_order_four_too() -> None:
    """z'' = -z' + tau, z = A + B e^-tau + tau^2 / 2 - tau."""
    z, dz = torch.tensor([0.3], dtype=F64), torch.tensor([-1.1], dtype=F64)
    b = -1 - dz
    exact = (z - b) + b * math.exp(-1) - 0.5, -b * math.exp(-1)
    found = [second_order(lambda z, dz, tau: tau - dz, z, dz, steps) for steps in (8, 16)]
    for k in range(2):
        one, two = (float((each[k] - exact[k]).abs()) for each in found)
        assert 3.9 < math.log2(one / two) < 4.2


def test_its_gradient_and_its_derivative_in_forward_mode_are_those_of_differences() -> None:
    network, (x, s, t) = small(F64, times=2), inputs(dtype=F64)
    nn.init.normal_(network.second_time.last.weight)  # pyright: ignore[reportOptionalMemberAccess]
    one = x[:1, :, :3, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: network(x, s[:1], t[:1]), (one,))
    tangents = torch.randn_like(x), torch.randn_like(s), torch.randn_like(t)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        derivative = torch.func.jvp(network, (x, s, t), tangents)[1]
        up, down = (
            network(*(value + e * along for value, along in zip((x, s, t), tangents, strict=True)))
            for e in (1e-5, -1e-5)
        )
    torch.testing.assert_close(derivative, (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def test_more_steps_change_little() -> None:
    x, s, _ = inputs()
    with torch.no_grad():
        few, more, many = (small(steps=n)(x, s) for n in (2, 4, 32))
    apart, size = float((few - many).abs().max()), float(many.std())
    assert 0 < apart < 0.05 * size
    assert float((more - many).abs().max()) < 0.2 * apart


def test_half_precision_is_near_and_hears_the_depth_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    x, s, _ = inputs()
    with torch.no_grad():
        full = small()(x, s)
        seen: list[torch.dtype] = []
        known = continuous.sinusoidal
        monkeypatch.setattr(continuous, "sinusoidal", lambda t, *a, **k: seen.append(t.dtype) or known(t, *a, **k))
        half = small(torch.bfloat16)(x.bfloat16(), s)
        with torch.autocast("cpu", torch.bfloat16):
            cast = small()(x, s)
    assert set(seen) == {torch.float32}
    for found in (half, cast):
        assert found.dtype == torch.bfloat16
        assert float((found - full).abs().max()) < 0.05 * float(full.abs().max())


def test_a_student_begins_as_its_teacher_and_hears_its_second_time() -> None:
    field = fewstep.NetworkField(small(classes=3))
    student = fewstep.FlowMap.from_field(field, guidance=True)
    x, s, t = inputs()
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        assert torch.equal(student.velocity(x, s, class_labels=labels), field(x, s, class_labels=labels))
        before = student.average_velocity(x, s, t, class_labels=labels)
        assert torch.equal(before, field(x, s, class_labels=labels))
    student.average_velocity(x, s, t, class_labels=labels).square().mean().backward()
    network: Any = student.network
    for told in (network.second_time, network.strength):
        assert told.last.weight.grad.abs().sum() > 0
        nn.init.normal_(told.last.weight)
    with torch.no_grad():
        after = student.average_velocity(x, s, t, class_labels=labels)
        strong = student.average_velocity(x, s, t, class_labels=labels, guidance=torch.full((3,), 3.0))
    assert not torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(strong, after, atol=1e-4)


def test_what_a_call_costs_is_counted() -> None:
    """Attention and all between the stages once, their equations four times a step."""
    x = torch.empty(3, 2, 6, 5, device="meta")
    one, two, four = (count_call(small(steps=n).to("meta"), x, (torch.empty(3, device="meta"),), {}) for n in (1, 2, 4))  # pyright: ignore[reportArgumentType]
    assert two - one > 0.5 * one
    assert four - two == 2 * (two - one)
    seen: list[int] = []
    network = small(steps=3)
    for stage in (*network.down, *network.up):
        stage.f.register_forward_hook(lambda *_: seen.append(1))  # pyright: ignore
    network(*inputs()[:2])
    assert len(seen) == network.evaluations == 4 * 3 * 4


def test_a_wrong_option_or_call_is_told() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"widths": (6,)}, "6 channels: multiples of 4"), ({"widths": ()}, "the number of widths 0"),
        ({"steps": 0}, "steps 0: 1 to 1,000"), ({"guidance": "interval"}, "alone"),
    ]  # fmt: skip
    for options, why in wrong:
        with pytest.raises(ValueError, match=why):
            ContinuousUNet((1, 8, 8), **options)
    x, s, t = inputs()
    with pytest.raises(ValueError, match="times=1 was called with 2"):
        small()(x, s, t)
    with pytest.raises(ValueError, match=r"for images \(2, 6, 5\) was given \(1, 6, 5\)"):
        small()(x[:, :1], s)
    with pytest.raises(ValueError, match="class_labels"):
        small(classes=3)(x, s)
    with pytest.raises(ValueError, match="takes no strength of guidance"):
        small()(x, s, guidance=s)


@pytest.mark.takes_seconds
def test_a_recipe_trains_distils_and_exports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.cli import main

    few = ["--training.batch", "16", "--steps", "3", "--evaluation.count", "0"]
    options = "{network: continuous, options: {widths: [4, 8], steps: 1, classes: 10}}"
    teacher, fast, out = tmp_path / "teacher", tmp_path / "fast", tmp_path / "export"
    assert main(["train", "digits-teacher", "--student", options, *few, "--out", str(teacher)]) == 0
    distil = ["distill", "digits-itvm", "--teacher", str(teacher), "--objective", "LMD", *few, "--out", str(fast)]
    assert main(distil) == 0
    assert main(["export", str(fast), str(out)]) == 0
    student, again = fewstep.load(fast), fewstep.load(out)
    network: Any = again.network
    assert isinstance(network, ContinuousUNet)
    assert network.shape == (1, 8, 8)
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert torch.equal(
        fewstep.sample(student, noise, 2, class_labels=labels), fewstep.sample(again, noise, 2, class_labels=labels)
    )
    assert main(["train", "checkerboard-itvm", "--student", "continuous", "--dry-run"]) != 0
    assert "continuous takes images (C, H, W), the data has shape (2,)" in capsys.readouterr().err


class Pictures(fewstep.VelocityField):
    """Two patterns of 4 x 4 with noise of .1, exactly."""

    def __init__(self) -> None:
        super().__init__()
        stripes = torch.tensor([1.0, -1.0]).repeat(8)
        means = torch.stack([stripes, stripes.view(4, 4).T.flatten()])
        self.points = fewstep.MixtureField(means, torch.full((2,), 0.1), torch.ones(2))
        self.path = self.points.path

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        return self.points(x.flatten(1), t).view(x.shape)


@pytest.mark.takes_seconds
def test_one_call_of_its_map_is_nearer_to_the_end_than_one_of_euler() -> None:
    teacher, draw = Pictures(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    student = fewstep.FlowMap(ContinuousUNet((1, 4, 4), (16, 16), steps=1, times=2))
    data = teacher.points.data(2000, draw).view(-1, 1, 4, 4)
    fewstep.fit(student, fewstep.ITVM(teacher), data, steps=150, batch=64, lr=4e-3, quiet=True, device="cpu")
    noise = torch.randn(500, 1, 4, 4, generator=draw)
    end = fewstep.sample(teacher, noise, 100).flatten(1)
    one, euler = (rmse(fewstep.sample(model, noise, 1).flatten(1), end) for model in (student.eval(), teacher))
    assert one < 0.6 * euler, (one, euler)
