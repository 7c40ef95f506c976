"""The notebooks run, each cell of them, with short trainings; what is stored with them is what their sources say."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from toys.places import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import execute  # noqa: E402

# The longest of them, which trains and reports eight runs however short, is run by `pytest -m slow` alone.
RUN = [pytest.param(name, marks=pytest.mark.slow) if name == "comparing_honestly" else name for name in execute.NAMES]
STEPS = 6  # of each training, where the stored outputs are of thousands
PICTURE, NOTEBOOK = 50_000, 400_000  # bytes


def _stored(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def _outputs(book: Any) -> list[Any]:
    return [output for cell in book.cells for output in cell.get("outputs", [])]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", RUN)
def test_every_cell_runs(name: str, tmp_path: Path) -> None:
    book = execute.execute(execute.notebook(name), tmp_path, STEPS)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in _outputs(book))


@pytest.mark.takes_seconds
def test_a_cell_that_raises_is_an_error(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 0", "1 / x")]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute.execute(nbformat.v4.new_notebook(cells=cells), tmp_path)


@pytest.mark.parametrize("name", execute.NAMES)
def test_what_is_stored_is_the_source_with_its_outputs(name: str) -> None:
    book = _stored(name)
    nbformat.validate(book)
    told = [(cell.cell_type, cell.source) for cell in execute.notebook(name).cells]
    assert [(cell.cell_type, cell.source) for cell in book.cells] == told, (
        f"{name}.ipynb is of another source: python docs/notebooks/execute.py {name} (--text where prose alone changed)"
    )
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert set(book.metadata["fewstep"]) == {"command", "commit", "machine"}
    assert book.cells[0].source.splitlines()[2].startswith("This notebook is for")


@pytest.mark.parametrize("name", execute.NAMES)
def test_outputs_are_small_and_say_nothing_of_where_they_were_made(name: str) -> None:
    outputs, file = _outputs(_stored(name)), NOTEBOOKS / f"{name}.ipynb"
    pictures = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert max(map(len, pictures)) < PICTURE
    assert file.stat().st_size < NOTEBOOK
    texts = [json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}}) for output in outputs]
    for text in texts:
        assert not any(place in text for place in ("/tmp", "/home", "/root", "ipykernel", "Warning")), text
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


def test_there_is_no_notebook_without_a_source() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == execute.NAMES
    page = (NOTEBOOKS / "index.md").read_text()
    assert all(f"({name}.ipynb)" in page for name in execute.NAMES)


def test_prose_alone_keeps_the_outputs() -> None:
    name = execute.NAMES[0]
    book, kept = execute.notebook(name), _stored(name)
    book.cells[0].source += " More prose."
    execute.keep_outputs(book, kept)
    assert _outputs(book) == _outputs(kept)
    next(cell for cell in book.cells if cell.cell_type == "code").source += "\npass"
    with pytest.raises(ValueError, match="the code has changed"):
        execute.keep_outputs(book, kept)


def test_a_source_that_is_no_notebook_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "HERE", tmp_path)
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "x.py"
    source.write_text("import os\n# %%\n")
    with pytest.raises(ValueError, match=r"x\.py has a line before its first cell: 'import os'"):
        execute.notebook("x")
    source.write_text("# %% [markdown]\nwords\n")
    with pytest.raises(ValueError, match="'words' stands in a cell of text"):
        execute.notebook("x")
    source.write_text("# %% [markdown]\n# words\n#\n# more\n\n# %% [writefile] mine.py\nx = 1\n\n\n# %%\nx\n")
    told = [(cell.cell_type, cell.source) for cell in execute.notebook("x").cells]
    assert told == [("markdown", "words\n\nmore"), ("code", "%%writefile mine.py\nx = 1"), ("code", "x")]
