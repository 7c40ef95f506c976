"""Images of many shapes: which bucket each goes into, and in which order training sees them."""

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Buckets, Dropped, load_data
from fewstep.data.aspects import Place, assign, bucket_sizes, nearest, step_for
from fewstep.data.buckets import BucketOrder, buckets_of, of_one_shape
from fewstep.data.couplings import Coupled, uncoupled
from fewstep.data.decode import size_or_why
from fewstep.data.only import Only
from fewstep.training.batches import Batches

# The training sizes of SDXL at one megapixel, of aspects up to 4 (arXiv 2307.01952, appendix I), wide ones as they are.
SDXL = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def noisy(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image of this width and height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_the_buckets_of_a_megapixel_are_those_of_sdxl() -> None:
    step = step_for(1024, 32)
    assert bucket_sizes(1024, step) == [*SDXL, (1024, 1024), *((w, h) for h, w in reversed(SDXL))]


@pytest.mark.parametrize(("size", "multiple"), [(64, 8), (512, 8), (512, 64), (640, 16), (768, 32), (1024, 16)])
def test_buckets_have_the_area_of_the_square_and_sides_that_a_model_takes(size: int, multiple: int) -> None:
    step = step_for(size, multiple)
    found = bucket_sizes(size, step)
    assert step % multiple == 0
    assert (size, size) in found
    assert {(w, h) for h, w in found} == set(found)  # as many tall ones as wide
    assert all(h % step == w % step == 0 and 1 / 4 <= w / h <= 4 for h, w in found)
    # No longer side would fit: so the area is that of the square but for less than a step of the longer side.
    assert all(h * w <= size * size < min(h, w) * (max(h, w) + step) for h, w in found)


def test_a_size_or_step_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 64, so the size is 448 or 512"):
        step_for(500, 64)
    with pytest.raises(ValueError, match="bucket_step: 48: a multiple of 32 up to the size, 512"):
        step_for(512, 32, 48)


def test_the_nearest_aspect_is_that_of_the_logarithm() -> None:
    sizes = [(32, 128), (64, 64), (128, 32)]
    edge = 64 * math.exp(math.log(4) / 2)  # as far from 1 as from 4
    assert [nearest(sizes, 64, round(edge) + by) for by in (-1, 1)] == [1, 0]
    assert [nearest(sizes, round(edge) + by, 64) for by in (-1, 1)] == [1, 2]


def test_the_cut_is_in_pixels_of_the_scaled_image() -> None:
    # 300 x 100 covers 64 x 64 as 192 x 64: 64 pixels go on both sides, and two thirds of the image.
    place = Place.of((100, 300), (64, 64))
    assert (place.height, place.width, place.top, place.left) == (100, 300, 0, 64)
    assert place.share_of((64, 64)) == pytest.approx(1 / 3)
    assert Place.of((300, 100), (64, 64)) == Place(300, 100, 64, 0)
    assert Place.of((64, 128), (32, 64)).share_of((32, 64)) == 1


# The first folder: photographs as they lie about.


def messy(root: Path) -> Path:
    root.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: 96 x 48 as stored, 48 x 96 as seen
    noisy((96, 48), 1).save(root / "a-turned.jpg", exif=turned)
    noisy((80, 64), 2).convert("CMYK").save(root / "b-cmyk.jpg")
    noisy((64, 64), 3).convert("P").save(root / "c-palette.png")
    Image.fromarray(np.full((60, 100), (44 << 8) + 7, np.uint16)).save(root / "d-16-bit.png")
    noisy((9, 8), 4).save(root / "e-tiny.png")
    noisy((1000, 40), 5).save(root / "f-panorama.png")
    (root / "g-corrupt.png").write_bytes((root / "c-palette.png").read_bytes()[:20])
    (root / "h-cut.jpg").write_bytes((root / "b-cmyk.jpg").read_bytes()[:-2000])
    return root


def test_a_messy_folder_is_put_into_buckets(tmp_path: Path) -> None:
    folder = messy(tmp_path / "photos")
    with pytest.warns(UserWarning, match="smaller than their bucket") as said:
        data = load_data(folder, size=64, buckets=True, bucket_step=16, on_error="skip")
    assert isinstance(data, Buckets)
    told = [str(one.message) for one in said]
    assert told == [
        "1 of 8 images are smaller than their bucket and enlarged (small: drop leaves them out), the smallest is "
        f"{folder / 'e-tiny.png'}, 9 x 8",
        "1 of 8 images lose more than a third, since no bucket is longer than 4 to 1; one is "
        f"{folder / 'f-panorama.png'}, 1000 x 40",
        f"1 of 8 images cannot be read and are left out ({folder / 'g-corrupt.png'}: Truncated File Read)",
        told[3],
    ]
    assert "1 of 4 images cannot be read" in told[3]
    assert "h-cut.jpg: image file is truncated" in told[3]
    # The panorama; the 16-bit one; CMYK, palette, tiny; and the one that was turned, which is tall.
    assert [(bucket.shape, bucket.count) for bucket in data.buckets] == [
        ((3, 32, 128), 1), ((3, 48, 80), 1), ((3, 64, 64), 3), ((3, 80, 48), 1),
    ]  # fmt: skip
    assert data.shape == (3, 64, 64)
    grey = data.rows(torch.tensor([1]), generator(0)).data
    assert torch.equal(grey, torch.full_like(grey, 44).sub(127.5).div(127.5))
    for bucket in data.buckets:
        rows = data.rows(torch.arange(bucket.first, bucket.first + bucket.count), generator(0)).data
        assert rows.shape == (bucket.count, *bucket.shape)
        assert -1 <= rows.min() <= rows.max() <= 1


def test_an_image_that_cannot_be_read_stops_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"g-corrupt\.png cannot be read .*on_error: skip"):
        load_data(messy(tmp_path / "photos"), size=64, buckets=True)


def test_small_images_may_be_dropped(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i, side in enumerate([64, 63, 80]):
        noisy((side, side), i).save(root / f"{i}.png")
    with pytest.warns(UserWarning, match="1 of 3 images are smaller than their bucket and left out"):
        data = load_data(root, size=64, buckets=True, small="drop")
    assert data.size == 2
    (root / "0.png").unlink()
    (root / "2.png").unlink()
    with pytest.raises(ValueError, match="none of the 1 images can be used: all are smaller"):
        load_data(root, size=64, buckets=True, small="drop")
    with pytest.raises(ValueError, match="small"):
        load_data(root, size=64, buckets=True, small="shrink")


def test_pixels_are_those_of_the_image_scaled_to_cover_and_cut(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    # Three stripes of 40: scaled to 192 x 64 and cut to 128 x 64 there would be half of the outer ones; to 128 x 32
    # all of an aspect of 4 is kept.
    for name, width in (("wide", 512), ("square", 64)):
        pixels = np.zeros((128 if width == 512 else 64, width, 3), np.uint8)
        pixels[:, : width // 2] = 255
        Image.fromarray(pixels).save(root / f"{name}.png")
    data = load_data(root, size=64, buckets=True)
    assert [bucket.shape for bucket in buckets_of(data)] == [(3, 32, 128), (3, 64, 64)]
    wide = data.rows(torch.tensor([0]), generator(0)).data[0]
    assert torch.equal(wide[:, :, :60], torch.ones(3, 32, 60))
    assert torch.equal(wide[:, :, 68:], -torch.ones(3, 32, 60))


def test_what_is_said_of_buckets_is_said_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    noisy((64, 64)).save(root / "0.png")
    with pytest.raises(ValueError, match="say its side"):
        load_data(root, buckets=True)
    with pytest.raises(ValueError, match="bucket_step is said of buckets"):
        load_data(root, size=64, bucket_step=16)
    noisy((96, 64)).save(root / "1.png")
    with pytest.raises(ValueError, match=r"--data\.buckets true"):
        load_data(root)


def test_classes_and_images_beside_follow_their_rows(tmp_path: Path) -> None:
    for kind, width in (("cat", 128), ("dog", 64)):
        for place in ("photos", "edges"):
            (tmp_path / place / kind).mkdir(parents=True)
        for i in range(3):
            for place in ("photos", "edges"):
                noisy((width, 64), i).save(tmp_path / place / kind / f"{i}.png")
    noisy((64, 64), 7).save(tmp_path / "photos" / "cat" / "9.png")
    noisy((64, 64), 7).save(tmp_path / "edges" / "cat" / "9.png")
    data: Any = load_data(tmp_path / "photos", size=64, buckets=True, beside=str(tmp_path / "edges"))
    assert data.classes == ("cat", "dog")
    labels, seen = [], []
    for bucket in data.buckets:
        batch = data.rows(torch.arange(bucket.first, bucket.first + bucket.count), generator(0))
        assert torch.equal(batch.cond["image"], batch.data)
        labels.append(batch.cond["class_labels"].tolist())
        seen.append(bucket.shape)
    assert seen == [(3, 40, 96), (3, 64, 64)]
    assert labels == [[0, 0, 0], [0, 1, 1, 1]]
    # Some classes of them: what is left of each bucket.
    plain: Any = load_data(tmp_path / "photos", size=64, buckets=True)
    some = Only(plain, ["cat"])
    assert [bucket.count for bucket in buckets_of(some)] == [3, 1]
    assert [bucket.shape for bucket in buckets_of(Only(plain, [1]))] == [(3, 64, 64)]
    last = some.rows(torch.tensor([3]), generator(0))
    assert torch.equal(last.data[0], plain.rows(torch.tensor([3]), generator(0)).data[0])


# The order


COUNTS = [100, 37, 3, 1]


def test_every_row_is_seen_as_often_as_every_other() -> None:
    order, batch = BucketOrder(COUNTS, 16, 5), 16
    seen = [Counter() for _ in COUNTS]  # type: ignore[var-annotated]
    steps = 141 * 20  # 16 x 20 epochs
    for step in range(steps):
        bucket, rows = order.rows(step, 0, batch)
        seen[bucket].update(rows.tolist())
    for count, counter in zip(COUNTS, seen, strict=True):
        assert len(counter) == count  # none is left out
        assert max(counter.values()) - min(counter.values()) <= 1  # each once before one of them comes again
        # As often as its bucket is due, but for one batch.
        assert abs(sum(counter.values()) - steps * batch * count / sum(COUNTS)) <= 2 * batch


def test_a_step_is_the_same_wherever_one_begins() -> None:
    whole = [BucketOrder(COUNTS, 16, 1).rows(step, 0, 16) for step in range(200)]
    again = BucketOrder(COUNTS, 16, 1)
    for step in (137, 3, 199, 8, 64):
        bucket, rows = again.rows(step, 4, 8)
        assert bucket == whole[step][0]
        assert torch.equal(rows, whole[step][1][4:12])
    assert [bucket for bucket, _ in whole] != [BucketOrder(COUNTS, 16, 2).rows(step, 0, 16)[0] for step in range(200)]


def test_few_rows_and_large_batches() -> None:
    order = BucketOrder([2, 1], 64, 0)
    found = Counter(order.rows(step, 0, 64)[0] for step in range(300))
    assert abs(found[0] - 200) <= 1
    assert Counter(order.rows(7, 0, 64)[1].tolist()).total() == 64


def in_buckets() -> Buckets:
    draw = generator(0)
    shapes = [(3, 4, 16), (3, 8, 8), (3, 16, 4)]
    return Buckets(
        [
            ArrayData(torch.randn(count, *shape, generator=draw), {"class_labels": torch.arange(count)})
            for shape, count in zip(shapes, (5, 40, 7), strict=True)
        ]
    )


@pytest.mark.parametrize("wrapped", ["plain", "dropped", "coupled"])
def test_several_processes_see_the_rows_of_one(wrapped: str) -> None:
    data: Any = in_buckets()
    data = Dropped(data, 0.5, {"class_labels": 99}) if wrapped == "dropped" else data
    data = Coupled(data, "ot") if wrapped == "coupled" else data
    one = Batches(data, 16, 4, 3)
    shapes = set()
    for step in range(30):
        whole, _ = one.micro(step, 0)
        shapes.add(tuple(whole.data.shape[1:]))
        for processes, accumulate in ((2, 1), (4, 1), (2, 2), (1, 4)):
            parts = [
                Batches(data, 16, 4, 3, accumulate, rank, processes).micro(step, index)[0]
                for rank in range(processes)
                for index in range(accumulate)
            ]
            assert torch.equal(torch.cat([part.data for part in parts]), whole.data)
            assert torch.equal(torch.cat([p.cond["class_labels"] for p in parts]), whole.cond["class_labels"])
    assert shapes == {(3, 4, 16), (3, 8, 8), (3, 16, 4)}


def test_rows_of_several_shapes_cannot_be_had_at_once() -> None:
    data = in_buckets()
    with pytest.raises(ValueError, match="rows of several shapes"):
        data.rows(torch.tensor([4, 5]), generator(0))
    with pytest.raises(ValueError, match="different shapes"):
        Buckets([ArrayData(torch.zeros(2, 3, 4, 4)), ArrayData(torch.zeros(2, 3, 4, 4))])


def test_what_judges_has_the_rows_of_the_usual_shape() -> None:
    data = in_buckets()
    alone: Any = uncoupled(Coupled(data))
    assert (alone.shape, alone.size, buckets_of(alone)) == ((3, 8, 8), 40, ())
    assert torch.equal(
        alone.rows(torch.arange(40), generator(0)).data, data.parts[1].rows(torch.arange(40), generator(0)).data
    )
    assert torch.equal(alone.cond["class_labels"], torch.arange(40))
    assert of_one_shape(data, (3, 16, 4)).size == 7
    assert of_one_shape(data, (3, 1, 1)).shape == (3, 8, 8)
    assert of_one_shape(data.parts[0]) is data.parts[0]


def test_assigning_says_nothing_where_there_is_nothing_to_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put = assign([(64, 64), (128, 130)], ["a", "b"], bucket_sizes(64, 16))
    assert put.sizes == [(64, 64)]
    assert put.rows == [[0, 1]]


def test_sizes_are_read_off_the_heads_of_files(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 8
    noisy((40, 30)).save(tmp_path / "turned.png", exif=turned)
    noisy((40, 30)).save(tmp_path / "plain.png")
    content = (tmp_path / "plain.png").read_bytes()
    assert size_or_why(tmp_path / "turned.png") == (40, 30)
    assert size_or_why(content[: len(content) // 2]) == (30, 40)  # of a file that is cut, whose pixels are not read
    assert size_or_why(b"") == "it is empty"
    assert size_or_why(b"text") == "its content is no image"
    assert isinstance(size_or_why(tmp_path / "none.png"), str)
