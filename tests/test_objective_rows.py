"""Which rows, calls, types and gradients the objectives use; and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GaussianAverageVelocity
from objective_toys import Moving, MovingNetwork, Perturbed, batch_of, gradient, loss_of, value
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.exact import GaussianField
from fewstep.fields import NetworkField, VelocityField
from fewstep.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, FlowMatching, Objective
from fewstep.objectives.base import split_rows
from fewstep.paths import Trigonometric
from fewstep.randomness import generator
from fewstep.sampling import count_calls

ALL: dict[str, Callable[[VelocityField], Objective]] = {
    "interval": lambda teacher: ITVM(teacher, "interval", middle=0.5),
    "integral": lambda teacher: ITVM(teacher, "integral"),
    "step": lambda teacher: ITVM(teacher, "step"),
    "derivative": lambda teacher: ITVM(teacher, "derivative"),
    "mixed": lambda teacher: ITVM(teacher, {"interval": 3.0, "step": 1.0}, ends=0.1),
    "LMD": lambda teacher: LMD(teacher),
    "LMD through the teacher": lambda teacher: LMD(teacher, through_teacher=True),
    "flow matching": lambda teacher: FlowMatching(),
}
DISTILLS = [name for name in ALL if name != "flow matching"]


def teacher_of(seed: int = 0) -> NetworkField:
    torch.manual_seed(seed)
    return NetworkField(MLP(2, width=16, depth=2))


def student_of(teacher: NetworkField) -> FlowMap:
    """A student whose second time speaks."""
    student = FlowMap.from_field(teacher)
    torch.manual_seed(1)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    return student


def perturbed(gaussian: GaussianField) -> FlowMap:
    return FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3))


# Rows


def test_rows_are_shared_out_within_each_chunk():
    chunks = [generator(0), generator(1)]
    parts = split_rows(16, {"a": 0.5, "b": 0.25, "c": 0.25, "none": 0.0}, chunks)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "a": [0, 1, 2, 3, 8, 9, 10, 11],
        "b": [4, 5, 12, 13],
        "c": [6, 7, 14, 15],
        "none": [],
    }


@pytest.mark.parametrize("shares", [(0.3, 0.7), (1.0, 1.0, 1.0), (0.13, 0.5, 0.37)])
def test_every_row_has_one_part_and_shares_are_met(shares: tuple[float, ...]):
    names = dict(zip("abc", shares, strict=False))
    parts = split_rows(53, names, generator(0))
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(53))
    for name, share in names.items():
        assert abs(len(parts[name]) - 53 * share / sum(shares)) <= 1


def test_a_part_that_would_get_no_row_is_an_error(gaussian: GaussianField):
    one_each = [generator(n) for n in range(8)]
    with pytest.raises(ValueError, match=r"'initial' has 0.5 of the rows, which is none in chunks of 1: use larger"):
        loss_of(ITVM(gaussian), perturbed(gaussian), batch_of(gaussian, 8), generator=one_each)


@pytest.mark.parametrize("name", ALL)
def test_two_processes_see_what_one_sees(gaussian: GaussianField, name: str):
    def of(batch: Batch, chunks: list[int]) -> tuple[float, Tensor]:
        student = perturbed(gaussian)
        loss = loss_of(ALL[name](gaussian), student, batch, generator=[generator(0, chunk) for chunk in chunks])
        return value(loss), gradient(loss, student)

    whole = batch_of(gaussian, 64)
    total, slope = of(whole, [0, 1, 2, 3])
    halves = [of(Batch(data), chunks) for data, chunks in zip(whole.data.chunk(2), ([0, 1], [2, 3]), strict=True)]
    assert total == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-12)
    torch.testing.assert_close(slope, (halves[0][1] + halves[1][1]) / 2, rtol=1e-11, atol=1e-12)
    assert total == of(whole, [0, 1, 2, 3])[0]
    assert total != of(whole, [0, 1, 2, 4])[0]


@pytest.mark.parametrize("name", ALL)
def test_coupled_noise_is_used_as_it_is(gaussian: GaussianField, name: str):
    student, data = perturbed(gaussian), batch_of(gaussian).data
    drawn = torch.randn(64, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one, two = (value(loss_of(ALL[name](gaussian), student, Batch(data, noise=noise))) for noise in (drawn, -drawn))
    assert one != two
    assert one == value(loss_of(ALL[name](gaussian), student, Batch(data, noise=drawn)))


# Calls

CALLS = {
    # Calls and rows of the student, of the target, of the teacher, for a batch of 64.
    "interval": (ITVM, {"target": "interval"}, (1, 64), (2, 64), (1, 32)),
    "integral": (ITVM, {"target": "integral"}, (1, 64), (1, 32), (2, 64)),
    "step": (ITVM, {"target": "step"}, (1, 64), (1, 32), (3, 96)),
    "derivative": (ITVM, {"target": "derivative"}, (1, 64), (1, 32), (2, 64)),
    "mixed": (ITVM, {"target": {"interval": 3.0, "step": 1.0}, "diagonal": 0.25}, (1, 64), (3, 84), (3, 40)),
    "default": (ITVM, {}, (1, 64), (2, 64), (1, 32)),
    "half and half": (ITVM, {"target": "mixed"}, (1, 64), (3, 48), (2, 48)),
    "all diagonal": (ITVM, {"diagonal": 1.0}, (1, 64), (0, 0), (1, 64)),
    "none diagonal": (ITVM, {"target": "interval", "diagonal": 0.0}, (1, 64), (2, 128), (0, 0)),
    "LMD": (LMD, {}, (2, 64), (0, 0), (2, 64)),
    "LMD, none diagonal": (LMD, {"diagonal": 0.0}, (1, 64), (0, 0), (1, 64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_call_and_no_row_is_wasted(name: str):
    method, options, *expected = CALLS[name]
    teacher = teacher_of()
    student, target = student_of(teacher), student_of(teacher)
    batch = Batch(torch.randn(64, 2))
    with count_calls(student) as a, count_calls(target) as b, count_calls(teacher) as c:
        loss = loss_of(method(teacher, **options), student, batch, target=target)
        loss.total.backward()
    assert [(calls.count, calls.rows) for calls in (a, b, c)] == expected
    assert sum(map(len, loss.times.values())) == 64


# Gradients


@pytest.mark.parametrize("name", DISTILLS)
def test_neither_teacher_nor_target_learns(name: str):
    teacher = teacher_of()
    student, target = student_of(teacher), student_of(teacher)
    objective = ALL[name](teacher)
    for parameter in target.parameters():
        parameter.requires_grad_(True)
    for parameter in teacher.parameters():  # frozen by the objective; thawed here to see what would reach it
        assert not parameter.requires_grad
        parameter.requires_grad_(name != "LMD through the teacher")
    loss = loss_of(objective, student, Batch(torch.randn(32, 2)), target=target)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None for p in (*target.parameters(), *teacher.parameters()))
    assert not any(term.requires_grad for term in (*loss.terms.values(), *loss.times.values()))


def test_the_teacher_is_no_part_of_the_objective_but_moves_with_it(gaussian: GaussianField):
    for objective in (ITVM(teacher_of().train()), LMD(teacher_of().train())):
        assert objective.state_dict() == {}
        assert list(objective.parameters()) == []
        assert not objective.train().teacher.training
        objective.to(torch.float64)
        assert next(objective.teacher.parameters()).dtype == torch.float64
        student = student_of(teacher_of())
        assert objective.parameter_groups(student) == {"student": list(student.parameters())}
    assert (ITVM(gaussian).ema, LMD(gaussian).ema, FlowMatching().ema) == (0.99, None, None)


# Shapes, types, conditions


@pytest.mark.parametrize("name", DISTILLS)
def test_conditions_follow_their_rows(name: str):
    labels = torch.arange(48) % 5 - 2
    at_label = torch.stack([torch.randn(48), labels.float()], dim=1)
    # Noise and data agree in the second coordinate, so every state on the path has it too.
    batch = Batch(at_label, {"class_labels": labels}, noise=torch.stack([torch.randn(48), labels.float()], dim=1))
    loss = loss_of(ALL[name](Moving()), FlowMap(MovingNetwork()), batch)
    assert value(loss) < 1e-9
    with pytest.raises(AssertionError, match="the condition of another"):
        loss_of(ALL[name](Moving()), FlowMap(MovingNetwork()), Batch(batch.data, {"class_labels": labels.roll(1)}))


@pytest.mark.parametrize("name", ALL)
def test_images_as_their_points(gaussian: GaussianField, name: str):
    # The Gaussian of eight independent points, as images (2, 2, 2) and as vectors (8,).
    losses = []
    for shape in ((8,), (2, 2, 2)):
        field = GaussianField(torch.linspace(-1, 1, 8).double().reshape(shape), torch.eye(8).double() * 0.5)
        flat = GaussianField(field.mean.flatten(), torch.eye(8).double() * 0.5)
        student = FlowMap(Perturbed(GaussianAverageVelocity(flat), 8, 0.2))
        losses.append(value(loss_of(ALL[name](field), student, batch_of(field, 32))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision(name: str, how: str):
    teacher = teacher_of()
    student, batch = student_of(teacher), Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(4)))
    full = value(loss_of(ALL[name](teacher), student, batch))
    if how == "weights":
        student, batch = student.to(torch.bfloat16), Batch(batch.data.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = loss_of(ALL[name](teacher).to(next(student.parameters()).dtype), student, batch)
    assert loss.total.dtype == torch.float32
    assert value(loss) == pytest.approx(full, rel=0.05)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


# Refusals


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ITVM, {"target": "intervall"}, "unknown target of ITVM 'intervall': did you mean 'interval'"),
        (ITVM, {"target": {"interval": 1.0, "jump": 1.0}}, "unknown target of ITVM 'jump'"),
        (ITVM, {"target": {"interval": -1.0}}, "not negative"),
        (ITVM, {"target": {"interval": 0.0}}, "not all shares are 0"),
        (ITVM, {"diagonal": 1.5}, r"ITVM's diagonal is 1.5: it lies in \[0, 1\]"),
        (ITVM, {"ema": -0.1}, "ITVM's ema is -0.1"),
        (ITVM, {"middle": 2.0}, "ITVM's middle is 2.0"),
        (ITVM, {"step_size": float("nan")}, "ITVM's step_size is nan"),
        (ITVM, {"warmup": -1.0}, "ITVM's warmup is -1.0"),
        (ITVM, {"initial_weight": -1.0}, "not negative"),
        (ITVM, {"times": "unifrom"}, "unknown distribution of times 'unifrom': did you mean 'uniform'"),
        (LMD, {"times": "normal"}, "unknown distribution of times 'normal'"),
        (LMD, {"diagonal": -0.1}, "LMD's diagonal is -0.1"),
        (LMD, {"diagonal": 1.0}, "LMD's diagonal is 1: that leaves no row"),
        (LMD, {"ends": 2.0}, "LMD's ends is 2.0"),
    ],
)
def test_options_that_cannot_be(gaussian: GaussianField, method: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        method(gaussian, **options)
    with pytest.raises(ValueError, match="unknown distribution of times"):
        FlowMatching("cosine")


def test_students_that_cannot_be_trained(gaussian: GaussianField):
    for objective in (ITVM(gaussian), LMD(gaussian)):
        with pytest.raises(ValueError, match=r"trains a FlowMap, not a NetworkField: FlowMap.from_field\(field\)"):
            objective.check_student(teacher_of())
        with pytest.raises(ValueError, match="trains a FlowMap, not a MLP"):
            objective.check_student(MLP(2, times=2))
        elsewhere = FlowMap(MLP(2, times=2), Trigonometric())
        with pytest.raises(
            ValueError, match=r"student is on Trigonometric\(\), the teacher on Linear\(\): use teacher.on"
        ):
            objective.check_student(elsewhere)
        objective.check_student(FlowMap(MLP(2, times=2)))
    for student in (teacher_of(), elsewhere):
        FlowMatching().check_student(student)
    with pytest.raises(ValueError, match="FlowMatching trains a VelocityField or a FlowMap, not a MLP"):
        FlowMatching().check_student(MLP(2))
    with pytest.raises(ValueError, match="FlowMatching was made without a teacher and needs one"):
        _ = FlowMatching().teacher
