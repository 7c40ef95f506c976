"""How fewstep says no: one line that names the thing, the value and the way out."""

from collections.abc import Iterable
from difflib import get_close_matches


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
    return ValueError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known)}")


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, a disk that is full); what was saved stays whole."""
