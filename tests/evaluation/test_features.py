"""Frechet distance, KID, precision and recall in closed form; the extractors and their cache."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.common import disk
from fewstep.common.disk import replace_file
from fewstep.data.arrays import ArrayData
from fewstep.data.files import digits
from fewstep.evaluation import extractor, features
from fewstep.evaluation.extractor import SmallClassifier, accuracy, extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance, kid, precision_recall
from fewstep.evaluation.inception import Inception, inception


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dims, generator=rng(seed), dtype=torch.float64)


def moments(dims: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    factor = normal(dims, rank or dims, seed)
    return normal(1, dims, seed + 100)[0], factor @ factor.T / dims


# Statistics


def test_merged_parts_are_one_pass():
    x = normal(100, 5) * 3 + 7
    one = FeatureStatistics.of(x)
    parts = FeatureStatistics.of(x[:1]).merge(FeatureStatistics.of(x[1:40]))
    parts = FeatureStatistics.of(x[40:]).merge(parts)
    batches = FeatureStatistics.empty(5)
    for batch in x.split(7):
        batches.update(batch)
    for other in (parts, batches):
        assert other.count == 100
        torch.testing.assert_close(other.mean, one.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(other.cov, one.cov, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.mean, x.mean(dim=0))
    torch.testing.assert_close(one.cov, x.T.cov())
    assert frechet_distance(one, parts) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_no_digits_are_lost_far_from_zero(parts: int):
    near = normal(400, 6) @ normal(6, 6, seed=1)
    far = 2.0**20 + (near * 2**20).round() / 2**20  # in both places the same numbers, exactly
    pieces = [FeatureStatistics.of(rows) for rows in far.chunk(parts)]
    while len(pieces) > 1:
        pieces = [a.merge(b) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    exact, other = FeatureStatistics.of(far - 2.0**20), FeatureStatistics.of(normal(400, 6, seed=2))
    torch.testing.assert_close(pieces[0].cov, exact.cov, rtol=0, atol=1e-9)
    moved = FeatureStatistics.from_moments(other.mean + 2.0**20, other.cov, 400)
    assert frechet_distance(pieces[0], moved) == pytest.approx(frechet_distance(exact, other), rel=1e-8)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_distance_of_merged_parts_is_that_of_the_whole(parts: int):
    # N(0, 1) and N(3, 4) in each of 16 dimensions: (3^2 + (2 - 1)^2) of each, and the whole of these samples' own.
    x, y = normal(4000, 16), 3 + 2 * normal(4000, 16, seed=1)
    whole = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert whole == pytest.approx(160, rel=0.02)
    shared = [FeatureStatistics.empty(16), FeatureStatistics.empty(16)]
    for rank in range(parts):  # each takes every parts-th row, in batches of its own
        for i, rows in enumerate((x, y)):
            own = FeatureStatistics.empty(16)
            for batch in rows[rank::parts].split(100 + rank):
                own.update(batch)
            shared[i] = shared[i].merge(own)
    assert frechet_distance(*shared) == pytest.approx(whole, abs=1e-10)


def test_merge_leaves_its_parts_alone():
    a, b = FeatureStatistics.of(normal(4, 2)), FeatureStatistics.of(normal(3, 2))
    before = a.mean.clone()
    a.merge(b).update(normal(5, 2))
    assert a.count == 4
    assert torch.equal(a.mean, before)


def test_half_precision_features_are_summed_in_float64():
    x = torch.full((3000, 1), 1.0, dtype=torch.float16)  # 3000 is no float16 sum of ones
    assert float(FeatureStatistics.of(x).mean) == 1.0
    assert float(FeatureStatistics.of(x).cov) == 0.0


def test_moments_come_back():
    mean, cov = moments(6, 0)
    statistics = FeatureStatistics.from_moments(mean, cov, count=50)
    torch.testing.assert_close(statistics.mean, mean)
    torch.testing.assert_close(statistics.cov, cov)


# Frechet distance


def test_frechet_distance_of_commuting_gaussians():
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.5])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.1])
    a = FeatureStatistics.from_moments(mean_a, torch.diag(std_a.double() ** 2))
    b = FeatureStatistics.from_moments(mean_b, torch.diag(std_b.double() ** 2))
    expected = float((mean_a - mean_b).square().sum() + (std_a.double() - std_b.double()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("ranks", [(8, 8), (8, 3), (3, 8), (3, 3)])
def test_frechet_distance_against_scipy(ranks: tuple[int, int]):
    from scipy.linalg import sqrtm

    a = FeatureStatistics.from_moments(*moments(8, 1, ranks[0]))
    b = FeatureStatistics.from_moments(*moments(8, 2, ranks[1]))
    # scipy's root of a singular matrix is inexact: a tiny ridge, whose own effect is below the tolerance.
    ridge = 1e-13 * torch.eye(8, dtype=torch.float64)
    root = sqrtm(((a.cov + ridge) @ (b.cov + ridge)).numpy()).trace().real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(root)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=2e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-6)


def test_frechet_distance_with_fewer_rows_than_features():
    x, y = normal(20, 64), normal(30, 64, seed=1)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # In the basis of both sets' rows, where nothing is rank-deficient but each covariance alone, it is the same.
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q
    small = frechet_distance(FeatureStatistics.of(x @ basis), FeatureStatistics.of(y @ basis))
    assert frechet_distance(a, b) == pytest.approx(small, rel=1e-7)
    # A shift of every row is a shift of the mean and nothing else.
    assert frechet_distance(a, FeatureStatistics.of(x + 0.5)) == pytest.approx(64 * 0.25, abs=1e-6)


def test_frechet_distance_of_constant_features():
    a, b = (FeatureStatistics.of(torch.full((5, 4), value)) for value in (1.0, 3.0))
    assert frechet_distance(a, b) == pytest.approx(16.0, abs=1e-9)


# KID


def test_kid_is_unbiased_and_repeatable():
    x, y = normal(2000, 4), normal(2000, 4, seed=1)
    mean, std = kid(x, y, subsets=50, size=100)
    assert abs(mean) < 4 * std / math.sqrt(50) + 0.02
    assert (mean, std) == kid(x, y, subsets=50, size=100)
    assert kid(x, y + 1, subsets=20, size=100)[0] > 20 * abs(mean)


def test_kid_of_whole_sets_in_closed_form():
    # One feature: the kernel is (x y + 1)^3, so E k = sum of binomial moments of the two sets.
    x, y = normal(30, 1), normal(30, 1, seed=1) * 2
    pairs = lambda a, b: (a @ b.T + 1) ** 3  # noqa: E731
    off = ~torch.eye(30, dtype=torch.bool)
    expected = pairs(x, x)[off].mean() + pairs(y, y)[off].mean() - 2 * pairs(x, y).mean()
    assert kid(x, y, subsets=3, size=30)[0] == pytest.approx(float(expected), rel=1e-9)


# Precision and recall


def test_precision_and_recall_of_equal_and_of_far_sets():
    x = normal(200, 8)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_precision_without_recall():
    # Two clusters; the model makes one: all of it is real, half of what is real is missing.
    a, b = normal(100, 2), normal(100, 2, seed=1) + 50
    assert precision_recall(torch.cat([a, b]), torch.cat([a, a + 1e-3])) == (1.0, 0.5)


def test_the_ball_reaches_to_the_kth_neighbour():
    # Real points at 0, 1, 3, 6: with k = 2 the radii are 3, 2, 3, 5.
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    fake = torch.tensor([[-3.0], [-3.1], [11.0], [11.1]])
    assert precision_recall(real, fake, k=2)[0] == 0.5


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch):
    x, y = normal(150, 3), normal(120, 3, seed=1) * 1.5
    whole = precision_recall(x, y)
    assert 0 < whole[0] < 1
    monkeypatch.setattr(features, "_ROWS", 11)
    assert precision_recall(x, y) == whole


# The small classifier and its cache


def bars(rows: int = 200, classes: int = 4, seed: int = 0) -> ArrayData:
    """8 x 8 images with one bright line, whose place is the class."""
    labels = torch.randint(0, classes, (rows,), generator=rng(seed))
    images = torch.randint(0, 100, (rows, 1, 8, 8), generator=rng(seed + 1), dtype=torch.uint8)
    images[torch.arange(rows), 0, 2 * labels] = 250
    return ArrayData(images, {"class_labels": labels})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extractor, "_LEAST_UPDATES", 20)


@pytest.mark.usefixtures("short")
def test_classifier_learns_caches_and_comes_back(tmp_path: Path):
    data, seen = bars(), []
    model = trained_classifier(data, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert model.accuracy is not None
    assert model.accuracy > 0.9
    assert seen[-1] == (20, 20)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())

    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".safetensors"]
    facts = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert facts["accuracy"] == model.accuracy
    assert facts["rows"] == 200

    again = trained_classifier(data, tmp_path, progress=lambda done, total: pytest.fail("trained again"))
    assert again.accuracy == model.accuracy
    images = data.rows(torch.arange(10), rng()).data
    assert torch.equal(extract(again, images), extract(model, images))


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("short")
def test_classifier_is_the_same_for_a_seed_and_leaves_the_global_generator_alone(tmp_path: Path):
    state = torch.get_rng_state()
    runs = [trained_classifier(bars(), tmp_path / str(i), seed=seed) for i, seed in enumerate([0, 0, 1])]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].head.weight, runs[1].head.weight)
    assert not torch.equal(runs[0].head.weight, runs[2].head.weight)


@pytest.mark.takes_seconds
@pytest.mark.usefixtures("short")
def test_other_rows_labels_or_seeds_are_not_taken_from_the_cache(tmp_path: Path):
    trained_classifier(bars(), tmp_path)
    changed = bars()
    changed.array[7, 0, 3, 3] += 1
    relabelled = bars()
    relabelled.cond["class_labels"][0] ^= 1
    for data, seed in ((changed, 0), (relabelled, 0), (bars(), 1)):
        calls = []
        trained_classifier(data, tmp_path, seed=seed, progress=lambda *step, calls=calls: calls.append(step))
        assert calls
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


@pytest.mark.usefixtures("short")
def test_cache_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "here"))
    trained_classifier(bars())
    assert len(list((tmp_path / "here").glob("*.safetensors"))) == 1


@pytest.mark.usefixtures("short")
def test_damaged_cache_names_the_file(tmp_path: Path):
    trained_classifier(bars(), tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    whole = weights.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"x" * 100):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{weights.name} is damaged .* delete it"):
            trained_classifier(bars(), tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "deep" / "file"
    replace_file(target, b"old")

    def full_disk(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        replace_file(target, b"new content")
    assert [f.name for f in target.parent.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


@pytest.mark.takes_seconds
def test_digits_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extractor, "_LEAST_UPDATES", 150)
    data = digits()
    model = trained_classifier(data, tmp_path)
    assert model.accuracy is not None
    assert model.accuracy > 0.95
    rows = data.rows(torch.arange(1797), rng())
    assert accuracy(model, rows.data, rows.cond["class_labels"]) > 0.97
    # Features see what classes miss: noise on the images is far, the other half of the images is near.
    near = frechet_distance(*map(FeatureStatistics.of, extract(model, rows.data).tensor_split([900])))
    noisy = (rows.data[900:] + 0.5 * torch.randn(897, 1, 8, 8, generator=rng())).clamp(-1, 1)
    far = frechet_distance(*(FeatureStatistics.of(extract(model, x)) for x in (rows.data[:900], noisy)))
    assert far > 3 * near


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 32, 48), (1, 64, 64)])
def test_classifier_takes_any_small_image(shape: tuple[int, int, int]):
    model = SmallClassifier(shape, classes=7).eval()
    x = torch.rand(2, *shape)
    assert model(x).shape == (2, model.num_features)
    assert model.classify(x).shape == (2, 7)


def test_features_do_not_depend_on_batches_or_what_lies_beyond_white():
    model = SmallClassifier((1, 8, 8), classes=2)  # in training mode: extract must not move its batch statistics
    x = torch.randn(20, 1, 8, 8, generator=rng()) * 2
    one = extract(model, x)
    torch.testing.assert_close(extract(model, x, batch_size=3), one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extract(model, x.clamp(-1, 1).double()), one)
    assert one.dtype == torch.float32
    assert not one.requires_grad


# The network of FID


def filled_inception() -> Inception:
    """Inception with weights that any machine makes alike, scaled so that a signal gets through."""
    model, draw = Inception(), rng()
    for name, value in sorted(model.state_dict().items()):
        if "num_batches" not in name:
            noise = torch.randn(value.shape, generator=draw)
            scale = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1
            value.copy_(noise * scale + (1.0 if name.endswith(("bn.weight", "running_var")) else 0.0))
    return model.eval()


@pytest.mark.takes_seconds
def test_inception_is_that_of_fid(tmp_path: Path):
    model = filled_inception()
    assert sum(p.numel() for p in model.parameters()) == 21_785_568
    image = torch.linspace(-1, 1, 3 * 40 * 60).view(1, 3, 40, 60).sin()
    # Made with torch-fidelity 0.4.0's network and these weights; one channel of each kind of branch.
    expected = torch.tensor([1.3881068, 0.1451316, 0.0268865, 0.3485247])
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        features = extract(inception(tmp_path / name), image)
        torch.testing.assert_close(features[0, [0, 500, 1300, 2047]], expected, rtol=1e-4, atol=1e-4)
    grey = image[:, :1]
    assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.takes_seconds
def test_inception_reads_pictures_in_8_bits():
    model = filled_inception()
    image = torch.full((1, 3, 30, 30), 0.5)
    assert torch.equal(model(image), model(image + 0.001))  # both are 191
    assert not torch.equal(model(image), model(image + 0.01))


def test_inception_without_its_weights(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*nowhere\.pth: download"):
        inception(tmp_path / "nowhere.pth")
    for name, content in (("junk.pth", b"not a file of torch"), ("junk.safetensors", b"nor of safetensors")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as Inception weights"):
            inception(tmp_path / name)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth lacks 470 weights"):
        inception(tmp_path / "other.pth")


def test_inception_runs_no_code_from_its_file(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weights": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        inception(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureStatistics.empty(3).update(torch.zeros(2, 4)), r"\(N, 3\), not \(2, 4\)"),
        (lambda: FeatureStatistics.of(torch.full((2, 2), math.nan)), "2 of 2 rows of features are not finite"),
        (lambda: FeatureStatistics.empty(3).merge(FeatureStatistics.empty(4)), "3 and of 4 features"),
        (lambda: FeatureStatistics.of(torch.zeros(1, 2)).cov, "at least 2 rows"),
        (lambda: kid(normal(10, 2), normal(20, 2)), "1000 rows cannot be drawn from 10 real and 20 fake"),
        (lambda: precision_recall(normal(3, 2), normal(9, 2), k=3), "k = 3"),
        (lambda: precision_recall(normal(9, 2), normal(9, 3)), r"\(9, 2\) and \(9, 3\)"),
        (lambda: SmallClassifier((1, 6, 6), 2), r"8 to 64 pixels, not \(1, 6, 6\)"),
        (lambda: SmallClassifier((5,), 2), r"not \(5,\)"),
        (
            lambda: SmallClassifier((1, 8, 8), 2)(torch.zeros(1, 3, 8, 8)),
            r"made for images \(1, 8, 8\), not \(3, 8, 8\)",
        ),
        (lambda: trained_classifier(ArrayData(torch.zeros(20, 1, 8, 8))), "class_labels"),
        (lambda: trained_classifier(bars(rows=19)), "19 rows are too few"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
