"""Holds the figures on README, docs and the leaderboard against the results files that they name.

    make figures        # or: python benchmarks/figures.py; says which figure has no file behind it

A comment names the files of the block below it (a table, a paragraph, a list, a fenced text):

    <!-- figures: fashion-mnist.json, threads.json -->

Each number of the block is then in one of these files, rounded as it is shown. Numbers that stand together (a row of a
table, ``.042 / .035``) stand together there, in one row or one column. ``ITVM .042`` is in a row that names ITVM. Two
more parts may follow, after semicolons:

    <!-- figures: threads.json; 1.4 = 3.62 / 2.62 -->                     a figure that follows from those of the file
    <!-- figures: sampling.json; not measured: 1.02 is the aim -->        a number that nobody measured, and why
    <!-- figures: not measured: computed from the shapes -->              a block without any measured number

A table of decimals without such a comment is an error, and so is a paragraph that claims a measured number.
"""

import ast
import operator
import re
import sys
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from marks import Block, Mark, blocks, parse
from record import FOLDER, Results, read

ROOT = Path(__file__).resolve().parent.parent

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)(?:e-?\d+)?"
_OF = re.compile(r"(?<![\w-])([A-Z][\w-]*\w)\s+(\d*\.\d+)(?!\w)")
NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}(?!\w)")
TOGETHER = re.compile(rf"(?<![\w.])(?:{_NUMBER}|-)(?: / (?:{_NUMBER}|-))+(?!\w)")
# A decimal in a text, but not what a symbol is set to (t = 0.5); shares, times and factors. And the versions of things.
_CLAIM = re.compile(
    r"(?<![\w.=<>-])(?<!= )(?<!< )\d*\.\d+(?!\w|\.\d)"
    rf"|{_NUMBER} ?(?:%(?! of the rows)|times\b|ms\b|microseconds\b)|{_NUMBER}x? (?:faster|slower)"
)
_NAMED = re.compile(r"\b(?:[A-Z][\w.]*|diffusers|version|versions|peft|torch)[ -]\d+(?:\.\d+)+")


def pages() -> list[Path]:
    """README, the leaderboard and all pages of docs."""
    docs = (path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return [ROOT / "README.md", ROOT / "benchmarks" / "LEADERBOARD.md", *sorted(docs)]


class Record:
    """The numbers of some results files: all of them, those that stand together in a row or a column, and the rows that
    a name is in."""

    def __init__(self, results: Iterable[Results]) -> None:
        self.lines: list[list[Decimal]] = []
        self.named: list[tuple[str, list[Decimal]]] = []
        for each in results:
            rows = [
                [(name, value) for name, cell in zip(each.columns, row, strict=True) for value in _values(cell)]
                for row in each.rows
            ]
            self.lines += [[value for _, value in row] for row in rows]
            names = [" ".join(cell for cell in row if isinstance(cell, str)) for row in each.rows]
            self.named += zip(names, self.lines[-len(rows) :], strict=True)
            self.lines += [[value for row in rows for name, value in row if name == col] for col in each.columns]
            self.lines.append([value for name in each.columns for value in _values(name)])
            words = [each.title, *each.notes, *each.commands, each.machine or "", each.commit or ""]
            self.lines += [_values(text) for text in (*words, str(each.seeds), each.date or "")]
        self.numbers = [value for line in self.lines for value in line]

    def has(self, shown: str, percent: bool) -> bool:
        return any(_same(shown, value, percent) for value in self.numbers)

    def has_of(self, name: str, shown: str) -> bool:
        """Whether the number is in a row that has this name; true where no row has it."""
        word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        rows = [line for words, line in self.named if word.search(words)]
        return not rows or any(_same(shown, value, percent=True) for line in rows for value in line)

    def has_together(self, shown: list[str], percent: bool) -> bool:
        """Whether the numbers are in one row or one column, in this order."""
        for line in self.lines:
            rest = iter(line)
            if all(any(_same(one, value, percent) for value in rest) for one in shown):
                return True
        return False


def _values(cell: Any) -> list[Decimal]:
    if isinstance(cell, dict):
        return [value for each in cell.values() for value in _values(each)]
    if isinstance(cell, str):
        return [_decimal(number) for number in NUMBER.findall(cell)]
    return [] if cell is None else [Decimal(cell)]


def _decimal(shown: str) -> Decimal:
    return Decimal(shown.replace(",", ""))


def _same(shown: str, value: Decimal, percent: bool) -> bool:
    """Whether a value rounds to what is shown; small whole numbers are exact. ``percent``: 0.022 is 2.2 too."""
    number = _decimal(shown)
    exponent: Any = number.as_tuple().exponent
    half = Decimal(0) if exponent == 0 and number < 10 else Decimal(5).scaleb(exponent - 1)
    return abs(value - number) <= half or (percent and abs(100 * value - number) <= half)


_SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _sum(node: ast.AST) -> Decimal:
    if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
        return _SUMS[type(node.op)](_sum(node.left), _sum(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Decimal(str(node.value))
    raise ValueError("a sum has numbers, + - * / and brackets alone")


def faults(text: str, folder: Path = FOLDER) -> list[str]:
    """What is wrong with the figures of a page: a line each, with the number of its line."""
    found = []
    for block in blocks(text):
        try:
            if block.mark is None:
                found += [f"{block.line}: {fault}" for fault in _unmarked(block)]
            else:
                found += [f"{block.line}: {fault}" for fault in _marked(block, parse(block.mark), folder)]
        except ValueError as error:
            found.append(f"{block.line}: the comment above, {block.mark!r}: {error}")
    return found


def _unmarked(block: Block) -> Iterator[str]:
    way_out = "put <!-- figures: FILE.json --> above it, a file of benchmarks/results, or 'figures: not measured: WHY'"
    if block.kind == "table":
        cells = [cell for row in _rows(block) for cell in row[1:]]
        if sum(bool(re.search(r"\d*\.\d|\d ?%", _NAMED.sub(" ", cell))) for cell in cells) >= 2:
            yield f"a table of numbers names no results file: {way_out}"
    elif block.kind == "text":
        text = _NAMED.sub(" ", block.text)
        if claim := _CLAIM.search(text):
            yield f"{claim[0].strip()!r} is claimed and no results file named: {way_out}"


def _marked(block: Block, mark: Mark, folder: Path) -> Iterator[str]:
    if not mark.files:
        return
    missing = [name for name in mark.files if not (folder / name).is_file()]
    if missing:
        yield f"there is no {missing[0]} in benchmarks/results"
        return
    record = Record(read(folder / name) for name in mark.files)
    names = ", ".join(mark.files)
    excused = set(NUMBER.findall(mark.unmeasured or ""))
    for shown, sum_ in mark.follows.items():
        figure = NUMBER.findall(shown)
        result = _sum(ast.parse(sum_, mode="eval").body)
        if len(figure) != 1 or not _same(figure[0], result, "%" in shown):
            yield f"{shown} does not follow from {sum_}, which is {result:.4g}"
        for part in NUMBER.findall(sum_):
            if part not in ("1", "100") and not record.has(part, percent=False):
                yield f"{part} of the sum {sum_} is not in {names}"
        excused |= set(figure)
    if block.kind == "table":
        for row in _rows(block):
            yield from _row_faults(row, record, excused, names)
        return
    for group in TOGETHER.findall(block.text):
        shown = [number for number in NUMBER.findall(group) if number not in excused]
        percent = bool(re.search(re.escape(group) + r"\s*%", block.text))
        if not record.has_together(shown, percent):
            yield f"{group} is in no row or column of {names}"
    for number in NUMBER.finditer(TOGETHER.sub(" ", block.text)):
        percent = bool(re.match(r"\s*%", number.string[number.end() :]))
        if number[0] not in excused and not record.has(number[0], percent):
            yield f"{number[0]} is not in {names}"
    for name, number in _OF.findall(TOGETHER.sub(" ", block.text)):
        if number not in excused and not record.has_of(name, number):
            yield f"{name} {number}: no row of {names} that names {name} has this number"


def _rows(block: Block) -> list[list[str]]:
    """The cells of the body of a table."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.text.splitlines()]
    return rows[2:]


def _row_faults(row: list[str], record: Record, excused: set[str], names: str) -> Iterator[str]:
    """The numbers of a row are those of a row or column of the record; else each cell of several numbers is."""
    percent = any("%" in cell for cell in row)
    cells = [[number for number in NUMBER.findall(cell) if number not in excused] for cell in row]
    for number in cells[0]:
        if not record.has(number, percent):
            yield f"{number} is not in {names}"
    shown = [number for cell in cells[1:] for number in cell]
    if record.has_together(shown, percent):
        return
    for text, cell in zip(row[1:], cells[1:], strict=True):
        is_alone = len(cell) == 1 and NUMBER.fullmatch(text.strip("* %"))
        if cell and (is_alone or not record.has_together(cell, percent)):
            yield f"the row {' | '.join(row)!r} is in no row or column of {names}"
            return


def main() -> int:
    count = 0
    for path in pages():
        for fault in faults(path.read_text()):
            print(f"{path.relative_to(ROOT)}:{fault}")
            count += 1
    print("every figure has a results file behind it" if count == 0 else f"{count} faults")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
