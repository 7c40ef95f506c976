"""What is put into the pages as they are read: texts made of the code, files of the repository, and links that lead on
the site where the file's own link leads in the repository.

A line ``<!-- generated: NAME -->`` gives way to the text of that name, ``<!-- file: PATH -->`` to a file.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import api
import commands
import drawing
import keys
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent


def _drawn(name: str) -> str:
    """A drawing as part of the page, whose colours it takes."""
    return f'```{{raw}} html\n<div class="drawing">{" ".join(drawing.drawings()[name].split())}</div>\n```'


TEXTS: dict[str, Callable[[], str]] = {
    "keys": keys.keys,
    "recipes": keys.recipes,
    "commands": commands.commands,
    "public-names": api.index,
    "house": lambda: _drawn("house"),
    "batch": lambda: _drawn("batch"),
    "sample": lambda: _drawn("sample"),
}
# Files outside docs that have a page on the site.
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "SECURITY.md": DOCS / "guides" / "security.md",
    ROOT / "CHANGELOG.md": DOCS / "changes.md",
    ROOT / "benchmarks" / "LEADERBOARD.md": DOCS / "benchmarks" / "leaderboard.md",
}
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
MARK = re.compile(r"^<!-- (generated|file): (\S+) -->$", re.MULTILINE)


@cache
def text_of(name: str) -> str:
    return TEXTS[name]()


def filled(text: str, page: Path) -> str:
    """The text of a page with its marks filled in and its links as the site has them."""

    def fill(mark: re.Match[str]) -> str:
        if mark[1] == "generated":
            return text_of(mark[2])
        file = ROOT / mark[2]
        return relinked(file.read_text(), file, page) if file.is_file() else ""

    return MARK.sub(fill, relinked(text, page, page))


def relinked(text: str, file: Path, page: Path) -> str:
    """Links of ``file`` as they are to be on ``page``: to a page of the site, or to a file that the site carries. A
    folder is named and not linked."""

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / found[2]))
        target = PAGES.get(target, target)
        if target.is_dir():
            return f"{found[1]} (`{target.relative_to(ROOT)}`)"
        return f"[{found[1]}]({os.path.relpath(target, page.parent)}{found[3] or ''})" if target.exists() else found[0]

    return LINK.sub(link, text)


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        source[0] = filled(source[0], page)


def _make(app: Sphinx) -> None:
    """All that is made of the code, before autodoc puts its own objects into the signatures."""
    for name in TEXTS:
        text_of(name)
    api.write(DOCS / "api" / "names")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _make)
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
