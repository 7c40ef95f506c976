"""Text from a file to a few-step map and its samples, by the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.__main__ import main
from fewstep.flows.spaces import Tokens

SMALL = ["--student.options", "{width: 16, depth: 1, heads: 2}", "--training.batch", "8", "--training.quiet", "true"]


@pytest.mark.takes_seconds
def test_a_text_is_trained_on_distilled_sampled_and_judged(tmp_path: Path, capsys: Any) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The cat sat on the mat, and the dog saw it. " * 60)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    few = ["--steps", "2", "--evaluation.count", "16", "--evaluation.steps", "[1, 2]"]
    own = ["--data", str(book), "--data.length", "12"]
    assert main(["train", "text-teacher", *own, *SMALL, *few, "--out", str(teacher)]) == 0
    field = fewstep.load(teacher)
    assert field.space == Tokens(tuple(" abcdefghijklmnopqrstuvwxyz"))
    assert field.prediction == "data"
    distilled = ["--teacher", str(teacher), *own, *few, "--evaluation.teacher_steps", "[2]", "--training.quiet", "true"]
    assert main(["distill", "text-itvm", *distilled, "--training.batch", "8", "--out", str(student)]) == 0
    rows = json.loads((student / "quality.json").read_text())["rows"]
    assert {"bigram_kl", "spelling", "entropy"} < set(rows[0])
    assert "bigram_kl" in (student / "report.html").read_text()
    capsys.readouterr()
    out = tmp_path / "lines.txt"
    assert main(["sample", str(student), "--steps", "2", "--count", "5", "--grid", "tokens", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert [len(line) for line in lines] == [12] * 5
    assert main(["sample", str(student), "--out", str(tmp_path / "a.png")]) == 2
    assert "samples of text are written as .txt" in capsys.readouterr().err
    assert main(["export", str(student), str(tmp_path / "export")]) == 0
    back, noise = fewstep.load(tmp_path / "export"), torch.randn(3, 12, 27)
    assert back.space == field.space
    assert torch.equal(fewstep.sample(back, noise, 2), fewstep.sample(fewstep.load(student), noise, 2))


@pytest.mark.takes_seconds
def test_a_chain_is_a_run_like_any_other(tmp_path: Path) -> None:
    out = tmp_path / "chain"
    made = ["--objective", "{name: MarkovChain, kind: uniform}", *SMALL, "--steps", "2", "--evaluation.count", "0"]
    assert main(["train", "text-teacher", *made, "--out", str(out)]) == 0
    field = fewstep.load(out)
    assert field.chain == "uniform"
    x = fewstep.sample(field, torch.randn(2, 32, 27), 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x.sum(-1), torch.ones(2, 32))


@pytest.mark.takes_seconds
def test_samples_of_a_box_and_a_torus_stay_there(tmp_path: Path, capsys: Any) -> None:
    points = torch.rand(200, 2) * 2 - 1
    np.save(tmp_path / "x.npy", points.numpy())
    recipe = tmp_path / "points.yaml"
    recipe.write_text(
        f"data: {tmp_path / 'x.npy'}\nstudent: {{network: mlp, options: {{width: 16, depth: 2}}}}\nobjective: PSD\n"
        "training: {steps: 3, batch: 8, quiet: true}\nevaluation: {count: 0}\n"
    )
    for i, (space, method, bound) in enumerate(
        (("box", "PSD", 1.0), ("torus", "PSD", 3.1416), ("box", "FlowMatching", 1.0))
    ):
        out, drawn = tmp_path / f"run-{i}", tmp_path / "drawn.npy"
        assert main(["train", str(recipe), "--student.space", space, "--objective", method, "--out", str(out)]) == 0
        model = fewstep.load(out)
        assert main(["sample", str(out), "--count", "64", "--steps", "2", "--out", str(drawn)]) == 0
        assert abs(np.load(drawn)).max() <= bound
        assert type(model.space).__name__.lower() == space
    for space, method, why in (
        ("{name: box, low: 0, high: 1}", "PSD", "and the box from 0 to 1"),
        ("torus", "LSD", "LSD is for R^n"),
        ("sphere", "PSD", "sphere"),
    ):
        capsys.readouterr()
        wanted = ["--student.space", space, "--objective", method, "--out", str(tmp_path / "no")]
        assert main(["train", str(recipe), *wanted]) == 2
        assert why in capsys.readouterr().err
