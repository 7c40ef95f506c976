"""Flows in the plane, and data as what is missing to what is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import ITVM, FlowMap, GaussianField, VelocityField, fit, sample
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Residual, load_data, upsampled
from fewstep.data.fluids import random_vorticity, simulate
from fewstep.networks import MLP


def energies(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of speed and of vorticity, by wave numbers."""
    k = torch.fft.fftfreq(w.shape[-1], 1 / w.shape[-1], dtype=torch.float64)
    square = (k[:, None] ** 2 + k[None] ** 2).clamp(min=1)
    power = torch.fft.fft2(w.double()).abs().square()
    return (power / square).sum((1, 2)), power.sum((1, 2))


def test_a_wave_dies_as_viscosity_says() -> None:
    """Waves of one length do not turn each other: cos 3x cos 4y decays as exp(-25 nu t), to rounding."""
    x = torch.arange(24, dtype=torch.float64) * 2 * math.pi / 24
    w = (torch.cos(4 * x)[:, None] * torch.cos(3 * x))[None]
    assert (simulate(w, 1.5, viscosity=0.01) - w * math.exp(-25 * 0.01 * 1.5)).abs().max() < 1e-13


@pytest.mark.takes_seconds
def test_the_step_is_of_order_four_and_keeps_what_has_no_viscosity() -> None:
    w = random_vorticity(2, 24, generator(0)).double()
    exact = simulate(w, 0.5, dt=0.0025)
    errors = [float((simulate(w, 0.5, dt=dt) - exact).abs().max()) for dt in (0.1, 0.05)]
    assert 12 < errors[0] / errors[1] < 20
    start = simulate(w, 1e-9, viscosity=0.0)
    later = simulate(start, 1.0, viscosity=0.0, dt=0.02)
    for before, after in zip(energies(start), energies(later), strict=True):
        assert ((after / before) - 1).abs().max() < 1e-5
    assert (later - start).std() > 0.3 * start.std()  # it moved
    with pytest.raises(ValueError, match=r"not finite after a time of 40: dt=4 is too long a step"):
        simulate(20 * w, 40.0, viscosity=0.0, dt=4.0)


def test_what_is_taken_off_comes_back() -> None:
    coarse = torch.randn(6, 1, 4, 4, generator=generator(1))
    known = upsampled(coarse, 4)
    assert (torch.nn.functional.avg_pool2d(upsampled(torch.ones(1, 1, 4, 4), 4), 4) - 1).abs().max() < 1e-6
    turned = upsampled(coarse.roll(1, -1), 4)
    torch.testing.assert_close(turned, known.roll(4, -1))  # periodic
    fine = known + 0.2 * torch.randn(6, 1, 16, 16, generator=generator(2))
    data = Residual(ArrayData(fine, {"image": torch.cat([known, 0 * known], 1)}))
    batch = data.rows(torch.arange(6), generator(0))
    torch.testing.assert_close(batch.data.std(), torch.tensor(1.0))
    assert data.moments == (0.0, data.std)
    assert abs(data.std - 0.2) < 0.01
    torch.testing.assert_close(data.denormalize(batch.data, batch.cond["image"]), fine)
    for cond, said in (
        ({}, "there is no condition 'image' to take off the data, which have none"),
        ({"image": coarse}, r"has rows of shape \(1, 4, 4\), and the data of \(1, 16, 16\): scale it up"),
        ({"image": fine}, "the data are their condition 'image'"),
    ):
        with pytest.raises(ValueError, match=said):
            Residual(ArrayData(fine, cond))
    with pytest.raises(ValueError, match="drop normalize"):
        Residual(ArrayData(fine, {"image": known}, normalize=True))


@pytest.mark.takes_seconds
def test_the_named_data() -> None:
    data: Any = load_data("vorticity", count=20, size=16)
    assert (data.shape, data.size) == ((1, 16, 16), 20)
    batch = data.rows(torch.arange(20), generator(0))
    whole: Any = load_data("vorticity", count=20, size=16, residual=False)
    fine = whole.rows(torch.arange(20), generator(0)).data
    torch.testing.assert_close(data.denormalize(batch.data, batch.cond["image"]), fine)
    means = torch.nn.functional.avg_pool2d(fine, 4)
    torch.testing.assert_close(upsampled(means, 4), batch.cond["image"])
    # The next frame is a step of the solver from the one that is known, in units of the spread.
    ahead: Any = load_data("vorticity", task="forecast", count=20, size=16, residual=False)
    pair = ahead.rows(torch.arange(20), generator(0))
    other: Any = load_data("vorticity", task="forecast", count=20, size=16, residual=False, split="test")
    assert abs(other.array - ahead.array).max() > 0.1
    torch.testing.assert_close(pair.data[:7], pair.cond["image"][1:8])  # of one flow, snapshot by snapshot
    for options, said in (
        ({"task": "drag"}, "unknown task 'drag'.*forecast, super-resolution"),
        ({"split": "val"}, "unknown split 'val'"),
        ({"size": 18}, "size 18 and factor 4: at least 8 points a side"),
        ({"count": 0}, "count 0 and ahead 0.25"),
    ):
        with pytest.raises(ValueError, match=said):
            load_data("vorticity", **options)


# Jointly Gaussian: what is missing to what is known has a law, a field and a map in closed form.

GAIN, SPREAD = 0.6, 0.5


class Known(VelocityField):
    """Of r given ``image``, which is N(GAIN image, SPREAD^2): the velocity from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.around = GaussianField(torch.zeros(1, dtype=torch.float64), SPREAD**2 * torch.eye(1, dtype=torch.float64))
        self.path = self.around.path

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        mean = GAIN * cond["image"]
        return self.around(x - torch.as_tensor(t).reshape(-1, 1) * mean, t) + mean


def gaussian_rows(count: int) -> tuple[Tensor, Tensor]:
    """The known and the whole: y, and x = y + r with r given y as above."""
    y = torch.randn(count, 1, generator=generator(3), dtype=torch.float64)
    return y, y + GAIN * y + SPREAD * torch.randn(count, 1, generator=generator(4), dtype=torch.float64)


@pytest.mark.takes_seconds
def test_the_residual_of_a_gaussian_is_carried_exactly() -> None:
    """X_{0,1}(z) = GAIN y + SPREAD z, and with y added it is x given y: the change of variables is exact."""
    y, x = gaussian_rows(20_000)
    z = torch.randn(500, 1, generator=generator(5), dtype=torch.float64)
    drawn = sample(Known(), z, 400, solver="heun", image=y[:500])
    assert (drawn - (GAIN * y[:500] + SPREAD * z)).abs().max() < 1e-4
    data = Residual(ArrayData(x, {"image": y}))
    assert abs(data.std - math.hypot(GAIN, SPREAD)) < 0.02
    whole = data.denormalize(drawn / data.std, y[:500])
    assert (whole - ((1 + GAIN) * y[:500] + SPREAD * z)).abs().max() < 1e-4
    assert data.std < 0.5 * float(x.std())  # what is learned varies less


class Beside(torch.nn.Module):
    """A two-time network of one's own that takes the known number as ``image``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(2, times=2, width=32, depth=2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, image: Tensor) -> Tensor:
        return self.inner(torch.cat([x, image.to(x)], 1), s, t)[:, :1]


@pytest.mark.takes_seconds
def test_a_conditional_map_is_learned_in_one_call() -> None:
    y, x = (part.float() for part in gaussian_rows(2000))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        student = FlowMap(Beside())
    teacher = Known().float()
    data = ArrayData(x - y, {"image": y})
    fit(student, ITVM(teacher), data, steps=250, batch=128, lr=1e-2, ema=0.95, quiet=True)
    z = torch.randn(2000, 1, generator=generator(5))
    exact = GAIN * y + SPREAD * z
    error = float((sample(student.eval(), z, 1, image=y) - exact).square().mean().sqrt())
    # One Euler step of the exact velocity, at the same cost, gives the mean.
    euler = float((sample(teacher, z, 1, image=y) - exact).square().mean().sqrt())
    assert error < 0.3 * euler
