"""What lies in a folder of images: which files are images, which part of them is used, which sub-folders are
classes."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.common.errors import unknown
from fewstep.data.formats import PICTURES, is_picture

# Files beside images that are no loss, and what operating systems leave everywhere.
_BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet")
_JUNK = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")

# What people call the folders that a data set is split into.
_TAIL = r"(?:[ _-]?(?:set|data|images|\d+))*"
_PARTS = {"train": "train(ing)?", "test": "test(ing)?", "val": "val(id(ation)?)?|dev|eval"}


@dataclass(frozen=True)
class Folder:
    """The images of a folder by their relative ``names``, in order; ``others`` are the files beside them. The folders
    that may be classes lie ``depth`` folders below the root."""

    root: Path
    names: list[str]
    others: list[str]
    depth: int = 0

    def classes(self) -> tuple[list[str], list[int]]:
        """The sub-folders that are classes, in their order, and the number of each image's; none where there are not
        two of them, or images beside."""
        inner = [name.split("/")[self.depth :] for name in self.names]
        folders = {parts[0] for parts in inner if len(parts) > 1}
        loose = [name for name, parts in zip(self.names, inner, strict=True) if len(parts) == 1]
        if len(folders) < 2:
            return [], []
        if loose:
            warnings.warn(
                f"{len(loose)} images such as {loose[0]} lie beside the {len(folders)} sub-folders of {self.root}: "
                "no class labels are taken from these (labels: false says that none are wanted)",
                stacklevel=3,
            )
            return [], []
        classes = sorted(folders)
        # Folders named 0 to 10 count as numbers do, so that folder 10 is class 10.
        with suppress(ValueError):
            classes = sorted(folders, key=int)
        number = {name: k for k, name in enumerate(classes)}
        return classes, [number[parts[0]] for parts in inner]


def open_folder(root: Path, split: str | None = None) -> Folder:
    """What is used of a folder of images; says in a line what is left out, and why.

    Hidden files and what operating systems leave (``Thumbs.db``, ``__MACOSX``) are no files here. Links to folders are
    followed, and each folder is read once.

    Args:
        split: which of the folders ``train``, ``test`` and ``val`` (or ``training``, ``test_set``, ``validation``, ...)
            is used, by default train where there are such; ``all`` takes them for folders like any other.

    Raises:
        FileNotFoundError: no such folder, or no images in it; says what it holds.
        ValueError: no such split, or some folders that look like splits and some that do not.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is {'a file, not a folder of pictures' if root.exists() else 'not there'}")
    found, left_out = _files_below(root)
    names = [name for name in found if is_picture(name)]
    if not names:
        held = [f"{len(found)} files: {_counted(found, 8)}" if found else "no files", *left_out]
        raise FileNotFoundError(f"no images ({PICTURES}) in {root}, which holds {'; '.join(held)}")
    above, used, unused = _split(root, names, split)
    if unused:
        sizes = Counter(name.removeprefix(above).split("/")[0] for name in names)
        counts = ", ".join(f"{folder} ({sizes[folder]})" for folder in unused)
        left_out.append(f"the images of {counts}, since {' and '.join(used)} is used (data.split names another)")
        names = [name for name in names if name.startswith(tuple(f"{above}{folder}/" for folder in used))]
    others = [name for name in found if not is_picture(name)]
    others = [name for name in others if not name.startswith(tuple(f"{above}{folder}/" for folder in unused))]
    if strange := [name for name in others if not name.lower().endswith(_BESIDE)]:
        is_heif = any(name.lower().endswith((".heic", ".heif")) for name in strange)
        hint = "; pip install pillow-heif for .heic" if is_heif else ""
        left_out.insert(0, f"{_counted(strange, 8)}, which Pillow does not read{hint}")
    if left_out:
        warnings.warn(f"left out of {root}: {'; '.join(left_out)}", stacklevel=4)
    return Folder(root, names, others, (above.count("/") + 1) if used else 0)


def stamp(root: Path, name: str) -> list[Any]:
    """What changes when a file does: its name, its size and its time; for one that is not there, its name alone."""
    try:
        found = (root / name).stat()
    except (OSError, ValueError):
        return [name, None, None]
    return [name, found.st_size, found.st_mtime_ns]


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """The files of a folder and of those below it by relative name, in order; and what is not looked into, in words."""
    found: list[str] = []
    closed: list[str] = []
    again: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Links wait until all that is there by itself has been seen, so that this keeps its own name.
    folders, links = [""], []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            place = os.stat(root / here)
            if (key := (place.st_dev, place.st_ino)) in seen:
                again.append(here)
                continue
            seen.add(key)
            entries = list(os.scandir(root / here))
        except OSError:
            closed.append(here)
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in _JUNK:
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{here}{entry.name}/")
            else:
                found.append(here + entry.name)
    said = [f"{len(again)} links to folders that are read already, such as {again[0]}"] if again else []
    said += [f"{len(closed)} folders that cannot be opened, such as {closed[0]}"] if closed else []
    return sorted(found), said


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _split(root: Path, names: list[str], split: str | None) -> tuple[str, list[str], list[str]]:
    """Where the folders are that a data set is split into, which of them are used, and which are not; none where it is
    not split."""
    if split == "all":
        return "", [], []
    wanted = None if split is None else _part_of(split)
    if split is not None and wanted is None:
        raise unknown("split", split, [*_PARTS, "all"])
    above = ""
    while True:  # archives often hold one folder, and the data set in it
        inner = [name.removeprefix(above).split("/") for name in names]
        folders = sorted({parts[0] for parts in inner if len(parts) > 1})
        loose = sum(len(parts) == 1 for parts in inner)
        if loose or len(folders) != 1 or _part_of(folders[0]):
            break
        above += f"{folders[0]}/"
    parts = {folder: _part_of(folder) for folder in folders}
    known = {part for part in parts.values() if part is not None}
    others = [folder for folder in folders if parts[folder] is None]
    if split is None:
        if not known or (len(known) == 1 and (known != {"train"} or others or loose)):
            return "", [], []
        if others or loose:
            beside = f"the folder {others[0]}" if others else f"{loose} images"
            some = ", ".join(sorted(folder for folder in folders if parts[folder]))
            raise ValueError(
                f"{root} has {some}, which look like parts of a data set, and beside them {beside}: say "
                "data.split: train to use that part alone, or data.split: all to use all (each folder is a class then)"
            )
    wanted = wanted or "train"
    if wanted not in known:
        held = ", ".join(folders[:8])[:150] or "no folders"
        raise ValueError(f"{root} has no folder for split {split or wanted}, but {held}: data.split: all takes all")
    used = [folder for folder in folders if parts[folder] == wanted]
    return above, used, [folder for folder in folders if folder not in used]


def _part_of(folder: str) -> str | None:
    """Which part of a data set a folder of this name is; None where it does not look like one."""
    return next((p for p, name in _PARTS.items() if re.fullmatch(f"(?:{name}){_TAIL}", folder.lower())), None)


def _counted(names: Iterable[str], most: int) -> str:
    """How many files there are of each suffix, the most frequent first."""
    kinds = Counter(Path(name).suffix.lower()[:20] or "no suffix" for name in names)
    said = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(most))
    return said if len(kinds) <= most else f"{said} and {len(kinds) - most} more kinds"
