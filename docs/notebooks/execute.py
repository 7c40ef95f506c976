"""The notebooks from their sources: each ``source/NAME.py`` becomes ``NAME.ipynb``, executed, with its pictures stored.

    python docs/notebooks/execute.py                       # all of them: some minutes each on one core
    python docs/notebooks/execute.py tour_of_methods       # one
    python docs/notebooks/execute.py --text                # prose alone changed: keep outputs, execute nothing

A source is a script in the percent format, which editors open as a notebook too: ``# %%`` begins a code cell,
``# %% [markdown]`` one of text, and ``# %% [writefile] NAME`` one that writes itself to the file NAME.
"""

import argparse
import base64
import io
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in (HERE / "source").glob("*.py"))
_CELL = re.compile(r"# %%(?: \[(markdown|writefile)\] ?(.*))?")
_COLOURS = 64


def notebook(name: str) -> nbformat.NotebookNode:
    """The notebook of a source, not executed.

    Raises:
        ValueError: a line before the first cell, or a line of text that is no comment.
    """
    cells = []
    for number, (kind, argument, lines) in enumerate(_cells(HERE / "source" / f"{name}.py")):
        if kind == "markdown":
            cell = nbformat.v4.new_markdown_cell("\n".join(_uncommented(name, line) for line in lines))
        else:
            magic = [f"%%writefile {argument}"] if kind == "writefile" else []
            cell = nbformat.v4.new_code_cell("\n".join(magic + lines))
        cell.id = f"cell-{number}"  # by default random: each execution would change every cell
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(book: nbformat.NotebookNode, folder: str | Path, steps: int | None = None) -> nbformat.NotebookNode:
    """Run all cells in place, in a kernel on one thread whose working directory is ``folder``.

    Args:
        steps: what the first cell takes from the environment: the length of trainings; the full one by default.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has its source and traceback.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "STEPS"} | threads
    if steps is not None:
        environment["STEPS"] = str(steps)
    client = NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


def stored(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is kept, in place: small pictures, nothing that says when it ran."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # nobody who reads a page lacks a progress bar
            cell.outputs = [output for output in cell.outputs if "IProgress not found" not in output.get("text", "")]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _small(output.data["image/png"])
    return book


def keep_outputs(book: nbformat.NotebookNode, kept: nbformat.NotebookNode) -> None:
    """Give a notebook the outputs of one that was executed, and says how, in place.

    Raises:
        ValueError: their code differs.
    """
    new, old = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (book, kept))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        raise ValueError("the code has changed, not the prose alone: execute it, without --text")
    for cell, before in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    book.metadata["fewstep"] = kept.metadata["fewstep"]


def _cells(source: Path) -> Iterator[tuple[str | None, str, list[str]]]:
    """Kind, argument and lines of each cell, without the empty lines around it."""
    kind, argument = None, ""
    lines: list[str] | None = None
    for line in [*source.read_text().splitlines(), "# %%"]:
        if found := _CELL.fullmatch(line):
            if lines is not None:
                yield kind, argument, list("\n".join(lines).strip("\n").splitlines())
            kind, argument, lines = found[1], found[2] or "", []
        elif lines is not None:
            lines.append(line)
        elif line:
            raise ValueError(f"{source.name} has a line before its first cell: {line!r}; begin it with '# %%'")


def _uncommented(name: str, line: str) -> str:
    if line != "#" and not line.startswith("# "):
        raise ValueError(f"{name}: {line!r} stands in a cell of text; each line of it begins with '# '")
    return line[2:]


def _small(png: str) -> str:
    """The same picture with a palette: a third of the bytes."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        flat = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    flat.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _made_by(name: str) -> dict[str, Any]:
    """What the numbers in a notebook come from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    return {
        "command": f"python docs/notebooks/execute.py {name}",
        "commit": commit.strip(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--text", action="store_true", help="take new prose from the sources, execute nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no notebook {min(unknown)}: there are {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        book, file = notebook(name), HERE / f"{name}.ipynb"
        if arguments.text:
            try:
                keep_outputs(book, nbformat.read(file, as_version=4))
            except ValueError as error:
                parser.error(f"{name}: {error}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                execute(book, folder)
            stored(book).metadata["fewstep"] = _made_by(name)
        nbformat.write(book, file)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
