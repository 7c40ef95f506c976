"""Checkpoints that are whole or not there: safetensors and JSON, written aside, synced, then renamed.

A checkpoint is a folder ``step-00001000`` with one ``NAME.safetensors`` per group of tensors and ``state.json``, which
lists every file with its size and SHA-256. Of a sharded training each process writes a file of its own instead, with
what it keeps of every tensor (``fewstep.training.shard_files``): no process ever holds the whole. Nothing is pickled.
``reached`` beside them holds the last step written, so that checkpoints that went missing are noticed.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.common.distributed import World
from fewstep.common.errors import TrainingError
from fewstep.common.received import plain_name
from fewstep.common.shards import local, share_of
from fewstep.common.write_errors import WriteError, write_error
from fewstep.training import shard_files
from fewstep.training.sealed import seal, unseal
from fewstep.training.shard_files import FILES

_WHOLE = re.compile(r"step-(\d{8,})")
_STALE = re.compile(r"\.(tmp|old)-(step-\d{8,}|reached)")

Tensors = dict[str, dict[str, Tensor]]
Sizes = Mapping[str, Mapping[str, torch.Size]]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder held: groups of tensors by name, and the JSON state."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint in ``folder``, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _WHOLE.fullmatch(entry.name)))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``; None where no run has reached one.

    Raises:
        FileNotFoundError: a run had reached one and it is gone.
    """
    if steps := steps_in(folder):
        return folder / _name(steps[-1])
    if (reached := folder / "reached").exists():
        raise FileNotFoundError(
            f"no checkpoint in {folder}, though the run had reached step {reached.read_text().strip()}: put the "
            f"step-... folder back, or start again with another output folder or resume=False (--fresh)"
        )
    return None


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, then drop all but the newest ``keep``.

    Args:
        world: of the processes that call this together, each with its shares of the tensors; one alone if not given.

    Raises:
        WriteError: the disk is full or cannot be written; older checkpoints stay as they were.
    """
    target, aside = folder / _name(step), folder / f".tmp-{_name(step)}"
    file, size = aside, sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    try:
        files: dict[str, dict[str, Any]] = {}
        if world is None:
            aside.mkdir(parents=True)
            for name, group in tensors.items():
                if group:
                    file = aside / f"{name}.safetensors"
                    save_file(_plain(group), file)
                    files[file.name] = _facts(file)
        else:
            file, state = aside / FILES, {**state, "shards": world.size}
            files = _write_shards(aside, tensors, world)
            if not world.is_main:
                world.barrier()  # until it is all there
                return target
        file = aside / "state.json"
        file.write_text(seal({**state, "step": step, "files": files}))
        _sync(file)
        _sync(aside)
        os.replace(aside, target)
        _sync(folder)
        file = folder / ".tmp-reached"
        file.write_text(f"{step}\n")
        _sync(file)
        os.replace(file, folder / "reached")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _unwritten(folder, step, target / file.name, size, error) from error
    if world is not None:
        world.barrier()
    for old in steps_in(folder)[:-keep]:
        _remove(folder / _name(old))
    return target


def _write_shards(aside: Path, tensors: Mapping[str, Mapping[str, Tensor]], world: World) -> dict[str, dict[str, Any]]:
    """Write a file a process; what is to be known of each, in every process."""
    if world.is_main:
        aside.mkdir(parents=True)
    world.barrier()
    shard_files.write(aside, tensors)
    own = shard_files.own_file(aside, world.rank)
    found = world.gather({own.name: _facts(own)} if own.exists() else {})
    return {name: facts for files in found for name, facts in files.items()}


def _facts(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every file of it.

    Raises:
        TrainingError: a file is missing or damaged; says which, and what to go back to.
    """
    state = read_state(path)
    if fault := _fault(path, state):
        raise TrainingError(_way_out(path, fault))
    if is_sharded(state):
        return Checkpoint(path, state["step"], _whole(path, shard_files.assemble), state)
    return Checkpoint(path, state["step"], {Path(name).stem: _tensors(path / name) for name in state["files"]}, state)


def load_shards(path: Path, world: World, targets: Callable[[Sizes], Tensors]) -> Checkpoint:
    """Read of a checkpoint what each process of a sharded training keeps; they verify its files together.

    Args:
        targets: makes the tensors that are read into, of the shapes that the checkpoint has.

    Raises:
        TrainingError: as :func:`load`, in every process. ValueError: as ``targets``.
    """
    state = read_state(path)
    mine = {
        name: facts for place, (name, facts) in enumerate(state["files"].items()) if place % world.size == world.rank
    }
    faults = [fault for fault in world.gather(_fault(path, state, mine)) if fault]
    if faults:
        raise TrainingError(_way_out(path, faults[0]))
    if is_sharded(state):
        tensors = targets(_whole(path, shard_files.sizes))
        _whole(path, lambda folder: shard_files.read_into(folder, tensors))
    else:
        found = {Path(name).stem: _tensors(path / name) for name in state["files"]}
        tensors = targets({group: {name: x.shape for name, x in named.items()} for group, named in found.items()})
        for group, named in tensors.items():
            for name, target in named.items():
                local(target).copy_(share_of(found[group][name], target))
    return Checkpoint(path, state["step"], tensors, state)


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Whether the processes of a sharded training wrote a checkpoint."""
    return bool(state.get("shards"))


def _whole(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except SafetensorError as error:  # whole, by their hashes, and yet no shards
        raise TrainingError(_way_out(path, f"the shards in {path} are damaged ({error})")) from None


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        # Cloned out of the memory map: the file may be deleted while training goes on.
        return {key: value.clone() for key, value in load_file(file).items()}
    except SafetensorError as error:  # whole, by its hash, and yet no safetensors
        raise TrainingError(_way_out(file.parent, f"{file} is damaged ({error})")) from None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint alone (step, seconds, fingerprint, ...), without reading its tensors.

    Raises:
        TrainingError: ``state.json`` is missing or damaged.
    """
    state = unseal(path / "state.json")
    if isinstance(state, str):
        raise TrainingError(_way_out(path, state))
    return state


def clean(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for entry in folder.iterdir():
        if _STALE.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def clear(folder: Path) -> None:
    """Remove every checkpoint: the run starts again."""
    for step in steps_in(folder):
        _remove(folder / _name(step))
    (folder / "reached").unlink(missing_ok=True)


def is_sealed(path: Path) -> bool:
    """Whether a folder has the state of a checkpoint, as it was written."""
    return not isinstance(unseal(path / "state.json"), str)


def is_ours(folder: Path) -> bool:
    """Whether nothing but checkpoints of this library, and hidden files, lies in ``folder``."""
    known = lambda name: name == "reached" or name.startswith(".") or _WHOLE.fullmatch(name)  # noqa: E731
    return all(known(entry.name) for entry in folder.iterdir())


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _plain(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and each with memory of its own: safetensors refuses tied weights."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault(path: Path, state: dict[str, Any], files: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with the first of the files, of all or of some, that is not as it was written."""
    if is_sharded(state) and (more := {file.name for file in path.glob(FILES)} - state["files"].keys()):
        return f"{path / min(more)} is no part of the checkpoint"
    for name, expected in (state["files"] if files is None else files).items():
        try:
            file = path / plain_name(name, path / "state.json")
        except ValueError as error:
            return str(error)
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{file} is damaged: it has {size} bytes where {expected['bytes']} were written"
        if _digest(file) != expected["sha256"]:
            return f"{file} is damaged: its SHA-256 is not that of what was written"
    return None


def _way_out(path: Path, fault: str) -> str:
    for step in reversed(steps_in(path.parent)):
        older = path.parent / _name(step)
        state = unseal(older / "state.json")
        if older != path and not isinstance(state, str) and _fault(older, state) is None:
            return f"{fault}. Delete the folder {path} to go back to {older.name}"
    return (
        f"{fault}, and no other checkpoint is whole. Put the file back, or start again with another output folder or "
        "resume=False (--fresh)"
    )


def _unwritten(folder: Path, step: int, file: Path, size: int, error: Exception) -> WriteError:
    """What is said of a checkpoint that could not be written."""
    steps = steps_in(folder)
    whole = f"{_name(steps[-1])} is whole and the same command goes on from it" if steps else "there is none before it"
    then = f", or keep fewer checkpoints: that of step {step} has {size:,} bytes; {whole}"
    # Not by the name of the file that the error knows, which is no more.
    plain = OSError(error.errno, "") if isinstance(error, OSError) else error
    return write_error(plain, file, then) or WriteError(f"could not write {file} ({error}): {whole}")


def _remove(path: Path) -> None:
    # Renamed first: a kill while its files go leaves no half checkpoint under a good name.
    aside = path.with_name(f".old-{path.name}")
    os.replace(path, aside)
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    """Down to the disk, so that a name never stands for bytes that a power cut lost."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
