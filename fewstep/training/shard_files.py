"""The tensors of a checkpoint as several processes write them, each what it keeps: a safetensors file a process, by
``torch.distributed.checkpoint``. Any number of processes reads them back, and one alone. Nothing is pickled.

A tensor is called ``GROUP/NAME`` here.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

Groups = Mapping[str, Mapping[str, Tensor]]

FILES = "shard-*.safetensors"


def are_there() -> bool:
    """Whether torch can write such files."""
    return hasattr(_dcp(), "HuggingFaceStorageWriter")


def write(folder: Path, tensors: Groups) -> None:
    """Write what this process keeps of the tensors. All processes call it.

    Raises:
        OSError, SafetensorError: one of them could not; in all of them.
    """
    writer = _dcp().HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_errors():
        _dcp().save(_flat(tensors), storage_writer=writer, no_dist=False)


def own_file(folder: Path, rank: int) -> Path:
    """The file that a process has written; there is none where it kept nothing."""
    return folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def sizes(folder: Path) -> dict[str, dict[str, torch.Size]]:
    """The shapes of the whole tensors, by group and name."""
    return {group: {name: entry.size for name, entry in found.items()} for group, found in _entries(folder).items()}


def read_into(folder: Path, tensors: Groups) -> None:
    """Read what this process keeps of the tensors into them. All processes call it."""
    with _plain_errors():
        _dcp().load(_flat(tensors), storage_reader=_dcp().HuggingFaceStorageReader(str(folder)))


def assemble(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors, whole, on the CPU of this process.

    Raises:
        SafetensorError: the files do not make up whole tensors.
    """
    with _plain_errors():
        whole = {
            group: {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
            for group, found in _entries(folder).items()
        }
        reader = _dcp().HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            _dcp().load(_flat(whole), storage_reader=reader, no_dist=True)
    return whole


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    with _plain_errors():
        metadata = _dcp().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        groups: dict[str, dict[str, Any]] = {}
        for key, entry in metadata.items():
            group, _, name = key.partition("/")
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():  # pyright: ignore
                raise SafetensorError(f"parts of {key} are missing")
            groups.setdefault(group, {})[name] = entry
        return groups


def _dcp() -> Any:
    import torch.distributed.checkpoint  # here, as it takes two seconds

    return torch.distributed.checkpoint


def _flat(tensors: Groups) -> dict[str, Any]:
    return {f"{group}/{name}": value for group, found in tensors.items() for name, value in found.items()}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The first error of any process, in the place of torch's account of all; and nothing said about one process."""
    quiet = logging.getLogger("torch.distributed.checkpoint")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    except _dcp().CheckpointException as error:
        first: Any = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, OSError) else SafetensorError(str(first)) from None
    except (LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise SafetensorError(f"they are no shards of tensors ({type(error).__name__}: {error})") from None
    finally:
        quiet.setLevel(level)
