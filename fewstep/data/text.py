"""Text as rows of tokens: windows of a file's characters, as one-hot vectors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.common.errors import unknown
from fewstep.common.reading import check_memory
from fewstep.data.batch import Batch

LETTERS = " abcdefghijklmnopqrstuvwxyz"
_HELD_OUT = 0.05  # of the text, at its end
_MOST = 4096  # characters that are different


class Text:
    """Windows of ``length`` characters of a text, one-hot (length, V); every place begins one.

    Args:
        text: what they are windows of.
        length: L.
        symbols: the vocabulary, in the order of its numbers.

    Attributes:
        symbols: as above; by these a student knows that its samples are tokens.
        words: the words of the whole text, by which the spelling of samples is judged.

    Raises:
        ValueError: a text shorter than two windows, or a vocabulary that is too small or too large.
    """

    def __init__(self, text: str, length: int = 32, symbols: Sequence[str] = LETTERS) -> None:
        if length < 1:
            raise ValueError(f"length is {length}: a row has one character at least")
        if len(text) < 2 * length:
            raise ValueError(f"a text of {len(text)} characters has no two rows of {length}: a longer text is needed")
        self.symbols = tuple(symbols)
        if not 2 <= len(self.symbols) <= _MOST:
            raise ValueError(
                f"a text of {len(self.symbols)} different characters: 2 to {_MOST} can be tokens. letters: true takes "
                "a to z alone"
            )
        check_memory(f"{len(text):,} characters", 6 * len(text), "a shorter text")
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        self._numbers = torch.from_numpy(np.array([number[c] for c in text], dtype=np.int16))
        self.words = frozenset(text.split(" "))
        self.shape: tuple[int, ...] = (length, len(self.symbols))
        self.size: int | None = len(text) - length + 1

    def tokens(self, index: Tensor) -> Tensor:
        """The windows that begin at the places ``index`` (n,), whole numbers (n, L)."""
        return self._numbers[index[:, None] + torch.arange(self.shape[0])].long()

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Those windows as float32 (n, L, V)."""
        return Batch(one_hot(self.tokens(index), self.shape[1]).float())


def text_file(path: str | Path, length: int = 32, split: str = "train", letters: bool = True) -> Text:
    """A text in UTF-8 as rows of characters.

    Args:
        length: characters of a row.
        split: train, the first 95 % of it; test, the rest; or all.
        letters: a to z and the space alone, as text8 has them: capitals become small, accents go, everything else is
            a space. False takes every character that occurs, line ends among them.

    Raises:
        ValueError: a file that is no text, or too short.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        return _split(text, length, split, letters)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def python_topics(length: int = 32, split: str = "train", letters: bool = True) -> Text:
    """The reference that Python's ``help()`` prints, some 600,000 characters of English: a text that every Python has.
    It differs a little from version to version.

    Args:
        length: characters of a row.
        split, letters: as for a file.
    """
    from pydoc_data.topics import topics

    return _split("\n".join(topics[name] for name in sorted(topics)), length, split, letters)


def _split(text: str, length: int, split: str, letters: bool) -> Text:
    if split not in ("train", "test", "all"):
        raise unknown("split", split, ("train", "test", "all"))
    text = only_letters(text) if letters else text.replace("\r\n", "\n")
    if not text:
        raise ValueError("the text has none of the letters a to z: letters: false takes all its characters")
    symbols = LETTERS if letters else sorted(set(text))
    edge = int(len(text) * (1 - _HELD_OUT))
    part = {"train": text[:edge], "test": text[edge:], "all": text}[split]
    return Text(part, length, symbols)


def only_letters(text: str) -> str:
    """A text in a to z and single spaces."""
    from unicodedata import normalize

    plain = normalize("NFKD", text).lower().encode("ascii", "ignore").decode()
    return " ".join("".join(c if "a" <= c <= "z" else " " for c in plain).split())
