"""README's own lines with what a stranger brings, typed literally in an empty folder."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from toys.first_hour import write_ddpm, write_photos

import fewstep
from fewstep.commands.messages import as_flags
from fewstep.common.options import read_yaml
from fewstep.runs.build import build
from fewstep.runs.recipes import load_recipe

SMALL = ("--steps", "2", "--training.batch", "4", "--evaluation.count", "4", "--evaluation.steps", "[1, 2]")


def typed(line: str, *more: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """What a command line says in a folder."""
    env = {**os.environ, "FEWSTEP_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", *line.split(), *more]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    write_ddpm(tmp_path / "my-ddpm")
    return tmp_path


@pytest.mark.takes_seconds
def test_a_folder_of_photos_of_all_sizes_is_distilled_with(home: Path) -> None:
    done = typed("fewstep distill --teacher ./my-ddpm --data ./photos --out runs/fast", *SMALL, cwd=home)
    assert read_yaml(home / "runs/fast/recipe.yaml")["data"] == {"name": "./photos", "size": 16, "labels": False}
    said = [line for line in done.stderr.splitlines() if line.startswith("note: images in ./photos")]
    assert len(said) == 1
    for word in ("middle square", "16 x 16", "--data.size", "not mirrored", "--data.flip", "folders are no classes"):
        assert word in said[0]
    again = typed("fewstep distill --teacher ./my-ddpm --data ./photos --out runs/fast", *SMALL, cwd=home)
    assert "done: step 2" in again.stderr  # the same run, and no other recipe


def _data(home: Path, source: str, **flags: str) -> dict[str, object]:
    """The section of data that a run is built with."""
    flags = {"teacher": str(home / "my-ddpm"), "data": str(home / "photos"), **flags}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(load_recipe(source, {"name": "x", **flags})).recipe.data.options


@pytest.mark.takes_seconds
def test_the_teacher_settles_what_nobody_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(home / "cache"))
    assert _data(home, "distill") == {"size": 16, "labels": False}
    assert _data(home, "finetune") == {"size": 16, "labels": False}
    assert _data(home, "distill", **{"data.size": "8", "data.labels": "false"}) == {"size": 8, "labels": False}
    write_ddpm(home / "grey", channels=1)
    assert _data(home, "distill", teacher=str(home / "grey"))["channels"] == 1


@pytest.mark.takes_seconds
def test_a_run_from_before_keeps_its_pictures_as_they_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(home / "cache"))
    recipe = load_recipe(
        "distill",
        {"name": "x", "teacher": str(home / "my-ddpm"), "data": str(home / "photos"), "data.labels": "false"},
    )
    for start in (home / "old", home / "new"):
        (start / "checkpoints" / "step-00000001").mkdir(parents=True)
    (home / "old" / "recipe.yaml").write_text(recipe.as_yaml())
    with pytest.raises(ValueError, match=r"images of several sizes.*--data\.size 64"):
        build(recipe, home / "old")
    assert build(recipe, home / "old", fresh=True).recipe.data.options["size"] == 16
    assert build(recipe, home / "new" / "other").recipe.data.options["size"] == 16


@pytest.mark.takes_seconds
def test_what_to_type_next_says_all_of_the_data(home: Path) -> None:
    line = "fewstep train --data ./photos --data.size 16 --data.flip false --student.options.norm_num_groups 4"
    blocks = ("--student.options.block_out_channels", "[4, 4, 4, 4]", "--student.options.attention_head_dim", "4")
    done = typed(line, *blocks, *SMALL, cwd=home)
    says = next(line.strip() for line in done.stderr.splitlines() if line.strip().startswith("fewstep distill"))
    assert "--data ./photos --data.size 16 --data.flip false --data.labels false" in says
    typed(says, *SMALL, cwd=home)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("size", "data.size"),
        ("data_size", "data.size"),
        ("flip", "data.flip"),
        ("step", "training.steps"),
        ("lr", "training.lr"),
        ("ema", "training.ema"),
        ("target", "objective.target"),
        ("training.batsh", "training.batch"),
        ("sede", "seed"),
    ],
)
def test_a_flag_that_is_not_known_names_the_one_that_is_meant(flag: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown recipe key '{flag}': did you mean '{meant}'\?"):
        load_recipe("checkerboard-itvm", {flag: "1"})


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no folder runs/nothing: runs holds no folders$"):
        fewstep.load("runs/nothing")
    (tmp_path / "runs" / "photos-train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"did you mean runs/photos-train\?"):
        fewstep.load("runs/photo-train")
    with pytest.raises(FileNotFoundError, match="Hugging Face hub"):
        fewstep.load("google/nothing")


@pytest.mark.takes_seconds
def test_a_run_without_evaluation_has_no_report(home: Path) -> None:
    done = typed("fewstep distill checkerboard-itvm --steps 1 --evaluation.count 0", cwd=home)
    assert "report.html" not in done.stdout
    assert "fewstep evaluate runs/checkerboard-itvm measures it" in done.stdout


@pytest.mark.parametrize("python", ["resume=False (--fresh)", "resume=False", "overwrite=True"])
def test_a_flag_is_named_once(python: str) -> None:
    assert as_flags(f"use\n{python} for it") == f"use {'--overwrite' if 'overwrite' in python else '--fresh'} for it"
