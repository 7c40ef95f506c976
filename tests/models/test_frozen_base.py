"""The frozen base of an adapter in bfloat16, int8 and nf4: less memory, one copy for teacher and student."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys.families import tiny_pipeline

from fewstep.flows.guided import unguided
from fewstep.networks.frozen_base import HalfLinear, PackedLinear
from fewstep.planning.plan import plan
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


def recipe(folder: Path, base: str, objective: str = "ITVM", **training: Any) -> Any:
    return load_recipe({
        "name": "kept", "teacher": str(folder), "objective": objective,
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


def packs(base: str) -> None:
    if base in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")


def kept_layers(model: Any) -> list[Any]:
    return [layer for layer in model.network.modules() if isinstance(layer, HalfLinear | PackedLinear)]


# How far the first velocity may be off, as a share of the largest.
DIGITS = {"bfloat16": 0.05, "int8": 0.05, "nf4": 0.5}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("base", DIGITS)
def test_one_copy_is_teacher_and_student(teacher: Path, tmp_path: Path, base: str) -> None:
    packs(base)
    built = build(recipe(teacher, base), tmp_path / "run")
    student: Any = built.student
    source: Any = unguided(built.objective.teacher)
    kept = kept_layers(student)
    assert len(kept) > 5
    stored = {"bfloat16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}[base]
    assert {layer.weight.dtype for layer in kept} == {torch.bfloat16, stored}
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    shared = {weight.data_ptr() for weight in source.parameters()}
    assert all(weight.data_ptr() in shared for layer in kept for weight in layer.parameters(recurse=False))
    x, cond = torch.randn(2, *built.data.shape), source.text.encode(["a cat", "a dog"])
    whole: Any = load(teacher)
    with torch.no_grad():
        start = source(x, 0.4, **cond)
        assert torch.equal(student.velocity(x, 0.4, **cond), start)
        plain = whole(x, 0.4, **cond)
    assert 0 < (start - plain).abs().max() < DIGITS[base] * plain.abs().max()


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("teacher", "base", "precision", "objective"),
    [
        ("sd", "bfloat16", "float32", "ITVM"),
        ("sd", "nf4", "bf16", "ITVM"),
        ("sd3", "nf4", "float32", "FlowMatching"),
        ("sd3", "int8", "float32", "MeanFlow"),
    ],
    indirect=["teacher"],
)
def test_it_trains_goes_on_and_is_exported(
    teacher: Path, tmp_path: Path, base: str, precision: str, objective: str
) -> None:
    packs(base)
    out = tmp_path / "run"
    run(recipe(teacher, base, objective, precision=precision, steps=2), out)
    done = run(recipe(teacher, base, objective, precision=precision), out)  # goes on
    assert done.result.step == 4
    for file in out.glob("checkpoints/**/*.safetensors"):
        assert not any("attn" in name and "lora" not in name for name in load_file(file))
    back: Any = load(out)
    assert not kept_layers(back)
    x, cond = torch.randn(2, *back.network.shape), back.text.encode(["a cat", "a dog"])
    times = (0.2,) if objective == "FlowMatching" else (0.2, 0.9)
    again: Any = load(export(out, tmp_path / "whole"))
    with torch.no_grad():
        assert torch.equal(again(x, *times, **cond), back(x, *times, **cond))
        ema: Any = done.result.ema
        torch.testing.assert_close(ema(x, *times, **cond), back(x, *times, **cond), atol=1e-4, rtol=1e-4)
    assert json.loads((out / "run.json").read_text())
    assert {type(layer) for layer in back.network.modules() if isinstance(layer, nn.Linear)} <= {nn.Linear, *KINDS}


KINDS = tuple(kind for kind in nn.Linear.__subclasses__() if kind not in (HalfLinear, PackedLinear))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("teacher", ["sd3"], indirect=True)
def test_it_goes_on_with_the_same_bits_and_no_other_teacher(teacher: Path, tmp_path: Path) -> None:
    packs("nf4")
    source = tmp_path / "teacher"
    shutil.copytree(teacher, source)
    out = tmp_path / "run"
    whole = run(recipe(source, "nf4", checkpoint_every=2), out).result.student.state_dict()
    shutil.rmtree(out / "checkpoints/step-00000004")
    again = run(recipe(source, "nf4", checkpoint_every=2), out).result.student.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    file = next(file for part in ("unet", "transformer") for file in (source / part).glob("*.safetensors"))
    weights = load_file(file)
    save_file({name: value * (1.01 if "attn" in name else 1.0) for name, value in weights.items()}, file)
    with pytest.raises(ValueError, match="the frozen weights are not those"):
        load(out)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("teacher", ["sd3"], indirect=True)
def test_a_plan_counts_it(teacher: Path, tmp_path: Path) -> None:
    full, half, eight, four = (plan(recipe(teacher, base)) for base in ("float32", "bfloat16", "int8", "nf4"))
    assert four.fixed < eight.fixed < half.fixed < full.fixed
    packs("nf4")
    for base, planned in (("int8", eight), ("nf4", four)):
        student: Any = build(recipe(teacher, base), tmp_path / base).student
        stay = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
        assert {part.name: part.bytes for part in planned.parts}["weights that stay"] == stay + sum(
            buffer.nbytes for buffer in student.buffers()
        )


def test_a_library_that_is_not_there_is_named(teacher: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"base: nf4 needs bitsandbytes, .* pip install 'fewstep\[quantised\]'"):
        build(recipe(teacher, "nf4"), tmp_path / "run")
