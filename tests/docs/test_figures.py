"""Each figure of README, docs and the leaderboard has a results file behind it, and the check that says so sees a wrong
one."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import figures
import marks
import pytest
from record import write

PAGES = figures.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(figures.ROOT)))
def test_every_figure_has_a_results_file(page: Path) -> None:
    assert figures.faults(page.read_text()) == []


def test_all_pages_are_looked_at() -> None:
    names = {str(page.relative_to(figures.ROOT)) for page in PAGES}
    assert {"README.md", "benchmarks/LEADERBOARD.md", "docs/guides/choosing.md", "docs/methods/itvm.md"} <= names
    marked = [block for page in PAGES for block in marks.blocks(page.read_text()) if block.mark]
    assert sum(bool(marks.parse(block.mark or "").files) for block in marked) > 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    facts = {"title": "A table", "commands": ["fit --steps 500"], "commit": "1234567", "seeds": [0], "machine": "mine"}
    rows = [["ITVM", 2735, Decimal("0.070"), Decimal("0.0671")], ["CTM", 1473, Decimal("0.161"), Decimal("0.120")]]
    notes = ["1,000 samples."]
    write(tmp_path / "a.json", **facts, notes=notes, columns=["method", "steps", "1", "2"], rows=rows)
    spread = [["ITVM", {"mean": 0.025, "std": 0.001}, 91.6], ["CTM", None, 86.1]]
    write(tmp_path / "b.json", **facts, columns=["method", "1", "share"], rows=spread)
    return tmp_path


RIGHT = {
    "a row": "<!-- figures: a.json -->\n| | steps | 1 | 2 |\n|---|---|---|---|\n| **ITVM** | 2735 | **.070** | .067 |",
    "a blank line below": "<!-- figures: a.json -->\n\n| | 1 | 2 |\n|---|---|---|\n| `ema: 0.9` | 0.07 | .067 |",
    "a column": "<!-- figures: a.json -->\n| | ITVM | CTM |\n|---|---|---|\n| 1 call | .070 | .161 |",
    "cells of several": "<!-- figures: a.json -->\n| | a | b |\n|---|---|---|\n| x | .070 / .07 | .161 / .12 |",
    "text": "<!-- figures: a.json -->\nAfter 1,000 samples and 500 steps ITVM has .070 / .067,\nCTM .161.",
    "a list": "<!-- figures: a.json -->\n* ITVM .070\n* and CTM .12",
    "a fenced text": "<!-- figures: a.json -->\n```\nITVM 0.070\n```",
    "another comment": "<!-- figures: a.json -->\n<!-- docs: not run -->\n```\nITVM 0.070\n```",
    "two files": "<!-- figures: a.json, b.json -->\nITVM .070 and 2.5 %, CTM 86.1 %.",
    "a sum": "<!-- figures: a.json; 2.3 = .161 / .070 -->\nCTM has 2.3 times the error.",
    "a difference in per cent": "<!-- figures: a.json; 57 % = 1 - .070 / .161 -->\nITVM is 57 % better.",
    "an aim": "<!-- figures: a.json; not measured: 0.05 is the aim -->\nITVM .070, the aim is 0.05.",
    "a comment of lines": "<!-- figures: a.json;\n     2.3 = .161 / .070 -->\nCTM has 2.3 times the error.",
    "nothing measured": "<!-- figures: not measured: closed form -->\nOff by 0.3.",
    "code": "Set `ends: 0.25`.\n\n    lr = 0.5\n\n```python\nx = 0.3\n```",
    "papers, versions, symbols": "(arXiv 2505.01169) Python 3.11, diffusers 0.42, SD 1.5, torch 2.13.0; t = 0.972.",
    "a table of words": "| | x |\n|---|---|\n| Wan 2.1 | Kandinsky 2.2 |\n| a | Flux.1 |\n| b | 8 |",
}  # fmt: skip
WRONG = {
    "a number that is not there": ("<!-- figures: a.json -->\nITVM .071.", ".071 is not in a.json"),
    "below another comment": ("<!-- figures: a.json -->\n<!-- docs: x -->\n```\n0.071\n```", "0.071 is not in a.json"),
    "too many digits": ("<!-- figures: a.json -->\nIt has .0702.", ".0702 is not in a.json"),
    "a whole number": ("<!-- figures: a.json -->\nAfter 501 steps.", "501 is not in a.json"),
    "a number of another row": ("<!-- figures: a.json -->\nITVM .161.", "ITVM .161: no row of a.json that names ITVM"),
    "a row of two rows": (
        "<!-- figures: a.json -->\n| | 1 | 2 |\n|---|---|---|\n| ITVM | .161 | .067 |", "in no row or column of a.json",
    ),
    "the order": ("<!-- figures: a.json -->\nAt 1 and 2: .067 / .070.", ".067 / .070 is in no row or column"),
    "a wrong sum": ("<!-- figures: a.json; 2.4 = .161 / .070 -->\n2.4 times", "from .161 / .070, which is 2.3"),
    "a sum of other numbers": ("<!-- figures: a.json; 2.5 = .161 / .064 -->\n2.5 times", ".064 of the sum"),
    "a sum that is code": ("<!-- figures: a.json; 2 = abs(.070) -->\n2 times", "a sum has numbers"),
    "a file that is not there": ("<!-- figures: c.json -->\nITVM .070.", "there is no c.json in benchmarks/results"),
    "a typing error": ("<!-- figures: a.jsn -->\nITVM .070.", "'a.jsn' is no results file"),
    "no reason": ("<!-- figures: not measured: -->\nITVM .070.", "says not why"),
    "a table without a comment": ("| | x |\n|---|---|\n| a | .07 |\n| b | 2 % |", "a table of numbers names no"),
    "a claim without a comment": ("\nWith it one step has an\nRMSE of .070.", "'.070' is claimed"),
    "a claim in a list": ("* it is 3x faster", "'3x faster' is claimed"),
    "a share": ("It saves 20 % of the time.", "'20 %' is claimed"),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_right_figures_pass(case: str, folder: Path) -> None:
    assert figures.faults(RIGHT[case], folder) == []


@pytest.mark.parametrize("case", WRONG)
def test_wrong_figures_are_named(case: str, folder: Path) -> None:
    text, said = WRONG[case]
    found = figures.faults(text, folder)
    assert found
    assert said in "\n".join(found)


def test_a_fault_has_its_line(folder: Path) -> None:
    text = "# Title\n\nText.\n\n<!-- figures: a.json -->\nIt has .071."
    assert figures.faults(text, folder) == ["6: .071 is not in a.json"]


def test_a_broken_results_file_is_named(folder: Path) -> None:
    facts = json.loads((folder / "a.json").read_text())
    (folder / "a.json").write_text(json.dumps({**facts, "seeds": None}))
    assert "a.json" in figures.faults(RIGHT["text"], folder)[0]


def _altered(text: str) -> Iterator[str]:
    """The page with one of its figures changed in the last digit, each in turn."""
    for number in re.finditer(r"(?<=[ *])\d*\.\d+(?=\**(?: /| \|))", text):
        digit = str((int(number[0][-1]) + 1) % 10)
        yield text[: number.end() - 1] + digit + text[number.end() :]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks/itvm-ablation.md", "docs/methods/lsd.md"])
def test_a_figure_that_is_changed_is_seen(name: str) -> None:
    altered = list(_altered((figures.ROOT / name).read_text()))
    seen = [bool(figures.faults(text)) for text in altered]
    assert len(altered) > 10
    assert sum(seen) >= 0.9 * len(altered)  # one that becomes its neighbour in the same row or column is not
