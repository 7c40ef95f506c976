"""A page fetches nothing: no script, style, font or picture from anywhere but the site. A build that has one fails."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_ADDRESS = r"""\s*["']?\s*((?:https?:)?//[^"'\s>)]+)"""
FETCHED = (
    re.compile(rf"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\b(?:src|srcset)={_ADDRESS}", re.I),
    re.compile(rf"<link\b(?![^>]*\brel=\"?(?:canonical|next|prev|author|license))[^>]*?\bhref={_ADDRESS}", re.I),
    re.compile(rf"\burl\({_ADDRESS}", re.I),
    re.compile(rf"@import{_ADDRESS}", re.I),
)


def fetched(text: str) -> list[str]:
    """The addresses that a browser would fetch by itself for a page or a style sheet."""
    return [address for pattern in FETCHED for address in pattern.findall(text)]


def _check(app: "Sphinx", exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    from sphinx.errors import SphinxError

    for file in sorted(Path(app.outdir).rglob("*")):
        if file.suffix in (".html", ".css", ".svg") and (found := fetched(file.read_text(encoding="utf-8"))):
            raise SphinxError(f"{file} would fetch {found[0]}: carry it in docs/_static")


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
