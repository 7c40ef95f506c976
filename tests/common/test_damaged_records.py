"""What a run keeps of itself, damaged or changed by hand: one line that names the file, and never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.evaluation.results import Evaluation

DEEP = "[" * 100_000
ROW = {"model": "student", "steps": 1, "nfe": 1, "rmse": 0.5}
FACTS = {"shape": [2], "count": 8}
FEW = ["--steps", "2", "--training.batch", "8", "--training.chunk", "8", "--student.options", "{width: 4, depth: 2}"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "checkerboard-itvm", *FEW, "--evaluation.count", "0", "--out", "run"]) == 0
    capsys.readouterr()
    return Path("run")


def refused(words: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2, words
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: "), line
    assert file in line, line
    assert len(line) < 400, line
    return line


@pytest.mark.takes_seconds
def test_quality(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def quality(**changed: Any) -> str:
        return json.dumps({"rows": [ROW], "floor": {}, "facts": FACTS} | changed)

    for text, key in (
        ("", ""), ("3", "all of it"), (DEEP, ""), ("{}", "rows"), (quality(rows=3), "rows"), (quality(rows=[]), "rows"),
        (quality(rows=[1]), "rows.0"), (quality(rows=[{**ROW, "steps": "x"}]), "rows.0.steps"),
        (quality(rows=[{**ROW, "rmse": "x" * 10_000}]), "rows.0.rmse"), (quality(facts={}), "facts.shape"),
        (quality(floor=[1]), "floor"), (quality(more=1), "more"),
    ):  # fmt: skip
        (run / "quality.json").write_text(text)
        assert key in refused(["compare", "run"], "run/quality.json", capsys)
        refused(["export", "run", "exported"], "run/quality.json", capsys)
        assert not Path("exported").exists()
    (run / "quality.json").write_text(quality())
    found = Evaluation.read(run / "quality.json")
    assert (found.rows, found.facts) == ([ROW], FACTS)
    assert main(["compare", "run"]) == 0


@pytest.mark.takes_seconds
def test_metrics(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (run / "metrics.jsonl").read_text()
    assert good.endswith("\n")
    for line in ("[", "3", "{}", '{"step": "x"}', DEEP):
        (run / "metrics.jsonl").write_text(f"{good}{line}\n")
        where = f"line {good.count(chr(10)) + 1} of run/metrics.jsonl"
        refused(["distill", "run", "--steps", "4"], where, capsys)
    (run / "metrics.jsonl").write_text(f'{good}{{"st')  # torn by a kill
    assert main(["distill", "run", "--steps", "4"]) == 0


@pytest.mark.takes_seconds
def test_the_mark_of_a_run_and_who_is_at_work_in_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (DEEP, "3", "{"):  # the checkpoints say the same
        (run / "run.json").write_text(text)
        assert main(["distill", "run"]) == 0
    capsys.readouterr()
    from fewstep.common.locks import owned

    for text in (DEEP, "3", '{"since": 1e300}', '{"since": 0, "command": 3}'):
        with owned(run, "trained"):
            (run / ".lock").write_text(text)
            with pytest.raises(OSError, match="run is being written by another process"):
                _own_elsewhere(run)


def _own_elsewhere(run: Path) -> None:
    """As another process would: what this one has it may enter again."""
    from contextvars import Context

    from fewstep.common.locks import owned

    def enter() -> None:
        with owned(run, "trained"):
            pass

    Context().run(enter)


@pytest.mark.takes_seconds
def test_what_a_comparison_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "training.batch=8", "--set", "training.chunk=8", "--set", "student.options={width: 4, depth: 2}"]
    words = ["compare", "checkerboard-itvm", "--methods", "FlowMatching", "--train-steps", "2"]
    words = [*words, *small, "--set", "evaluation.count=8", "--set", "evaluation.batch=8", "--out", "c"]
    assert main(words) == 0
    good = (tmp_path / "c" / "budget.json").read_text()
    for text in ("", "3", DEEP, "[]", '{"methods": 3}', good.replace('"time": ', '"time": "x", "was": ')):
        (tmp_path / "c" / "budget.json").write_text(text)
        refused(words, "c/budget.json", capsys)
