"""The frozen base of an adapter in bfloat16: half of its memory, one copy for teacher and student."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys.families import tiny_pipeline

from fewstep.flows.guided import unguided
from fewstep.models.half_base import HalfLinear
from fewstep.planning.plan import plan
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


def recipe(folder: Path, base: str, **training: Any) -> Any:
    return load_recipe({
        "name": "half", "teacher": str(folder), "objective": "ITVM",
        "data": {"name": "teacher", "prompts": ["a cat", "a dog"], "count": 8, "steps": 2},
        "student": {"lora": {"rank": 2, "base": base}},
        "training": {"steps": 4, "batch": 4, "lr": 1e-2, "quiet": True, **training},
        "evaluation": {"count": 0},
    })  # fmt: skip


@pytest.fixture(scope="module", params=["sd", "sd3"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / request.param
    tiny_pipeline(request.param).save_pretrained(folder)
    return folder


@pytest.mark.takes_seconds
def test_one_half_copy_is_teacher_and_student(teacher: Path, tmp_path: Path) -> None:
    built = build(recipe(teacher, "bfloat16"), tmp_path / "run")
    student: Any = built.student
    source: Any = unguided(built.objective.teacher)
    kept = [layer for layer in student.network.modules() if isinstance(layer, HalfLinear)]
    assert len(kept) > 5
    assert {layer.weight.dtype for layer in kept} == {torch.bfloat16}
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    shared = {weight.data_ptr() for weight in source.parameters()}
    assert all(layer.weight.data_ptr() in shared for layer in kept)
    x, cond = torch.randn(2, *built.data.shape), source.text.encode(["a cat", "a dog"])
    whole: Any = load(teacher)
    with torch.no_grad():
        start = source(x, 0.4, **cond)
        assert torch.equal(student.velocity(x, 0.4, **cond), start)
        plain = whole(x, 0.4, **cond)
    assert 0 < (start - plain).abs().max() < 0.05 * plain.abs().max()  # to the digits of bfloat16


@pytest.mark.takes_seconds
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_trains_goes_on_and_is_exported(teacher: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "run"
    run(recipe(teacher, "bfloat16", precision=precision, steps=2), out)
    done = run(recipe(teacher, "bfloat16", precision=precision), out)  # goes on
    assert done.result.step == 4
    back: Any = load(out)
    assert not any(isinstance(layer, HalfLinear) for layer in back.network.modules())
    x, cond = torch.randn(2, *back.network.shape), back.text.encode(["a cat", "a dog"])
    again: Any = load(export(out, tmp_path / "whole"))
    with torch.no_grad():
        assert torch.equal(again(x, 0.2, 0.9, **cond), back(x, 0.2, 0.9, **cond))
        ema: Any = done.result.ema
        torch.testing.assert_close(ema(x, 0.2, 0.9, **cond), back(x, 0.2, 0.9, **cond), atol=1e-4, rtol=1e-4)
    assert json.loads((out / "run.json").read_text())
    assert {type(layer) for layer in back.network.modules() if isinstance(layer, nn.Linear)} <= {nn.Linear, *KINDS}


KINDS = tuple(kind for kind in nn.Linear.__subclasses__() if kind is not HalfLinear)


@pytest.mark.takes_seconds
def test_a_plan_counts_it(teacher: Path) -> None:
    full, half = (plan(recipe(teacher, base)) for base in ("float32", "bfloat16"))
    assert half.fixed < full.fixed
