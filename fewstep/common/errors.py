"""How fewstep says no: one line that names the thing, the value and the way out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

_LONGEST, _CAUSE = 380, 160  # characters of a message, and of the cause that it gives
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 6


def shown(value: Any) -> str:
    """A value as an error shows it: as Python writes it, and of a long one the beginning and the end."""
    return _SHORT.repr(value)


def shortened(text: str, longest: int = _LONGEST) -> str:
    """A message in one line, and of one that is too long for anybody the beginning and the end."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-(longest // 3) + 5 :]}"


def briefly(error: BaseException) -> str:
    """What an error says, shortened to be a part of a message; its kind where it says nothing."""
    return shortened(str(error), _CAUSE) or type(error).__name__


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known: lists what is, the nearest first.

    >>> raise unknown("objective", "ITMV", ["FM", "ITVM", "LMD"])
    Traceback (most recent call last):
    ValueError: unknown objective 'ITMV': did you mean 'ITVM'? Known: FM, ITVM, LMD
    """
    known = sorted(known)
    folded = {k.lower(): k for k in known}
    near = get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    return ValueError(f"unknown {kind} {shown(name)}: {hint}Known: {', '.join(known)}")


@contextmanager
def refused(what: str, way_out: str = "") -> Iterator[None]:
    """Whatever other people's code (diffusers, transformers, torch) makes of values that it was given from a file, as
    one line: the border between what was received and what is computed. Not for code of fewstep's own.

    Args:
        what: the beginning of the line, such as ``diffusers cannot make a UNet2DModel of FILE``.

    Raises:
        ValueError: that line, with the cause.
    """
    try:
        yield
    except Exception as error:
        cause = shortened(f"{type(error).__name__}: {error}", _CAUSE)
        raise ValueError(f"{what} ({cause})" + (f": {way_out}" if way_out else "")) from error


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, a disk that is full); what was saved stays whole."""


OUT_OF_MEMORY = "there is not enough memory for this: ask for fewer or smaller samples, a smaller batch or network"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing, on a CPU or a GPU."""
    said = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in said or "out of memory" in said.lower()
