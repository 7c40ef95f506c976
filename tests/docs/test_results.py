"""The files of benchmarks/results, and the leaderboard that is written from them."""

import importlib
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import leaderboard
import pytest
from record import FOLDER, here, read, write

FILES = sorted(FOLDER.glob("*.json"))
FACTS: dict[str, Any] = {
    "title": "A table", "commands": ["python measure.py"], "commit": "1234567", "seeds": [0], "machine": "a machine",
}  # fmt: skip


def test_there_are_files() -> None:
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_results_file_has_its_form(file: Path) -> None:
    results = read(file)
    assert results.rows
    assert json.loads(file.read_text())["columns"] == results.columns  # plain JSON, for everybody


@pytest.mark.parametrize("script", sorted(FOLDER.parent.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_finds_what_it_imports(script: Path) -> None:
    importlib.import_module(script.stem)


def test_the_leaderboard_is_what_its_files_say() -> None:
    text = leaderboard.page(leaderboard.TEXT.read_text())
    assert text == leaderboard.PAGE.read_text(), "run `make leaderboard`"
    assert "{{" not in text


def test_what_is_written_is_read_back_with_its_digits(tmp_path: Path) -> None:
    rows = [["a", Decimal("0.070"), {"mean": 0.1234567891, "std": 0.0}], ["b", None, True]]
    write(tmp_path / "x.json", **FACTS, columns=["name", "1", "2"], formats={"2": "{mean:.2f} ± {std}"}, rows=rows)
    results = read(tmp_path / "x.json")
    assert results.rows == [["a", Decimal("0.070"), {"mean": Decimal("0.123457"), "std": 0}], ["b", None, "yes"]]
    assert leaderboard.table(results).splitlines()[2:] == ["| a | 0.070 | 0.12 ± 0 |", "| b | - | yes |"]


def test_groups_and_formats_are_shown(tmp_path: Path) -> None:
    rows = [["distilled", "ITVM", 0.5, 0.123], ["distilled", "PSD", 1.0, 2.0], [None, "teacher", None, None]]
    facts = {**FACTS, "columns": ["kind", "name", "share", "x"], "rows": rows, "group": "kind"}
    write(tmp_path / "x.json", **facts, formats={"share": "{} %", "x": "{:.2f}"})
    assert leaderboard.table(read(tmp_path / "x.json")).splitlines() == [
        "| name | share | x |", "| --- | --- | --- |", "| *distilled* |  |  |", "| ITVM | 0.5 % | 0.12 |",
        "| PSD | 1 % | 2.00 |", "| teacher | - | - |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": None}, "seeds is empty: give it, or add the note 'seeds: not recorded'"),
        ({"commands": []}, "commands is empty"),
        ({"machine": ""}, "machine is empty"),
        ({"rows": [["a"]]}, "row 0 has 1 cells for 2 columns"),
        ({"formats": {"3": "{}"}}, "no column is called '3'; there are: name, 1"),
        ({"group": "kind"}, "no column is called 'kind'"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_file_that_does_not_say_where_it_is_from_is_refused(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    facts = {**FACTS, "columns": ["name", "1"], "rows": [["a", 1]], **wrong}
    (tmp_path / "x.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path / "x.json")
    assert "x.json" in str(error.value)
    with pytest.raises(ValueError, match=said):
        write(tmp_path / "y.json", **facts)
    assert not (tmp_path / "y.json").exists()


def test_what_is_missing_is_said_on_the_page(tmp_path: Path) -> None:
    facts = {
        **FACTS,
        "commit": None,
        "commands": [],
        "notes": ["commit: not recorded", "commands: not recorded", "A note."],
    }
    write(tmp_path / "x.json", **facts, columns=["1"], rows=[[1]])
    text = leaderboard.section("x.json", tmp_path)
    assert "(the command was not recorded)" in text
    assert "Commit: not recorded; seed: 0; machine: a machine. File: [`x.json`](results/x.json)." in text
    assert "A note." in text
    assert "commands: not recorded" not in text


def test_a_run_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(FOLDER.parent / "sampling.py"), "--rounds", "3"])
    facts = here(seeds=[0, 1], notes=["A note."])
    assert facts["commands"] == ["python benchmarks/sampling.py --rounds 3"]
    assert "torch" in facts["machine"]
    write(tmp_path / "x.json", title="x", columns=["1"], rows=[[1]], **facts)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        assert facts["commit"].startswith(commit.stdout.strip())
    assert "seeds: not recorded" in here()["notes"]
