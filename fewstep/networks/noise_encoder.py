"""A small encoder of noise: which normal noise belongs to a datum: its mean and the logarithm of its variance."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class NoiseEncoder(nn.Module):
    """Mean and logarithm of the variance of ``q(x0 | x1)``, which both have the shape of a sample and start at 0: at
    first the noise is independent of the data.

    Images (C, H, W) go through ``depth`` residual blocks of convolutions that see 1, 2, 4, ... pixels apart; samples of
    another shape through ``depth`` hidden layers, as the numbers in them.

    Args:
        shape: of one sample.
        width: channels, or the width of a layer.
        depth: blocks, or hidden layers.
        seed: decides the first weights.

    Raises:
        ValueError: no layer, or one of no width.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"the encoder of noise has depth {depth} and width {width}: both are 1 or more")
        self.is_image, size = len(shape) == 3, math.prod(shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.is_image:
                self.first: nn.Module = nn.Conv2d(shape[0], width, 3, padding=1)
                self.hidden = nn.ModuleList(
                    nn.Conv2d(width, width, 3, padding=2**k, dilation=2**k) for k in range(depth)
                )
                self.last: nn.Module = nn.Conv2d(width, 2 * shape[0], 1)
            else:
                self.first = nn.Linear(size, width)
                self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
                self.last = nn.Linear(width, 2 * size)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.to(next(self.parameters()).dtype)
        h = self.first(rows if self.is_image else rows.flatten(1))
        for layer in self.hidden:
            h = h + layer(silu(h))
        mean, log_variance = self.last(silu(h)).chunk(2, dim=1)
        return mean.reshape(x.shape), log_variance.reshape(x.shape)
