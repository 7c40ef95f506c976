"""Two players in one training, and what stands around another objective."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import toy
from fewstep.data.batch import Batch
from fewstep.evaluation.cost import step_cost
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.networks import MLP
from fewstep.objectives import ITVM, ConsistencyDistillation, Corrected, FlowMatching, Objective, Player
from fewstep.objectives.finishing import name_of, rollout
from fewstep.training.fit import fit
from fewstep.training.run import Run
from fewstep.training.step import adamw, players_of, update


def student_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> FlowMap:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP(2, width=16, depth=2, times=2)
        nn.init.normal_(network.second_time.last.weight, std=0.1)  # pyright: ignore
    return FlowMap(network.to(dtype))


def loss_of(objective: Objective, student: FlowMap, step: int = 0, progress: float = 0.9) -> Any:
    dtype = next(student.parameters()).dtype
    batch = Batch(torch.randn(64, 2, generator=generator(7), dtype=dtype))
    return objective(student, batch, target=student, progress=progress, step=step, generator=generator(0, step))


def made(objective: Corrected, student: FlowMap) -> Corrected:
    objective.adopt(student)
    for p in objective.fake.parameters():  # pyright: ignore
        p.data += 0.1 * torch.randn(p.shape, generator=generator(3)).to(p)  # so that it is not its student
    return objective


def test_the_gradients_of_the_sum_are_those_of_each_loss_to_the_bit():
    student = student_of(dtype=torch.float64)
    objective = made(Corrected(ITVM(eight_gaussians().double()), begin=0.0), student)
    players = players_of(objective, student)
    assert list(players) == ["student", "fake"]
    loss = loss_of(objective, student)
    assert list(loss.others) == ["fake"]
    together = torch.autograd.grad(loss.descended, [*players["student"].parameters, *players["fake"].parameters])
    loss = loss_of(objective, student)
    apart = [
        *torch.autograd.grad(loss.total, players["student"].parameters, retain_graph=True),
        *torch.autograd.grad(loss.others["fake"], players["fake"].parameters, retain_graph=True),
    ]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    # And neither loss knows the other's parameters.
    for of, player in ((loss.total, "fake"), (loss.others["fake"], "student")):
        found = torch.autograd.grad(of, players[player].parameters, retain_graph=True, allow_unused=True)
        assert all(g is None for g in found)


def test_a_player_has_its_own_rate_betas_and_clip():
    weights = {name: nn.Parameter(torch.zeros(2)) for name in ("student", "fake")}
    players = {
        "student": Player([weights["student"]]),
        "fake": Player([weights["fake"]], lr=0.2, betas=(0.0, 0.5), clip=None),
    }
    optimizers = adamw(players, torch.device("cpu"), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    assert optimizers["student"].param_groups[0]["betas"] == (0.9, 0.99)
    assert optimizers["fake"].param_groups[0]["betas"] == (0.0, 0.5)
    for weight in weights.values():
        weight.grad = torch.tensor([3.0, 4.0])
    clipped = {}

    def see(name: str) -> Any:
        def hook(*_: Any) -> None:
            clipped[name] = weights[name].grad.clone()  # pyright: ignore

        return hook

    for name, optimizer in optimizers.items():
        optimizer.register_step_pre_hook(see(name))
    norms = update(players, optimizers, torch.amp.GradScaler("cpu", enabled=False), 0.1, clip=1.0)
    assert {name: float(norm) for name, norm in norms.items()} == {"student": 5.0, "fake": 5.0}
    assert clipped["student"].norm() == pytest.approx(1.0)
    assert clipped["fake"].norm() == pytest.approx(5.0)
    # Adam's first step is the rate, whatever the gradient.
    torch.testing.assert_close(weights["student"].detach(), torch.full((2,), -0.1))
    torch.testing.assert_close(weights["fake"].detach(), torch.full((2,), -0.02))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_player_without_gradients_stands_still(scaled: bool):
    """Torch's scaler raises for an optimizer without any: it is not asked."""
    still, moving = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    players = {"student": Player([still]), "fake": Player([moving])}
    optimizers = adamw(players, torch.device("cpu"), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(moving.sum()).backward()
    norms = update(players, optimizers, scaler, 0.1, clip=1.0)
    assert list(norms) == ["fake"]
    assert torch.equal(still, torch.zeros(2))
    assert not optimizers["student"].state
    assert moving.abs().min() > 0


def test_an_overflow_of_one_player_stops_that_one_alone():
    bad, good = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    players = {"student": Player([bad]), "fake": Player([good])}
    # Torch's own, as on a GPU, where alone there is a scaler.
    optimizers = {name: torch.optim.AdamW(player.parameters, lr=0.1, fused=True) for name, player in players.items()}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(good.sum()).backward()
    bad.grad = torch.full((2,), torch.inf)
    before = scaler.get_scale()
    update(players, optimizers, scaler, 0.1, clip=1.0)
    assert torch.equal(bad, torch.zeros(2))
    assert good.abs().min() > 0
    assert scaler.get_scale() < before


def test_until_it_begins_it_is_its_base_to_the_bit():
    student, base = student_of(), ITVM(eight_gaussians())
    objective = made(Corrected(base, begin=0.5), student)
    before, alone = loss_of(objective, student, progress=0.49), loss_of(base, student, progress=0.49)
    assert torch.equal(before.total, alone.total)
    assert (before.others, list(before.terms)) == ({}, list(alone.terms))
    assert list(loss_of(objective, student, progress=0.5).others) == ["fake"]


def test_the_weight_rises_from_nothing():
    student = student_of()
    objective = made(Corrected(ITVM(eight_gaussians()), weight=0.2, begin=0.5, ramp=0.2), student)

    def share(progress: float) -> float:
        loss = loss_of(objective, student, progress=progress)
        base = loss_of(objective.base, student, progress=progress).total
        return float((loss.total - base) / loss.terms["corrector"])

    assert [round(share(p), 4) for p in (0.5, 0.6, 0.7, 0.9)] == [0.0, 0.1, 0.2, 0.2]


def test_where_the_student_stands_still_its_base_is_not_paid_for():
    student = student_of()
    objective = made(Corrected(ITVM(eight_gaussians()), begin=0.0, every=3, rollout=(1,)), student)
    with count_calls(student) as on_turn:
        assert loss_of(objective, student, step=3).total.requires_grad
    with count_calls(student) as off_turn:
        loss = loss_of(objective, student, step=4)
    assert not loss.total.requires_grad
    assert (off_turn.count, off_turn.rows) == (1, 32)  # the samples, and nothing else
    assert on_turn.rows > 100
    grads = torch.autograd.grad(loss.descended, list(student.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


def test_the_averages_follow_the_student_where_it_moves(tmp_path: Path):
    seen = []

    def look(run: Run) -> None:
        assert run.target is not None
        seen.append(tuple(next(m.parameters()).detach().clone() for m in (run.student, run.ema, run.target)))

    objective = Corrected(ITVM(eight_gaussians(), ema=0.5), begin=0.0, every=2, rollout=(1,))
    fit(student_of(), objective, toy.eight_gaussians(), 4, batch=64, ema=0.5, ema_warmup=False, callbacks=[look],
        out=tmp_path, log_every=1, quiet=True)  # fmt: skip
    for moved, still in ((seen[0], seen[1]), (seen[2], seen[3])):
        assert all(torch.equal(a, b) for a, b in zip(moved, still, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    lines = fewstep.training.trackers.read_metrics(tmp_path / "metrics.jsonl")
    assert ["loss" in line for line in lines] == [True, False, True, False]  # the student's, not the sum
    assert all("loss/fake" in line and "grad_norm/fake" in line for line in lines)


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_that_was_killed_goes_on_with_both_players(tmp_path: Path, every: int):
    def train(out: Path | None = None, stop: int = 0) -> tuple[Objective, FlowMap]:
        objective = Corrected(ITVM(eight_gaussians()), begin=0.3, every=every)
        student = student_of()

        def kill(run: Run) -> None:
            if run.step == stop:
                raise InterruptedError

        fit(student, objective, toy.eight_gaussians(), 24, out=out, batch=64, checkpoint_every=8, callbacks=[kill],
            quiet=True)  # fmt: skip
        return objective, student

    whole = train()
    with pytest.raises(InterruptedError):
        train(tmp_path, stop=14)
    resumed = train(tmp_path)
    for one, two in zip(whole, resumed, strict=True):
        a, b = one.state_dict(), two.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    kept = load_file(tmp_path / "checkpoints" / "step-00000024" / "objective.safetensors")
    assert all(name.startswith("fake.") for name in kept if name != "copied")


def test_a_checkpoint_without_a_player_is_named(tmp_path: Path):
    fit(student_of(), ITVM(eight_gaussians()), toy.eight_gaussians(), 2, out=tmp_path, batch=64, quiet=True)
    objective = Corrected(ITVM(eight_gaussians()), begin=0.0)
    student = student_of()
    objective.adopt(student)
    players = players_of(objective, student)
    optimizers = adamw(players, torch.device("cpu"), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Run(student, objective, players, optimizers, scaler, None, None, None, {})
    with pytest.raises(ValueError, match="no optimizer of 'fake', and those of student"):
        run.restore(tmp_path / "checkpoints" / "step-00000002")


def test_student_fake_and_teacher_may_be_three_on_one_base():
    """Of a student that trains an adapter, the adapter alone is copied; a checkpoint has no base in it."""
    torch.manual_seed(0)
    teacher = NetworkField(MLP(2, width=16, depth=2))
    student = FlowMap.from_field(teacher, share=False)
    for name, p in student.named_parameters():
        p.requires_grad_("second_time" in name)
    objective = Corrected(ITVM(teacher), begin=0.0)
    objective.adopt(student)
    still = {id(p) for p in student.parameters() if not p.requires_grad}
    fake = list(objective.fake.parameters())  # pyright: ignore
    assert {id(p) for p in fake if not p.requires_grad} == still
    assert not {id(p) for p in fake if p.requires_grad} & {id(p) for p in student.parameters()}
    kept = fewstep.training.run.own_state(objective, student)
    assert kept
    assert all("second_time" in name for name in kept if name != "copied")


def test_rollouts_are_the_samples_that_are_drawn_later():
    student = student_of()
    noise = torch.randn(16, 2, generator=generator(1))
    for steps in (1, 2, 4):
        x = rollout(student, noise, steps, generator(2))
        torch.testing.assert_close(x.detach(), sample(student, noise, steps))
        assert x.requires_grad
    student.gamma = 1.0  # a consistency model brings new noise in between
    torch.testing.assert_close(
        rollout(student, noise, 2, generator(2)).detach(), sample(student, noise, 2, generator=generator(2))
    )


def test_it_is_its_base_in_all_but_its_term():
    base = ConsistencyDistillation(eight_gaussians(), ema=0.7)
    objective = Corrected(base)
    assert (objective.ema, objective.gamma, objective.teacher) == (0.7, 1.0, base.teacher)
    student = student_of()
    objective.adopt(student)
    assert student.gamma == 1.0
    assert set(base.sources) < set(objective.sources)
    assert name_of(objective) == "Corrected(ConsistencyDistillation)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 0.0}, "weight is 0.0: it is more than 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"share": 0.0}, r"share is 0.0: it lies in \(0, 1\]"),
        ({"begin": 1.0}, r"begin is 1.0: it lies in \[0, 1\)"),
        ({"rollout": ()}, r"rollout is \[\]: one number"),
        ({"rollout": (0,)}, r"rollout is \[0\]"),
        ({"every": 0}, "every is 0: at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Corrected(ITVM(eight_gaussians()), **options)


def test_bases_that_cannot_be():
    teacher: Any = eight_gaussians()
    with pytest.raises(ValueError, match="stands around an objective, such as"):
        Corrected(teacher)
    with pytest.raises(ValueError, match="FlowMatching trains a field"):
        Corrected(FlowMatching(), teacher=teacher)
    with pytest.raises(ValueError, match="both have a player 'fake'"):
        Corrected(Corrected(ITVM(teacher)))


def test_what_it_costs_is_counted_with_both_players():
    """On half of the rows: a sample, the fake on it, both with a backward pass, and the teacher: 1.5 + 1 + 1/6."""
    teacher = NetworkField(MLP(2, width=16, depth=2))
    batch = Batch(torch.randn(64, 2))
    objective = Corrected(ITVM(teacher), begin=0.0, rollout=(1,))
    base = step_cost(student_of(), objective.base, batch, rounds=1).counts
    counts = step_cost(student_of(), objective, batch, rounds=1).counts
    assert counts.trained == base.trained + 1.0
    assert counts.plain == base.plain + 0.5
