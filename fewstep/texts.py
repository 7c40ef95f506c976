"""Text embeddings in shards, each distinct prompt encoded once by the processes together; and how shards are kept."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.data.encoded import NULL, TEXTS, is_whole, text_files
from fewstep.encoders import kept_null
from fewstep.evaluation.files import replace_file
from fewstep.prompts import SIZES, Prompts
from fewstep.training.distributed import World

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SHARD_BYTES, _MOST = 1 << 28, 10_000  # a shard has as many bytes, and rows, at most


def write_texts(
    text: Prompts,
    prompts: Sequence[str],
    out: Path,
    *,
    size: tuple[int, int],
    dtype: str = "float16",
    batch: int = 16,
    device: torch.device | str = "cpu",
    turns: Callable[[int], list[int]],
    tick: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """The conditions of distinct prompts and of the empty one, into the folder ``out``; returns the files of the
    shards. What is there and whole stays.

    Args:
        size: height and width of the image in pixels, for models that are told.
        dtype: how they are kept; sizes stay float32. batch: prompts encoded at once.
        turns: which shards this process makes, see :func:`turns_of`. tick: called with how many more are done.
    """
    encoders = copy.copy(text)  # so that the encoders are let go again
    null = kept_null(encoders, device)
    if not (out / NULL).is_file():
        replace_file(out / NULL, save({name: value.cpu().contiguous() for name, value in null.items()}))
    shard = rows_of(sum(value[None].numel() for value in null.values()) * DTYPES[dtype].itemsize)
    known = {"count": len(prompts), "shard": shard}
    replace_file(out / TEXTS, json.dumps(known).encode())
    files = text_files(out, known)
    for i in turns(len(files)):
        part = prompts[i * shard : (i + 1) * shard]
        if not is_kept(files[i]):
            keep(files[i], _joined(_conditions(encoders, part, size, dtype, batch, device, tick)))
        else:
            tick(len(part))
    return files


def note_of(file: Path) -> Path:
    """Where what a shard is known by is written: its hash, its bytes, its rows."""
    return file.with_suffix(".json")


def keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard, whole or not at all, and then what it is known by."""
    content = save({name: value.contiguous() for name, value in tensors.items()})
    rows = len(next(iter(tensors.values())))
    replace_file(file, content)
    known = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "rows": rows}
    replace_file(note_of(file), json.dumps(known).encode())


def is_kept(file: Path) -> bool:
    """Whether a shard is there as it was written; the file is read for it."""
    try:
        return is_whole(file, json.loads(note_of(file).read_text()))
    except (FileNotFoundError, ValueError):
        return False


def turns_of(world: World, rest: bool) -> Callable[[int], list[int]]:
    """Which of ``count`` shards a process makes, in order: its own; with ``rest`` then the others from the last on, so
    that processes which are done early meet those that are not at the end."""

    def turns(count: int) -> list[int]:
        mine = list(range(world.rank, count, world.size))
        return mine + ([i for i in reversed(range(count)) if i % world.size != world.rank] if rest else [])

    return turns


def rows_of(row_bytes: int) -> int:
    """How many rows of this size make a shard."""
    return max(1, min(_MOST, _SHARD_BYTES // row_bytes))


def cast(value: Tensor, dtype: str, name: str) -> Tensor:
    """Numbers as they are kept, on the CPU.

    Raises:
        ValueError: the type cannot hold them.
    """
    kept = value.to("cpu", DTYPES[dtype])
    if not kept.isfinite().all():
        raise ValueError(f"{name} are not finite in {dtype}: say dtype: bfloat16 or float32")
    return kept


def _conditions(
    text: Prompts,
    prompts: Sequence[str],
    size: tuple[int, int],
    dtype: str,
    batch: int,
    device: torch.device | str,
    tick: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        cond = text.encode(part, size=size, device=device)
        yield {  # half precision would round sizes in pixels
            name: cast(value, dtype, name) if value.is_floating_point() and name not in SIZES else value.cpu()
            for name, value in cond.items()
        }
        tick(len(part))


def _joined(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = list(parts)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
