"""What the pages ask their reader to type: every fenced block, and every command line that is set in by four spaces.

A page says how a block is run in a comment of HTML directly above it, which no reader sees:

    <!-- docs: skip gpu -->       not run here, for one of the REASONS below; it is counted
    <!-- docs: slow -->           run by `pytest -m slow` alone
    <!-- docs: file mine.py -->   the block is this file, and all blocks of the page find it
    <!-- docs: fails -->          the command is shown for its error
    <!-- docs: setup              Python that gives the names which the text around a block takes for granted
    field = make_it()
    -->

Blocks without a comment are run: ``python``, ``bash`` and ``sh`` as they stand, of ``console`` what follows a ``$``,
and ``yaml`` as a recipe. Blocks of text, output and other formats have nothing to run. What makes long trainings short
is in ``page_short.py``, for all pages at once.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
REASONS = {
    "gpu": "needs a GPU",
    "hub": "talks to the Hugging Face hub",
    "served": "serves a page until it is stopped",
    "gigabytes": "needs a model or data of gigabytes",
    "hours": "takes hours",
    "installs": "installs packages, or sets up the machine",
    "checkout": "is for work on fewstep's own sources",
    "tested": "has a test of its own, as it needs more than a folder",
    "outside": "is of another program, which is not installed for the tests",
}
RUN = {"python": "python", "py": "python", "bash": "shell", "sh": "shell", "console": "shell", "yaml": "recipe"}
SILENT = {"", "text", "json", "toml", "bibtex", "diff", "html", "make", "mermaid", "math", "latex"}
# A line that is set in is a command if it begins with one of these; formulas and output are set in too.
PROGRAMS = {"fewstep", "python", "torchrun", "accelerate", "pip", "uv", "hf", "make", "git", "pytest", "ruff", "sphinx"}

BUILT = {"_build", "names"}  # folders of docs that `make docs` writes

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*(\{code-block\}|\{code-cell\})?\s*([\w+-]*)[^`]*$")
_DIRECTIVE = re.compile(r"^\s*<!-- docs: (\w+)(.*)$")
_ASSIGNMENTS = re.compile(r"^(?:[A-Z_]+=\S* )*")


class PageError(Exception):
    """A page says something that cannot be run as it is written."""


@dataclass(frozen=True)
class Block:
    """A block of a page: ``kind`` is python, shell, recipe or file; ``skip`` is the key of a reason, or empty."""

    page: Path
    line: int  # of its first line of text, from 1
    kind: str
    text: str
    skip: str = ""
    slow: bool = False
    fails: bool = False
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README, the other pages beside it, and all of docs but what is built from it."""
    beside = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "AGENTS.md")]
    below = sorted(page for page in (ROOT / "docs").rglob("*.md") if not BUILT & set(page.relative_to(ROOT).parts))
    return [page for page in beside if page.exists()] + below


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in order; raises PageError for one that nobody knows how to run."""
    lines = page.read_text().splitlines()
    found: list[Block] = []
    said: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if match := _DIRECTIVE.match(line):
            body, number = _comment(page, lines, number, match)
            if match[1] == "setup":
                found.append(Block(page, number - body.count("\n"), "python", body))
            else:
                said[match[1]] = body
        elif fence := _FENCE.match(line):
            start = number
            while number < len(lines) and lines[number].strip() != fence[2]:
                number += 1
            text = dedent("\n".join(lines[start:number]))
            number += 1
            if line.lstrip("`~ ").startswith("{") and not fence[3]:
                continue  # a directive of MyST, with prose in it
            found += _fenced(page, start + 1, fence[4], text, said)
            said = {}
        elif line.startswith("    ") and line.strip():
            start = number
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(_command(line) for line in lines[start - 1 : number])
            if text.strip():
                found.append(_block(page, start, "shell", text, said))
            said = {}
        elif line.strip() and not line.startswith("<!--") and said:
            raise PageError(f"{page.relative_to(ROOT)}:{number}: `docs: {next(iter(said))}` has no block below it")
    return found


def _comment(page: Path, lines: list[str], number: int, match: re.Match[str]) -> tuple[str, int]:
    """What a comment says behind its first word, and the number of the line it ends on."""
    where = f"{page.relative_to(ROOT)}:{number}"
    body = [match[2]]
    while "-->" not in body[-1]:
        if number == len(lines):
            raise PageError(f"{where}: the comment does not end")
        body.append(lines[number])
        number += 1
    body[-1] = body[-1].partition("-->")[0]
    text = dedent("\n".join(body[1:])) if match[1] == "setup" and len(body) > 1 else "\n".join(body).strip()
    known = {"skip": set(REASONS), "slow": {""}, "fails": {""}}
    if match[1] not in {*known, "file", "setup"}:
        raise PageError(f"{where}: `docs: {match[1]}` is none of skip, slow, fails, file, setup")
    if match[1] in known and text not in known[match[1]]:
        raise PageError(f"{where}: `docs: {match[1]} {text}` is none of {', '.join(sorted(known[match[1]]))}")
    return text, number


def _fenced(page: Path, line: int, language: str, text: str, said: dict[str, str]) -> list[Block]:
    if "file" in said:
        return [_block(page, line, "file", text + "\n", said)]
    if language in SILENT:
        if any(program(_command(line)) == "fewstep" or line.startswith("$ ") for line in text.splitlines()):
            raise PageError(f"{page.relative_to(ROOT)}:{line}: commands in a block of {language or 'no language'}")
        return []
    if language not in RUN:
        raise PageError(f"{page.relative_to(ROOT)}:{line}: nobody knows how to run a block of {language!r}")
    if language == "console":
        text = "\n".join(line[2:] if line.startswith("$ ") else "" for line in text.splitlines())
    return [_block(page, line, RUN[language], text, said)]


def _block(page: Path, line: int, kind: str, text: str, said: dict[str, str]) -> Block:
    return Block(page, line, kind, text, said.get("skip", ""), "slow" in said, "fails" in said, said.get("file", ""))


def _command(line: str) -> str:
    """The command of a line that is set in, without what is said of it three blanks further on; empty if it is none."""
    text = line.strip().removeprefix("$ ")
    return re.split(r" {3,}(?!\S*\\)", text)[0] if program(text) in PROGRAMS else ""


def program(line: str) -> str:
    """The first word of a command line, behind the variables that are set for it."""
    words = _ASSIGNMENTS.sub("", line).split()
    return words[0].rpartition("/")[2] if words else ""
