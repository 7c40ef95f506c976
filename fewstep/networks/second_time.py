"""The second time input of a student: silent at the start, so that the student begins as its teacher."""

import math

import torch
from torch import Tensor, nn


def sinusoidal(t: Tensor, dim: int, *, low: float = 1.0, high: float = 1000.0) -> Tensor:
    """Sines and cosines of ``t`` (B,) at ``dim / 2`` angular frequencies spaced geometrically: (B, dim), float32 at
    least."""
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype) / max(half - 1, 1)
    angles = t[:, None] * torch.exp(math.log(low) + steps * math.log(high / low))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SecondTime(nn.Module):
    """A time (B,) as a vector (B, dim) to add to a network's own time embedding; zero until it is trained.

    One line where the network embeds its time makes it a student::

        emb = self.time_embed(s) + self.second_time(t)      # self.second_time = SecondTime(dim)

    Args:
        dim: the width of the embedding it is added to.
        frequencies: how many sines and cosines of the time it sees.
        scale: the size of the network's time unit: 1 for times in [0, 1], 1000 for diffusers' timesteps.
    """

    def __init__(self, dim: int, frequencies: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        self.frequencies, self.scale = frequencies, scale
        self.first = nn.Linear(frequencies, dim)
        self.last = nn.Linear(dim, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor) -> Tensor:
        # Up to 30 rad over [0, 1]: the flow map is smooth in its times, and high frequencies make its derivative wild.
        features = sinusoidal(t / self.scale, self.frequencies, low=0.5, high=30.0).to(self.first.weight.dtype)
        return self.last(nn.functional.silu(self.first(features)))
