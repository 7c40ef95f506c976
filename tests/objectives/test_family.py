"""Every objective at the exact flow map of a Gaussian and of a mixture, in float64: its expected gradient at a state,
for a student that may be changed there at will, vanishes to 1e-10. The expectation over all noise and data that lead
to the state is by exact quadrature (see ``origins``). At another map it does not vanish."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import (
    Make,
    OfRows,
    SolvedAverageVelocity,
    expected_gradients,
    gradient,
    loss_of,
    mixture,
    origins,
    three_states,
)  # fmt: skip

from fewstep.data.batch import Batch
from fewstep.flows.exact import GaussianField, MixtureField
from fewstep.flows.fields import KNOWN, NetworkField, VelocityField
from fewstep.flows.paths import Trigonometric, VariancePreserving
from fewstep.objectives import (
    AYF,
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
    ContrastiveFlowMatching,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    Recentred,
    Shortcut,
    SplitMeanFlow,
    flow_matching,
)  # fmt: skip

# The default of many is other shares of the rows; here half of them are on the diagonal, for all that have one.
HALF = {"diagonal": 0.5}
DISTILLATION: dict[str, Make] = {
    "ITVM interval": lambda v: ITVM(v, "interval"),
    "ITVM interval, cut anywhere": lambda v: ITVM(v, "interval", middle=1.0),
    "ITVM derivative": lambda v: ITVM(v, "derivative"),
    "LMD": lambda v: LMD(v, **HALF),
    "LMD through the teacher": lambda v: LMD(v, through_teacher=True, **HALF),
    "EMD": lambda v: EMD(v, full=False, **HALF),
    "EMD full": lambda v: EMD(v, **HALF),
    "AYF": lambda v: AYF(v, ramp=1.0, **HALF),
    "PFMM after its first round": lambda v: PFMM(v, **HALF),
    "SCM": lambda v: SCM(v),
    "SCM, no weight": lambda v: SCM(v, learned=False),
    "MeanFlow": lambda v: MeanFlow(v, **HALF),
    "MeanFlow, no weight": lambda v: MeanFlow(v, adaptive=0.0, **HALF),
    "ImprovedMeanFlow": lambda v: ImprovedMeanFlow(v),
    "AlphaFlow at its end": lambda v: AlphaFlow(v),
    "LSD": lambda v: LSD(v, **HALF),
    "ESD": lambda v: ESD(v, **HALF),
    "PSD": lambda v: PSD(v, **HALF),
    "PSD, weighted": lambda v: PSD(v, learned=True, **HALF),
    "PSD, cut anywhere": lambda v: PSD(v, "uniform", **HALF),
    "TVM": lambda v: TVM(v),
    "Shortcut": lambda v: Shortcut(v, **HALF),
    "SplitMeanFlow": lambda v: SplitMeanFlow(v),
}
FROM_DATA: dict[str, Make] = {
    "MeanFlow from data": lambda _: MeanFlow(**HALF),
    "ImprovedMeanFlow from data": lambda _: ImprovedMeanFlow(),
    "AlphaFlow from data, at its end": lambda _: AlphaFlow(),
    "LSD from data": lambda _: LSD(**HALF),
    "LSD from data, weighted": lambda _: LSD(learned=True, **HALF),
    "ESD from data": lambda _: ESD(**HALF),
    "PSD from data": lambda _: PSD(**HALF),
    "PSD from data, cut anywhere": lambda _: PSD(middle="uniform", **HALF),
    "TVM from data": lambda _: TVM(),
    "Shortcut from data": lambda _: Shortcut(**HALF),
    "SplitMeanFlow from data": lambda _: SplitMeanFlow(),
    "FMM": lambda _: FMM(),
}
EXACT = DISTILLATION | FROM_DATA


class World(NamedTuple):
    """A field and its exact average velocity."""

    field: GaussianField | MixtureField
    exact: nn.Module


def make_world(name: str) -> World:
    """The Gaussian in closed form; the mixture, on the linear path or, ``bent``, on the trigonometric one."""
    if name == "gaussian":
        mean, cov = [0.7, -1.1], [[0.5, 0.3], [0.3, 1.7]]
        field = GaussianField(torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64))
        return World(field, GaussianAverageVelocity(field))
    field = mixture() if name == "mixture" else mixture().on(Trigonometric())
    return World(field, SolvedAverageVelocity(field))


WORLDS = ("gaussian", "mixture", "bent")


def moments(field: GaussianField | MixtureField, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the data, and the mean of its outer product, given the states."""
    _, data, weights = origins(field, x, s)
    outer = torch.einsum("pw,pwi,pwj->pij", weights, data, data)
    return torch.einsum("pw,pwi->pi", weights, data), outer


@pytest.mark.parametrize("world", WORLDS)
def test_the_quadrature_knows_what_led_to_a_state(world: str):
    field, (x, s, _) = make_world(world).field, three_states()
    noise, data, weights = origins(field, x, s)
    every = [s[:, None].expand(-1, weights.shape[1]).flatten(), noise.flatten(0, 1), data.flatten(0, 1)]
    at, dx = (value.reshape(noise.shape) for value in field.path.sample(every[1], every[2], every[0]))
    torch.testing.assert_close(at, x[:, None].expand_as(at), rtol=0, atol=1e-14)
    velocity = torch.einsum("pw,pwi->pi", weights, dx)
    torch.testing.assert_close(velocity, field(x, s), rtol=0, atol=1e-13)
    # The covariance of the data is sigma^2 / alpha times the derivative of its mean in the state (Tweedie).
    mean, outer = moments(field, x, s)
    factor = (field.path.sigma(s) ** 2 / field.path.alpha(s))[:, None, None]
    along = [(moments(field, x + e, s)[0] - moments(field, x - e, s)[0]) / 2e-5 for e in 1e-5 * torch.eye(2).to(x)]
    covariance = outer - mean[:, :, None] * mean[:, None]
    torch.testing.assert_close(covariance, factor * torch.stack(along, dim=2), rtol=1e-8, atol=1e-9)


ON_A_BENT_PATH = ("LMD", "EMD", "SCM", *FROM_DATA)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("world", "name"),
    [(world, name) for world in WORLDS for name in EXACT if world != "bent" or name in ON_A_BENT_PATH],
)
@pytest.mark.usefixtures("fraction")
def test_the_exact_map_is_where_every_gradient_vanishes(world: str, name: str):
    field, exact = make_world(world)
    objective = EXACT[name](field)
    where = three_states(to_the_end=objective.gamma == 1)
    if getattr(objective, "log_weight", None) is not None:  # at any weight
        nn.init.normal_(objective.log_weight.last.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    found = expected_gradients(objective, field, exact, where)
    assert len(found) == (1 if name.startswith(("SCM", "FMM")) else 2)
    assert found.abs().max() < 1e-10
    # And nowhere else: not at one state, on the diagonal or off it.
    off = expected_gradients(objective, field, exact, where, size=0.1)
    assert (off.norm(dim=2) > 1e-3).all()


@pytest.mark.takes_seconds
@pytest.mark.parametrize("world", WORLDS)
def test_the_integral_of_itvm_is_exact_on_average_over_its_time(world: str, fraction: Callable[[float], None]):
    field, exact = make_world(world)
    nodes, weights = np.polynomial.legendre.leggauss(16)

    def gradients(size: float) -> Tensor:
        parts = []
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            fraction(node)
            objective = ITVM(field, "integral")
            parts.append(weight * expected_gradients(objective, field, exact, three_states(), size))
        return torch.stack(parts).sum(0)

    assert gradients(0.0).abs().max() < 1e-10
    assert (gradients(0.1).norm(dim=2) > 1e-3).all()


@pytest.mark.parametrize("world", WORLDS)
def test_flow_matching_has_the_velocity(world: str, monkeypatch: pytest.MonkeyPatch):
    field, exact = make_world(world)
    where = three_states()
    ways = origins(field, *where[:2])[2].shape[1]
    monkeypatch.setattr(flow_matching, "draw_times", lambda *_: where.s.repeat_interleave(ways))
    assert expected_gradients(FlowMatching(), field, exact, where).abs().max() < 1e-10
    assert (expected_gradients(FlowMatching(), field, exact, where, size=0.1).norm(dim=2) > 1e-3).all()


class Contrasted(nn.Module):
    """What contrastive flow matching learns instead of the velocity v: ``(v - l E[dx]) / (1 - l)``."""

    def __init__(self, field: VelocityField, weight: float, mean: Tensor) -> None:
        super().__init__()
        self.field, self.weight, self.mean = field, weight, mean

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        drift = self.field.path.alpha_dot(t)[:, None] * self.mean
        return (self.field(x, t) - self.weight * drift) / (1 - self.weight)


@pytest.mark.parametrize("world", WORLDS)
def test_contrastive_flow_matching_and_its_undoing(world: str, monkeypatch: pytest.MonkeyPatch):
    field, weight = make_world(world).field, 0.3
    mean = field.mean if isinstance(field, GaussianField) else field.weights @ field.means
    x, s, _ = three_states()
    noise, data, weights = origins(field, x, s)
    rows = weights.numel()
    # Each row has the mean of noise and data beside it, of which the loss is linear, and at another time.
    pair = lambda values, other: torch.stack([values.reshape(rows, 2), other.expand(rows, 2)], dim=1).flatten(0, 1)  # noqa: E731
    batch = Batch(pair(data, mean), {"row": torch.arange(2 * rows)}, noise=pair(noise, torch.zeros(2).to(x)))
    times = torch.stack([s.repeat_interleave(weights.shape[1]), torch.full((rows,), 0.77).to(x)], dim=1).flatten()
    monkeypatch.setattr(flow_matching, "draw_times", lambda *_: times)

    def expected(minimiser: nn.Module) -> Tensor:
        student = NetworkField(OfRows(minimiser, 2 * rows), field.path)
        loss = loss_of(ContrastiveFlowMatching(weight), student, batch, generator=[torch.Generator()] * rows)
        slopes = gradient(loss, student).reshape(*weights.shape, 2, -1)[:, :, 0] * 2 * rows
        return (slopes * weights[..., None]).sum(1)

    learned = Contrasted(field, weight, mean)
    assert expected(learned).abs().max() < 1e-10
    assert expected(field).norm(dim=1).min() > 1e-3
    undone = Recentred(NetworkField(learned, field.path), weight, mean)
    for other in (Trigonometric(), VariancePreserving(), undone.path):  # on another path it is the same model
        y, t = torch.randn(33, 2, dtype=torch.float64), torch.linspace(0.02, 0.98, 33, dtype=torch.float64)
        torch.testing.assert_close(undone.on(other)(y, t), field.on(other)(y, t), atol=1e-10, rtol=1e-10)
    assert all(getattr(undone, name) == getattr(field, name) for name in KNOWN if name != "source")
    torch.testing.assert_close(undone(x, s), field(x, s), rtol=0, atol=1e-12)
