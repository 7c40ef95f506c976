"""Densities of points in the plane, drawn without end. Each has mean 0 and standard deviation 1 per axis.

The scales below are closed forms, so that the unit variance is exact and not a measurement (the silhouette's is exact
for its pixels). Shapes after FFJORD (arXiv:1810.01367), whose toy densities the field has used since.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.data import densities
from fewstep.data.batch import Batch
from fewstep.data.decode import decode

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Toy:
    """A density of the plane given by how to draw from it: ``draw(n, generator) -> (n, 2)`` float32.

    ``inside(points) -> (n,)`` says which points (n, 2) the density can draw, where its support has an edge.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    shape: tuple[int, ...] = (2,)
    size: int | None = None
    inside: Callable[[Tensor], Tensor] | None = None

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return Batch(self.draw(len(index), generator))


def checkerboard() -> Toy:
    """Uniform on the filled cells of a board: the data of ``CheckerboardField``."""
    board = densities.checkerboard()
    return Toy(board.draw, inside=board.inside)


def eight_gaussians() -> Toy:
    """Eight equal Gaussians on a circle: the data of ``fewstep.flows.exact.eight_gaussians()``."""
    return Toy(densities.eight_gaussians().draw)


def spiral() -> Toy:
    """Gaussians along a spiral: the data of ``fewstep.flows.exact.spiral()``."""
    return Toy(densities.spiral().draw)


def two_moons(noise: float = 0.05) -> Toy:
    """Two half circles of radius 1, interleaved; ``noise`` is a standard deviation in units of that radius.

    The mean is (1/2, 1/4), the variances are 3/4 + noise^2 and 9/16 - 1/pi + noise^2.

    Args:
        noise: standard deviation of what is added to a point, in units of the radius.
    """
    mean = torch.tensor([0.5, 0.25])
    scale = torch.tensor([3 / 4 + noise**2, 9 / 16 - 1 / math.pi + noise**2]).sqrt()

    def draw(n: int, generator: torch.Generator) -> Tensor:
        angle = math.pi * torch.rand(n, generator=generator)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        is_lower = torch.rand(n, 1, generator=generator) < 0.5
        points = torch.where(is_lower, torch.tensor([1.0, 0.5]) - upper, upper)
        return (points + noise * torch.randn(n, 2, generator=generator) - mean) / scale

    return Toy(draw)


def pinwheel() -> Toy:
    """Five arms, each a Gaussian of scales 0.3 along and 0.1 across at radius 1, turned the more the farther out.

    The five-fold symmetry makes the mean 0 and both variances half of E r^2 = 1 + 0.3^2 + 0.1^2.
    """
    scale = math.sqrt(1.1 / 2)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        arm = torch.randint(5, (n,), generator=generator)
        along, across = (torch.randn(n, 2, generator=generator) * torch.tensor([0.3, 0.1])).unbind(1)
        along = along + 1
        turn = arm * (2 * math.pi / 5) + 0.25 * along.exp()
        cos, sin = turn.cos(), turn.sin()
        return torch.stack([along * cos - across * sin, along * sin + across * cos], dim=1) / scale

    return Toy(draw)


def swiss_roll(noise: float = 0.5) -> Toy:
    """The spiral (a cos a, a sin a), a uniform on [3 pi/2, 9 pi/2]; ``noise`` is a standard deviation.

    Turns lie 2 pi apart. The mean is (2, 2 / (3 pi)). With h = 39/8 pi^2 + noise^2, the variances are h - 17/4 and
    h + 1/4 - 4 / (9 pi^2).

    Args:
        noise: standard deviation of what is added to a point.
    """
    mean = torch.tensor([2, 2 / (3 * math.pi)])
    half = 39 / 8 * math.pi**2 + noise**2
    scale = torch.tensor([half - 17 / 4, half + 1 / 4 - 4 / (9 * math.pi**2)]).sqrt()

    def draw(n: int, generator: torch.Generator) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
        points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        return (points + noise * torch.randn(n, 2, generator=generator) - mean) / scale

    return Toy(draw)


def silhouette(image: Any = None, threshold: float = 0.5) -> Toy:
    """Uniform on the shape in an image: its opaque pixels where it has transparent ones, else its dark ones.

    The image keeps its proportions, so the two variances have mean 1 and need not be equal.

    Args:
        image: a PIL image, or a path; a heart without one. Images over 512 pixels a side are made smaller.
        threshold: opaque is an alpha from here on, dark a brightness below, both in [0, 1].

    Raises:
        ValueError: there is no such pixel, or the file cannot be read.
    """
    mask = _heart() if image is None else _shape_of(image, threshold)
    down, right = mask.nonzero().double().unbind(1)
    if not len(down):
        raise ValueError(f"no opaque or dark pixel in {image}: raise threshold={threshold} or give another image")
    centres = torch.stack([right, -down], dim=1)  # rows of an image count downwards
    centres -= centres.mean(0)
    # A pixel is a unit square: jitter within it adds 1/12 to each variance.
    scale = (centres.square().mean() + 1 / 12).sqrt()
    centres, pixel = (centres / scale).float(), 1 / scale.item()

    def draw(n: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(centres), (n,), generator=generator)
        return centres[which] + pixel * (torch.rand(n, 2, generator=generator) - 0.5)

    return Toy(draw)


def _heart() -> Tensor:
    """A mask (256, 256) of the sextic heart (x^2 + y^2 - 1)^3 <= x^2 y^3."""
    y, x = torch.meshgrid(torch.linspace(1.25, -1.25, 256), torch.linspace(-1.25, 1.25, 256), indexing="ij")
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def _shape_of(image: "Picture", threshold: float) -> Tensor:
    import numpy as np
    from PIL import Image

    if not isinstance(image, Image.Image):
        pixels = decode(Path(image).expanduser(), None, 4)
        if isinstance(pixels, str):
            raise ValueError(f"{str(image)[:200]} cannot be read as an image: {pixels}")
        image = Image.fromarray(pixels.transpose(1, 2, 0))
    picture = image.convert("RGBA")
    picture.thumbnail((512, 512))
    alpha = torch.from_numpy(np.array(picture.getchannel("A"))) / 255
    opaque = alpha >= threshold
    return opaque if not opaque.all() else torch.from_numpy(np.array(picture.convert("L"))) / 255 < threshold
