"""Every method and variant by name; students that are the truth plus a small something that trains, and others whose
calls tell what they were given."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.flows.exact import ExactField, GaussianField, MixtureField
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.networks import MLP
from fewstep.objectives import (
    AYF,
    CTM,
    EMD,
    ESD,
    FMM,
    ITVM,
    LMD,
    LSD,
    PFMM,
    PSD,
    SCM,
    TVM,
    AlphaFlow,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContrastiveFlowMatching,
    FlowMatching,
    ImprovedMeanFlow,
    Loss,
    MeanFlow,
    Objective,
    Shortcut,
    SplitMeanFlow,
    Trajectory,
)  # fmt: skip

Make = Callable[[VelocityField], Objective]

DISTILLS: dict[str, Make] = {
    "ITVM interval": lambda v: ITVM(v, "interval"),
    "ITVM interval, cut anywhere": lambda v: ITVM(v, "interval", middle=1.0),
    "ITVM integral": lambda v: ITVM(v, "integral"),
    "ITVM step": lambda v: ITVM(v, "step"),
    "ITVM derivative": lambda v: ITVM(v, "derivative"),
    "ITVM of two targets": lambda v: ITVM(v, {"interval": 3.0, "step": 1.0}, ends=0.1),
    "ITVM trajectory": lambda v: ITVM(v, {"trajectory": 1.0, "interval": 1.0}),
    "ITVM from the prior": lambda v: ITVM(v, "integral", starts="prior"),
    "ITVM at its own states": lambda v: ITVM(v, "interval", starts="own"),
    "Trajectory": lambda v: Trajectory(v),
    "LMD": lambda v: LMD(v),
    "LMD from the prior": lambda v: LMD(v, starts="prior", adaptive=1.0),
    "LMD at its own states": lambda v: LMD(v, starts="own"),
    "LMD through the teacher": lambda v: LMD(v, through_teacher=True),
    "LMD by difference": lambda v: LMD(v, jvp="difference"),
    "EMD": lambda v: EMD(v, full=False),
    "EMD full": lambda v: EMD(v),
    "AYF": lambda v: AYF(v, ramp=1.0),
    "AYF LMD": lambda v: AYF(v, "LMD"),
    "PFMM": lambda v: PFMM(v),
    "ConsistencyDistillation": lambda v: ConsistencyDistillation(v),
    "ConsistencyDistillation, Huber": lambda v: ConsistencyDistillation(v, huber=0.03),
    "CTM": lambda v: CTM(v),
    "SCM distilled": lambda v: SCM(v),
    "SCM distilled, no weight": lambda v: SCM(v, learned=False),
    "MeanFlow distilled": lambda v: MeanFlow(v),
    "MeanFlow distilled, no weight": lambda v: MeanFlow(v, adaptive=0.0),
    "MeanFlow distilled, by difference": lambda v: MeanFlow(v, adaptive=0.0, jvp="difference"),
    "MeanFlow distilled, float32": lambda v: MeanFlow(v, adaptive=0.0, jvp="float32"),
    "ImprovedMeanFlow distilled": lambda v: ImprovedMeanFlow(v),
    "AlphaFlow distilled": lambda v: AlphaFlow(v, adaptive=0.0),
    "LSD distilled": lambda v: LSD(v),
    "LSD distilled, weighted": lambda v: LSD(v, learned=True),
    "ESD distilled": lambda v: ESD(v),
    "PSD distilled": lambda v: PSD(v),
    "PSD distilled, cut anywhere": lambda v: PSD(v, "uniform"),
    "TVM distilled": lambda v: TVM(v),
    "Shortcut distilled": lambda v: Shortcut(v),
    "SplitMeanFlow distilled": lambda v: SplitMeanFlow(v),
}
FROM_DATA: dict[str, Make] = {
    "SCM": lambda _: SCM(),
    "MeanFlow": lambda _: MeanFlow(),
    "MeanFlow, weighted": lambda _: MeanFlow(adaptive=1.0),
    "ImprovedMeanFlow": lambda _: ImprovedMeanFlow(),
    "AlphaFlow": lambda _: AlphaFlow(),
    "FMM": lambda _: FMM(),
    "LSD": lambda _: LSD(),
    "ESD": lambda _: ESD(),
    "PSD": lambda _: PSD(),
    "PSD, weighted": lambda _: PSD(learned=True),
    "PSD, cut anywhere": lambda _: PSD(middle="uniform"),
    "TVM": lambda _: TVM(),
    "Shortcut": lambda _: Shortcut(),
    "SplitMeanFlow": lambda _: SplitMeanFlow(),
    "ConsistencyTraining": lambda _: ConsistencyTraining(),
    "ConsistencyTraining, squared": lambda _: ConsistencyTraining(huber=0.0),
}
OF_FIELDS: dict[str, Make] = {
    "FlowMatching": lambda _: FlowMatching(),
    "ContrastiveFlowMatching": lambda _: ContrastiveFlowMatching(),
}
ALL = DISTILLS | FROM_DATA | OF_FIELDS

# Those whose residual is zero, row by row, at the exact map. (Of the others test_family knows in which sense they are.)
EXACT = (
    "ITVM interval", "ITVM interval, cut anywhere", "ITVM derivative", "LMD", "LMD through the teacher", "EMD",
    "EMD full", "AYF", "PFMM", "SCM distilled", "SCM distilled, no weight", "MeanFlow distilled, no weight",
    "MeanFlow distilled, float32", "ImprovedMeanFlow distilled", "AlphaFlow distilled", "LSD distilled",
    "LSD distilled, weighted", "ESD distilled", "PSD distilled", "PSD distilled, cut anywhere", "TVM distilled",
    "SplitMeanFlow distilled",
)  # fmt: skip


class SolvedAverageVelocity(nn.Module):
    """u(x, s, t) of any field, without a division by t - s: velocities at Gauss nodes of the way, found by fixed-point
    iteration. From 0 to 1, good to 1e-7 for ``mixture``; of half of that way, to 1e-12."""

    def __init__(self, field: VelocityField, nodes: int = 16, iterations: int = 16) -> None:
        super().__init__()
        self.field, self.iterations = field, iterations
        places, weights = np.polynomial.legendre.leggauss(nodes)
        basis = np.polynomial.legendre.legvander(places, nodes - 1)
        integrals = [np.polynomial.legendre.legint(row, lbnd=-1) for row in np.eye(nodes)]
        up_to = np.stack([np.polynomial.legendre.legval(places, integral) for integral in integrals], axis=1)
        self.register_buffer("places", torch.as_tensor((places + 1) / 2))
        self.register_buffer("weights", torch.as_tensor(weights / 2))
        self.register_buffer("up_to", torch.as_tensor(up_to @ np.linalg.inv(basis) / 2))  # from 0 to each node

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        times = (s[:, None] + (t - s)[:, None] * self.places).flatten()
        velocities = self.field(x, s)[:, None].expand(-1, len(self.places), -1)
        for _ in range(self.iterations):
            state = x[:, None] + (t - s)[:, None, None] * (self.up_to @ velocities)
            velocities = self.field(state.flatten(0, 1), times).reshape(state.shape)
        return self.weights @ velocities


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


class OfRows(nn.Module):
    """As :class:`Perturbed`, with a theta for each row, found by the condition ``row``: the most flexible of students.

    One backward pass then gives the gradient that each row asks for by itself.
    """

    def __init__(self, exact: nn.Module, rows: int, size: float = 0.0) -> None:
        super().__init__()
        self.exact = exact
        self.theta = nn.Parameter(Perturbed(exact, 2, size).theta.detach().repeat(rows, 1, 1))

    def forward(self, x: Tensor, *times: Tensor, row: Tensor) -> Tensor:
        s, t = times[0][:, None], times[-1][:, None]
        features = torch.cat([x, s, t, s * t, torch.ones_like(s)], dim=1)
        return self.exact(x, *times) + torch.einsum("nf,nfd->nd", features, self.theta[row])


def origins(field: GaussianField | MixtureField, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All noise and data that can have led to the states x (P, 2) at times s (P,): (P, W, 2) each, with weights (P, W).

    Given x the data is in a component by a softmax, and in it Gaussian: two nodes an axis, exact for all polynomials of
    degree 3 in data and noise.
    """
    if isinstance(field, GaussianField):
        means, weights, basis, variances = field.mean[None], torch.ones(1), field.basis, field.variances[None]
    else:
        means, weights, basis = field.means, field.weights, torch.eye(2, dtype=torch.float64)
        variances = field.scales.square()[:, None].expand(-1, 2)
    a, sigma = field.path.alpha(s)[:, None, None], field.path.sigma(s)[:, None, None]
    spread = a * a * variances + sigma * sigma  # (P, K, 2), of x on the axes of the basis
    offset = (x[:, None] - a * means) @ basis
    log = weights.log() - 0.5 * (offset.square() / spread + spread.log()).sum(-1)
    middle = a * variances / spread * offset
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    nodes = middle[:, :, None] + (variances * sigma * sigma / spread).sqrt()[:, :, None] * signs
    data = (means[:, None] + nodes @ basis.T).reshape(len(x), -1, 2)
    noise = (x[:, None] - a * data) / sigma
    return noise, data, torch.softmax(log, dim=1).repeat_interleave(4, dim=1) / 4


class States(NamedTuple):
    """Where a gradient is asked for: x (P, 2) at times s (P,), and the end t (P,) of the way."""

    x: Tensor
    s: Tensor
    t: Tensor


def three_states(length: float = 0.3, to_the_end: bool = False) -> States:
    """Three states and a way of this length; where only ways to t = 1 are known, from 0.4 of it on."""
    x = torch.tensor([[0.4, -0.3], [-0.9, 0.8], [1.2, 0.5]], dtype=torch.float64)
    s = torch.tensor([0.7, 0.8, 0.9] if to_the_end else [0.1, 0.35, 0.6], dtype=torch.float64)
    return States(x, s, torch.ones_like(s) if to_the_end else s + length)


def expected_gradients(
    objective: Any,
    field: GaussianField | MixtureField,
    exact: nn.Module,
    states: States,
    size: float = 0.0,
    progress: float = 1.0,
) -> Tensor:
    """The gradient at each state for the parameters of that state alone, (parts, P, 12), its expectation over all that
    can have led there. The parts: on the diagonal (for which ``diagonal`` is 0.5), and off it.

    The student is the exact map plus a perturbation of this size.
    """
    noise, data, weights = origins(field, states.x, states.s)
    s, t = (time.repeat_interleave(weights.shape[1]) for time in (states.s, states.t))
    halves = 2 if getattr(objective, "shares", {}).get(getattr(objective, "diagonal_term", ""), 0) else 1
    rows = halves * weights.numel()
    objective.starts = lambda *_: s.repeat(halves)
    if objective.gamma == 0:
        objective.pairs = lambda *_: (s.repeat(halves), t.repeat(halves))
    if isinstance(objective, FMM):  # the path is at the second of the two
        objective.pairs = lambda *_: (t.clone(), s.clone())
    noise, data = (value.reshape(-1, 2).repeat(halves, 1) for value in (noise, data))
    student = FlowMap(OfRows(exact, rows, size), field.path)
    batch = Batch(data, {"row": torch.arange(rows)}, noise=noise)
    slopes = gradient(loss_of(objective, student, batch, progress=progress), student)
    slopes = slopes.reshape(halves, *weights.shape, -1) * weights.numel()
    return (slopes * weights[..., None]).sum(2)


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


def moving_rows(labels: Tensor) -> Batch:
    """Rows that all methods find on the paths of ``Moving``: noise and data agree in the second coordinate, which holds
    the label, and are a label apart in the first."""
    start = torch.randn(len(labels), generator=torch.Generator().manual_seed(6))
    noise, data = (torch.stack([first, labels.float()], dim=1) for first in (start, start + labels))
    return Batch(data, {"class_labels": labels}, noise=noise)


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
    if getattr(objective, "frozen", student) is None:  # as fit does
        objective.adopt(student)
    return objective(student, batch, **options)


def value(loss: Loss) -> float:
    return float(loss.total.detach())


def gradient(loss: Loss, student: nn.Module) -> Tensor:
    """In all parameters of the student, as one vector."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, parameters)])


def teacher_of(seed: int = 0) -> NetworkField:
    torch.manual_seed(seed)
    return NetworkField(MLP(2, width=16, depth=2))
