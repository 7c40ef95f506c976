"""Trajectories of a teacher, drawn once by the run that learns from them: `data: {name: teacher, states: ...}`."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Pairs
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.generation.reflow import make_pairs
from fewstep.generation.teacher_samples import TeacherPairs
from fewstep.networks import MLP
from fewstep.runs.datasets import coupling_of, make_data
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

STATES = [0.25, 0.5, 0.75]


def recipe_of(**data: Any) -> dict[str, Any]:
    return {
        "name": "stored", "teacher": "checkerboard", "student": {"network": "mlp", "options": {"width": 16}},
        "data": {"name": "teacher", "states": STATES, "count": 23, "steps": 8, "solver": "midpoint", **data},
        "objective": {"name": "Trajectory", "diagonal": 0, "times": "calls(1)", "ends": 0},
        "training": {"steps": 3, "batch": 16, "chunk": 16, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip


def test_they_are_those_of_reflow_and_the_training_is_the_same(tmp_path: Path) -> None:
    """To the bit: one command in the place of two."""
    run(load_recipe(recipe_of()), tmp_path / "run")
    teacher = fewstep.CheckerboardField()
    make_pairs(teacher, tmp_path / "pairs", 23, steps=8, solver="midpoint", states=STATES, device="cpu")
    ours, theirs = Pairs(tmp_path / "run" / "teacher-samples"), Pairs(tmp_path / "pairs")
    every = torch.arange(23)
    for name in ("noise", "states", "times", "data"):
        found, wanted = (getattr(kept.rows(every, generator(0)), name) for kept in (ours, theirs))
        assert torch.equal(found, wanted), name
    tree = {**recipe_of(), "data": str(tmp_path / "pairs")}
    run(load_recipe(tree), tmp_path / "two")
    one, two = (fewstep.load(tmp_path / name).state_dict() for name in ("run", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_with_what_it_drew_and_refuses_others(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(load_recipe(recipe_of()), out)
    before = {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()}
    run(load_recipe({**recipe_of(), "training": {**recipe_of()["training"], "steps": 5}}), out)
    assert {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()} == before
    for change, said in (({"states": 3}, "after is"), ({"steps": 16}, "steps is 8 there and 16 here")):
        with pytest.raises(ValueError, match=said):
            make_data(load_recipe(recipe_of(**change)), fewstep.CheckerboardField(), out)
    torn = out / "teacher-samples" / "pairs-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])  # a disk that was full: drawn anew, and the same
    data = make_data(load_recipe(recipe_of()), fewstep.CheckerboardField(), out)
    assert data.rows(torch.arange(4), generator(0)).states is not None
    assert Pairs(out / "teacher-samples").states == 3


def test_before_anything_is_drawn_it_says_what_it_will_be(tmp_path: Path) -> None:
    field = NetworkField(MLP(2, width=8, classes=3))
    data = TeacherPairs(field, count=7, steps=4, states=[0.5], folder=tmp_path / "kept")
    assert (data.size, data.shape, data.states, data.brings_noise, data.two_sided) == (7, (2,), 1, True, False)
    assert data.path == field.path.quarters
    labels = data.cond["class_labels"]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not (tmp_path / "kept").exists()
    batch = data.rows(torch.tensor([4, 1]), generator(0))
    assert batch.states is not None
    assert batch.noise is not None
    assert (batch.states.shape, batch.noise.shape) == ((2, 1, 2), (2, 2))
    assert torch.equal(batch.cond["class_labels"], labels[[4, 1]])
    assert torch.equal(Pairs(tmp_path / "kept").cond["class_labels"], labels)
    fewer = TeacherPairs(field, count=4, steps=4, states=[0.5], classes=2, folder=tmp_path / "fewer")
    assert fewer.cond["class_labels"].tolist() == [0, 1, 0, 1]
    assert torch.equal(fewer.rows(torch.arange(4), generator(0)).cond["class_labels"], fewer.cond["class_labels"])


def test_states_lie_on_the_exact_trajectories() -> None:
    field = GaussianField(torch.tensor([0.7, -1.1]), torch.tensor([[0.5, 0.3], [0.3, 1.7]]))
    batch = TeacherPairs(field, count=64, steps=64, states=[0.25, 0.75]).rows(torch.arange(64), generator(0))
    assert batch.states is not None
    assert batch.noise is not None
    zeros = torch.zeros(64)
    for k, t in enumerate((0.25, 0.75)):
        torch.testing.assert_close(batch.states[:, k], field.flow(batch.noise, zeros, zeros + t), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"states": [0.3]}, "multiples of a step, 1 / 8"),
        ({"states": [0.75, 0.25]}, "they rise between 0 and 1"),
        ({"states": 8}, "states is 8: of 8 steps, 7 end between noise and data"),
        ({"states": [0.0, 0.5]}, "they rise between 0 and 1"),
        ({"states": 3, "solver": "adaptive"}, "states are kept at the steps of a solver"),
        ({"states": 3, "solver": "huen"}, "did you mean 'heun'"),
        ({"states": "all"}, "data.states is 'all': input should be a whole number or a list"),
        ({"states": "0.25,0.5"}, "data.states is '0.25,0.5': input should be a whole number or a list"),
        ({"states": True}, "data.states is True: input should be a number"),
        ({"states": 3, "count": 0}, "data.count is 0"),
        ({"states": 3, "prompts": ["a cat"]}, "no text encoders"),
        ({"states": 0}, "Trajectory without a teacher|stored"),
    ],
)
def test_bad_settings_are_said_before_the_teacher_is_called(
    data: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipe_of(**data)
    if data["states"] == 0:
        tree["objective"]["teacher"] = "none"
    with pytest.raises(ValueError, match=said):
        run(load_recipe(tree), tmp_path / "run")
    assert "drawing" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher-samples").exists()


def test_a_run_says_that_noise_and_data_were_paired() -> None:
    assert coupling_of(load_recipe(recipe_of())) == "reflow pairs"
    assert coupling_of(load_recipe(recipe_of(states=0))) == ""


@pytest.mark.takes_seconds
def test_the_recipe_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.count", "2000", "--data.batch", "2000", "--training.steps", "300", "--training.quiet", "true"]
    small += ["--training.batch", "256", "--training.chunk", "256", "--student.options.width", "64"]
    assert main(["distill", "checkerboard-stored", *small, "--evaluation.count", "0", "--out", "run"]) == 0
    teacher: Any = fewstep.CheckerboardField()
    noise = torch.randn(500, 2, generator=generator(7))
    end = fewstep.sample(teacher, noise, 64, solver="midpoint")

    def rmse(x: torch.Tensor) -> float:
        return float((x - end).square().sum(1).mean().sqrt())

    assert rmse(fewstep.sample(fewstep.load("run"), noise, 1)) < 0.3 < rmse(fewstep.sample(teacher, noise, 4))
