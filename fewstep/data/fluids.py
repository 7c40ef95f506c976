"""Flows in the plane: the vorticity of an incompressible fluid on a periodic square, by a pseudo-spectral solver.

    dw/dt + u . grad w = nu lap w,    u = (dpsi/dy, -dpsi/dx),    lap psi = -w

Derivatives are exact for the waves that the grid holds, products are cleared of those that it does not (2/3 rule), and
viscosity is solved exactly (an integrating factor around the classic Runge-Kutta step of order 4).
"""

from functools import cache

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.randomness import generator
from fewstep.data.arrays import ArrayData
from fewstep.data.batch import Data
from fewstep.data.residual import Residual, upsampled

TASKS = ("super-resolution", "forecast")
_FLOW, _SPIN_UP = 8, 2.0  # snapshots of one flow; time before the first
_SPLITS = {"train": 0, "test": 1}


def simulate(vorticity: Tensor, time: float, viscosity: float = 2e-3, dt: float = 0.05) -> Tensor:
    """The vorticity (N, H, W) of flows on the square of side 2 pi (rows along y), ``time`` later; mean 0.

    Args:
        dt: of a step, at most; smaller than the spacing of the grid over the largest speed.

    Raises:
        ValueError: numbers that are not finite, as after steps that are too long.
    """
    steps = max(1, round(time / dt + 0.499))
    dt, (height, width) = time / steps, vorticity.shape[-2:]
    real = torch.float64 if vorticity.dtype == torch.float64 else torch.float32
    ky = torch.fft.fftfreq(height, 1 / height, dtype=real)[:, None]
    kx = torch.fft.rfftfreq(width, 1 / width, dtype=real)[None]
    square = ky**2 + kx**2
    inverse = torch.where(square > 0, 1 / square.clamp(min=1), 0)
    kept = (ky.abs() < height / 3) & (kx < width / 3)
    half = torch.exp(-viscosity * square * dt / 2)

    def field(waves: Tensor) -> Tensor:
        return torch.fft.irfft2(waves, s=(height, width))

    def turned(w: Tensor) -> Tensor:
        """-u . grad w."""
        psi = inverse * w
        product = field(1j * ky * psi) * field(1j * kx * w) - field(1j * kx * psi) * field(1j * ky * w)
        return kept * -torch.fft.rfft2(product)

    w = kept * torch.fft.rfft2(vorticity.to(real))
    for _ in range(steps):
        a = turned(w)
        b = turned(half * (w + dt / 2 * a))
        c = turned(half * w + dt / 2 * b)
        d = turned(half * (half * w + dt * c))
        w = half * (half * (w + dt / 6 * a) + dt / 3 * (b + c)) + dt / 6 * d
    if not (found := field(w)).isfinite().all():
        raise ValueError(f"the flow is not finite after a time of {time:g}: dt={dt:.3g} is too long a step for it")
    return found


def random_vorticity(count: int, size: int, draw: torch.Generator, peak: float = 1.5) -> Tensor:
    """Random flows (N, size, size) of mean square speed 1, most of it in waves near the number ``peak``."""
    k = torch.fft.fftfreq(size, 1 / size)
    length = (k[:, None] ** 2 + k[None] ** 2).sqrt()
    weight = length**3 * torch.exp(-((length / peak) ** 2))  # of the vorticity; the speed's is one less
    waves = torch.fft.fft2(torch.randn(count, size, size, generator=draw)) * weight
    speed = (waves.abs().square() / length.square().clamp(min=1)).sum((1, 2), keepdim=True).sqrt() / size**2
    return torch.fft.ifft2(waves / speed).real


def vorticity(
    task: str = "super-resolution",
    count: int = 512,
    size: int = 32,
    factor: int = 4,
    ahead: float = 0.25,
    residual: bool = True,
    split: str = "train",
) -> Data:
    """Vorticity (1, size, size) of decaying flows, of standard deviation 1, beside what is known of it, ``image``.

    Args:
        task: what is known: ``super-resolution``, the means of squares of ``factor`` points, interpolated; or
            ``forecast``, the vorticity a time ``ahead`` before.
        count: snapshots, eight of each flow.
        size: points a side.
        factor: how many points a side are one, for super-resolution.
        ahead: the time between both, for a forecast.
        split: train or test, other flows.
        residual: what is learned is the difference from what is known (:class:`Residual`).

    Raises:
        ValueError: an unknown task or split, a factor that does not divide the size, less than eight points a side.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if split not in _SPLITS:
        raise unknown("split", split, _SPLITS)
    if size < 8 or factor < 2 or size % factor:
        raise ValueError(f"size {size} and factor {factor}: at least 8 points a side, in squares of 2 or more points")
    if count < 1 or not 0 < ahead <= 10:
        raise ValueError(f"count {count} and ahead {ahead:g}: at least one snapshot, and a time above 0 up to 10")
    before, now = _snapshots(count, size, ahead if task == "forecast" else 0.5, _SPLITS[split])
    coarse = torch.nn.functional.avg_pool2d(now, factor) if task == "super-resolution" else before
    known = upsampled(coarse, factor) if task == "super-resolution" else before
    data = ArrayData(now, {"image": known}, name="vorticity")
    return Residual(data) if residual else data


@cache
def _snapshots(count: int, size: int, ahead: float, split: int) -> tuple[Tensor, Tensor]:
    """Pairs of snapshots (count, 1, size, size), the second a time ``ahead`` after the first."""
    flows = simulate(random_vorticity(-(-count // _FLOW), size, generator(2505, split)), _SPIN_UP)
    states = [flows]
    for _ in range(_FLOW):
        states.append(simulate(states[-1], ahead))
    both = torch.stack(states, 1)[:, :, None]
    both = both / both.std()
    return both[:, :-1].flatten(0, 1)[:count], both[:, 1:].flatten(0, 1)[:count]
