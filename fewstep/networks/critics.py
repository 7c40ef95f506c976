"""Small critics: networks that say how real a sample looks, ``critic(x, **cond) -> (n,)``, more for what is real."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu, silu

from fewstep.networks.second_time import sinusoidal

_FREQUENCIES = 32
_SMALLEST = 4  # the shorter side of an image's last features, at most


class ConvCritic(nn.Module):
    """A residual network of convolutions for images (n, C, H, W), with no norms; sides are halved until the shorter is
    4. The deviation in groups of rows is a channel of its last features (arXiv 1710.10196), so it sees samples that are
    too alike. Classes are a projection (arXiv 1802.05637).

    Groups are of 4 rows that stand together, of 2 or 1 where 4 does not divide the rows.

    Args:
        shape: of one sample, (C, H, W), sides of 8 or more.
        width: channels of the first block; they double with each, up to four times as many.
        classes: the number of classes for a ``class_labels`` condition (n,), 0 for none.
        level: takes the noise on the rows as ``level`` (n,) in [0, 1]; see :class:`fewstep.Diffused`.
        seed: decides the first weights.

    Raises:
        ValueError: samples that are no images, or too small; called without the labels of its classes or its level.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int = 32, classes: int = 0, level: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 2 * _SMALLEST:
            raise ValueError(
                f"the critic conv is for images (C, H, W) with sides of {2 * _SMALLEST} or more, and samples are "
                f"{tuple(shape)}: take the critic mlp, or a module of your own"
            )
        if width < 1:
            raise ValueError(f"the critic conv has width {width}: it is 1 or more")
        channels, *sides = shape
        with _first_weights(seed):
            self.stem = nn.Conv2d(channels, width, 3, padding=1)
            self.blocks = nn.ModuleList()
            now = width
            while min(sides) > _SMALLEST:
                self.blocks.append(_Halved(now, min(2 * now, 4 * width), level))
                now, sides = min(2 * now, 4 * width), [math.ceil(side / 2) for side in sides]
            self.last = nn.Conv2d(now + 1, now, 3, padding=1)
            self.features = nn.Linear(now * sides[0] * sides[1], now)
            self.head = _Head(now, classes)
        self.takes_level = level

    def forward(self, x: Tensor, *, class_labels: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        told = _embedded(level, self.takes_level, x)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, told)
        h = torch.cat([h, deviation(h)[:, None, None, None].expand(-1, 1, *h.shape[2:])], dim=1)
        h = leaky_relu(self.last(leaky_relu(h, 0.2)), 0.2)
        return self.head(leaky_relu(self.features(h.flatten(1)), 0.2), class_labels)


class MLPCritic(nn.Module):
    """``depth`` hidden layers of ``width`` for points, or samples of any other shape as the numbers in them. Points
    also go in as sines and cosines of 1, 2, 4, ... times their numbers: a plain MLP is slow to see an edge.

    Args:
        shape: of one sample.
        frequencies: of the sines and cosines; None for 4 where a sample has up to 16 numbers, and 0 for others.
        classes, level, seed: see :class:`ConvCritic`.

    Raises:
        ValueError: called without the labels of its classes or its level.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 128,
        depth: int = 3,
        frequencies: int | None = None,
        classes: int = 0,
        level: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.frequencies = (4 if size <= 16 else 0) if frequencies is None else frequencies
        if depth < 1 or width < 1:
            raise ValueError(f"the critic mlp has depth {depth} and width {width}: both are 1 or more")
        with _first_weights(seed):
            self.input = nn.Linear(size * (1 + 2 * self.frequencies), width)
            self.level = nn.Linear(_FREQUENCIES, width, bias=False) if level else None
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
            self.head = _Head(width, classes)
        self.takes_level = level

    def forward(self, x: Tensor, *, class_labels: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        x = x.flatten(1)
        turns = torch.cat([x * 2**k for k in range(self.frequencies)], dim=1) if self.frequencies else x[:, :0]
        h = self.input(torch.cat([x, turns.sin(), turns.cos()], dim=1))
        told = _embedded(level, self.level is not None, x)
        if self.level is not None and told is not None:
            h = h + self.level(told)
        for layer in self.hidden:
            h = layer(silu(h))
        return self.head(silu(h), class_labels)


class _Halved(nn.Module):
    """A residual block, and half of each side."""

    def __init__(self, channels: int, out: int, level: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, padding=1)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1, bias=False)
        self.level = nn.Linear(_FREQUENCIES, out, bias=False) if level else None

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        h = self.first(leaky_relu(x, 0.2))
        if self.level is not None and told is not None:
            h = h + self.level(told)[:, :, None, None]
        h = self.second(leaky_relu(h, 0.2)) + self.skip(x)
        return avg_pool2d(h, 2, ceil_mode=True) / math.sqrt(2)


class _Head(nn.Module):
    """``<w + w_class, h>``: a logit of features (n, width), with a projection where there are classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.label = nn.Embedding(classes, width) if classes else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, h: Tensor, class_labels: Tensor | None) -> Tensor:
        logits = self.linear(h)[:, 0]
        if self.label is None:
            return logits
        if class_labels is None:
            raise ValueError("this critic was made with classes: class_labels (n,) are needed")
        return logits + (self.label(class_labels) * h).sum(1) / math.sqrt(h.shape[1])


def deviation(h: Tensor) -> Tensor:
    """How far the rows of a group are from each other, the mean deviation of their features (n, ...): (n,), the same in
    a group of 4 rows (of 2 or 1 where 4 does not divide n)."""
    group = next(size for size in (4, 2, 1) if len(h) % size == 0)
    spread = h.reshape(len(h) // group, group, -1).var(1, unbiased=False).add(1e-8).sqrt().mean(1)
    return spread.repeat_interleave(group)


def _embedded(level: Tensor | None, wanted: bool, x: Tensor) -> Tensor | None:
    if not wanted:
        return None
    if level is None:
        raise ValueError("this critic takes the noise on its rows: level (n,) is needed")
    return sinusoidal(level.to(x.dtype), _FREQUENCIES, low=0.5, high=30.0)


@contextmanager
def _first_weights(seed: int) -> Iterator[None]:
    """Inside, layers are made with the weights of this seed, whatever was drawn before; nothing outside notices."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
