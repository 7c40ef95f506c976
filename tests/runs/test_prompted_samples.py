"""Samples of a teacher of text stand in for images; pairs of prompts."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.captions import CAPTIONS, pipeline_folder

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Pairs, load_data
from fewstep.data.couplings import uncoupled
from fewstep.evaluation import evaluate as evaluation
from fewstep.flows.guided import Guided
from fewstep.generation.drawing import draw
from fewstep.generation.reflow import make_pairs
from fewstep.generation.teacher_samples import TeacherPairs
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.datasets import make_data
from fewstep.runs.loading import make_teacher
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import evaluate_run, run

FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(watch, "teacher_states", partial(watch.teacher_states, steps=2))
    monkeypatch.setattr(watch, "_COLUMNS", 2)
    monkeypatch.setattr(judge, "_DECODED", 2)
    monkeypatch.setattr(evaluation, "_SOLVE", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        pipeline_folder(folder / name, name)
    return folder


def recipe_of(teacher: Path, data: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": "fast", "teacher": {"source": str(teacher), "guidance": {"scale": 3.0, "null": "text"}}, "data": data,
        "objective": "ITVM", "training": {"steps": 2, "batch": 2, "quiet": True},
        "evaluation": {"count": 4, "steps": [1, 2], "teacher_steps": [1]}, **more,
    }  # fmt: skip


def prompted(**more: Any) -> dict[str, Any]:
    return {"name": "teacher", "prompts": list(CAPTIONS), "count": 7, "steps": 2, **more}


@pytest.mark.takes_seconds
def test_samples_of_the_teacher_in_the_place_of_pictures(models: Path, tmp_path: Path) -> None:
    """Those that guided sampling gives for the prompts in turn, kept in shards and not drawn again."""
    tree, out = recipe_of(models / "sd", prompted()), tmp_path / "run"
    tree["evaluation"]["count"] = 0
    run(load_recipe(tree), out)
    kept = Pairs(out / "teacher-samples")
    batch = kept.rows(torch.arange(7), generator(0))
    field: Any = fewstep.load(models / "sd")
    guided = Guided(field, 3.0, null=field.text.null())
    wanted, *_ = draw(guided, 7, 2, prompts=[*CAPTIONS], solver="heun")
    scale = float(wanted.std())
    assert float((batch.data - wanted).std()) < 2e-3 * scale  # the conditions are kept in half precision
    cond = field.text.encode([CAPTIONS[i % 5] for i in range(7)])["encoder_hidden_states"]
    assert torch.equal(batch.cond["encoder_hidden_states"], cond.half().float())
    assert len(load_data(out / "teacher-samples")._texts._shards[0]["encoder_hidden_states"]) == 4  # pyright: ignore

    before = {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()}
    run(load_recipe(tree, {"steps": "3"}), out)
    assert {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()} == before
    run(load_recipe(tree), out, fresh=True)
    after = {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()}
    assert all(after[name] > before[name] for name in before)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"count": 50}}, "count is 7 there and 50 here"),
        ({"data": {"steps": 3}}, "steps is 2 there and 3 here"),
        ({"data": {"solver": "euler"}}, "solver is heun there and euler here"),
        ({"data": {"shape": [4, 4, 4]}}, r"shape is \[4, 8, 8\] there and \[4, 4, 4\] here"),
        ({"data": {"prompts": ["a cow"]}}, r"prompts is 5 prompts \w+ there and 1 prompts \w+ here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"scale": 4.0}, r"model is Guided \w+ there and Guided \w+ here"),
    ],
)
def test_samples_of_a_teacher_drawn_otherwise_are_refused(
    drawn_run: Path, models: Path, change: dict[str, Any], said: str
) -> None:
    tree = recipe_of(models / "sd", prompted(**change.get("data", {})), seed=change.get("seed", 0))
    tree["teacher"]["guidance"]["scale"] = change.get("scale", 3.0)
    before = (drawn_run / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=rf"other samples of a teacher: {said}\. Use another .*--out.*--fresh"):
        run(load_recipe(tree), drawn_run)
    assert (drawn_run / "recipe.yaml").read_bytes() == before


@pytest.fixture(scope="module")
def drawn_run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has drawn its samples, and was stopped before its first step."""
    recipe = load_recipe(recipe_of(models / "sd", prompted(), seed=0))
    out = tmp_path_factory.mktemp("drawn") / "run"
    data: Any = uncoupled(make_data(recipe, make_teacher(recipe.teacher), out))  # pyright: ignore
    assert len(data.bare(torch.arange(7))) == 7
    (out / "recipe.yaml").write_text(recipe.as_yaml())
    return out


@pytest.mark.takes_seconds
def test_samples_are_drawn_anew_where_asked_and_stay_when_a_run_is_judged(
    drawn_run: Path, models: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(drawn_run, tmp_path / "run")
    tree = recipe_of(models / "sd", prompted(count=5, steps=1))
    tree["evaluation"] |= {"count": 0, "steps": [1]}
    run(load_recipe(tree), out, fresh=True)
    assert Pairs(out / "teacher-samples").facts["count"] == 5
    before = {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()}
    assert evaluate_run(out, count=4, seed=1) is not None
    assert {file.name: file.stat().st_mtime_ns for file in (out / "teacher-samples").iterdir()} == before


def test_the_noise_of_the_samples_is_not_theirs_in_training(models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(models / "sd", prompted()))
    data: Any = uncoupled(make_data(recipe, make_teacher(recipe.teacher), None))  # pyright: ignore
    assert isinstance(data, TeacherPairs)
    assert data.cond["encoder_hidden_states"].shape == (7, 8, 16)
    batch = data.rows(torch.tensor([6, 0]), generator(0))
    assert batch.noise is None
    assert torch.equal(batch.data, data.bare(torch.tensor([6, 0])))


@pytest.mark.takes_seconds
def test_prompts_come_from_a_file_beside_the_recipe(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "captions.txt").write_text("a cat\n\na dog\n")
    file = tmp_path / "recipes" / "x.yaml"
    tree = recipe_of(models / "sd", prompted(prompts="captions.txt"))
    file.write_text(json.dumps({name: value for name, value in tree.items() if name != "name"}))
    recipe = load_recipe(file)
    data: Any = uncoupled(make_data(recipe, make_teacher(recipe.teacher), None))  # pyright: ignore
    assert data.prompts == ["a cat", "a dog"]
    with pytest.raises(FileNotFoundError, match=r"no file of prompts gone\.txt"):
        build(load_recipe(file, {"data.prompts": "gone.txt"}))
    with pytest.raises(ValueError, match=r"which is conditioned on text: say which prompts"):
        build(load_recipe(recipe_of(models / "sd", {"name": "teacher", "count": 4})))


@pytest.mark.takes_seconds
def test_pairs_of_prompts(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(CAPTIONS))
    words = ["reflow", str(models / "sd3"), "--prompts", "prompts.txt", "--count", "7", "--steps", "2", "--shard", "4"]
    assert main([*words, "--guidance-scale", "2", "--out", "pairs"]) == 0
    pairs = Pairs("pairs")
    batch = pairs.rows(torch.tensor([6, 1]), generator(0))
    assert batch.noise is not None
    field: Any = fewstep.load(models / "sd3")
    for name, value in field.text.encode(["a dog", "a dog"]).items():
        assert torch.equal(batch.cond[name], value.half().float())
    guided = Guided(field, 2.0, null=field.text.null())
    cond: dict[str, Any] = batch.cond
    wanted = fewstep.sample(guided, batch.noise, 2, solver="heun", **cond)
    torch.testing.assert_close(batch.data, wanted, rtol=1e-4, atol=1e-4)

    Path("prompts.txt").write_text("a cat\na dog")
    capsys.readouterr()
    assert main([*words, "--guidance-scale", "2", "--out", "pairs"]) == 2
    assert "other pairs: prompts is 5 prompts" in capsys.readouterr().err
    assert main([*words[:2], *words[4:], "--out", "none"]) == 2
    assert "conditioned on text: give it prompts" in capsys.readouterr().err
    # On to training: a straighter model of text.
    more = ["--teacher", str(models / "sd3"), "--data", "pairs", "--objective", "FlowMatching", "--steps", "2"]
    more += ["--training.batch", "2", "--evaluation.count", "0", "--training.quiet", "true", "--out", "run"]
    assert main(["distill", *more]) == 0
    (tmp_path / "pairs" / "text-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 shards of text are missing, one is .*text-00000"):
        Pairs("pairs")


def test_processes_draw_pairs_of_prompts_together(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field: Any = fewstep.load(models / "sd")
    how: dict[str, Any] = {"steps": 1, "prompts": CAPTIONS, "shard": 2, "batch": 2, "device": "cpu"}
    make_pairs(field, tmp_path / "one", 5, **how)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in ((1, 2), (0, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert make_pairs(field, tmp_path / "two", 5, **how) == missing
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.takes_seconds
def test_trajectories_of_prompts_are_kept_and_learned_from(models: Path, tmp_path: Path) -> None:
    tree, out = recipe_of(models / "sd", prompted(states=[0.5])), tmp_path / "run"
    tree |= {"objective": {"name": "Trajectory", "diagonal": 0, "times": "calls(1)", "ends": 0}}
    tree["evaluation"]["count"] = 0
    run(load_recipe(tree), out)
    batch = Pairs(out / "teacher-samples").rows(torch.arange(7), generator(0))
    assert batch.states is not None
    assert batch.states.shape == (7, 1, 4, 8, 8)
    assert set(batch.cond) == {"encoder_hidden_states"}
