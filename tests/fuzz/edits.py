"""What is done to a file: a value in its tree, its text, its bytes, its tensors, or what kind of thing it is."""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.training import checkpoints

TREES = (".json", ".yaml", ".jsonl")
TENSORS = (".safetensors",)
ARRAYS = (".npz", ".npy")


@dataclass(frozen=True)
class Edit:
    """``kind`` names a function below; ``where`` is a number from which a place in the file is taken."""

    file: str
    kind: str
    where: int = 0
    value: Any = None


def apply(edit: Edit) -> None:
    """Do it, to a file of the working folder. What cannot be done to this file is left undone."""
    file = Path(edit.file)
    if file.is_file() and not file.is_symlink():
        with suppress(ValueError, RecursionError, KeyError, TypeError, OSError, yaml.YAMLError, SafetensorError):
            _KINDS[edit.kind](file, edit.where, edit.value)
        _seal(file)


def kinds_for(file: str) -> list[list[str]]:
    """The edits that make sense for a file, in groups that are as likely as each other."""
    groups = [["text", "cut", "flip", "bytes", "empty", "gone", "folder", "pipe", "loop"]]
    suffix = Path(file).suffix
    if suffix in TREES:
        # Values above all: what is no tree any more is refused by its reader, and there is but one of those.
        groups += [["set"], ["set"], ["set"], ["set"], ["drop", "add", "rename", "wrap"], ["nest", "bomb"]]
    if suffix in TENSORS:
        groups += [["reshape", "cast", "poison", "lose", "extra", "lie"]] * 2
    if suffix in ARRAYS:
        groups += [["array"]] * 2
    return groups


def _read(file: Path) -> Any:
    text = file.read_text()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line]
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


def _write(file: Path, tree: Any) -> None:
    if file.suffix == ".jsonl":
        lines = tree if isinstance(tree, list) else [tree]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    else:
        file.write_text(json.dumps(tree))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _in_tree(change: Callable[[Any, Any, Any], None]) -> Callable[[Path, int, Any], None]:
    def edit(file: Path, where: int, value: Any) -> None:
        tree = {"": _read(file)}
        places = list(_places(tree))[1:]
        if places:
            change(*places[where % len(places)], value)
            _write(file, tree[""])

    return edit


def _set(inside: Any, key: Any, value: Any) -> None:
    inside[key] = value


def _drop(inside: Any, key: Any, _: Any) -> None:
    del inside[key]


def _add(inside: Any, key: Any, value: Any) -> None:
    if isinstance(inside, list):
        inside.insert(key, value)
    else:
        inside[str(value)[:60]] = value


def _rename(inside: Any, key: Any, value: Any) -> None:
    if isinstance(inside, dict):
        inside[f"{key}{str(value)[:60]}"] = inside.pop(key)


def _wrap(inside: Any, key: Any, _: Any) -> None:
    inside[key] = [inside[key]]


def _nest(file: Path, where: int, _: Any) -> None:
    depth = (10, 200, 3000, 100_000)[where % 4]
    inside = "[" * depth + "]" * depth if where % 3 else '{"a":' * depth + "1" + "}" * depth
    text = file.read_text()
    lines = text.split("\n")
    whole = (inside, f'{{"name": {inside}}}', text.replace(":", f": {inside} #", 1), "\n".join([*lines[:-1], inside]))
    file.write_text(whole[where % len(whole)])


def _bomb(file: Path, where: int, _: Any) -> None:
    """Aliases and merges of YAML that stand for a billion values, aliases that hold themselves, odd numbers."""
    level = "[" + ", ".join(["*x{i}"] * 9) + "]"
    aliases = "x0: &x0 [lol]\n" + "".join(f"x{i + 1}: &x{i + 1} {level.format(i=i)}\n" for i in range(9))
    merges = "x0: &x0 {a: 1}\n" + "".join(
        f"x{i + 1}: &x{i + 1} {{<<: {level.format(i=i)}, b{i}: *x{i}}}\n" for i in range(9)
    )
    loops = "x: &x [*x]\n", "x: &x {<<: *x}\n", "&x {data: *x, name: *x}\n", "? &x [*x]\n: 1\n"
    odd = (
        f"name: {'9' * 5000}\n",
        "name: 2020-99-99\n",
        "name: !!binary '*'\n",
        "name: !!python/name:os.sep\n",
        "=: =\n",
    )
    bombs = [aliases, merges, *loops, *odd, f"name: {'1:' * 3000}1\n", f"{'a: ' * 50}", "name: !!timestamp x\n"]
    bomb = bombs[where % len(bombs)]
    file.write_text(bomb + (file.read_text() if where % 2 and file.suffix == ".yaml" else ""))


def _cut(file: Path, where: int, _: Any) -> None:
    os.truncate(file, where % (file.stat().st_size + 1))


def _flip(file: Path, where: int, _: Any) -> None:
    data, drawn = bytearray(file.read_bytes()), random.Random(where)
    for _ in range(min(len(data), 1 + where % 8)):
        # Headers are where it hurts.
        data[drawn.randrange(len(data) if where % 2 else min(len(data), 200))] ^= 1 << drawn.randrange(8)
    file.write_bytes(data)


def _bytes(file: Path, where: int, _: Any) -> None:
    file.write_bytes(random.Random(where).randbytes(where % 5000))


def _gone(file: Path, *_: Any) -> None:
    file.unlink()


def _folder(file: Path, *_: Any) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path, *_: Any) -> None:
    file.unlink()
    os.mkfifo(file)


def _loop(file: Path, *_: Any) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _in_tensors(change: Callable[[dict[str, Any], str], None]) -> Callable[[Path, int, Any], None]:
    def edit(file: Path, where: int, _: Any) -> None:
        tensors = load_file(file)
        if tensors:
            change(tensors, sorted(tensors)[where % len(tensors)])
            file.unlink()
            save_file(tensors, file)

    return edit


def _reshape(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = torch.cat([tensors[name].flatten(), torch.ones(3, dtype=tensors[name].dtype)])


def _cast(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64)


def _poison(tensors: dict[str, Any], name: str) -> None:
    if tensors[name].is_floating_point():
        tensors[name] = torch.full_like(tensors[name], torch.nan)


def _lose(tensors: dict[str, Any], name: str) -> None:
    del tensors[name]


def _extra(tensors: dict[str, Any], name: str) -> None:
    tensors[f"{name}.more"] = tensors[name].clone()


def _lie(file: Path, where: int, _: Any) -> None:
    """A header that says more than there is."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if where % 2:
        file.write_bytes((size + (1 << (where % 63))).to_bytes(9, "little")[:8] + data[8:])
    else:
        header = data[8 : 8 + size].replace(b'"shape":[', b'"shape":[99999999999,', 1)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _array(file: Path, where: int, _: Any) -> None:
    strange: list[Any] = [
        np.zeros((0, 2), np.float32), np.zeros(()), np.full((8, 2), np.nan), np.full((8, 2), 1e300),
        np.array([["a", "b"]]), np.array([[1j, 2]]), np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.zeros((3, 2), "M8[s]"), np.zeros((8, 1, 1, 1, 1, 1, 2)), np.array([{"a": 1}], dtype=object),
        np.zeros((2, 2**20), np.float32), np.zeros((8, 2), bool),
    ]  # fmt: skip
    value = strange[where % len(strange)]
    if file.suffix == ".npy":
        np.save(file, value, allow_pickle=True)
    else:
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        if arrays:
            arrays[sorted(arrays)[where % len(arrays)]] = value
        np.savez(file, allow_pickle=True, **arrays)


def _text(file: Path, _: int, value: Any) -> None:
    file.write_text(str(value), errors="replace")


def _seal(file: Path) -> None:
    """A checkpoint that says of itself that it is whole: what was changed was changed by one who knows how."""
    state, name = file.parent / "state.json", file.name
    if not (file.parent.name.startswith("step-") and state.is_file() and file.is_file()):
        return
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(state.read_text())["state"]
        if name != "state.json":
            said["files"][name] = {"bytes": file.stat().st_size, "sha256": checkpoints._digest(file)}
        state.write_text(checkpoints.seal(said))


def _empty(file: Path, *_: Any) -> None:
    file.write_bytes(b"")


_KINDS: dict[str, Callable[[Path, int, Any], None]] = {
    "set": _in_tree(_set), "drop": _in_tree(_drop), "add": _in_tree(_add), "rename": _in_tree(_rename),
    "wrap": _in_tree(_wrap), "nest": _nest, "bomb": _bomb, "text": _text, "cut": _cut, "flip": _flip, "bytes": _bytes,
    "empty": _empty, "gone": _gone, "folder": _folder, "pipe": _pipe, "loop": _loop, "reshape": _in_tensors(_reshape),
    "cast": _in_tensors(_cast), "poison": _in_tensors(_poison), "lose": _in_tensors(_lose),
    "extra": _in_tensors(_extra), "lie": _lie, "array": _array,
}  # fmt: skip
