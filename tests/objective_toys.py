"""Students that are the truth plus a small something that trains, and others whose calls tell what they were given."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.exact import ExactField, GaussianField, MixtureField
from fewstep.fields import VelocityField
from fewstep.maps import FlowMap
from fewstep.objectives import Loss
from fewstep.paths import Linear


class SolvedAverageVelocity(nn.Module):
    """u(x, s, t) of any field by 16 Runge-Kutta steps (order 4), without a division by t - s: 1e-6 for ``mixture``."""

    def __init__(self, field: VelocityField) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        length, steps, mean = (t - s)[:, None], 16, torch.zeros_like(x)

        def rate(mean: Tensor, part: float) -> Tensor:
            return self.field(x + length * mean, s + part * (t - s))

        for k in range(steps):
            a = rate(mean, k / steps)
            b = rate(mean + a / (2 * steps), (k + 0.5) / steps)
            c = rate(mean + b / (2 * steps), (k + 0.5) / steps)
            d = rate(mean + c / steps, (k + 1) / steps)
            mean = mean + (a + 2 * b + 2 * c + d) / (6 * steps)
        return mean


class Perturbed(nn.Module):
    """An exact average velocity of points, plus ``features(x, s, t) @ theta``: the truth where theta = 0.

    The samples may have any shape. The loss's gradient in theta says which moments of the residual are not zero.
    """

    def __init__(self, exact: nn.Module, dim: int, size: float = 0.0) -> None:
        super().__init__()
        self.exact = exact
        draw = torch.Generator().manual_seed(3)
        self.theta = nn.Parameter(size * torch.randn(dim + 4, dim, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        points = x.flatten(1)
        times = tuple(time[:, None] for time in times)
        s, t = times[0], times[-1]
        features = torch.cat([points, s, t, s * t, torch.ones_like(s)], dim=1)
        exact = self.exact(points, *(time[:, 0] for time in times))
        return (exact + features @ self.theta).reshape(x.shape)


def mixture() -> MixtureField:
    """Three overlapping Gaussians in the plane, float64: far from one Gaussian, yet smooth enough for few steps."""
    means = torch.tensor([[1.0, 0.0], [-0.8, 0.6], [0.1, -1.0]], dtype=torch.float64)
    scales = torch.tensor([0.8, 0.7, 0.9], dtype=torch.float64)
    return MixtureField(means, scales, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def picture_of(field: GaussianField) -> GaussianField:
    """The same Gaussian, its points as images (1, 1, 2)."""
    cov = field.basis * field.variances @ field.basis.T
    return GaussianField(field.mean.reshape(1, 1, 2), cov)


class Moving(VelocityField):
    """Everything moves along the first axis at the speed of its label, which the second axis holds: so each row knows
    which condition belongs to it."""

    path = Linear()

    def forward(self, x: Tensor, t: Tensor, *, class_labels: Tensor) -> Tensor:  # pyright: ignore
        return moves(x, class_labels)


class MovingNetwork(nn.Module):
    """The average velocity of ``Moving``."""

    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return moves(x, class_labels)


def moves(x: Tensor, class_labels: Tensor) -> Tensor:
    if not torch.allclose(x[:, 1], class_labels.to(x)):
        raise AssertionError("a row was given the condition of another")
    return torch.stack([class_labels.to(x), torch.zeros_like(x[:, 1])], dim=1)


def batch_of(field: ExactField, rows: int = 64) -> Batch:
    return Batch(field.data(rows, torch.Generator().manual_seed(1)))


def loss_of(objective: Any, student: FlowMap, batch: Batch, seed: int = 2, **options: Any) -> Loss:
    """The loss with a copy of the student as target, at the end of the training if nothing else is said."""
    options = {
        "target": deepcopy(student),
        "progress": 1.0,
        "generator": torch.Generator().manual_seed(seed),
        **options,
    }
    return objective(student, batch, **options)


def value(loss: Loss) -> float:
    return float(loss.total.detach())


def gradient(loss: Loss, student: nn.Module) -> Tensor:
    """In all parameters of the student, as one vector."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, parameters)])
