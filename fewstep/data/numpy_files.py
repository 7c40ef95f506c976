"""NumPy's files: ``.npy``, which is memory-mapped, and ``.npz``. What a header declares is held against the bytes that
there are before memory is taken for it, and nothing that is pickled is ever loaded."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile

from fewstep.common.reading import check_memory, reading

# So many bytes at most come from one, by the way a member of an archive is packed; others have no such bound.
_MOST_FROM_ONE = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}


def is_archive(path: Path) -> bool:
    """Whether a file is an ``.npz``, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def map_array(path: Path) -> np.ndarray:
    """The array of a ``.npy``, memory-mapped.

    Raises:
        ValueError: it is damaged, or pickled.
    """
    with reading(f"{path} as a NumPy array"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


@contextmanager
def open_archive(path: Path) -> Iterator[NpzFile]:
    """An ``.npz``, whose ``files`` are the names of its arrays.

    Raises:
        ValueError: it is damaged.
    """
    with reading(f"{path} as NumPy arrays"):
        archive = np.load(path, allow_pickle=False)
    with archive:
        yield archive


def read_member(archive: NpzFile, name: str, path: Path) -> np.ndarray:
    """One array of an archive; ``path`` is what to call it.

    Raises:
        ValueError: it is damaged or pickled, or takes more memory than there is.
    """
    with reading(f"{name} in {path}"):
        members = archive.zip
        assert members is not None  # it is None once closed
        info = members.getinfo(f"{name}.npy" if f"{name}.npy" in members.namelist() else name)
        with members.open(info) as file:
            is_first = npy.read_magic(file) == (1, 0)
            # What is newer than the second version differs from it in the encoding of names alone.
            shape, _, dtype = (npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0)(file)
            needed = file.tell() + math.prod(shape) * dtype.itemsize
        most = info.compress_size * _MOST_FROM_ONE.get(info.compress_type, info.file_size)
        if not dtype.hasobject and (needed != info.file_size or info.file_size > most):
            raise ValueError(f"it declares {dtype} of shape {str(shape)[:60]}, which are not the bytes it has")
    check_memory(f"{name} in {path}", needed, "save it as .npy, which is memory-mapped")
    with reading(f"{name} in {path}"):
        return archive[name]
