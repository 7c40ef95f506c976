"""Distillation straight from diffusers folders: guidance fixed, told to the student, or off; autoguidance; reflow."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from toys.unet import tiny_unet

from fewstep import FlowMap, Guided, load, sample
from fewstep.cli import main
from fewstep.data.couplings import uncoupled
from fewstep.runs.build import build
from fewstep.runs.loading import load_run
from fewstep.runs.previews import Watch
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional diffusion model whose label 10 stands for none."""
    folder = tmp_path_factory.mktemp("teachers") / "ddpm"
    DDPMPipeline(tiny_unet(classes=11), DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "weak"
    DDPMPipeline(tiny_unet(classes=11, seed=1), DDPMScheduler()).save_pretrained(folder)
    return folder


def recipe_of(teacher: Path, objective: Any = "ITVM", **guidance: Any) -> dict[str, Any]:
    return {
        "name": "fast", "teacher": {"source": str(teacher), **({"guidance": guidance} if guidance else {})},
        "data": "digits", "objective": objective, "training": {"steps": 3, "batch": 8, "quiet": True, "lr": 1e-2},
        "evaluation": {"count": 8, "steps": [1], "teacher_steps": [1], "extractor": "none"},
    }  # fmt: skip


NULL = {"class_labels": 10}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("objective", ["ITVM", "LMD", "AYF", "PSD", "MeanFlow", "ConsistencyDistillation"])
def test_any_objective_takes_a_diffusion_model(ddpm: Path, objective: str) -> None:
    built = build(load_recipe(recipe_of(ddpm, objective)))
    student, teacher = built.student, built.teacher
    assert isinstance(student, FlowMap)
    assert teacher is not None
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1, 5, 10])
    with torch.no_grad():
        found = student.eval().velocity(x, t, class_labels=labels)
        assert torch.equal(found, teacher(x, t, class_labels=labels))
        assert found.isfinite().all()
    batch = built.data.rows(torch.arange(64), torch.Generator().manual_seed(0))
    loss = built.objective(student, batch, target=student, progress=0.5, step=1, generator=torch.Generator()).total
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.takes_seconds
def test_guidance_of_a_fixed_strength_is_folded_in(ddpm: Path, tmp_path: Path) -> None:
    built = build(load_recipe(recipe_of(ddpm, scale=2.5, null=NULL)))
    field = load(ddpm)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        strong, none = (field.velocity(x, t, class_labels=label) for label in (labels, torch.full((4,), 10)))
        assert built.teacher is not None
        torch.testing.assert_close(
            built.teacher(x, t, class_labels=labels), none + 2.5 * (strong - none), atol=1e-4, rtol=1e-4
        )
    run(load_recipe(recipe_of(ddpm, scale=2.5, null=NULL)), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "quality.json").read_text())["rows"]
    # A step of the teacher is two calls, one of the student one.
    assert [(row["model"], row["nfe"]) for row in found] == [("student", 1), ("teacher", 2)]


@pytest.mark.takes_seconds
def test_guidance_of_any_strength_is_told_to_the_student(ddpm: Path, tmp_path: Path) -> None:
    tree = recipe_of(ddpm, scale=2.0, range=[1, 4], null=NULL)
    run(load_recipe(tree), tmp_path / "run")
    student: Any = load_run(tmp_path / "run")
    assert student.network.takes_guidance
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        one, three = (student(x, 0.0, 1.0, class_labels=labels, guidance=torch.full((2,), w)) for w in (1.0, 3.0))
    assert (one - three).abs().max() > 1e-6
    words = ["sample", str(tmp_path / "run"), "--guidance-scale", "3", "--count", "2", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "x.npz")]) == 0
    # Where nothing is said, it is sampled at the strength it was judged at, and so it is watched.
    with torch.no_grad():
        noise = torch.randn(2, 1, 8, 8)
        said = sample(student, noise, 1, class_labels=labels, guidance=torch.full((2,), 2.0))
        assert torch.equal(sample(student, noise, 1, class_labels=labels), said)
    asked = []
    student.network.register_forward_pre_hook(
        lambda _module, _given, named: asked.append(named["guidance"]), with_kwargs=True
    )
    built = build(load_recipe(tree))
    Watch(load_recipe(tree), uncoupled(built.data), built.teacher, tmp_path / "run").draw(student, 9)
    assert asked
    assert all((strength == 2).all() for strength in asked)
    # Left to itself, a student is told nothing, and says so.
    tree["student"] = {"network": "auto", "guidance": False}
    with pytest.raises(ValueError, match=r"conditions class_labels, guidance: .*told no strength of guidance"):
        build(load_recipe(tree))


def test_no_guidance(ddpm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(ddpm), "--guidance-scale", "3", "--count", "1", "--out", "x.npy"]) == 2
    assert "guidance 3: the model is told no strength of it" in capsys.readouterr().err
    built = build(load_recipe(recipe_of(ddpm)))
    assert not isinstance(built.teacher, Guided)
    assert not built.student.network.takes_guidance  # pyright: ignore


@pytest.mark.takes_seconds
def test_autoguidance_by_a_weaker_diffusion_model(ddpm: Path, weak: Path, tmp_path: Path) -> None:
    """Of another schedule and prediction: both are flows by now."""
    built = build(load_recipe(recipe_of(ddpm, scale=2.0, weak=str(weak))))
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        strong, other = (load(folder).velocity(x, t, class_labels=labels) for folder in (ddpm, weak))
        assert built.teacher is not None
        torch.testing.assert_close(built.teacher(x, t, class_labels=labels), 2 * strong - other, atol=1e-4, rtol=1e-4)
    run(load_recipe(recipe_of(ddpm, scale=2.0, weak=str(weak))), tmp_path / "run")


@pytest.mark.takes_seconds
def test_from_the_command_line_to_an_export(ddpm: Path, tmp_path: Path) -> None:
    words = ["distill", "--teacher", str(ddpm), "--data", "digits", "--steps", "2", "--training.batch", "8"]
    words += ["--evaluation.count", "0", "--training.quiet", "true", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "fast")]) == 0
    student, back = load_run(tmp_path / "run"), load(tmp_path / "fast")
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(student(x, 0.0, 1.0, class_labels=labels), back(x, 0.0, 1.0, class_labels=labels))


@pytest.mark.takes_seconds
def test_a_diffusion_model_is_straightened(ddpm: Path, tmp_path: Path) -> None:
    """Pairs of the converted model, resumed after a shard went missing, and flow matching on them."""
    pairs = tmp_path / "pairs"
    words = ["reflow", str(ddpm), "--count", "24", "--steps", "2", "--shard", "8", "--out", str(pairs)]
    assert main(words) == 0
    before = (pairs / "pairs-00001.safetensors").read_bytes()
    (pairs / "pairs-00001.safetensors").unlink()
    assert main(words) == 0
    assert (pairs / "pairs-00001.safetensors").read_bytes() == before
    words = ["distill", "--teacher", str(ddpm), "--data", str(pairs), "--objective", "FlowMatching", "--steps", "2"]
    words += ["--training.batch", "8", "--evaluation.count", "8", "--evaluation.steps", "[1]", "--evaluation.extractor"]
    assert main([*words, "none", "--training.quiet", "true", "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "quality.json").read_text())["rows"]
    assert {row["model"] for row in found} == {"student", "teacher"}
    assert all("rmse" in row for row in found)  # it is to end where the teacher does
