"""Objectives that are biased by design: at the exact map of a mixture, the expected gradient at a state is not zero but
shrinks at the order that theory predicts. By quadrature, as in ``test_family``."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import SolvedAverageVelocity, States, expected_gradients, mixture, three_states

from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import VelocityField
from fewstep.objectives import (
    AYF,
    CTM,
    ITVM,
    PFMM,
    SCM,
    AlphaFlow,
    ConsistencyDistillation,
    ConsistencyTraining,
    MeanFlow,
    Objective,
    Shortcut,
)  # fmt: skip


def alpha_flow(teacher: VelocityField | None, a: float, adaptive: float = 0.0) -> AlphaFlow:
    objective = AlphaFlow(teacher, adaptive=adaptive)
    objective.alpha = lambda progress: a
    return objective


def consistency_training(gap: float, huber: float) -> ConsistencyTraining:
    objective = ConsistencyTraining(stages=round(1 / gap).bit_length() - 1, huber=huber)
    assert objective.gap(1.0) == gap
    return objective


class Bias(NamedTuple):
    """A method whose bias is of this order in h; three values of h, each half of the one before."""

    make: Callable[[VelocityField, float], Objective]
    order: int
    first: float
    states: Callable[[float], States] = lambda _: three_states()
    progress: float = 1.0


TO_THE_END = lambda _: three_states(to_the_end=True)  # noqa: E731
BIASES = {
    # a of AlphaFlow: an Euler step of length a (t - s) is off by a^2, and weighs 1 / a.
    "AlphaFlow": Bias(alpha_flow, 1, 0.1),
    "AlphaFlow from data": Bias(lambda _, h: alpha_flow(None, h), 1, 0.1),
    # 1 - r of the tangent.
    "AYF": Bias(lambda v, h: AYF(v, ramp=1 - h, diagonal=0.5), 1, 0.004),
    "SCM": Bias(lambda v, h: SCM(v, ramp=1 - h), 1, 0.004, TO_THE_END),
    "ITVM derivative, warming up": Bias(
        lambda v, h: ITVM(v, "derivative", diagonal=0.5, times="uniform", ends=0.25), 1, 0.004
    ),
    # One Heun step is off by h^3.
    "AYF LMD": Bias(lambda v, h: AYF(v, "LMD", step_size=h, diagonal=0.5), 3, 0.1),
    "ITVM step": Bias(lambda v, h: ITVM(v, "step", diagonal=0.5, times="uniform", ends=0.25, step_size=h), 3, 0.1),
    "ConsistencyDistillation": Bias(lambda v, h: ConsistencyDistillation(v, gap=h), 3, 0.2, TO_THE_END),
    # A given way in steps of h.
    "CTM": Bias(lambda v, h: CTM(v, solver_steps=round(1 / h), diagonal=0.5), 2, 1 / 4),
    # A way of length h, in two steps of half of it; of u, which is the way divided by h.
    "PFMM in its first round": Bias(lambda v, _: PFMM(v, diagonal=0.5), 2, 0.05, three_states, 0.0),
    "Shortcut on its finest grid": Bias(
        lambda v, h: Shortcut(v, finest=round(2 / h), diagonal=0.5), 1, 1 / 16, three_states
    ),
    # The gap between two states of one noise and data, s' - s = h (1 - s).
    "ConsistencyTraining": Bias(lambda _, h: consistency_training(h, huber=0.03), 1, 1 / 128, TO_THE_END),
    "ConsistencyTraining, squared": Bias(lambda _, h: consistency_training(h, huber=0.0), 1, 1 / 32, TO_THE_END),
    # The power of a weight that goes with the noise of the goal.
    "MeanFlow from data, weighted": Bias(lambda _, h: MeanFlow(adaptive=h, diagonal=0.5), 1, 0.05),
}


def norms(name: str, h: float, size: float = 0.0) -> Tensor:
    """The norm of the expected gradient off the diagonal, at each state."""
    make, _, _, states, progress = BIASES[name]
    field = mixture()
    objective = make(field, h)
    if name.endswith("warming up"):
        progress = 0.25 * (1 - h)
    found = expected_gradients(objective, field, SolvedAverageVelocity(field), states(h), size, progress)
    return found[-1].norm(dim=1)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", BIASES)
def test_the_bias_is_of_its_order(name: str, fraction: Callable[[float], None]):
    fraction(0.0)  # the longest step, the middle time at t
    _, order, first, *_ = BIASES[name]
    large, middle, small = (norms(name, first / k) for k in (1, 2, 4))
    assert (small > 1e-8).all()
    torch.testing.assert_close(large / middle, torch.full_like(large, 2.0**order), rtol=0.25, atol=0)
    torch.testing.assert_close(middle / small, torch.full_like(large, 2.0**order), rtol=0.13, atol=0)
    assert (norms(name, first, size=0.3) > 1e-3).all()  # and what is not the map is found out


@pytest.mark.parametrize(
    "make", [lambda _: MeanFlow(diagonal=0.5, adaptive=1.0), lambda _: SCM(), lambda v: AYF(v, diagonal=0.5, ramp=1.0)],
    ids=["the weight of MeanFlow", "the norm of SCM", "the norm of AYF, of a teacher"],
)  # fmt: skip
def test_what_goes_with_the_noise_of_a_goal_biases(gaussian: GaussianField, make: Callable[..., Objective]):
    """Only where there is noise in the goal, and it is not symmetric, as that of the Gaussian is."""
    where = three_states(to_the_end=make(gaussian).gamma == 1)
    assert expected_gradients(make(gaussian), gaussian, GaussianAverageVelocity(gaussian), where)[-1].abs().max() < 1e-9
    field = mixture()
    biased = expected_gradients(make(field), field, SolvedAverageVelocity(field), where)[-1]
    assert biased.norm(dim=1).max() > 1e-3 if not make(field).has_teacher else biased.abs().max() < 1e-9


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
@pytest.mark.parametrize("of", ["teacher", "data"])
@pytest.mark.usefixtures("fraction")
def test_alpha_flow_runs_into_mean_flow(of: str, adaptive: float):
    field = mixture()
    teacher = field if of == "teacher" else None
    exact = SolvedAverageVelocity(field)

    def gradients(objective: AlphaFlow | MeanFlow) -> Tensor:
        return expected_gradients(objective, field, exact, three_states(), size=0.3)[-1]

    limit = gradients(MeanFlow(teacher, diagonal=0.5, adaptive=adaptive))
    far, near = (gradients(alpha_flow(teacher, a, adaptive)) - limit for a in (0.02, 0.01))
    assert near.norm() < 0.05 * limit.norm()
    assert 1.7 < float(far.norm() / near.norm()) < 2.3
    assert torch.equal(gradients(alpha_flow(teacher, 0.0, adaptive)), limit)


def test_the_schedule_of_alpha_flow():
    alpha = AlphaFlow().alpha
    assert [alpha(p) for p in (0.0, 0.28, 0.5, 0.72, 1.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert 0 < alpha(0.7) < alpha(0.6) < alpha(0.4) < alpha(0.3) < 1
