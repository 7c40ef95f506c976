"""Text embeddings in shards, each distinct prompt encoded once by the processes together; and how shards are kept, in
a folder that knows what it was made of."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.common.disk import create_file, replace_file, sweep
from fewstep.common.distributed import World
from fewstep.common.reading import parse_json, read_text
from fewstep.data.shards import is_note, is_whole
from fewstep.data.texts import CAPTIONS, NULL, TEXTS, text_files
from fewstep.latents.encoders import kept_null
from fewstep.latents.prompts import SIZES, Prompts
from fewstep.training.fingerprint import differences

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
    """The conditions of distinct prompts and of the empty one, into the folder ``out``; returns their files. What is
    there and whole stays.

    Args:
        size: height and width of the image in pixels, for models that are told.
        dtype: how they are kept; sizes stay float32. batch: prompts encoded at once.
        turns: which shards this process makes, see :func:`turns_of`. tick: called with how many more are done.
    """
    encoders = copy.copy(text)  # so that the encoders are let go again
    null = kept_null(encoders, device)
    if not is_kept(out / NULL):
        keep(out / NULL, {name: value.cpu() for name, value in null.items()}, rows=1)
    shard = rows_of(sum(value[None].numel() for value in null.values()) * DTYPES[dtype].itemsize)
    known = {"count": len(prompts), "shard": shard}
    replace_file(out / TEXTS, json.dumps(known).encode())
    replace_file(out / CAPTIONS, "".join(f"{json.dumps(prompt)}\n" for prompt in prompts).encode())
    files = text_files(out, known)
    for i in turns(len(files)):
        part = prompts[i * shard : (i + 1) * shard]
        if not is_kept(files[i]):
            keep(files[i], _joined(_conditions(encoders, part, size, dtype, batch, device, tick)))
        else:
            tick(len(part))
    return [out / NULL, *files]


def note_of(file: Path) -> Path:
    """Where what a shard is known by is written: its hash, its bytes, its rows."""
    return file.with_suffix(".json")


def keep(file: Path, tensors: dict[str, Tensor], rows: int | None = None) -> None:
    """Write a shard, whole or not at all, and then what it is known by; of ``rows``, by default as many as its tensors
    are long."""
    content = save({name: value.contiguous() for name, value in tensors.items()})
    rows = len(next(iter(tensors.values()))) if rows is None else rows
    replace_file(file, content)
    replace_file(note_of(file), json.dumps(known_by(content, rows)).encode())


def known_by(content: bytes, rows: int) -> dict[str, Any]:
    """What a file is known by."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "rows": rows}


def is_kept(file: Path) -> bool:
    """Whether a shard is there as it was written; the file is read for it."""
    try:
        return is_whole(file, read_note(file))
    except (FileNotFoundError, ValueError):
        return False


def read_note(file: Path) -> dict[str, Any]:
    """What a shard is known by, as :func:`keep` wrote it.

    Raises:
        ValueError: it is no such note.
    """
    note = parse_json(read_text(note_of(file)), str(note_of(file)))
    if not is_note(note):
        raise ValueError(f"{note_of(file)} does not say what {file.name} is known by: remove both")
    return note


def claim(file: Path, facts: dict[str, Any], kind: str, saved: Callable[[Path], dict[str, Any]]) -> None:
    """Write what a folder is made of into its ``file``, or see that what is there is the same. Every process does: they
    write the same bytes.

    Args:
        kind: what the folder holds, in words. saved: reads the facts of a folder.

    Raises:
        ValueError: the folder was made of something else, or holds other files.
    """
    out = file.parent
    names = os.listdir(out) if out.is_dir() else []
    if file.name in names:
        refuse_others(out, facts, kind, saved(out))
        sweep(out)
        return
    # Another process may be at it, with a file that is not yet renamed.
    if out.is_file() or any(file.name not in name for name in names):
        raise ValueError(f"{out} holds something else than {kind}: nothing in it is overwritten, use another folder")
    if not create_file(file, (json.dumps(facts, indent=1) + "\n").encode()):
        refuse_others(out, facts, kind, saved(out))


def refuse_others(out: Path, facts: dict[str, Any], kind: str, saved: dict[str, Any]) -> None:
    """Refuse a folder of which any of these facts is another; what to type to go on may be."""
    if differing := differences({key: saved.get(key) for key in facts}, facts, ("command",)):
        raise ValueError(f"{out} holds other {kind}: {'; '.join(differing)}. Use another folder, or remove that one")


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
