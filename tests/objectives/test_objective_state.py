"""What of an objective trains, or stays from step to step: learned weights, the rounds of PFMM. All is checkpointed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.randomness import generator
from fewstep.data import toy
from fewstep.flows import exact
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import PFMM, PSD, Objective
from fewstep.objectives.rows import Now
from fewstep.objectives.weights import LearnedWeight
from fewstep.training.fit import fit
from fewstep.training.run import Run


def student_of(seed: int = 0, dropout: float = 0.0) -> FlowMap:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP(2, width=16, depth=2, times=2)
        nn.init.normal_(network.second_time.last.weight, std=0.1)  # pyright: ignore
    if dropout:
        network.output = nn.Sequential(nn.Dropout(dropout), network.output)  # pyright: ignore
    return FlowMap(network)


def test_the_learned_weight_goes_to_the_logarithm_of_the_error():
    weight = LearnedWeight()
    s, t = torch.rand(2, 256, generator=generator(0))
    assert torch.equal(weight(s, t), torch.zeros(256))
    error = torch.exp(2 * s - t)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    objective = PSD(learned=True)
    objective.log_weight = weight
    for _ in range(300):
        optimizer.zero_grad()
        objective.weigh(error, s, t, Now()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weight(s, t).detach(), 2 * s - t, rtol=0, atol=0.15)


def train(make: Callable[[], Objective], out: Path | None = None, stop: int = 0) -> tuple[Objective, FlowMap]:
    """24 steps, with dropout; checkpoints every 8 where there is a folder; killed after step ``stop``."""
    objective, student = make(), student_of(dropout=0.2)

    def kill(run: Run) -> None:
        if run.step == stop:
            raise InterruptedError

    data = toy.eight_gaussians()
    fit(student, objective, data, 24, out=out, batch=64, checkpoint_every=8, callbacks=[kill], quiet=True)
    return objective, student


def equal(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "make", [lambda: PSD(learned=True), lambda: PFMM(exact.eight_gaussians(), rounds=4, ema=0.9)], ids=["PSD", "PFMM"]
)
def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path: Path, make: Callable[[], Objective]):
    whole, student = train(make)
    # A round has 6 steps. Killed in the third; the checkpoint is of the second, whose frozen copy must come back.
    with pytest.raises(InterruptedError):
        train(make, tmp_path, stop=14)
    resumed, again = train(make, tmp_path)
    fresh = make()
    fresh.adopt(student_of(dropout=0.2))
    for one, two in ((student, again), (whole, resumed)):
        a, b = one.state_dict(), two.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    # And there was something to lose.
    assert not any(torch.equal(whole.state_dict()[key], value) for key, value in fresh.state_dict().items())


def test_pfmm_killed_and_gone_on_with_the_same_object(tmp_path: Path):
    def make() -> PFMM:
        return PFMM(exact.eight_gaussians(), rounds=4, ema=0.9)

    whole, _ = train(make)
    one = make()
    with pytest.raises(InterruptedError):
        train(lambda: one, tmp_path, stop=14)
    train(lambda: one, tmp_path)
    assert all(torch.equal(one.state_dict()[key], value) for key, value in whole.state_dict().items())


def test_pfmm_refreshes_its_copy_when_a_round_begins_and_never_else():
    objective, student = PFMM(exact.eight_gaussians(), rounds=4, ema=0.5), student_of()
    frozen: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}

    def watch(run: Run) -> None:
        assert objective.frozen is not None
        assert run.target is not None
        frozen[run.step] = next(objective.frozen.parameters()).clone()
        targets[run.step] = next(run.target.parameters()).clone()

    fit(student, objective, toy.eight_gaussians(), 20, batch=64, callbacks=[watch], quiet=True)
    # Step n + 1 is computed at progress n / 20: rounds begin with step 6, 11 and 16, from the copy after 5, 10 and 15.
    for step in range(6, 21):
        assert torch.equal(frozen[step], targets[(step - 1) // 5 * 5])
    assert not torch.equal(frozen[5], frozen[6])
    assert int(objective.round) == 3
    assert objective.frozen is not None
    assert not any(p.requires_grad for p in objective.frozen.parameters())
    assert not any(module.training for module in objective.frozen.modules())


def test_intervals_and_halves_of_pfmm():
    objective = PFMM(exact.eight_gaussians(), rounds=3)
    assert [objective.round_at(p) for p in (0.0, 0.33, 0.34, 0.67, 0.99, 1.0)] == [0, 0, 1, 2, 2, 2]
    for progress, longest in ((0.0, 0.25), (0.5, 0.5), (1.0, 1.0)):
        s, t = objective.pairs(4096, generator(0), Now(progress=progress))
        assert 0.9 * longest < float((t - s).max()) <= longest + 1e-6
