"""The report of a run: one HTML file that needs nothing else, to read, to mail, to keep."""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.common.disk import replace_file
from fewstep.evaluation import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    path: str | Path,
    *,
    title: str,
    recipe_text: str,
    figures: "Sequence[tuple[str, bytes | Figure]]" = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = (),
    next_commands: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML page: no scripts, nothing fetched, light or dark as the reader has it.

    Args:
        title: of the page, such as the run's name.
        recipe_text: shown as it is, folded away.
        figures: (caption, PNG bytes or a matplotlib figure), in order.
        tables: (caption, column names, rows). Numbers are shown to four digits and aligned; None is a dash.
        next_commands: what to type next, one line each.

    Returns:
        the path, written whole or not at all.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    cards = [_table(*table) for table in tables] + [_figure(*figure) for figure in figures]
    if cards:
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
    if next_commands:
        commands = "\n".join(_text(command) for command in next_commands)
        parts.append(f"<section><h2>What to type next</h2><pre><code>{commands}</code></pre></section>")
    parts.append(
        f"<section><details><summary>Recipe</summary><pre><code>{_text(recipe_text)}</code></pre></details></section>"
    )
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(parts))
    path = Path(path)
    replace_file(path, page.encode())
    return path


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    numeric = [bool(column) and all(map(_is_number, column)) for column in cells]
    kind = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{k}>{_text(name)}</th>" for k, name in zip(kind, columns, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{k}>{_text(_cell(value))}</td>' for k, value in zip(kind, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        f"<section><h2>{_text(caption)}</h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></section>'
    )


def _figure(caption: str, picture: "bytes | Figure") -> str:
    from PIL import Image

    content = picture if isinstance(picture, bytes) else style.png(picture)
    with Image.open(io.BytesIO(content)) as image:
        # A figure says how large it is meant to be; a grid of pixels is shown as it is.
        width = round(image.width * 96 / image.info.get("dpi", (96, 96))[0])
    data, text = base64.b64encode(content).decode(), _text(caption)
    return (
        f"<figure><figcaption>{text}</figcaption>"
        f'<img alt="{text}" width="{width}" src="data:image/png;base64,{data}"></figure>\n'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        # Four digits, but every digit of a whole number: 60000.0 is not 6e+04.
        return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 9999.5 else f"{value:,.0f}"
    return str(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # one that is written out, and a mean with its deviation
        return re.fullmatch(rf"{_NUMBER}( ± {_NUMBER})?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(text: str) -> str:
    return html.escape(text, quote=True)


_NUMBER = r"-?(\d[\d,]*\.?\d*(e[-+]?\d+)?|inf|nan)"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --page: #fbfbfc; --card: #ffffff; --ink: #202124; --quiet: #5f6368; --line: #e3e5e8; --code: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181a; --card: #1f2124; --ink: #e8eaed; --quiet: #9aa0a6; --line: #35383c; --code: #26282c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1104px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2, figcaption { font-size: 15px; font-weight: 600; margin: 0 0 12px; }
section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 20px; }
.cards { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; margin: 0 0 20px; }
.cards > * { margin: 0; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { text-align: left; padding: 6px 14px; border-bottom: 1px solid var(--line); white-space: nowrap; }
:is(th, td):first-child { padding-left: 0; }
:is(th, td):last-child { padding-right: 0; }
th { color: var(--quiet); font-weight: 500; font-size: 13px; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
pre { margin: 0; padding: 12px 14px; background: var(--code); border-radius: 6px; overflow-x: auto;
  font: 13.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; font-size: 15px; font-weight: 600; }
details[open] summary { margin-bottom: 12px; }
"""
