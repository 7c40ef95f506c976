"""How far samples of one model are from each other, in closed form and through ``evaluate``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.arrays import ArrayData
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.variety import diversity, mean_distance, spreads
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap


def normal(rows: int, dims: int) -> Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_mean_distance_of_known_points_and_of_normals():
    assert mean_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    # Two of N(0, I) in D dimensions are 2 Gamma((D + 1) / 2) / Gamma(D / 2) apart on average.
    expected = 2 * math.exp(math.lgamma(5 / 2) - math.lgamma(4 / 2))
    assert mean_distance(normal(4000, 4)) == pytest.approx(expected, rel=0.01)
    with pytest.raises(ValueError, match="1 rows have no distance"):
        mean_distance(torch.zeros(1, 2))


def test_diversity_of_a_scaling_is_its_factor_and_of_one_point_is_zero():
    x, labels = normal(300, 5), torch.arange(300) % 3
    teacher = spreads(x, labels)
    # Each class about a centre of its own, which does not count, and shrunk by a factor of its own, which does.
    factor = torch.tensor([0.5, 1.0, 0.75], dtype=torch.float64)[labels, None]
    own = spreads(factor * x + 100 * labels[:, None], labels)
    assert diversity(own, teacher) == pytest.approx(0.75, abs=1e-12)
    assert diversity(spreads(torch.zeros_like(x), labels), teacher) == 0.0
    assert diversity(spreads(3 * x), spreads(x)) == pytest.approx(3.0, abs=1e-12)


def test_what_cannot_be_compared_does_not_count():
    x, labels = normal(6, 2), torch.tensor([0, 0, 1, 1, 2, 3])
    own = spreads(x, labels)
    assert list(own) == [0, 1]  # the others have one row
    assert diversity(own, {0: own[0] / 2, 1: 0.0, 7: 1.0}) == 2.0  # a teacher that stands still says nothing
    assert diversity(own, {}) is None


def test_sixty_four_of_a_class_are_compared():
    x, labels = normal(200, 2), torch.arange(200) % 2
    assert spreads(x, labels)[1] == mean_distance(x[1::2][:64])


class Shrunk(nn.Module):
    """A flow to N(mean, 0.04 I), shrunk about its mean by a factor: a velocity, and an average velocity."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.asked = factor, []

    def forward(self, x: Tensor, s: Tensor, t: Tensor | None = None, **cond: Tensor) -> Tensor:
        self.asked.append(cond)
        label = cond.get("class_labels", cond.get("place"))
        mean = 0.0 if label is None else label.to(x).view(-1, *[1] * (x.ndim - 1))
        if t is None:  # the straight field to a point is exact in any number of steps
            return (mean + 0.2 * self.factor * self._start(x, s, mean)) - self._start(x, s, mean)
        return mean + 0.2 * self.factor * x - x  # one step from noise

    def _start(self, x: Tensor, s: Tensor, mean: Any) -> Tensor:
        """The noise of a state ``(1 - s) noise + s (mean + 0.2 factor noise)``."""
        time = s.view(-1, *[1] * (x.ndim - 1))
        return (x - time * mean) / (1 - time + 0.2 * self.factor * time)


def rows(count: int, cond: str | None) -> ArrayData:
    draw = torch.Generator().manual_seed(1)
    where = torch.arange(count) % 2 if cond == "class_labels" else torch.arange(count) / 100
    points = 0.2 * torch.randn(count, 3, generator=draw) + (0 if cond is None else where[:, None])
    return ArrayData(points, None if cond is None else {cond: where})


def measured(cond: str | None, count: int = 700, **options: Any) -> Any:
    """A student that is half as diverse as its teacher."""
    student, teacher = FlowMap(Shrunk(0.5)), NetworkField(Shrunk())
    found = evaluate(
        student, teacher=teacher, data=rows(2 * count, cond), steps=(1,), teacher_steps=(1, 16), count=count, **options
    )
    return found, student, teacher


@pytest.mark.parametrize("cond", [None, "class_labels", "place"])
def test_a_student_half_as_diverse_has_one_half_whatever_is_asked_for(cond: str | None):
    found, student, _ = measured(cond)
    assert list(found.rows[0])[-1] == "diversity"
    assert [row["diversity"] for row in found.rows] == pytest.approx([0.5, 1.0, 1.0], rel=1e-4)
    # Rows of the data are as diverse as the teacher; of each place there is one alone.
    assert ("diversity" in found.floor) == (cond != "place")
    if cond != "place":
        assert found.floor["diversity"] == pytest.approx(1.0, abs=0.1)
        assert sum(len(some.get(cond, range(700))) for some in student.network.asked) == 700  # no sample more
    else:  # one condition, 64 times: a tenth of 700 is no more
        asked = student.network.asked[-1]["place"]
        assert asked.tolist() == [asked[0]] * 64


def test_samples_of_their_own_are_drawn_where_they_are_few_or_asked_for():
    found, student, _ = measured("place", count=100)
    assert "diversity" not in found.rows[0]
    assert sum(len(some["place"]) for some in student.network.asked) == 100
    found, student, _ = measured("place", count=100, metrics=["diversity"])
    assert found.rows[0]["diversity"] == pytest.approx(0.5, rel=1e-4)
    assert found.rows[0]["nfe"] == 1  # they do not count as calls of a sample
    ticks: list[tuple[int, int]] = []
    measured("place", metrics=["diversity"], progress=lambda *tick: ticks.append(tick))
    assert ticks[-1][0] == ticks[-1][1] == 2 * (1 + 1 + 16)


def test_a_class_that_the_data_do_not_tell_has_no_floor():
    field = GaussianField(torch.zeros(2), torch.eye(2))
    student = FlowMap(Shrunk())
    teacher, cond = NetworkField(Shrunk()), {"class_labels": torch.arange(2)}
    found = evaluate(
        student, teacher=teacher, data=field.data(400, torch.Generator()), steps=(1,), count=100, cond=cond,
        teacher_steps=(16,),
    )  # fmt: skip
    assert found.rows[0]["diversity"] == pytest.approx(1.0, rel=1e-4)
    assert "diversity" not in found.floor


def test_a_teacher_of_few_steps_does_not_say_how_diverse_samples_should_be():
    field = GaussianField(torch.zeros(2), torch.eye(2))
    options: dict[str, Any] = {"teacher": field, "steps": (1,), "count": 20}
    assert "diversity" not in evaluate(FlowMap(Shrunk()), teacher_steps=(1, 15), **options).rows[0]
    with pytest.raises(ValueError, match=r"'diversity' cannot be had here.* 16 of teacher_steps or more"):
        evaluate(FlowMap(Shrunk()), teacher_steps=(15,), metrics=["diversity"], **options)
