"""Scenes of balls before a wall and on a floor: a shaded picture, and how far each of its points is from the viewer."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

NEAR, FAR = 1.0, 5.0
BALLS = 3


def scenes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W) in [-1, 1] and depths (N, 1, H, W) between NEAR and FAR, seen straight ahead.

    A scene is the same at any ``size``: it is drawn first, then looked at.
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    x, y, z = draw(-0.8, 0.8, BALLS), draw(-0.6, 0.8, BALLS), draw(NEAR + 0.6, FAR - 0.6, BALLS)
    radius, colours = 0.9 / z, draw(0.25, 1.0, BALLS + 2, 3)  # balls of one size: what is near looks large
    wall, slope, floor = draw(FAR - 1, FAR, 1), draw(-0.4, 0.4, 1), draw(0.0, 0.5, 1)
    light = normalize(torch.cat([draw(-1, 1, 1), draw(-1.2, -0.4, 1), draw(-1, -0.4, 1)], 1), dim=1)

    side = (torch.arange(size) + 0.5) * 2 / size - 1
    v, u = (grid.expand(count, 1, size, size) for grid in torch.meshgrid(side, side, indexing="ij"))
    zero, hidden = torch.zeros_like(u), torch.full_like(u, 2 * FAR)
    # Each surface: its depth where it is, and its normal.
    depths = [wall + slope * u, torch.where(v > floor, wall - 3 * (v - floor), hidden)]
    normals = [torch.cat([slope + zero, zero, zero - 1], 1), torch.cat([zero, zero - 3, zero - 1], 1)]
    for k in range(BALLS):
        p, q = u - x[:, k : k + 1], v - y[:, k : k + 1]
        height = (radius[:, k : k + 1] ** 2 - p**2 - q**2).clamp(min=0).sqrt()
        depths.append(torch.where(height > 0, z[:, k : k + 1] - height, hidden))
        normals.append(torch.cat([p, q, -height], 1))
    depth, seen = torch.cat(depths, 1).clamp(NEAR).min(1, keepdim=True)
    shade = (normalize(torch.stack(normals, 1), dim=2) * light[:, None]).sum(2).clamp(0)
    lit = (0.25 + 0.75 * shade).gather(1, seen)
    colour = (colours + zero[:, None]).gather(1, seen[:, None].expand(-1, -1, 3, -1, -1)).squeeze(1)
    return 2 * lit * colour - 1, depth.clamp(max=FAR)
