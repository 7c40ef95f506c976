"""Text as rows of tokens, as people keep it: with marks, accents, other line ends, and too little of it."""

from pathlib import Path

import pytest
import torch

from fewstep.common.randomness import generator
from fewstep.data import load_data
from fewstep.data.text import LETTERS, Text, only_letters


def read(data: Text, places: list[int]) -> list[str]:
    rows = data.rows(torch.tensor(places), generator(0)).data
    assert rows.dtype == torch.float32
    assert torch.equal(rows.sum(-1), torch.ones(len(places), data.shape[0]))
    return ["".join(data.symbols[token] for token in row) for row in rows.argmax(-1).tolist()]


def test_a_book_of_somebodys_is_letters_and_spaces(tmp_path: Path) -> None:
    book = tmp_path / "livre.txt"
    book.write_bytes(b"\xef\xbb\xbf" + ("Élan,  vital!\r\n\r\n1907 (Paris)\tœuvre\n" * 40).encode())
    data = load_data(book, length=16)
    assert isinstance(data, Text)
    assert data.symbols == tuple(LETTERS)
    assert data.shape == (16, 27)
    assert read(data, [0, 1])[0] == "elan vital paris"
    test = load_data(book, length=16, split="test")
    assert data.size + test.size + 30 == len(only_letters(book.read_text("utf-8-sig")))
    assert "vital" in data.words
    whole = load_data(book, length=16, letters=False)
    assert {"É", "œ", "\n"} < set(whole.symbols)
    assert "\r" not in whole.symbols
    assert read(whole, [0]) == ["Élan,  vital!\n\n1"]


def test_the_reference_of_python_is_a_text() -> None:
    data = load_data("python-topics")
    assert data.size > 100_000
    assert read(data, [0]) == ["the assert statement assert stat"]
    assert {"the", "statement"} < data.words


@pytest.mark.parametrize(
    ("content", "options", "why"),
    [
        (b"\xff\xfe\x00a", {}, r"is no text in UTF-8 \(byte 0\)"),
        (b"short", {}, "text of 4 characters has no two rows of 32"),
        ("もじ".encode() * 99, {}, "none of the letters a to z: letters: false"),
        (b"a" * 99, {"letters": False}, "of 1 different characters"),
        (b"words and words" * 9, {"split": "valid"}, "valid"),
        (b"words and words" * 9, {"length": 0}, "length is 0"),
    ],
)
def test_a_text_that_cannot_be_is_refused(tmp_path: Path, content: bytes, options: dict[str, object], why: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        load_data(tmp_path / "a.txt", **options)
