"""Improved MeanFlow with guidance learned from labelled data, and with its velocity head (arXiv 2512.02012)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.objectives import SolvedAverageVelocity, origins, three_states
from toys.students import field_of, loud
from toys.students import rows as rows_of

from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.data.batch import Batch
from fewstep.evaluation.points import rmse
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField, MixtureField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.networks import MLP, ContinuousUNet, Conv1dNet
from fewstep.objectives import ImprovedMeanFlow
from fewstep.objectives.rows import Now, Rows
from fewstep.objectives.velocity_head import VelocityHead
from fewstep.planning.counting import count_step
from fewstep.runs.loading import load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.fit import fit

NULL = {"class_labels": 2}
MEANS, SCALE = [[0.8, 0.2], [-0.6, -0.4]], 0.6


def classes(dtype: torch.dtype = torch.float64) -> tuple[GaussianField, GaussianField, MixtureField]:
    """Two classes, and both together in equal parts."""
    means = torch.tensor(MEANS, dtype=dtype)
    one, other = (GaussianField(mean, SCALE**2 * torch.eye(2, dtype=dtype)) for mean in means)
    return one, other, MixtureField(means, torch.full((2,), SCALE, dtype=dtype), torch.full((2,), 0.5, dtype=dtype))


class Truth(nn.Module):
    """The average velocity of the first class, guided by a strength at all times; without a label, of both classes."""

    def __init__(self, strength: float, size: float = 0.0) -> None:
        super().__init__()
        one, _, both = classes()
        self.guided = SolvedAverageVelocity(Guided(one, strength, weak=both))
        self.plain = SolvedAverageVelocity(both)
        self.off = nn.Parameter(torch.tensor(size, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, guidance: Tensor, class_labels: Tensor) -> Tensor:
        guided, plain = self.guided(x, s, t), self.plain(x, s, t)
        return torch.where((class_labels == 2)[:, None], plain, guided) + self.off * x.roll(1, 1)


def all_that_led_there(strength: float, interval: tuple[float, float] = (0.0, 1.0), label: int = 0) -> Any:
    """Rows at three states on ways of .3, with all noise and data that can have led there, and their weights."""
    one, _, both = classes()
    states = three_states(length=0.3)
    noise, data, weights = origins(one if label == 0 else both, states.x, states.s)
    each = weights.shape[1]
    x, s, t = (value.repeat_interleave(each, 0) for value in states)
    noise, data = noise.reshape(-1, 2), data.reshape(-1, 2)
    told = torch.tensor([strength, *interval], dtype=torch.float64).expand(len(x), 3)
    cond = {"class_labels": torch.full((len(x),), label), "guidance": told}
    return Rows("mean", x, data - noise, s, t, noise, data, s, cond), weights


def mean_over(values: Tensor, weights: Tensor) -> Tensor:
    return (values.reshape(*weights.shape, 2) * weights[..., None]).sum(1)


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_guidance_that_is_learned_is_that_of_the_classes(strength: float) -> None:
    """At the exact guided velocity the goal is that velocity, on average over the data; so it is for u off the
    diagonal. Outside the interval the goal is the class's own velocity, without a label that of all."""
    one, _, both = classes()
    objective = ImprovedMeanFlow(guided=True, null=NULL, head=False)
    student = FlowMap(Truth(strength))
    rows, weights = all_that_led_there(strength)
    x, s, t = (value[:: weights.shape[1]] for value in (rows.x, rows.s, rows.t))
    with torch.no_grad():
        own = student.velocity(rows.x, rows.s, **rows.cond)
        found = mean_over(objective.guided_velocity(student, rows, own), weights)
        expected = both(x, s) + strength * (one(x, s) - both(x, s))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

        goal = objective.mean_goal(student, rows, objective.guided_velocity(student, rows, own), own)
        exact = SolvedAverageVelocity(Guided(one, strength, weak=both))(x, s, t)
        torch.testing.assert_close(mean_over(goal, weights), exact, rtol=0, atol=1e-7)

        late, weights = all_that_led_there(strength, interval=(0.2, 0.5))
        found = mean_over(objective.guided_velocity(student, late, own), weights)
        inside = ((s >= 0.2) & (s <= 0.5))[:, None]
        assert inside.any()
        assert not inside.all()
        torch.testing.assert_close(found, torch.where(inside, expected, one(x, s)), rtol=0, atol=1e-9)

        blank, weights = all_that_led_there(strength, label=2)
        none = student.velocity(blank.x, blank.s, **blank.cond)
        found = mean_over(objective.guided_velocity(student, blank, none), weights)
        torch.testing.assert_close(found, both(x, s), rtol=0, atol=1e-9)

        # Another map is found out.
        other = FlowMap(Truth(strength, size=0.1))
        own = other.velocity(rows.x, rows.s, **rows.cond)
        rows, weights = all_that_led_there(strength)
        goal = objective.mean_goal(other, rows, objective.guided_velocity(other, rows, own), own)
        off = mean_over(other.average_velocity(rows.x, rows.s, rows.t, **rows.cond) - goal, weights)
        assert off.abs().max() > 1e-2


def test_the_loss_is_that_of_the_goal_along_the_models_own_velocity() -> None:
    """Row by row: along the noisy velocity the goal has the same mean, and another value."""
    objective, student = ImprovedMeanFlow(guided=True, null=NULL, head=False), FlowMap(Truth(2.5, size=0.1))
    rows, _ = all_that_led_there(2.5)
    parts: Any = {"tangent": slice(0, 0), "mean": slice(None)}
    with torch.no_grad():
        own = student.velocity(rows.x, rows.s, **rows.cond)
        goal = objective.mean_goal(student, rows, objective.guided_velocity(student, rows, own), own)
        error = (student.average_velocity(rows.x, rows.s, rows.t, **rows.cond) - goal).square().mean(1)
        torch.testing.assert_close(objective.errors(student, rows, parts, Now())["mean"], error)
        # With a head it is the head's velocity.
        points = small().double()
        objective = ImprovedMeanFlow(guided=True, null=NULL)
        objective.adopt(points)
        assert objective.head is not None
        objective.head.layer.bias.add_(0.5)  # pyright: ignore
        u, v = objective.head(points, rows.x, rows.s, rows.t, rows.cond)
        velocity = objective.guided_velocity(points, rows, v)
        found = objective.errors(points, rows, parts, Now())
        goal = objective.mean_goal(points, rows, velocity, v)
        torch.testing.assert_close(found["mean"], (u - goal).square().mean(1))
        torch.testing.assert_close(found["head"], (v - velocity).square().mean(1))


def labelled(rows: int = 4096, dtype: torch.dtype = torch.float64) -> Batch:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (rows,), generator=draw)
    data = torch.tensor(MEANS, dtype=dtype)[labels] + SCALE * torch.randn(rows, 2, generator=draw, dtype=dtype)
    return Batch(data, {"class_labels": labels})


def small(interval: bool = True, **options: Any) -> FlowMap:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FlowMap(MLP(2, width=64, depth=3, times=2, classes=3, guidance="interval" if interval else True))


def test_what_rows_are_told() -> None:
    objective, student, batch = (
        ImprovedMeanFlow(guided=True, null=NULL, drop=0.2),
        small(),
        labelled(dtype=torch.float32),
    )
    rows, _ = objective._draw(student, batch, generator(0), Now())
    strength, low, high = rows.cond["guidance"].unbind(1)
    # A density of 1/w on [1, 8] is a uniform logarithm.
    place = strength.log() / torch.tensor(8.0).log()
    grid = torch.linspace(0, 1, len(batch))
    assert (place.sort().values - grid).abs().max() < 0.03
    assert (low.sort().values - grid / 2).abs().max() < 0.03
    assert (high.sort().values - (1 + grid) / 2).abs().max() < 0.03
    dropped = rows.cond["class_labels"] == 2
    assert abs(float(dropped.float().mean()) - 0.2) < 0.03
    assert torch.equal(rows.cond["class_labels"][~dropped], batch.cond["class_labels"][~dropped])
    objective.adopt(student)
    loss = objective(student, batch, generator=generator(0))
    assert {name: len(times) for name, times in loss.times.items()} == {"tangent": 2048, "mean": 2048, "head": 4096}
    assert float(loss.total.detach()) == pytest.approx(float(sum(loss.terms.values())), rel=1e-6)
    # A student that is told the strength alone has it at all times; the draws of times are those of no guidance.
    alone, _ = objective._draw(small(interval=False), batch, generator(0), Now())
    assert torch.equal(alone.cond["guidance"], strength)
    plain, _ = ImprovedMeanFlow()._draw(student, batch, generator(0), Now())
    assert torch.equal(plain.s, rows.s)
    assert set(plain.cond) == {"class_labels"}


def test_a_fraction_stands_for_no_class() -> None:
    objective = ImprovedMeanFlow(guided=True, null={"class_labels": 1.5})
    with pytest.raises(ValueError, match=r"null: class_labels is 1\.5, .* has whole numbers"):
        objective._draw(small(), labelled(32, dtype=torch.float32), generator(0), Now())


# Networks of fewstep's own, and the shape of a row.
OWN: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: MLP(2, width=16, depth=2), (2,)),
    "conv1d": (lambda: Conv1dNet(2, 8, width=16, depth=2), (2, 8)),
    "continuous": (lambda: ContinuousUNet((1, 8, 8), widths=(8, 16), steps=1), (1, 8, 8)),
}


@pytest.mark.parametrize("name", [*OWN, "unet", "unet of classes", "sd", "dit"])
def test_a_head_begins_as_the_output_that_it_stands_beside(name: str) -> None:
    field: Any = NetworkField(OWN[name][0]()) if name in OWN else field_of(name)
    student = FlowMap.from_field(field)
    x, cond = (torch.randn(2, *OWN[name][1]), {}) if name in OWN else rows_of(name)
    loud(student)
    head, s, t = VelocityHead(student), torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.9])
    with count_calls(student) as calls:
        u, v = head(student, x, s, t, cond)
    assert calls.count == 1
    torch.testing.assert_close(u, student.average_velocity(x, s, t, **cond), rtol=0, atol=0)
    torch.testing.assert_close(v, u)
    (v.sum() + 0 * u.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.layer.parameters())
    with torch.no_grad():
        for p in head.layer.parameters():
            p.mul_(2)
        assert not torch.allclose(head(student, x, s, t, cond)[1], v)


@pytest.mark.parametrize(("head", "calls"), [(True, 3), (False, 4)])
def test_what_a_step_costs(head: bool, calls: int) -> None:
    """u, which says v too; v_null; and the derivative. Without a head v is a call more."""
    student, objective = small(), ImprovedMeanFlow(guided=True, null=NULL, head=head)
    objective.adopt(student)
    with count_calls(student) as made:
        objective(student, labelled(64, torch.float32), generator=generator(0))
    assert made.count == calls


def test_a_step_is_counted_before_there_are_numbers() -> None:
    """As ``fewstep plan`` does, on tensors without any."""
    student, (x, cond) = FlowMap.from_field(field_of("dit"), guidance="interval").to("meta"), rows_of("dit")
    batch = Batch(x.repeat(4, 1, 1, 1).to("meta"), {name: value.repeat(4).to("meta") for name, value in cond.items()})
    counted = []
    for head in (True, False):
        objective = ImprovedMeanFlow(guided=True, null={"class_labels": 5}, head=head)
        objective.adopt(student)
        counted.append(count_step(student, objective, batch).flops)
    assert 0 < counted[0] < counted[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guided": True}, "say both guided: true and null"),
        ({"null": NULL}, "say both guided: true and null"),
        ({"guided": True, "null": NULL, "drop": 0.0}, "drop is 0: without rows that lose their labels"),
        ({"guided": True, "null": NULL, "strengths": (0.0, 2.0)}, "strengths run from 0.0 to 2.0"),
        (
            {"guided": True, "null": NULL, "scale": 9.0},
            r"scale is 9.0, outside the strengths that it learns, \[1.0, 8.0\]",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImprovedMeanFlow(**options)


def test_students_and_data_that_do_not_fit() -> None:
    objective = ImprovedMeanFlow(guided=True, null=NULL)
    one, _, both = classes()
    with pytest.raises(ValueError, match="is guided, and so is its teacher: leave one of them out"):
        ImprovedMeanFlow(Guided(one, 2.0, weak=both), guided=True, null=NULL)
    with pytest.raises(ValueError, match=r"its MLP takes none: FlowMap.from_field\(field, guidance='interval'\)"):
        objective.check_student(FlowMap(MLP(2, width=8, times=2, classes=3)))
    with pytest.raises(ValueError, match=r"a Truth has no place for a velocity head, .*: say head: false"):
        objective.check_student(FlowMap(Truth(2.0)))
    student = small()
    objective.adopt(student)
    assert student.guidance == 2.0
    with pytest.raises(ValueError, match="null names 'class_labels', a condition that the data has not: none"):
        objective(student, Batch(torch.randn(8, 2)), generator=generator(0))
    told = Batch(torch.randn(8, 2), {"class_labels": torch.zeros(8, dtype=torch.long), "guidance": torch.ones(8)})
    with pytest.raises(ValueError, match="draws the strength of guidance, and the data has one"):
        objective(student, told, generator=generator(0))
    with pytest.raises(ValueError, match=r"call objective.adopt\(student\) before the first step"):
        ImprovedMeanFlow(head=True)(student, labelled(8, torch.float32), generator=generator(0))
    student.network.compile()
    with pytest.raises(ValueError, match="sees nothing inside a compiled network: say head: false, or compile: false"):
        objective(student, labelled(8, torch.float32), generator=generator(0))


@pytest.mark.takes_seconds
def test_guided_samples_are_those_of_the_guided_classes() -> None:
    """The end points of the exact classes guided by 3, which the same training without guidance is far from, and one
    without a head farther than one with it."""
    one, _, both = classes(torch.float32)
    batch = labelled(dtype=torch.float32)
    noise, labels = torch.randn(500, 2, generator=generator(3)), torch.zeros(500, dtype=torch.long)
    ends = sample(Guided(one, 3.0, weak=both), noise, 100)
    found = []
    for options in ({"guided": True, "null": NULL}, {"guided": True, "null": NULL, "head": False}, {}):
        objective, student = ImprovedMeanFlow(**options), small()
        data = ArrayData(batch.data, batch.cond)
        made = fit(student, objective, data, steps=400, batch=256, lr=3e-3, ema=0.99, quiet=True).ema
        cond: dict[str, Any] = {"class_labels": labels, **({"guidance": torch.full((500,), 3.0)} if options else {})}
        found.append(rmse(sample(made, noise, 2, **cond), ends))
    with_head, without, plain = found
    assert with_head < 0.7 * plain, found
    assert with_head < without < 0.95 * plain, found


@pytest.mark.takes_seconds
def test_a_run_by_recipe_is_told_guidance_and_sampled_with_it(tmp_path: Any) -> None:
    import numpy as np

    batch = labelled(512, torch.float32)
    np.savez(tmp_path / "points.npz", data=batch.data.numpy(), labels=batch.cond["class_labels"].numpy())
    recipe = {
        "name": "guided", "data": str(tmp_path / "points.npz"),
        "student": {"network": "mlp", "options": {"width": 16, "depth": 2, "classes": 3}},
        "objective": {"name": "ImprovedMeanFlow", "guided": True, "null": NULL, "scale": 3.0},
        "training": {"steps": 4, "batch": 64, "quiet": True, "checkpoint_every": 2}, "evaluation": {"count": 0},
    }  # fmt: skip
    loaded = load_recipe(recipe)
    assert loaded.student.guidance == "interval"
    run(loaded, tmp_path / "run")
    student = load_run(tmp_path / "run")
    assert isinstance(student, FlowMap)
    assert student.guidance == 3.0
    assert student.network.takes_interval
    assert not any("head" in name for name in student.state_dict())
    # It goes on where it was, head and all, as a run that was never stopped does.
    run(load_recipe({**recipe, "training": {**recipe["training"], "schedule": "constant"}}), tmp_path / "short")
    for name, steps in (("short", 8), ("whole", 8)):
        longer = {**recipe["training"], "schedule": "constant", "steps": steps}
        run(load_recipe({**recipe, "training": longer}), tmp_path / name)
    parts, whole = (load_run(tmp_path / name).state_dict() for name in ("short", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
