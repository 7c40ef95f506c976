"""The cost of a step: calls counted exactly, memory on known allocations, times in turn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.evaluation.calls import UNITS, Counts
from fewstep.evaluation.cost import Cost, compare_costs, expected_cost, probes, step_cost, unit_costs
from fewstep.evaluation.memory import Allocations
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP
from fewstep.objectives import ITVM, LMD, PFMM, FlowMatching, Loss

BATCH = Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def teacher() -> NetworkField:
    return NetworkField(MLP(2, width=8, depth=2))


@pytest.fixture
def student(teacher: NetworkField) -> FlowMap:
    return FlowMap.from_field(teacher)


class Extra(FlowMatching):
    """Flow matching that calls the student once more, on a quarter of the rows, for nothing."""

    def forward(self, student: Any, batch: Batch, **options: Any) -> Loss:
        with torch.no_grad():
            student.velocity(batch.data[:16], torch.zeros(16))
        return super().forward(student, batch, **options)


def counts(student: FlowMap, objective: Any) -> Counts:
    return step_cost(student, objective, BATCH, rounds=1).counts


def test_calls_are_counted_exactly(teacher: NetworkField, student: FlowMap) -> None:
    assert counts(student, FlowMatching()) == Counts(trained=1, calls=1)
    # The teacher on the diagonal half, the target twice on the other, the student on all.
    assert counts(student, ITVM(teacher)) == Counts(trained=1, plain=1.5, calls=4)
    assert counts(student, ITVM(teacher, target="derivative")) == Counts(
        trained=1, plain=1, tangent=0.5, calls=4, jvps=1
    )
    lmd = counts(student, LMD(teacher, through_teacher=False, diagonal=0.25))
    assert lmd == Counts(trained=0.25, plain=1, tangent_trained=0.75, calls=4, jvps=1)
    through = counts(student, LMD(teacher, through_teacher=True, diagonal=0.25))
    assert through == Counts(trained=0.25, plain=0.25, frozen=0.75, tangent_trained=0.75, calls=4, jvps=1)


def test_a_call_more_shows(student: FlowMap) -> None:
    assert counts(student, Extra()) == Counts(trained=1, plain=0.25, calls=2)
    assert expected_cost(counts(student, Extra())) == pytest.approx(1 + 0.25 / 3)


def test_a_guided_teacher_is_two_and_frozen_copies_of_the_objective_count(teacher: NetworkField) -> None:
    labelled = NetworkField(MLP(2, width=8, depth=2, classes=3))
    student = FlowMap.from_field(labelled)
    batch = Batch(BATCH.data, {"class_labels": torch.arange(64) % 2})
    guided = Guided(labelled, 2.0, null={"class_labels": 2})
    assert step_cost(student, ITVM(guided), batch, rounds=1).counts == Counts(trained=1, plain=2, calls=4)
    # PFMM's rounds start from a copy of the student that the objective keeps.
    assert counts(FlowMap.from_field(teacher), PFMM(teacher)).plain > 1


def test_each_probe_is_one_call_of_its_kind(student: FlowMap) -> None:
    costs = compare_costs(probes(student), BATCH, rounds=3)
    assert {kind: costs[kind].counts.rows for kind in UNITS} == {kind: {kind: 1.0} for kind in UNITS}
    units = unit_costs(costs)
    assert units["trained"] == 1
    assert expected_cost(Counts(trained=1, plain=1.5), units) == pytest.approx(1 + 1.5 * units["plain"])


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    slow, base = Cost((2.0, 30.0, 3.0), 0, Counts()), Cost((1.0, 10.0, 1.0), 0, Counts())
    assert slow.over(base) == 3.0  # a round in which the machine was ten times as slow says as much as another
    assert slow.seconds == 3.0


def test_methods_take_turns_on_the_same_random_numbers(student: FlowMap) -> None:
    seen: list[tuple[str, int, int]] = []

    class Logged(FlowMatching):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, student: Any, batch: Batch, *, step: int = 0, generator: Any, **options: Any) -> Loss:
            seen.append((self.name, step, generator.initial_seed()))
            assert options["progress"] == 0.5
            return super().forward(student, batch, step=step, generator=generator, **options)

    before = torch.get_rng_state()
    costs = compare_costs({name: (student, Logged(name), None) for name in "ab"}, BATCH, rounds=2)
    assert [{(name, step) for name, step, _ in seen[i : i + 2]} for i in (4, 6)] == [
        {("a", 2), ("b", 2)}, {("a", 3), ("b", 3)},
    ]  # fmt: skip
    assert seen[4][2] == seen[5][2] != seen[6][2]
    assert len(costs["a"].times) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in student.parameters())
    with pytest.raises(ValueError, match="rounds is 0"):
        compare_costs({"a": (student, FlowMatching(), None)}, BATCH, rounds=0)


def test_memory_of_known_tensors() -> None:
    x = torch.ones(1000)
    with Allocations() as made:
        a = x * 2
        a.add_(1)
        view = a.view(10, 100)
        b = view + 1
        assert made.now == 8000  # neither a view nor what is written in place is new
        del a, view
        assert made.now == 4000
        c = b * 2
        del b, c
    assert (made.now, made.peak) == (0, 8000)


def test_memory_kept_for_the_backward_pass_counts_and_gradients_of_weights_do_not() -> None:
    class Deep(nn.Module):
        """Keeps ``depth`` activations of 400 bytes a row, and as many weights of 40,000 bytes."""

        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(100, 100, bias=False) for _ in range(depth))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def peak(depth: int, rows: int) -> int:
        return step_cost(NetworkField(Deep(depth)), FlowMatching(), Batch(torch.randn(rows, 100)), rounds=1).peak_bytes

    assert peak(20, 1000) - peak(10, 1000) == 10 * 1000 * 400
    assert peak(20, 1) < 2.5 * 40_000  # all gradients at once would be 20 of them


def test_forward_mode_keeps_its_tangents(teacher: NetworkField, student: FlowMap) -> None:
    costs = {
        name: step_cost(student, objective, Batch(torch.randn(640, 2)), rounds=1).peak_bytes
        for name, objective in {"FM": FlowMatching(), "ITVM": ITVM(teacher), "LMD": LMD(teacher, diagonal=0)}.items()
    }
    assert costs["ITVM"] < 1.15 * costs["FM"]
    assert costs["LMD"] > 2 * costs["FM"]
