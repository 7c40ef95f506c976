"""Files of a folder that came from elsewhere, before they are copied into what others get: each is a file of that
folder, no link out of it, and is what its name says. Names that its files give are names, no paths."""

import errno
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_KINDS = {".png": "PNG", ".json": "JSON"}
_PNG = b"\x89PNG\r\n\x1a\n"
# A string that says where something is on the machine where it was written.
_PLACE = re.compile(r"/[^/\s]+/?|(?:/[^/]*/|~[^/\\]*[/\\]|\\\\|[A-Za-z]:[/\\]|\.{1,2}/|file:).*")


def plain_name(name: Any, where: Path) -> str:
    """A name that a file gives of another beside it.

    Raises:
        ValueError: it is a path, or no name at all.
    """
    if isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name):
        return name
    raise ValueError(f"{where} names the file {str(name)[:80]!r}: the name of a file beside it is needed, no path")


def own_file(file: Path, root: Path) -> Path:
    """A file, where it really lies: in the folder ``root``, or in the same download of the hub, whose snapshots are
    links to its blobs.

    Raises:
        ValueError: a link that leads elsewhere, or no file.
    """
    home = root.resolve()
    homes = [home, *(p.parent.parent / "blobs" for p in (home, *home.parents) if p.parent.name == "snapshots")]
    real = file.resolve()
    if not any(real.is_relative_to(place) for place in homes):
        raise ValueError(f"{file} is a link out of {root}, and what others get follows none: put the file itself there")
    if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{file} is no file that can be copied: remove it")
    return real


def own_folder(folder: Path, root: Path) -> None:
    """That a folder in ``root`` lies there: what is removed from it would go elsewhere.

    Raises:
        ValueError: it is a link that leads out of there.
    """
    if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{folder} is a link out of {root}, and what is removed there would be somebody else's: put the whole run "
            "there, and link to that"
        )


def no_link(path: str, flags: int) -> int:
    """Opens what fewstep writes on in a folder, ``open(file, "a", opener=no_link)``: the file of that name itself.

    Raises:
        ValueError: a link, or a file that has another name too: what it leads to would be written over.
    """
    try:
        handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link, and nothing is written through one: remove it") from None
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise ValueError(f"{path} has another name on this disk (a hard link), which would be written too: remove it")
    return handle


def copy_file(file: Path, target: Path, root: Path) -> None:
    """Copy a file of the folder ``root`` into what others get.

    Raises:
        ValueError: as :func:`own_file`, or it is not what its name says.
    """
    real = own_file(file, root)
    if why := unlike_its_name(real, file.suffix):
        raise ValueError(f"{file} {why}, and is not copied: fetch it again")
    with real.open("rb") as source, target.open("xb") as copy:
        while block := source.read(1 << 20):
            copy.write(block)


def unlike_its_name(file: Path, suffix: str) -> str:
    """Why a file is not what its suffix says; empty where it is, or the suffix says nothing that is known here."""
    if suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return ""
        except SafetensorError as error:
            return f"is no safetensors ({error})"
    try:
        if suffix == ".png":
            clean_png(file)
        elif suffix == ".json":
            json.loads(file.read_bytes())
        elif suffix in (".txt", ".md", ".yaml", ".py"):
            file.read_text(encoding="utf-8")
    except (ValueError, RecursionError):
        return f"is no {_KINDS.get(suffix, 'text')}"
    return ""


def clean_png(file: Path) -> bytes:
    """The image in a PNG, packed anew: what else is in the file, text or bytes after its end, stays behind.

    Raises:
        ValueError: it is none.
    """
    from PIL import Image

    with file.open("rb") as opened:
        content = opened.read() if opened.read(8) == _PNG else b""
    try:
        with Image.open(io.BytesIO(_PNG + content), formats=["PNG"]) as picture:
            picture.load()
            packed, seen_through = io.BytesIO(), picture.info.get("transparency")
            kept = {} if seen_through is None else {"transparency": seen_through}
            picture.info.clear()
            picture.save(packed, "png", **kept)
    # Pillow's decoders raise all of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no PNG ({type(error).__name__})") from None
    return packed.getvalue()


def without_places(value: Any) -> Any:
    """A value as others get it: of what lies at a place on this machine the name alone, of a folder and of code.

    >>> without_places({"teacher": "/home/me/ddpm", "objective": "../mine.py:Loss", "data": "hf:owner/name"})
    {'teacher': 'ddpm', 'objective': 'mine.py:Loss', 'data': 'hf:owner/name'}
    """
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if isinstance(value, str) and is_place(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or value
    return value


def is_place(text: str) -> bool:
    """Whether a text says where something is on this machine."""
    if "\n" in text or len(text) > 4096:
        return False
    file = text.rpartition(":")[0] if re.search(r"\.py:\w+$", text) else text
    return bool(_PLACE.fullmatch(text)) or (re.search(r"[/\\]", file) is not None and _exists(Path(file)))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
