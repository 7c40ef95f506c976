"""How likely rows of the data are to a model: metrics that are dear, and measured only where they are asked for."""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fewstep.common.distributed import World
from fewstep.common.randomness import generator, sample_generators
from fewstep.common.sharing import in_turn, rounds
from fewstep.data.batch import Batch
from fewstep.flows.fields import VelocityField, check_velocity
from fewstep.flows.likelihood import bits_per_dim, log_likelihood
from fewstep.flows.maps import FlowMap

LIKELIHOODS = ("nll", "bits_per_dim")
LEVEL = 1 / 127.5  # a step of 8 bits in images in [-1, 1]
_STEPS = 50  # of midpoint, two calls each
_POINTS, _IMAGES = 1000, 100  # rows judged at most
_EXACT = 32  # numbers in a sample up to which the divergence is exact
_SIGNS, _UNIFORM = 0x7369676E, 0x756E6966


def possible_likelihoods(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Those of samples of this shape: points have a density, the bytes of images have bits."""
    return ("bits_per_dim",) if len(shape) == 3 else ("nll",)


def check_likelihood(model: FlowMap | VelocityField, cond: Any) -> None:
    """That a model has a likelihood, of rows under their own conditions.

    Raises:
        ValueError: it does not.
    """
    model.path.check_noise("a likelihood")
    if isinstance(model, VelocityField):
        check_velocity(model, "a likelihood")
    if cond:
        raise ValueError("nll and bits_per_dim judge rows of the data under their own conditions: leave cond out")


def rows_judged(shape: tuple[int, ...]) -> int:
    """How many rows of the data are looked at, at most."""
    return _IMAGES if len(shape) == 3 else _POINTS


def calls_of(rows: int, batch: int, world: World) -> int:
    """Calls of the network that a likelihood takes of a process, each with a way back."""
    return 2 * _STEPS * rounds(-(-rows // batch), world)


def likelihood(
    model: FlowMap | VelocityField,
    batches: Iterable[Batch],
    seed: int,
    *,
    guidance: float | None = None,
    tick: Callable[[int], None] = lambda _: None,
    world: World | None = None,
) -> float | None:
    """The mean of ``-log p`` in nats over rows of points, or of bits a dimension over rows of images (C, H, W), to
    which uniform noise of one level is added first.

    By the ODE of the model's velocity in 50 midpoint steps, of a map that of its own, u(x, t, t); the divergence is
    exact up to 32 numbers a sample, else by one vector of random signs a row. Row i gets the same noise and signs from
    a seed whatever the batch.

    Args:
        world: the processes that share the batches, by default this one alone.

    Returns:
        on the main process; None for a map that knows the way to t = 1 alone, and so has no velocity (a consistency
        model).

    Raises:
        ValueError: images that are not of 8 bits in [-1, 1].
    """
    if isinstance(model, FlowMap) and model.gamma == 1:
        return None
    parts, world = list(batches), World() if world is None else world

    def judged(first: int, part: Batch) -> float:
        x, dims = part.data.float(), part.data[0].numel()
        rows = range(first, first + len(x))
        if x.ndim == 4:
            _check_bytes(x)
            drawn = [
                torch.rand(row.shape, generator=generator(seed, _UNIFORM, i)) for i, row in zip(rows, x, strict=True)
            ]
            x = x + LEVEL * (torch.stack(drawn).to(x) - 0.5)
        cond: dict[str, Any] = dict(part.cond)
        if guidance is not None:
            cond["guidance"] = torch.full((len(x),), guidance)
        probes = None if dims <= _EXACT else 1
        signs = sample_generators(seed ^ _SIGNS, rows)
        log_p = log_likelihood(model, x, steps=_STEPS, probes=probes, generator=signs, **cond)
        value = bits_per_dim(log_p, dims, LEVEL) if x.ndim == 4 else -log_p
        tick(2 * _STEPS)
        return float(value.double().sum())

    sizes = [len(part) for part in parts]
    starts = accumulate(sizes[:-1], initial=0)
    total = sum(in_turn(list(zip(starts, parts, strict=True)), lambda item: judged(*item), world))
    return total / sum(sizes) if math.isfinite(total) else math.inf


def _check_bytes(x: Tensor) -> None:
    level = (x + 1) / LEVEL
    if not (((level - level.round()).abs() < 1e-2) & (level > -0.5) & (level < 255.5)).all():
        raise ValueError(
            "bits_per_dim is of images of 8 bits in [-1, 1], and the data have other numbers (latents, floats, other "
            "levels): fewstep.log_likelihood and fewstep.bits_per_dim take any"
        )
