"""Learned noise in one dimension, against its loss in closed form; straighter lines; and what it refuses."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.data.conditions import Dropped
from fewstep.data.couplings import Coupled
from fewstep.data.given import as_data
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import sample_states
from fewstep.networks import MLP, NoiseEncoder
from fewstep.objectives import ITVM, ContrastiveFlowMatching, FlowMatching, LearnedNoise
from fewstep.objectives.base import Player
from fewstep.objectives.finishing import name_of
from fewstep.runs.methods import settle_objective
from fewstep.runs.recipes import load_recipe

V = 0.49
# beta: m and s of the best x0 = m x1 + s e, and the variance of that x0.
BEST = {
    1.0: (0.650, 0.621, 0.592),
    5.0: (0.195, 0.896, 0.822),
    20.0: (0.0499, 0.9729, 0.948),
    100.0: (0.0100, 0.9945, 0.989),
}


class Linear1D(nn.Module):
    """``x0 = m x1 + s e``."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(s, dtype=torch.float64).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.m * x, (2 * self.log_s).expand_as(x)


class BestVelocity(nn.Module):
    """``E[x1 - x0 | x_t]`` of that encoder, which it is given as it stands now."""

    path = Linear()

    def __init__(self, encoder: Linear1D) -> None:
        super().__init__()
        self.known = (encoder,)

    def velocity(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        m, s = self.known[0].m.detach(), self.known[0].log_s.detach().exp()
        t = t[:, None]
        # x_t = (t + (1 - t) m) x1 + (1 - t) s e, x1 - x0 = (1 - m) x1 - s e
        a, b = t + (1 - t) * m, (1 - t) * s
        return (a * (1 - m) * V - b * s) / (a.square() * V + b.square()) * x


def exact_loss(m: Tensor, s: Tensor, beta: float) -> Tensor:
    """``E Var(x1 - x0 | x_t)`` over t, by quadrature, and beta times the KL."""
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    a, b = t + (1 - t) * m, (1 - t) * s
    variance = (1 - m) ** 2 * V + s**2
    explained = (a * (1 - m) * V - b * s) ** 2 / (a.square() * V + b.square())
    kl = (m**2 * V + s**2 - 1 - (s**2).log()) / 2
    return variance - explained.mean() + beta * kl


def loss_at(m: float, s: float, beta: float, rows: int = 200_000) -> tuple[Any, Linear1D]:
    encoder = Linear1D(m, s)
    x = math.sqrt(V) * torch.randn(rows, 1, generator=generator(3), dtype=torch.float64)
    objective = LearnedNoise(FlowMatching(), encoder, beta)
    return objective(BestVelocity(encoder), Batch(x), generator=generator(4)), encoder


@pytest.mark.parametrize("beta", BEST)
def test_the_best_encoders_are_those_of_the_closed_form(beta: float):
    m, s, variance = BEST[beta]
    assert m**2 * V + s**2 == pytest.approx(variance, abs=2e-3)
    pair = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    slope, *_ = torch.autograd.grad(exact_loss(pair[0], pair[1], beta), pair)
    assert slope.abs().max() < 2e-3 * max(beta, 1)  # to the digits that are written above
    for dm, ds in ((0.02, 0.0), (-0.02, 0.0), (0.0, 0.02), (0.0, -0.02)):
        assert exact_loss(pair[0] + dm, pair[1] + ds, beta) > exact_loss(pair[0], pair[1], beta)


@pytest.mark.parametrize(
    ("m", "s", "beta"), [(0.65, 0.621, 1.0), (0.195, 0.896, 5.0), (0.3, 0.7, 1.0), (-0.2, 1.2, 5.0)]
)
def test_value_and_gradient_are_those_of_the_closed_form(m: float, s: float, beta: float):
    """The velocity is the best one, so by the envelope theorem the gradient with it held fixed is that of the best
    loss: it runs through the state and the goal, or is another."""
    loss, encoder = loss_at(m, s, beta)
    pair = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    exact = exact_loss(pair[0], pair[1], beta)
    slope, *_ = torch.autograd.grad(exact, pair)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(float(exact.detach()), abs=0.01)
    assert encoder.m.grad is not None
    assert encoder.log_s.grad is not None
    assert float(encoder.m.grad) == pytest.approx(float(slope[0]), abs=0.02)
    assert float(encoder.log_s.grad) / s == pytest.approx(float(slope[1]), abs=0.02)
    assert float(loss.terms["noise_square"]) == pytest.approx(m**2 * V + s**2, abs=0.01)


def test_an_encoder_starts_as_no_encoder():
    student = fewstep.NetworkField(MLP(2, width=16, depth=2))
    base, batch = ContrastiveFlowMatching(), Batch(torch.randn(64, 2, generator=generator(1)))
    objective = LearnedNoise(base)
    objective.adopt(student)
    own, alone = (each(student, batch, generator=generator(2)) for each in (objective, base))
    assert torch.equal(own.total, alone.total)
    assert float(own.terms["kl"]) == 0
    own.total.backward()
    assert all(p.grad is not None for p in objective.parameters())
    player = Player.of(objective.parameter_groups(student)["student"])
    assert len(player.parameters) == len([*student.parameters(), *objective.parameters()])
    assert name_of(objective) == "LearnedNoise(ContrastiveFlowMatching)"
    assert objective.sources == ("2301.12003", "2506.05350", "2210.02747")


@pytest.mark.parametrize("shape", [(2,), (3, 7, 5), (4, 6)])
def test_an_encoder_takes_any_shape(shape: tuple[int, ...]):
    encoder = NoiseEncoder(shape, width=8, depth=2)
    for parameter in encoder.last.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, *shape, generator=generator(0))
    mean, log_variance = encoder(x)
    assert mean.shape == log_variance.shape == x.shape
    assert not torch.equal(mean, log_variance)
    one, _ = encoder(x[:1])
    torch.testing.assert_close(one, mean[:1])


@pytest.mark.takes_seconds
def test_trajectories_are_straighter_than_without_at_the_same_steps():
    pair = fewstep.MixtureField(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.2, 0.2]), torch.ones(2) / 2)
    rows, start = pair.data(4096, generator(0)), torch.randn(500, 2, generator=generator(1))
    bends: dict[str, float] = {}
    for name, objective in {"alone": FlowMatching(), "learned": LearnedNoise(FlowMatching(), beta=1.0)}.items():
        torch.manual_seed(0)
        field = fewstep.NetworkField(MLP(2, width=32, depth=3))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fewstep.fit(field, objective, rows, 200, batch=256, chunk=256, lr=5e-3, ema=0.97, quiet=True)
        assert any("mean square" in str(each.message) for each in told) == (name == "learned")
        states = sample_states(field, start, 32)
        bends[name] = float((states.diff(dim=1) * 32 - (states[:, -1:] - states[:, :1])).square().mean())
    assert bends["learned"] < 0.35 * bends["alone"]


def test_narrow_noise_is_told_once_half_way():
    encoder = Linear1D(0.0, 0.5)
    objective, student = LearnedNoise(FlowMatching(), encoder, 2.0), BestVelocity(encoder)
    batch = Batch(torch.randn(512, 1, dtype=torch.float64, generator=generator(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(student, batch, progress=0.4, generator=generator(1))
    with pytest.warns(UserWarning, match=r"mean square of 0\.2\d, and sampling draws 1.*Raise beta, which is 2"):
        objective(student, batch, progress=0.5, generator=generator(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(student, batch, progress=0.6, generator=generator(1))


# Refusals, and recipes


def test_what_does_not_fit_is_refused():
    field = fewstep.NetworkField(MLP(2, width=8, depth=1))
    with pytest.raises(ValueError, match=r"stands around FlowMatching.*not ITVM"):
        LearnedNoise(ITVM(fewstep.GaussianField(torch.zeros(2), torch.eye(2))))
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*positive number"):
            LearnedNoise(FlowMatching(), beta=beta)
    with pytest.raises(ValueError, match=r"unknown encoder of LearnedNoise 'unet'.*auto"):
        LearnedNoise(FlowMatching(), "unet")
    with pytest.raises(ValueError, match="depht"):
        LearnedNoise(FlowMatching(), {"depht": 2})
    objective = LearnedNoise(FlowMatching())
    rows = Coupled(as_data(torch.randn(32, 2)))
    labelled = Coupled(as_data(TensorDataset(torch.randn(32, 2), torch.zeros(32, dtype=torch.long))))
    for data in (rows, Dropped(labelled, 0.5, {"class_labels": 1})):
        with pytest.raises(ValueError, match="coupling: independent"):
            objective.check_data(data, field)
    objective.check_data(as_data(torch.randn(32, 2)), field)
    objective.adopt(field)
    with pytest.raises(ValueError, match="coupling: independent"):
        objective(field, Batch(torch.zeros(4, 2), noise=torch.zeros(4, 2)), generator=generator(0))
    with pytest.raises(ValueError, match="call adopt"):
        LearnedNoise(FlowMatching())(field, Batch(torch.zeros(4, 2)), generator=generator(0))
    with pytest.raises(ValueError, match=r"does not say what its samples look like.*encoder: \{shape"):
        LearnedNoise(FlowMatching()).check_student(fewstep.NetworkField(nn.Linear(2, 2)))


def test_a_recipe_names_a_base_or_has_flow_matching(tmp_path: Path):
    for said, base in (
        ("LearnedNoise", "FlowMatching"),
        ("{name: LearnedNoise, beta: 5, base: {times: power}}", "FlowMatching"),
        ("{name: LearnedNoise, base: ContrastiveFlowMatching}", "ContrastiveFlowMatching"),
    ):
        file = tmp_path / "recipe.yaml"
        file.write_text(f"data: checkerboard\nstudent: mlp\nobjective: {said}\ntraining: {{steps: 2}}\n")
        recipe = load_recipe(file)
        settle_objective(recipe)
        assert [section.name for section in recipe.objectives] == ["LearnedNoise", base]
