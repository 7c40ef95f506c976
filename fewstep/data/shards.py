"""Rows in shards, memory-mapped, and the facts beside them in JSON: what folders of latents and of pairs have in
common."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.common.errors import briefly, shown
from fewstep.common.reading import no_file, parse_json, read_text

MOST_SHARDS = 100_000  # their names have five digits


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def is_said(value: Any) -> bool:
    """Whether it is a text, or nothing."""
    return value is None or isinstance(value, str)


# What facts of folders may be, where they have them: of all folders, and of those with images or latents of them.
CHECKS: dict[str, Callable[[Any], bool]] = {
    "shape": lambda value: is_list(value, is_count) and bool(value),
    "count": is_count,
    "shard": is_count,
    "command": lambda value: isinstance(value, str),
    "text": is_said,
    "vae": is_said,
}


def gathered(
    shards: Iterable[Tensor], which: Tensor, place: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows (n, *shape) of several shards: row i is number ``place[i]`` of shard ``which[i]``."""
    out = torch.empty(len(which), *shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
    wanted = set(which.tolist())
    for number, shard in enumerate(shards):
        if number in wanted:
            here = which == number
            out[here] = shard[place[here]].to(out.dtype)
    return out


def facts_in(
    file: Path, wanted: int, missing: str, way_out: str, checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """The facts of a folder in a file of the ``wanted`` format; what is said where it is missing, or of another.
    ``checks`` say what each of them may be."""
    if not file.is_file():
        raise FileNotFoundError(missing)
    facts = parse_json(read_text(file), str(file))
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is no mapping of facts: {way_out}")
    if facts.get("format") != wanted:
        raise ValueError(f"{file} has format {shown(facts.get('format'))}, this fewstep reads {wanted}: {way_out}")
    for key, check in checks.items():
        if key in facts and not check(facts[key]):
            raise ValueError(f"{file} has {key}: {shown(facts[key])}, which cannot be: {way_out}")
    if facts.keys() >= {"count", "shard"} and shards_of(facts) > MOST_SHARDS:
        raise ValueError(f"{file} has more than {MOST_SHARDS:,} shards, which cannot be: {way_out}")
    return facts


def shards_of(facts: Mapping[str, Any]) -> int:
    """How many files rows are in, by their ``count`` and how many are in a ``shard``."""
    return -(-facts["count"] // facts["shard"])


def is_note(kept: Any) -> bool:
    """Whether a value is what a shard is known by."""
    kinds = {"rows": int, "bytes": int, "sha256": str}
    return isinstance(kept, dict) and all(type(kept.get(k)) is kind for k, kind in kinds.items()) and kept["rows"] >= 0


def check_floats(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """That tensors are of a type that fewstep writes numbers in.

    Raises:
        ValueError: one is not, by its name.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{file} has {name} of {tensor.dtype}, and float16, bfloat16 or float32 is needed")


def read_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped.

    Raises:
        ValueError: it is damaged.
    """
    if why := no_file(file):
        raise ValueError(f"{file} is damaged ({why})")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({briefly(error)})") from None


def is_whole(file: Path, kept: dict[str, Any]) -> bool:
    """Whether a file has the hash that it was written with."""
    if not file.is_file() or file.stat().st_size != kept["bytes"]:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == kept["sha256"]


def check_size(file: Path, kept: dict[str, Any]) -> None:
    """That a shard is there and as long as it was written; its hash takes reading it all, see ``Encoded.check``.

    Raises:
        ValueError: it is not.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    if file.stat().st_size != kept["bytes"]:
        raise ValueError(f"{file} is damaged ({file.stat().st_size} bytes, it had {kept['bytes']})")
