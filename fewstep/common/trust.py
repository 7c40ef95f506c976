"""May this code run? What the user names may: by a flag, from Python, in a recipe file given by its path. What a folder
names (a run, an export) came with the folder, perhaps from a stranger. It runs where this user's own fewstep wrote that
folder, or where the user says so: ``--trust``, ``trust=True``.

That fewstep wrote a folder is remembered outside of it: one file for each, in ``$XDG_STATE_HOME/fewstep/runs`` (else
``~/.local/state/fewstep/runs``), with the hash of its recipe and the places of the code. Whoever replaces the folder
can change neither. Code that lies in the folder itself could be replaced with it, so it is never remembered.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from fewstep.common.user_folders import state_folder

# What becomes of code that a folder names: asked for, run, or (where a command only looks) no code at all.
_ANSWER: ContextVar[Literal["ask", "run", "never"]] = ContextVar("answer", default="ask")
# The keys of a recipe that may name code; a text in the place of their section stands for the last.
_KEYS = (("teacher", "source"), ("teacher", "guidance", "weak"), ("student", "network"), ("objective", "name"))
_SHORT = _KEYS[0], _KEYS[2], _KEYS[3]
# What this process wrote, for where nothing can be written down.
_written: dict[Path, dict[str, Any]] = {}


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Inside, code that folders name runs, also of those that they lead to: a run whose teacher is a run."""
    token = _ANSWER.set("run" if trust and _ANSWER.get() == "ask" else _ANSWER.get())
    try:
        yield
    finally:
        _ANSWER.reset(token)


@contextmanager
def only_looking() -> Iterator[None]:
    """Inside, no code runs that anybody names."""
    token = _ANSWER.set("never")
    try:
        yield
    finally:
        _ANSWER.reset(token)


def is_code(name: Any) -> bool:
    """Whether a name stands for code: ``FILE.py:NAME`` or ``MODULE:NAME``."""
    return isinstance(name, str) and ":" in name and not name.startswith(("fewstep:", "hf:"))


def code_in(tree: Mapping[str, Any]) -> dict[str, str]:
    """The code that a recipe names, by its dotted key."""
    found = {}
    for keys in _KEYS:
        value: Any = tree
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else value if keys in _SHORT else None
        if is_code(value):
            found[".".join(keys)] = value
    objective = tree.get("objective")
    if isinstance(objective, Mapping):  # what it stands around, a critic: whatever is named inside, however deep
        found |= {f"objective.{key}": name for key, name in _named_inside(objective).items()}
    return found


def _named_inside(value: Any) -> dict[str, str]:
    """All code that a value names, by its dotted key inside of it."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {}
    for key, part in parts:
        found |= {str(key): part} if is_code(part) else {f"{key}.{k}": name for k, name in _named_inside(part).items()}
    return found


def check_code(name: str) -> None:
    """Called before any code is read in.

    Raises:
        ValueError: nothing runs here.
    """
    if _ANSWER.get() == "never":
        raise ValueError(f"{name} is code, and a command that only looks runs none")


def check_folder(folder: Path, recipe: Path, code: Mapping[str, str]) -> None:
    """That the code which a folder names may run, in its recipe or in another file ``recipe`` that says what is made;
    ``code`` is by its key, as :func:`code_in` gives it.

    Raises:
        ValueError: nobody said so.
    """
    if not code or _ANSWER.get() == "never":  # there, it is refused when it is looked for
        return
    why = _not_ours(folder, recipe, code)
    if why and _ANSWER.get() == "run":
        remember(folder, recipe, code)
    elif why:
        key, name = next(iter(code.items()))
        more = f" and {len(code) - 1} more" if len(code) > 1 else ""
        raise ValueError(
            f"{_short(folder)} names code, {_short(name)} ({key}){more}, and {why}: look at that code, then say "
            "--trust (trust=True in Python) to run it"
        )


def remember(folder: Path, recipe: Path, code: Mapping[str, str]) -> None:
    """Write down that this user's fewstep wrote a folder, or was told to trust it, with this recipe and its code."""
    places = [_place(name) for name in code.values()]
    places = [place for place in places if not _lies_in(place, folder)]
    if not places:
        return
    said = folder.resolve() / recipe.name
    _written[said] = {"recipe": str(said), "sha256": _digest(recipe), "code": sorted(places)}
    note = _note_of(said)
    try:
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = note.with_name(f".{note.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            json.dump(_written[said], stream, indent=1)
        aside.replace(note)
    except OSError as error:
        warnings.warn(
            f"that you trust {_short(folder)} could not be written down in {note.parent} ({error.strerror}): later "
            "commands on it need --trust",
            stacklevel=2,
        )


def _not_ours(folder: Path, recipe: Path, code: Mapping[str, str]) -> str:
    """Why the code of a folder is not known to be the user's own; empty where it is."""
    places = [_place(name) for name in code.values()]
    if any(_lies_in(place, folder) for place in places):
        return "it lies in that folder"
    known = _known(folder.resolve() / recipe.name)
    if known is None:
        return "the folder is not known to be written by you"
    if known.get("sha256") != _digest(recipe):
        return f"{recipe.name} is not as you wrote it"
    return "" if set(places) <= set(known.get("code", ())) else "it is not at the place where it was then"


def _known(said: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_note_of(said).read_text())
    except (OSError, ValueError, RecursionError):
        return _written.get(said)
    return found if isinstance(found, dict) and found.get("recipe") == str(said) else None


def _note_of(said: Path) -> Path:
    """The note of a recipe, by where it is: in a folder, under its name there."""
    return state_folder() / "runs" / f"{hashlib.sha256(str(said).encode()).hexdigest()[:32]}.json"


def _place(name: str) -> str:
    """A name of code with its file in full."""
    file, _, inside = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{inside}" if file.endswith(".py") else name


def _lies_in(place: str, folder: Path) -> bool:
    file = place.rpartition(":")[0]
    return file.endswith(".py") and Path(file).is_relative_to(folder.resolve())


def _digest(recipe: Path) -> str:
    return hashlib.sha256(recipe.read_bytes()).hexdigest()


def _short(name: Any) -> str:
    """A name that is not longer than a line has room for."""
    text = str(name)
    return text if len(text) <= 80 else f"{text[:30]}...{text[-45:]}"
