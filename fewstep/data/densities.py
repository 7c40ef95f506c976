"""Densities that are known in closed form, and draws from them: mixtures of Gaussians, and boxes.

Their exact fields are in ``fewstep.flows.exact``, which draws its data by the same functions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.common.randomness import normal, uniform


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians: means (K, D), standard deviations (K,), weights (K,) which sum to 1."""

    means: Tensor
    scales: Tensor
    weights: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (count, D), in the dtype of the means."""
        which = _draw(self.weights, count, generator)
        noise = normal(self.means.new_empty(count, self.means.shape[1]), generator)
        return self.means[which] + self.scales[which, None] * noise


@dataclass(frozen=True)
class Boxes:
    """Uniform over boxes that do not overlap: ``sides`` (K, D, 2), the low and high end of each box on each axis."""

    sides: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points (count, D), float32."""
        volume = (self.sides[..., 1] - self.sides[..., 0]).prod(1)
        box = self.sides[_draw(volume, count, generator)].float()
        part = uniform(count * box.shape[1], generator).reshape(box.shape[:2]).to(box)
        return box[..., 0] + part * (box[..., 1] - box[..., 0])

    def inside(self, points: Tensor) -> Tensor:
        """Whether each of points (N, D) lies in a box, (N,); one on an edge does, up to the rounding of float32."""
        low, high = self.sides.to(points.device, torch.float64).unbind(-1)
        at = points.double()[:, None]
        return ((at >= low - 1e-6) & (at <= high + 1e-6)).all(2).any(1)


def checkerboard() -> Boxes:
    """The 8 filled cells of a 4 x 4 board, scaled to a standard deviation of 1 on each axis: (8, 2, 2), float64."""
    cells = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    corners = torch.tensor(cells, dtype=torch.float64) - 2
    return Boxes(torch.stack([corners, corners + 1], dim=-1) * (math.sqrt(3) / 2))


def eight_gaussians() -> Mixture:
    """Eight equal Gaussians on a circle, their scale an eighth of its radius r, with r^2 / 2 + (r / 8)^2 = 1: a
    standard deviation of 1 on each axis."""
    radius = 8 / math.sqrt(33)
    angle = torch.arange(8) * (math.pi / 4)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Mixture(means, torch.full((8,), radius / 8), torch.ones(8) / 8)


def spiral() -> Mixture:
    """Forty-eight equal Gaussians along a spiral of two turns, scaled to a standard deviation of 1 over both axes."""
    radius = torch.linspace(0.2**2, 1, 48, dtype=torch.float64).sqrt()  # evenly spaced, as the turns are of one width
    angle = 4 * math.pi * radius
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    means, scale = means - means.mean(0), 0.05
    size = (means.square().sum(1).mean() / 2 + scale**2).sqrt()
    return Mixture((means / size).float(), torch.full((48,), scale / float(size)), torch.ones(48) / 48)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices of probabilities as the weights are, drawn where the generator lives."""
    index = torch.multinomial(weights.to(generator.device), count, replacement=True, generator=generator)
    return index.to(weights.device)
