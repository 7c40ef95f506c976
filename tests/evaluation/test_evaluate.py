"""Quality against network calls: on exact maps and on images whose features are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.randomness import sample_generators
from fewstep.data import densities, load_data
from fewstep.data.arrays import ArrayData
from fewstep.data.batch import Batch
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.extractor import extract
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, precision_recall
from fewstep.evaluation.inception import Inception
from fewstep.evaluation.measure import ENDS
from fewstep.evaluation.points import error_quantiles, outside, rmse, sliced_wasserstein
from fewstep.evaluation.results import Evaluation, alike, compare
from fewstep.flows.exact import CheckerboardField, GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_noise
from fewstep.networks import MLP


@pytest.fixture
def field() -> GaussianField:
    return GaussianField(torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))


class ExactNetwork(nn.Module):
    """The average velocity of an exact flow, and an offset."""

    def __init__(self, field: GaussianField, offset: float = 0.0) -> None:
        super().__init__()
        self.field, self.offset = field, nn.Parameter(torch.tensor(offset))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return (self.field.flow(x, s, t) - x) / (t - s)[:, None] + self.offset


class Labelled(nn.Module):
    """A data-predicting network, for maps and fields alike: images (1, 4, 4) of the value of their label."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, *times: Tensor, class_labels: Tensor) -> Tensor:
        self.asked.append(class_labels)
        return class_labels.to(x)[:, None, None, None].expand_as(x) / 10 + 0.01 * x


class Features(nn.Module):
    """Three numbers of an image; tells the class of ``Labelled``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight

    def classify(self, x: Tensor) -> Tensor:
        return -(x.flatten(1).mean(1, keepdim=True) - torch.arange(3) / 10).abs()


def images(rows: int) -> ArrayData:
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (rows,), generator=draw)
    return ArrayData(
        labels[:, None, None, None] / 10 + 0.05 * torch.randn(rows, 1, 4, 4, generator=draw), {"class_labels": labels}
    )


def test_an_exact_map_is_exact_at_any_step_count_and_its_teacher_as_far_off_as_euler_is(field: GaussianField):
    found = evaluate(FlowMap(ExactNetwork(field)), teacher=field, steps=(1, 4), teacher_steps=(1, 3), count=300)
    assert [(r["model"], r["steps"], r["nfe"]) for r in found.rows] == [
        ("student", 1, 1), ("student", 4, 4), ("teacher", 1, 1), ("teacher", 3, 3),
    ]  # fmt: skip
    assert max(r["rmse"] for r in found.rows[:2]) < 1e-5
    noise = sample_noise((300, 2), sample_generators(0, range(300)))
    by_hand = rmse(noise + field(noise, 0.0), field.flow(noise, 0.0, 1.0))
    assert found.rows[2]["rmse"] == pytest.approx(by_hand, rel=1e-5)
    ends = error_quantiles(noise + field(noise, 0.0), field.flow(noise, 0.0, 1.0))
    assert [found.rows[2][name] for name in ENDS[1:]] == pytest.approx(ends, rel=1e-5)
    assert found.rows[3]["rmse"] < 0.5 * by_hand
    # The exact map is as good as data; one Euler step makes a single point of them (its velocity is mean - x).
    assert found.rows[0]["sliced_w2"] < 3 * found.floor["sliced_w2"] + 0.02
    assert found.rows[2]["sliced_w2"] > 0.5
    assert set(found.floor) == {"sliced_w2", "energy", "histogram_kl"}


def test_a_shifted_map_is_off_by_its_shift(field: GaussianField):
    # The two coordinates are each off by 0.3, whatever the number of steps for which a shift adds up exactly.
    found = evaluate(FlowMap(ExactNetwork(field, 0.3)), teacher=field, steps=(1,), teacher_steps=(1,), count=100)
    assert found.rows[0]["rmse"] == pytest.approx(0.3 * 2**0.5, rel=1e-5)


def test_no_number_depends_on_the_batch_and_all_on_the_seed(field: GaussianField):
    model = FlowMap(MLP(2, width=8, depth=2, times=2))
    options: dict[str, Any] = {"teacher": field, "steps": (2,), "teacher_steps": (2,), "count": 50}
    one, other = (evaluate(model, batch=batch, **options) for batch in (50, 7))
    for a, b in zip(one.rows, other.rows, strict=True):
        assert list(a.values())[3:] == pytest.approx(list(b.values())[3:], rel=1e-5)
    assert one.floor == other.floor
    torch.testing.assert_close(one.samples["student 2"], other.samples["student 2"])
    assert evaluate(model, seed=1, **options).rows[0]["rmse"] != pytest.approx(one.rows[0]["rmse"], rel=1e-3)
    more = evaluate(model, **{**options, "count": 90})
    torch.testing.assert_close(more.samples["student 2"][:50], one.samples["student 2"])


def test_a_teacher_without_a_closed_form_is_solved_once(field: GaussianField):
    class Network(nn.Module):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return field(x, t)

    network, exact = Network(), FlowMap(ExactNetwork(field))
    ticks: list[tuple[int, int]] = []
    found = evaluate(
        exact, teacher=NetworkField(network), data=field.data(200, torch.Generator()), steps=(1, 2), teacher_steps=(3,),
        count=20, batch=10, progress=lambda done, total: ticks.append((done, total)),
    )  # fmt: skip
    assert network.calls == 2 * (256 + 3)
    assert ticks[-1] == (2 * (256 + 3 + 1 + 2),) * 2
    assert [done for done, _ in ticks] == [*range(1, ticks[-1][1] + 1)]  # after each call, of a batch of any size
    # 128 midpoint steps are as good as exact.
    assert found.rows[0]["rmse"] < 1e-4


def test_calls_are_counted_guidance_makes_two(field: GaussianField):
    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return field(x, t) * (1 + class_labels[:, None])

    guided = Guided(NetworkField(Network()), 2.0, (0.0, 0.6), null={"class_labels": 0})
    data = field.data(100, torch.Generator())
    found = evaluate(guided, data=data, steps=(1, 4), count=10, cond={"class_labels": 2})
    # Of the times 0, 1/4, 1/2, 3/4 three are guided.
    assert [row["nfe"] for row in found.rows] == [2, 7]


def test_images_are_measured_by_features():
    data, network, extractor = images(200), Labelled(), Features()
    model = FlowMap(network, prediction="data")
    found = evaluate(model, data=data, steps=(1,), count=100, batch=30, extractor=extractor)
    assert list(found.rows[0]) == [
        "model", "steps", "nfe", "fd", "feature_w2", "kid", "precision", "recall", "accuracy",
    ]  # fmt: skip
    # By hand: all rows but in the data's order, which features do not see; the labels are those of 100 of the rows.
    labels = torch.cat(network.asked)
    draws = sample(model, sample_noise((100, 1, 4, 4), sample_generators(0, range(100))), 1, class_labels=labels)
    rows = torch.randperm(200, generator=_rows_of(0))[:100]
    real = data.rows(rows, torch.Generator())
    assert torch.equal(labels, real.cond["class_labels"])
    a, b = extract(extractor, real.data), extract(extractor, draws)
    fd = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert found.rows[0]["fd"] == pytest.approx(fd, rel=1e-4)
    assert (found.rows[0]["precision"], found.rows[0]["recall"]) == precision_recall(a, b)
    assert found.rows[0]["feature_w2"] == pytest.approx(sliced_wasserstein(a, b), rel=1e-4)
    assert found.rows[0]["accuracy"] == 1.0
    assert 0.0 <= found.floor["fd"] < 0.2
    assert found.floor["accuracy"] > 0.95  # a mean of 16 values with 0.05 / 4 of noise
    assert found.samples["student 1"].shape == (64, 1, 4, 4)
    assert torch.equal(found.samples["data"], real.data[:64])


def _rows_of(seed: int) -> torch.Generator:
    from fewstep.common.randomness import generator
    from fewstep.evaluation import inputs as module

    return generator(seed, module._ROWS)


def test_accuracy_sees_the_wrong_class():
    class Stubborn(Labelled):
        def forward(self, x: Tensor, *times: Tensor, class_labels: Tensor) -> Tensor:
            return super().forward(x, *times, class_labels=torch.zeros_like(class_labels))

    model, cond = FlowMap(Stubborn(), prediction="data"), {"class_labels": torch.arange(3)}
    found = evaluate(
        model, data=images(50), steps=(1,), count=90, extractor=Features(), cond=cond, metrics=["accuracy"]
    )
    assert found.rows[0]["accuracy"] == pytest.approx(1 / 3)  # labels 0, 1, 2 in turn
    assert list(found.rows[0]) == ["model", "steps", "nfe", "accuracy"]
    assert found.floor == {}  # 50 rows are not two sets of 90


def test_labels_are_drawn_uniformly_where_asked():
    network = Labelled()
    model, cond = FlowMap(network, prediction="data"), {"class_labels": 3}
    evaluate(model, data=images(50), steps=(1,), count=3000, extractor=Features(), cond=cond, metrics=["accuracy"])
    counts = torch.cat(network.asked).bincount(minlength=3)
    # 1000 of each, give or take 26 (one standard deviation).
    assert (counts - 1000).abs().max() < 130


def test_images_of_a_costly_teacher_are_solved_in_part(monkeypatch: pytest.MonkeyPatch):
    import fewstep.evaluation.evaluate as module

    monkeypatch.setattr(module, "_SOLVED", 8)
    network = Labelled()
    teacher, options = NetworkField(network, prediction="data"), {"steps": (1,), "teacher_steps": (1, 20), "batch": 5}
    student = FlowMap(Labelled(), prediction="data")
    found = evaluate(student, teacher=teacher, data=images(60), count=24, metrics=["rmse"], **options)
    assert found.facts["ends"] == 8
    assert sum(map(len, network.asked)) == 8 * 256 + 24 * (1 + 20)

    labels = (found.samples["student 1"].flatten(1).mean(1) * 10).round().long()
    noise = sample_noise((24, 1, 4, 4), sample_generators(0, range(24)))
    ends = sample(teacher, noise, 128, solver="midpoint", class_labels=labels)
    one = sample(teacher, noise, 1, class_labels=labels)
    assert found.rows[1]["rmse"] == pytest.approx(rmse(one[:8], ends[:8]), rel=1e-3)
    assert found.rows[2]["rmse"] < found.rows[1]["rmse"]


def test_fid_is_the_name_for_inception_alone():
    class Small(Inception):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.features = Features()

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)

    model = FlowMap(Labelled(), prediction="data")
    found = evaluate(model, data=images(40), steps=(1,), count=20, extractor=Small())
    assert "fid" in found.rows[0]
    assert "fd" not in found.rows[0]
    with pytest.raises(
        ValueError, match="'fid' cannot be had here, only fd, feature_w2, kid, precision, recall, accuracy"
    ):
        evaluate(model, data=images(40), extractor=Features(), metrics=["fid"])


def test_the_models_are_left_as_they_were(field: GaussianField):
    class Dropping(ExactNetwork):
        def __init__(self, field: GaussianField) -> None:
            super().__init__(field)
            self.drop, self.still = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return self.drop(super().forward(x, s, t))

    model = FlowMap(Dropping(field)).train()
    model.network.still.eval()
    found = evaluate(model, teacher=field, steps=(1,), teacher_steps=(1,), count=20)
    assert found.rows[0]["rmse"] < 1e-5  # no dropout
    assert model.training
    assert model.network.drop.training
    assert not model.network.still.training
    assert not any(value.requires_grad for value in found.samples.values())


def test_points_of_other_shapes_and_types():
    class Wide:
        shape, size = (3, 2), None

        def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
            return Batch(torch.randn(len(index), 3, 2, generator=generator))

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return self.scale * x

    found = evaluate(FlowMap(Still()), data=Wide(), steps=(2,), count=500)
    assert list(found.rows[0]) == ["model", "steps", "nfe", "sliced_w2", "energy"]
    assert found.samples["student 2"].dtype == torch.float64
    assert found.rows[0]["sliced_w2"] < 0.15  # normal noise is this data


def test_points_between_the_squares_are_outside():
    teacher = CheckerboardField()
    still = FlowMap(ExactNetwork(GaussianField(torch.zeros(2), torch.eye(2))))  # its samples are the noise
    found = evaluate(still, teacher=teacher, steps=(1,), teacher_steps=(1, 100), count=500)
    noise = sample_noise((500, 2), sample_generators(0, range(500)))
    assert found.rows[0]["outside"] == outside(noise, densities.checkerboard().inside)
    assert 0.4 < found.rows[0]["outside"] < 0.7
    assert found.rows[1]["outside"] == 0.0  # one Euler step leads to the middle of the board, where two squares meet
    assert 0.0 < found.rows[2]["outside"] < 0.1
    assert found.floor["outside"] == 0.0
    # The data know it too, for a teacher that does not.
    learned = evaluate(still, data=load_data("checkerboard"), steps=(1,), count=500)
    assert learned.rows[0]["outside"] == found.rows[0]["outside"]
    with pytest.raises(ValueError, match=r"'outside' cannot be had here.* outside a support with edges"):
        evaluate(still, teacher=eight_gaussians(), metrics=["outside"])


def test_what_was_measured_before_there_were_more_metrics_stands_beside_new_rows(field: GaussianField):
    file = Path(__file__).parents[1] / "written_by_0.1.0" / "run" / "quality.json"
    old = Evaluation.read(file)
    new = evaluate(FlowMap(ExactNetwork(field)), teacher=field, steps=(1, 2), count=200)
    columns, rows = compare({"old": old, "new": new})
    assert columns == ["metric", "nfe", "old", "new", "old's teacher", "new's teacher"]
    found = {(metric, nfe): values for metric, nfe, *values in rows}
    assert found["rmse", 1] == [old.rows[0]["rmse"], new.rows[0]["rmse"], old.rows[4]["rmse"], new.rows[2]["rmse"]]
    assert found["diversity", 1] == [None, new.rows[0]["diversity"], None, new.rows[2]["diversity"]]
    assert list(alike({"old": old, "new": new})[0]) == ["old", "new"]


def test_json_table_and_comparison(field: GaussianField):
    options: dict[str, Any] = {"teacher": field, "steps": (1, 2), "teacher_steps": (1, 5), "count": 40}
    one = evaluate(FlowMap(ExactNetwork(field)), **options)
    two = evaluate(FlowMap(ExactNetwork(field, 0.1)), **{**options, "steps": (2, 4)}, metrics=["rmse"])
    back = Evaluation.from_json(one.to_json())
    assert (back.rows, back.floor, back.facts, back.samples) == (one.rows, one.floor, one.facts, {})

    columns, rows = one.table()
    assert columns == ["model", "steps", "nfe", *ENDS, "sliced_w2", "energy", "histogram_kl"]
    assert rows[0][:3] == ["student", 1, 1]
    assert rows[-1] == ["data", *[None] * 5, *one.floor.values()]
    assert two.table()[1][-1][0] == "teacher"  # rmse has no floor

    assert set(ENDS) <= set(two.rows[0])  # RMSE never stands alone
    two.rows[2] = dict(one.rows[2])
    two.rows[3] = dict(one.rows[3])
    columns, rows = compare({"exact": one, "shifted": two})
    assert columns == ["metric", "nfe", "exact", "shifted", "teacher"]
    assert [row[:2] for row in rows[:4]] == [["rmse", n] for n in (1, 2, 4, 5)]
    first, second, third, last = rows[:4]
    assert first[2:] == [one.rows[0]["rmse"], None, one.rows[2]["rmse"]]
    assert second[2:] == [one.rows[1]["rmse"], two.rows[0]["rmse"], None]
    assert third[2:] == [None, two.rows[1]["rmse"], None]
    assert last[2:] == [None, None, one.rows[3]["rmse"]]

    other = evaluate(FlowMap(ExactNetwork(field)), **{**options, "teacher": eight_gaussians()})
    assert compare({"a": one, "b": other})[0][2:] == ["a", "b", "a's teacher", "b's teacher"]
    fewer = evaluate(FlowMap(ExactNetwork(field)), **{**options, "count": 30})
    with pytest.raises(ValueError, match="'a' was evaluated with count = 40, 'b' with 30"):
        compare({"a": one, "b": fewer})


def test_extractors_with_other_weights_are_not_compared():
    other = Features()
    nn.init.ones_(other.weight)
    model = FlowMap(Labelled(), prediction="data")
    a, b = (evaluate(model, data=images(40), steps=(1,), count=20, extractor=e) for e in (Features(), other))
    with pytest.raises(ValueError, match="extractor = Features "):
        compare({"a": a, "b": b})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (1, 0)}, r"steps are \[1, 0, .*each at least 1"),
        ({"teacher_steps": (0,)}, "each at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"count": 3}, "3 samples against 3 rows of data: at least 4"),
        ({"data": torch.zeros(2, 2)}, "against 2 rows of data"),
        ({"metrics": ["rsme"]}, "unknown metric 'rsme': did you mean 'rmse'"),
        ({"metrics": ["fd"]}, "'fd' cannot be had here, only rmse, error_median, error_99, sliced_w2"),
        ({"metrics": []}, "nothing to measure"),
        ({"teacher": None}, "evaluate needs data"),
        ({"teacher": nn.Identity(), "data": torch.zeros(9, 2)}, "the teacher is a VelocityField, not a Identity"),
        ({"extractor": Features()}, r"an extractor judges images \(C, H, W\), and a sample has shape \(2,\)"),
        ({"teacher": None, "data": torch.zeros(9, 1, 4, 4)}, "nothing to measure: give a teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_computed(field: GaussianField, options: Any, message: str):
    class Untouched(nn.Module):
        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        evaluate(FlowMap(Untouched()), **{"teacher": field, "data": None, **options})


def test_wrong_models_and_samples_that_diverge(field: GaussianField):
    with pytest.raises(ValueError, match="a FlowMap or a VelocityField, not a MLP"):
        evaluate(MLP(2), teacher=field)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="20 of 20 samples of the student in 2 steps are not finite"):
        evaluate(FlowMap(ExactNetwork(field, float("nan"))), teacher=field, steps=(2,), count=20)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_noise_that_is_kept_gives_the_samples_of_noise_that_is_drawn(monkeypatch, gamma: float):
    """By itself, and for a map that draws more from the generators of its noise."""
    field = GaussianField(torch.zeros(2), torch.eye(2))
    torch.manual_seed(0)
    student = FlowMap.from_field(field, MLP(2, width=8, depth=2, times=2))
    student.gamma = gamma

    def rows() -> list:
        return evaluate(student, teacher=field, steps=(2, 3), count=50, batch=20, metrics=("rmse",)).rows

    kept = rows()
    monkeypatch.setattr("fewstep.evaluation.inputs._SMALL", 0)
    assert rows() == kept
