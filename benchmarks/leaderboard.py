"""Writes benchmarks/LEADERBOARD.md: the text of leaderboard_text.md with the tables of results/.

    make leaderboard        # or: python benchmarks/leaderboard.py

In the text, a line ``{{ checkerboard.json }}`` becomes the commands, the notes, the table and the facts of that results
file.
"""

import re
from pathlib import Path
from typing import Any

from record import FOLDER, NOT_RECORDED, Results, read

HERE = Path(__file__).resolve().parent
TEXT, PAGE = HERE / "leaderboard_text.md", HERE / "LEADERBOARD.md"
WRITTEN = "<!-- Written by `make leaderboard` from leaderboard_text.md and results/: change those, not this page. -->"
_PLACE = re.compile(r"^\{\{ (\S+\.json) \}\}$", re.MULTILINE)


def table(results: Results) -> str:
    """The table as Markdown. Rows that share the value of ``group`` stand under a line with that value."""
    names = [name for name in results.columns if name != results.group]
    lines, group = [names, ["---"] * len(names)], None
    for row in results.rows:
        cells = dict(zip(results.columns, row, strict=True))
        if results.group is not None and cells[results.group] != group:
            group = cells[results.group]
            if group is not None:
                lines.append([f"*{group}*", *[""] * (len(names) - 1)])
        lines.append([shown(cells[name], results.formats.get(name, "")) for name in names])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(cell: Any, form: str) -> str:
    """A cell as it is read: ``form`` is for a number (``"{:.3f}"``), or for several by name (``"{mean} ± {std}"``)."""
    if cell is None:
        return "-"
    if isinstance(cell, dict):
        return (form or " / ".join(f"{{{name}}}" for name in cell)).format(**cell)
    return form.format(cell) if not isinstance(cell, str) and form.startswith(("{:", "{}")) else str(cell)


def facts(results: Results, name: str) -> str:
    """One line: the commit, seeds, machine and day, and the file that has it all."""
    seeds = results.seeds or []
    said = {
        "Commit": results.commit,
        "seed" if len(seeds) == 1 else "seeds": ", ".join(map(str, seeds)),
        "machine": results.machine,
    }
    words = "; ".join(f"{key}: {value or NOT_RECORDED}" for key, value in said.items())
    return f"{words}{f'; {results.date}' if results.date else ''}. File: [`{name}`](results/{name})."


def section(name: str, folder: Path = FOLDER) -> str:
    """What stands in the place of ``{{ name }}``."""
    results, mark = read(folder / name), f"<!-- figures: {name} -->"
    commands = "\n".join(results.commands) or f"(the command was {NOT_RECORDED})"
    notes = [f"{mark}\n{' '.join(results.sentences)}"] if results.sentences else []
    return "\n\n".join(
        [f"```text\n{commands}\n```", *notes, f"{mark}\n\n{table(results)}", f"{mark}\n{facts(results, name)}"]
    )


def page(text: str, folder: Path = FOLDER) -> str:
    """The text with its tables."""
    title, rest = text.split("\n", 1)
    return f"{title}\n\n{WRITTEN}\n{_PLACE.sub(lambda place: section(place[1], folder), rest)}"


def main() -> None:
    PAGE.write_text(page(TEXT.read_text()))
    print(f"{PAGE} is written")


if __name__ == "__main__":
    main()
