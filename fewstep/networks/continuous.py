"""A U-Net whose stages are second-order differential equations, solved by as many steps as one likes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from fewstep.networks.second_time import SecondTime, sinusoidal

_WIDEST = 1 << 16


def second_order(
    f: Callable[[Tensor, Tensor, float], Tensor], z: Tensor, dz: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """``z'' = f(z, z', tau)`` from tau = 0 to 1 by ``steps`` equal steps of the classical Runge-Kutta method: z(1) and
    z'(1), with an error of order ``steps ** -4``. Four evaluations of ``f`` a step.

    Args:
        z, dz: z(0) and z'(0), of one shape.
    """
    h = 1 / steps
    for n in range(steps):
        tau = n * h
        v1, a1 = dz, f(z, dz, tau)
        v2 = dz + h / 2 * a1
        a2 = f(z + h / 2 * v1, v2, tau + h / 2)
        v3 = dz + h / 2 * a2
        a3 = f(z + h / 2 * v2, v3, tau + h / 2)
        v4 = dz + h * a3
        a4 = f(z + h * v3, v4, tau + h)
        z = z + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        dz = dz + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return z, dz


class ContinuousUNet(nn.Module):
    """A U-Net over images (B, C, H, W) with one time, ``net(x, t)``, or two, ``net(x, s, t)``, in which the blocks of a
    stage are one differential equation in a depth tau (arXiv 2310.20092)::

        z'' = f(z, z', tau, emb(t)),    z(0) = h,    z'(0) = g(h)    ->    z(1)

    h comes into the stage; g, a layer, is learned; f is two convolutions, which all depths share.

    Reconstructed from the abstract of the paper, which solves by adaptive steps and trains by the adjoint equation.
    Here the steps are fixed and the gradient goes through them: a call has a cost that can be counted before it
    (:attr:`evaluations`), and a derivative in forward mode.

    Args:
        shape: (C, H, W) of a sample.
        widths: channels of the stages, the finest first; each stage has half the height and width of the one before.
        steps: of the solver, in each stage.
        attention: every place of the coarsest stage sees every other.
        times: 1 for a field, 2 for a flow map.
        classes: the number of classes for a ``class_labels`` condition (B,), 0 for none.
        guidance: takes the strength of guidance as a condition ``guidance`` (B,), as an MLP does.

    Raises:
        ValueError: a number out of its range; called with another number of times or channels, or without the labels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, ...] = (32, 64),
        steps: int = 2,
        attention: bool = True,
        times: int = 1,
        classes: int = 0,
        guidance: bool | Literal["interval"] = False,
    ) -> None:
        super().__init__()
        for name, number, least, most in (
            *(("shape", side, 1, _WIDEST) for side in shape), *(("widths", width, 4, _WIDEST) for width in widths),
            ("steps", steps, 1, 1000), ("classes", classes, 0, 1 << 20), ("the number of widths", len(widths), 1, 16),
        ):  # fmt: skip
            if not least <= number <= most:
                raise ValueError(f"a ContinuousUNet with {name} {number}: {least} to {most:,} can be made")
        if odd := [width for width in widths if width % 4]:
            raise ValueError(f"a ContinuousUNet with a stage of {odd[0]} channels: multiples of 4 can be made")
        if guidance == "interval":
            raise ValueError("a ContinuousUNet takes the strength of guidance alone: guidance: true")
        self.config = {
            "shape": list(shape), "widths": list(widths), "steps": steps, "attention": attention, "times": times,
            "classes": classes, "guidance": guidance,
        }  # fmt: skip
        told, pairs = 4 * widths[0], list(pairwise(widths))
        self.time = nn.Sequential(nn.Linear(64, told), nn.SiLU(), nn.Linear(told, told))
        self.second_time = SecondTime(told) if times == 2 else None
        self.label = nn.Embedding(classes, told) if classes else None
        self.strength = SecondTime(told, scale=3.0) if guidance else None
        self.input = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        self.down = nn.ModuleList(_Stage(width, told, steps) for width in widths)
        self.coarser = nn.ModuleList(nn.Conv2d(fine, coarse, 3, 2, 1) for fine, coarse in pairs)
        self.attention = _Attention(widths[-1]) if attention else None
        self.finer = nn.ModuleList(nn.Conv2d(fine + coarse, fine, 3, padding=1) for fine, coarse in pairs)
        self.up = nn.ModuleList(_Stage(width, told, steps) for width in widths)
        self.norm, self.output = nn.GroupNorm(4, widths[0]), nn.Conv2d(widths[0], shape[0], 3, padding=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), of one sample."""
        return tuple(self.config["shape"])

    @property
    def classes(self) -> int:
        """How many classes it is conditioned on."""
        return self.config["classes"]

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance."""
        return bool(self.config["guidance"])

    @property
    def evaluations(self) -> int:
        """How many times the right-hand sides f are computed in one call of the network."""
        return 4 * self.config["steps"] * (len(self.down) + len(self.up))

    def forward(
        self, x: Tensor, *times: Tensor, class_labels: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        if len(times) != self.config["times"]:
            raise ValueError(f"a ContinuousUNet with times={self.config['times']} was called with {len(times)}")
        if x.ndim != 4 or x.shape[1] != self.shape[0]:
            raise ValueError(f"a ContinuousUNet for images {self.shape} was given {tuple(x.shape[1:])}")
        told = self.time(sinusoidal(times[0], 64, low=0.5, high=100.0).to(self.input.weight.dtype))
        if self.second_time is not None:
            told = told + self.second_time(times[1])
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this ContinuousUNet was made with classes: class_labels (B,) are needed")
            told = told + self.label(class_labels)
        if guidance is not None and self.strength is None:
            raise ValueError("this ContinuousUNet takes no strength of guidance: make it with guidance=True")
        if self.strength is not None:
            told = told + self.strength(torch.ones_like(times[0]) if guidance is None else guidance.to(times[0]))
        h, skips = self.down[0](self.input(x), told), []
        for coarser, stage in zip(self.coarser, self.down[1:], strict=True):
            skips.append(h)
            h = stage(coarser(h), told)
        if self.attention is not None:
            h = self.attention(h)
        h = self.up[-1](h, told)
        for finer, stage, skip in zip(reversed(self.finer), reversed(self.up[:-1]), reversed(skips), strict=True):
            h = stage(finer(torch.cat([interpolate(h, size=skip.shape[2:]), skip], dim=1)), told)
        return self.output(silu(self.norm(h)))

    def with_second_time(self, guidance: bool | str = False) -> "ContinuousUNet":
        """The same network with a second time that is silent, as a student starts."""
        made = {**self.config, "times": 2, "guidance": guidance or self.config["guidance"]}
        student = ContinuousUNet(**made).to(self.input.weight)
        student.load_state_dict(self.state_dict(), strict=False)
        return student


class _Stage(nn.Module):
    """h (B, width, H, W) to z(1) of its differential equation."""

    def __init__(self, width: int, told: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.start = nn.Conv2d(width, width, 1)  # g
        self.f = _Acceleration(width, told)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        return second_order(lambda z, dz, tau: self.f(z, dz, tau, told), h, self.start(h), self.steps)[0]


class _Acceleration(nn.Module):
    """f: two convolutions of z and z', scaled and shifted between them by the depth and what the network is told."""

    def __init__(self, width: int, told: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, 2 * width), nn.GroupNorm(4, width)])
        self.first, self.last = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.depth, self.told = nn.Linear(16, told), nn.Linear(told, 2 * width)

    def forward(self, z: Tensor, dz: Tensor, tau: float, told: Tensor) -> Tensor:
        at = told.new_full((1,), tau, dtype=torch.promote_types(told.dtype, torch.float32))
        depth = self.depth(sinusoidal(at, 16, low=0.5, high=10.0).to(self.depth.weight.dtype))
        scale, shift = self.told(silu(told + depth))[:, :, None, None].chunk(2, dim=1)
        h = self.first(silu(self.norms[0](torch.cat([z, dz], dim=1))))
        return self.last(silu(self.norms[1](h) * (1 + scale) + shift))


class _Attention(nn.Module):
    """Attention over the places of an image, added to what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h).flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        seen = self.mix(scaled_dot_product_attention(q, k, v)[:, 0])
        return h + seen.transpose(1, 2).reshape(h.shape)
