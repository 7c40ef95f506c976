"""The loop: what it computes, what it says, when it stops and what it refuses."""

import math
import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from toys.training import Gaussian, Matching, Rows, Student, lines, train, weights

from fewstep.common.randomness import generator
from fewstep.data.order import epoch_indices
from fewstep.flows.exact import GaussianField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM
from fewstep.objectives.base import Loss
from fewstep.training.adamw import AdamW
from fewstep.training.batches import Batches
from fewstep.training.ema import Ema
from fewstep.training.fit import fit
from fewstep.training.run import every
from fewstep.training.schedules import schedule_factor
from fewstep.training.shares import check_shares, default_chunk

# Schedules and averages: closed forms


def test_schedules_are_their_formulas():
    assert [schedule_factor("constant", p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert schedule_factor("cosine", 0.0) == 1.0
    assert schedule_factor("cosine", 0.25) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert schedule_factor("cosine", 1.0) == pytest.approx(0.0)
    assert [schedule_factor("constant", 0.0, step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule_factor("cosine", 0.5, 0, 4) == pytest.approx(0.125)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        schedule_factor("cosin", 0.0)


def test_the_average_is_its_closed_form():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.9)
    nn.init.ones_(model.weight)
    for step in range(20):
        ema.update(step)
    torch.testing.assert_close(ema.module.weight, torch.tensor([[1 - 0.9**20]]))
    assert not ema.module.training
    assert not ema.module.weight.requires_grad


def test_the_average_warms_up_only_when_asked():
    model = nn.Linear(1, 1)
    assert [Ema(model, 0.99).decay_at(n) for n in (0, 5)] == [0.99, 0.99]
    rising = Ema(model, 0.99, warmup=True)
    assert [rising.decay_at(n) for n in (0, 8, 10_000)] == [0.1, 0.5, 0.99]
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Ema(model, 1.0)


def test_the_average_of_half_precision_weights_is_float32_and_its_buffers_are_copies():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    ema = Ema(model, 0.999)
    assert {t.dtype for t in ema.module.state_dict().values()} == {torch.float32, torch.int64}
    start = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.fill_(3.0)
        model[1].num_batches_tracked.fill_(7)
    ema.update(0)
    # In bfloat16 a step of a thousandth would be lost on weights of one.
    expected = start + 0.001 * (model[0].weight.float() - start)
    torch.testing.assert_close(ema.module[0].weight, expected, rtol=0, atol=1e-7)
    assert ema.module[1].running_mean.tolist() == [3.0] * 4
    assert ema.module[1].num_batches_tracked == 7


def test_the_optimizer_has_the_bits_of_torchs(tmp_path):
    def run(make):
        network = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(2, 2))
        with torch.no_grad():
            for n, p in enumerate(network.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator(n)))
        optimizer = make(list(network.parameters()), lr=0.1, betas=(0.8, 0.99), weight_decay=0.3, fused=True)
        for step in range(6):
            layers = network if step % 2 else network[:2]  # some have no gradient, from the start on
            layers(torch.ones(4, 3)).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:  # as one that goes on
                saved, optimizer = optimizer.state_dict(), make(list(network.parameters()), fused=True)
                optimizer.load_state_dict(saved)
        return [*network.parameters()], optimizer.state_dict()

    (ours, state), (theirs, their_state) = run(AdamW), run(torch.optim.AdamW)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert state["param_groups"] == their_state["param_groups"]
    for index, values in their_state["state"].items():
        assert all(torch.equal(state["state"][index][name], value) for name, value in values.items())


# Rows and noise of a step


def test_rows_and_noise_do_not_depend_on_processes_or_micro_batches():
    whole, noise = Batches(Rows(100), 48, 4, seed=3).micro(step=5, index=0)
    parts, draws = [], []
    for rank in range(3):
        own = Batches(Rows(100), 48, 4, seed=3, accumulate=2, rank=rank, processes=3)
        for index in range(2):
            rows, generators = own.micro(5, index)
            parts.append(rows)
            draws += generators
    torch.testing.assert_close(torch.cat([part.data for part in parts]), whole.data, rtol=0, atol=0)
    assert torch.cat([part.cond["row"] for part in parts]).tolist() == whole.cond["row"].tolist()
    assert [g.initial_seed() for g in draws] == [g.initial_seed() for g in noise]
    assert draws[7].initial_seed() == generator(3, 5, 7, 2).initial_seed()


def test_every_row_is_seen_once_an_epoch():
    batches = Batches(Rows(96), 24, 8, seed=1)
    for epoch in range(2):
        seen = torch.cat([batches.micro(4 * epoch + step, 0)[0].cond["row"] for step in range(4)])
        assert seen.sort().values.tolist() == list(range(96))


def test_chunks_come_from_the_batch_alone():
    assert [default_chunk(n) for n in (16, 64, 100, 256, 250)] == [16, 64, 50, 64, 50]
    with pytest.raises(ValueError, match=r"batch=96 .*3 process.*multiple of 192\. Say both, batch=192 with chunk=64"):
        Batches(Rows(9), 96, 64, 0, processes=3)
    Batches(Rows(9), 192, 64, 0, processes=3)
    with pytest.raises(ValueError, match="accumulate=3"):
        train(accumulate=3)


# The loop


def test_it_learns_the_known_answer():
    """Data at one point: the best velocity at t = 0.5 from x is (x1 - x) / 0.5, its loss zero."""

    class Point(Gaussian):
        def rows(self, index, generator):
            return super().rows(index, generator).__class__(torch.full((len(index), 2), 2.0))

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(2, 2)

        def velocity(self, x, t):
            return self.network(x) / (1 - t[:, None]).clamp(min=0.1)

    class Half(Matching):
        def forward(self, student, batch, *, target=None, progress=0.0, step=0, generator):
            noise = torch.cat([torch.randn(16, 2, generator=g) for g in generator])
            x, t = (noise + batch.data) / 2, torch.full((len(batch),), 0.5)
            return Loss((student.velocity(x, t) - (batch.data - noise)).square().mean())

    result = train(student=Line(), objective=Half(None), data=Point(), steps=400, lr=0.03, chunk=16, batch=64)
    network = result.ema.network
    torch.testing.assert_close(network.weight, -torch.eye(2), rtol=0, atol=1e-2)
    torch.testing.assert_close(network.bias, torch.full((2,), 2.0), rtol=0, atol=2e-2)
    assert result.stopped == "done"
    assert result.step == 400
    assert result.losses["loss"] < 1e-4


def test_a_tensor_is_data():
    rows = torch.randn(40, 2, generator=generator(1)).double()
    seen = []

    class Looking(Matching):
        def forward(self, student, batch, **options):
            seen.append(batch.data)
            return super().forward(student, batch, **options)

    train(objective=Looking(), data=rows, batch=20, steps=2)
    found = torch.cat(seen)
    torch.testing.assert_close(found[found[:, 0].argsort()], rows[rows[:, 0].argsort()].float(), rtol=0, atol=0)


def test_accumulation_changes_neither_losses_nor_weights(tmp_path):
    for name, accumulate in (("whole", 1), ("parts", 4)):
        # Dropout draws per micro-batch; without it the two are one sum in another order.
        train(tmp_path / name, Student(dropout=0.0), chunk=4, accumulate=accumulate)
    for whole, parts in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-6)
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-5)


def test_one_seed_decides_all_and_the_callers_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, again = weights(train()), weights(train())
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, again)
    assert torch.equal(first, weights(train()))
    assert not torch.equal(first, weights(train(seed=1)))


def test_what_dropout_draws_is_new_at_each_step_and_decided_by_the_seed():
    class Drawing(Matching):
        def forward(self, student, batch, **options):
            drawn.append(torch.rand(()).item())
            return super().forward(student, batch, **options)

    runs = []
    for seed in (0, 0, 1):
        drawn = []
        train(objective=Drawing(), seed=seed)
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 24


@pytest.mark.parametrize("chunk", [64, 16])
def test_it_has_the_bits_of_a_loop_written_by_hand(chunk):
    """Distilling a Gaussian by ITVM with torch alone: draws, loss, clipping, AdamW and both averages."""
    teacher = GaussianField(torch.zeros(2), torch.tensor([[0.5, 0.2], [0.2, 1.0]]))
    data = torch.randn(64, 2, generator=generator(1))
    copies = []
    for _ in range(2):
        torch.manual_seed(0)
        copies.append(FlowMap.from_field(teacher, MLP(2, width=16, depth=2, times=2)))
    fitted, student = copies
    options = {"steps": 5, "seed": 3, "batch": 64, "chunk": chunk, "lr": 0.01, "ema": 0.9, "quiet": True}
    result = fit(
        fitted, ITVM(teacher, ema=0.9, diagonal=0.5, times="uniform", ends=0.1), data, ema_warmup=False, **options
    )

    slow, average = deepcopy(student), deepcopy(student)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, fused=True)
    first = torch.arange(64) % chunk < chunk // 2  # the rows on the diagonal
    for step in range(5):
        order = epoch_indices(64, 3, 64 * step, 64)
        draws = [generator(3, step, n, 2) for n in range(64 // chunk)]
        noise = torch.cat([torch.randn(chunk, 2, generator=g) for g in draws])
        a, b, to_zero, to_one, start, _ = (torch.cat([torch.rand(chunk, generator=g) for g in draws]) for _ in range(6))
        s, t = torch.minimum(a, b).where(to_zero >= 0.1, 0.0), torch.maximum(a, b).where(to_one >= 0.1, 1.0)
        s, t = torch.where(first, start, s), torch.where(first, start, t)
        x = s[:, None] * data[order] + (1 - s)[:, None] * noise
        with torch.no_grad():
            goal = torch.empty(64, 2)
            goal[first] = teacher(x[first], s[first])
            far, near, end = x[~first], s[~first], t[~first]
            middle = near + 0.5 * (end - near)
            half = slow.network(far, near, middle)
            rest = slow.network(far + (middle - near)[:, None] * half, middle, end)
            goal[~first] = 0.5 * half + 0.5 * rest
        error = (student.network(x, s, t) - goal).square().mean(1)
        (error[first].mean() + error[~first].mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 * schedule_factor("cosine", step / 5)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for copy, decay in ((slow, 0.9), (average, 0.9)):
                torch._foreach_lerp_(list(copy.parameters()), parameters, 1 - decay)
    for ours, theirs in ((fitted, student), (result.ema, average)):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_clipping_bounds_the_gradient(monkeypatch):
    norms = []

    class Recording(AdamW):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return super().step(closure)

    monkeypatch.setattr("fewstep.training.step.AdamW", Recording)
    train(clip=0.01, steps=3)
    train(clip=None, steps=3)
    assert norms[:3] == pytest.approx([0.01] * 3, rel=1e-3)
    assert min(norms[3:]) > 0.1


def test_copies_are_made_only_where_wanted():
    seen = []
    train(objective=Matching(ema=None), ema=None, steps=1, callbacks=[lambda run: seen.append((run.target, run.ema))])
    train(steps=1, callbacks=[lambda run: seen.append((run.target, run.ema, run.student))])
    assert seen[0][0] is None
    assert isinstance(seen[0][1], Student)
    target, average, student = seen[1]
    assert len({id(m) for m in (target, average, student)}) == 3
    assert student.training
    assert not target.training


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_copies_follow_the_student(decay):
    seen = []

    def look(run):
        seen.append([next(m.parameters()).detach().clone() for m in (run.student, run.target, run.ema)])

    start = next(Student().parameters()).detach()
    train(objective=Matching(ema=decay), ema=decay, ema_warmup=False, steps=3, callbacks=[look])
    expected = start
    for weight, slow, ema in seen:
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(slow, expected)
        torch.testing.assert_close(ema, expected)
    assert not torch.equal(start, seen[0][0])


def test_each_player_has_its_own_optimizer(tmp_path):
    class Two(Matching):
        def parameter_groups(self, student):
            return {"student": list(student.parameters()), "weight": [self.weight]}

    objective = Two()
    train(tmp_path, objective=objective)
    assert objective.weight.item() != 0.0
    assert {"grad_norm/student", "grad_norm/weight"} <= set(lines(tmp_path)[0])
    names = {file.name for file in (tmp_path / "checkpoints" / "step-00000012").iterdir()}
    assert {"optimizer-student.safetensors", "optimizer-weight.safetensors", "objective.safetensors"} <= names


def test_half_precision_trains_after_a_pass_without_gradients():
    """Autocast keeps casts of weights: one made without gradients must not be used where they are wanted."""

    class Twice(Matching):
        def forward(self, student, batch, **options):
            with torch.no_grad():
                low = student.velocity(batch.data, torch.zeros(len(batch)))
            assert low.dtype == torch.bfloat16
            return super().forward(student, batch, **options)

    student = Student()
    start = [p.detach().clone() for p in student.parameters()]
    train(student=student, objective=Twice(None), precision="bf16", steps=3)
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert all((p != q).any() for p, q in zip(student.parameters(), start, strict=True))


def test_callbacks_see_the_run_and_log_into_its_line(tmp_path):
    steps = []

    def metric(run):
        steps.append(run.step)
        run.log({"rmse": 0.5 * run.step, "ok": isinstance(run.ema, Student) and run.out == tmp_path})

    train(tmp_path, log_every=4, callbacks=[every(3, metric)])
    assert steps == [3, 6, 9, 12]
    records = lines(tmp_path)
    assert [line["step"] for line in records] == [3, 4, 6, 8, 9, 12]
    assert records[-1]["rmse"] == 6.0
    assert records[-1]["ok"]
    assert "loss" in records[-1]
    assert "loss" not in records[0]


def test_a_callback_that_samples_from_the_student_changes_nothing():
    def sampling(run):
        run.ema.eval()
        torch.randn(3)

    assert torch.equal(weights(train(ema=None)), weights(train(ema=None, callbacks=[sampling])))


# Going on


# What it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be more than 0, got 0"),
        ({"steps": None}, "needs steps, max_seconds or both"),
        ({"batch": 0}, "batch must be more than 0"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"precision": "fp16"}, "needs a CUDA GPU"),
        ({"track": ["wandbb"]}, "unknown tracker 'wandbb': did you mean 'wandb'"),
        ({"ema": 1.0}, "EMA decay"),
        ({"compile": True, "student": nn.Linear(2, 2)}, "Linear has none"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/checkpoints/step-*"))


def test_data_that_does_not_fit_the_network():
    with pytest.raises(ValueError, match=r"16 rows of shape \(2,\): do the data fit the network"):
        train(student=Student(dim=3))
    with pytest.raises(ValueError, match="nothing to train"):
        train(student=Student().requires_grad_(False), objective=Matching(trains=False))


# Where the numbers go


@pytest.mark.parametrize(("batch", "processes"), [(4, 2), (8, 2), (64, 3), (100, 8), (256, 16), (7, 2)])
def test_what_a_batch_that_cannot_be_shared_is_told_can_be_shared(batch: int, processes: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared equally") as refused:
        check_shares(batch, default_chunk(batch), processes=processes)
    ways = re.findall(r"batch=(\d+) with chunk=(\d+)", str(refused.value))
    assert len(ways) == (2 if batch % processes == 0 else 1)
    for rows, chunk in ways:
        check_shares(int(rows), int(chunk), processes=processes)
