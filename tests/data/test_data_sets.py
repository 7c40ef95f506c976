"""Arrays as data, the order of training, and finding data by name."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.common import randomness
from fewstep.data import ArrayData, Data, epoch_indices, load_data, order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_uint8_rows_become_floats_between_minus_one_and_one():
    values = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    data = ArrayData(values)
    assert data.array.dtype == np.uint8
    assert (data.size, data.shape) == (4, (1, 8, 8))
    x = data.rows(torch.tensor([3, 0]), generator()).data
    assert x.dtype == torch.float32
    assert x.max() == 1
    assert x.min() == -1
    expected = torch.from_numpy(values[[3, 0]].astype(np.float64)) / 127.5 - 1
    torch.testing.assert_close(x.double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(data.denormalize(x).round().byte(), torch.from_numpy(values[[3, 0]]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4", "int16", "bool"])
def test_other_numbers_pass_through_as_float32(dtype):
    values = (np.arange(12).reshape(4, 3) % 5).astype(dtype)
    x = ArrayData(values).rows(torch.tensor([1, 1, 2]), generator()).data
    assert x.dtype == torch.float32
    assert np.array_equal(x.numpy(), values[[1, 1, 2]].astype(np.float32))


def test_rows_are_copies_and_the_array_stays():
    values = np.zeros((3, 2), np.float32)
    ArrayData(values).rows(torch.arange(3), generator()).data.add_(1)
    assert not values.any()


@pytest.mark.parametrize("shape", [(7,), (2, 7), (1, 4, 4, 4), (2, 3, 3, 3, 3)])
def test_any_rank(shape):
    values = torch.randn(5, *shape)
    data = ArrayData(values)
    assert data.shape == shape
    assert torch.equal(data.rows(torch.tensor([4, 2]), generator()).data, values[[4, 2]])


def test_normalize_over_the_whole_array_and_back():
    # A small spread around a large mean: float32 would lose it before the mean is taken off.
    values = 1e8 + np.random.default_rng(0).normal(size=(1000, 6))
    data = ArrayData(values, normalize=True)
    x = data.rows(torch.arange(1000), generator()).data.double()
    assert abs(x.mean()) < 1e-6
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (data.denormalize(x) - torch.from_numpy(values)).abs().max() < 1e-6


def test_normalize_refuses_a_constant_and_pictures():
    with pytest.raises(ValueError, match=r"all values of data are 3\.0"):
        ArrayData(np.full((4, 2), 3.0), normalize=True)
    with pytest.raises(ValueError, match="drop normalize"):
        ArrayData(np.zeros((4, 1, 2, 2), np.uint8), normalize=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flip_turns_half_of_the_rows_left_to_right(dtype):
    values = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 5)).astype(dtype)
    plain, flipped = ArrayData(values), ArrayData(values, flip=True)
    index = torch.zeros(4000, dtype=torch.int64)
    one = plain.rows(index[:1], generator()).data
    x = flipped.rows(index, generator(1)).data
    kept, turned = (x == one).flatten(1).all(1), (x == one.flip(-1)).flatten(1).all(1)
    assert (kept ^ turned).all()
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(x, flipped.rows(index, generator(1)).data)
    assert not torch.equal(x, flipped.rows(index, generator(2)).data)


def test_flip_of_points_is_refused():
    with pytest.raises(ValueError, match="drop flip"):
        ArrayData(np.zeros((4, 2)), flip=True)


def test_conditions_are_gathered_beside_their_rows():
    values = np.arange(10.0).reshape(10, 1)
    data = ArrayData(values, {"class_labels": np.arange(10, dtype=np.uint8), "angle": values.repeat(2, 1)})
    batch = data.rows(torch.tensor([7, 7, 0]), generator())
    assert batch.data.flatten().tolist() == [7, 7, 0]
    assert batch.cond["class_labels"].dtype == torch.int64
    assert batch.cond["class_labels"].tolist() == [7, 7, 0]
    assert batch.cond["angle"].dtype == torch.float32
    assert batch.cond["angle"].tolist() == [[7, 7], [7, 7], [0, 0]]


def test_memory_map_stays_on_disk(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    data = ArrayData(mapped)
    assert np.shares_memory(data.array, mapped)
    assert np.array_equal(data.denormalize(data.rows(torch.tensor([9, 3]), generator()).data), values[[9, 3]])


@pytest.mark.parametrize(
    ("array", "cond", "message"),
    [
        (np.zeros((0, 2)), {}, r"shape \(0, 2\) is empty"),
        (np.zeros(5), {}, r"reshape it to \(N, 1\)"),
        (np.array([[1], [1, 2]], dtype=object), {}, "dtype object"),
        (np.array([["a"]]), {}, "no array of real numbers"),
        (np.zeros((4, 2)), {"class_labels": np.zeros(3, int)}, r"shape \(3,\), but the data has 4 rows"),
        (np.zeros((4, 2)), {"class_labels": np.zeros((4, 1, 2))}, "whole numbers"),
        (np.zeros((4, 2)), {"class_labels": np.zeros((4, 10), int)}, "one a row"),
        (np.zeros((4, 2)), {"class_labels": np.array([0, 1, -1, 0])}, "count from 0, got -1"),
        (
            np.zeros((4, 2)),
            {"depth": np.array([0, 1, np.nan, 0])},
            "condition 'depth' of data has 1 values .* row 2 of 4",
        ),
    ],
)
def test_bad_arrays_are_refused_when_made(array, cond, message):
    with pytest.raises(ValueError, match=message):
        ArrayData(array, cond)


def test_values_that_are_not_finite_are_counted_across_parts():
    values = np.zeros((5000, 2000), np.float32)  # three parts of the check
    values[3000, 5] = np.nan
    values[4500, 6:8] = np.inf
    with pytest.raises(ValueError, match=r"data has 3 values that are not finite .* first in row 3000 of 5000"):
        ArrayData(values)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_each_epoch_visits_each_row_once(size):
    stream = epoch_indices(size, seed=5, start=0, count=4 * size)
    assert stream.dtype == torch.int64
    for epoch in stream.view(4, size):
        assert sorted(epoch.tolist()) == list(range(size))
    if size == 100:
        assert not torch.equal(*stream.view(4, size)[:2])
        assert not torch.equal(stream, epoch_indices(size, seed=6, start=0, count=4 * size))


@pytest.mark.parametrize("batch", [1, 3, 10, 11, 64])
def test_any_cut_into_batches_gives_the_same_stream(batch):
    whole = epoch_indices(10, seed=1, start=0, count=192)
    parts = [epoch_indices(10, seed=1, start=s, count=min(batch, 192 - s)) for s in range(0, 192, batch)]
    assert torch.equal(torch.cat(parts), whole)
    # Far into the run without having been anywhere before.
    assert torch.equal(epoch_indices(10, seed=1, start=187, count=5), whole[187:])


def test_two_orders_are_kept_in_half_of_their_bits():
    order._permutation.cache_clear()
    size = 1000
    for start in range(0, 5 * size, 300):
        epoch_indices(size, seed=4, start=start, count=300)
    kept = order._permutation.cache_info()
    assert (kept.maxsize, kept.misses) == (2, 6)  # each epoch was drawn once
    assert order._permutation(size, 4, 0).dtype == torch.int32
    first = torch.randperm(size, generator=randomness.generator(4, 0, order._ORDER))
    assert torch.equal(epoch_indices(size, seed=4, start=0, count=size), first)


def test_writing_to_an_order_does_not_change_the_next():
    first = epoch_indices(10, seed=2, start=0, count=10)
    expected = first.clone()
    first.zero_()
    assert torch.equal(epoch_indices(10, seed=2, start=0, count=10), expected)


def test_loaded_data_is_data():
    for name in ("checkerboard", "eight-gaussians", "digits"):
        assert isinstance(load_data(name), Data)


def test_unknown_names_paths_and_options(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'chekerboard': did you mean 'checkerboard'"):
        load_data("chekerboard")
    for path in ("./photos", "some/photos", "points.npy", tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            load_data(path)
    with pytest.raises(ValueError, match=r"option of digits 'flpi': did you mean 'flip'.* flip, labels"):
        load_data("digits", flpi=True)
    with pytest.raises(ValueError, match="'checkerboard' takes no options, got 'size'"):
        load_data("checkerboard", size=3)
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.doc is no file of data"):
        load_data(tmp_path / "notes.doc")
    with pytest.raises(ValueError, match=r"option of .* 'path'"):
        load_data(tmp_path, path="elsewhere")


def test_options_reach_the_loader():
    assert "class_labels" not in load_data("digits", labels=False).rows(torch.arange(2), generator()).cond
    far, near = (
        load_data("two-moons", noise=noise).rows(torch.arange(5000), generator()).data for noise in (0.3, 0.001)
    )
    assert far.abs().max() > near.abs().max() + 0.5


@pytest.mark.takes_seconds
def test_importing_costs_no_optional_package():
    code = "import sys, fewstep.data; print([m for m in ('sklearn', 'datasets', 'PIL', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
