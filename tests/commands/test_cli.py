"""The command line: quick to start, one line where something is wrong, and commands to copy at the end."""

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys.families import tiny_model, tiny_vae
from toys.videos import FLOW, wan_model, wan_vae

import fewstep
from fewstep.cli import main
from fewstep.common.errors import TrainingError
from fewstep.evaluation.results import Evaluation, compare
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.generation.images import suffix_of
from fewstep.latents.prompts import Prompts
from fewstep.latents.vae import Latents
from fewstep.networks import FAMILIES, MLP
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs import run as runs
from fewstep.runs.judge import next_commands
from fewstep.runs.recipes import load_recipe

TINY = [
    "--teacher", "eight-gaussians", "--data", "eight-gaussians", "--steps", "4", "--training.batch", "32",
    "--training.chunk", "32", "--student.options.width=8", "--student.options.depth", "2",
    "--evaluation.count", "20", "--evaluation.steps", "[1, 2]", "--evaluation.teacher-steps", "[2]",
    "--training.quiet", "true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((watch, "_MEASURED"), (watch, "_POINTS"), (judge, "_POINTS")):
        monkeypatch.setattr(module, name, 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run in it, ``runs/one``."""
    folder = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["distill", "checkerboard-itvm", *TINY, "--out", "runs/one"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that is refused says: one line on stderr, nothing on stdout, exit code 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def commands(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[list[str]]]:
    """The output, and what it says to type next."""
    said = capsys.readouterr()
    _, _, after = said.err.partition("next:\n")
    return said.out, [shlex.split(line) for line in after.splitlines()]


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom fewstep.cli import main\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as stop:\n        assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'diffusers', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.returncode == 0, said.stderr
    assert "distill" in said.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_public_names_are_there_and_lazy() -> None:
    import ast

    tree = ast.parse(Path(fewstep.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    lazy = {name: f"fewstep.{home}" for name, home in fewstep._HOMES.items()}
    assert typed == lazy
    assert set(fewstep.__all__) == set(lazy)
    for name in fewstep.__all__:
        assert getattr(fewstep, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fewstep.nothing  # noqa: B018
    assert set(fewstep.__all__) <= set(dir(fewstep))


@pytest.mark.takes_seconds
def test_distill_says_what_came_out_and_what_to_type(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "checkerboard-itvm", *TINY, "--out", "runs/one"]) == 0  # done already: judged again
    out, following = commands(capsys)
    assert "student" in out
    assert "rmse" in out
    assert "runs/one/report.html" in out
    assert [words[1] for words in following] == ["sample", "evaluate", "export"]
    for words in following:  # they are real: each can be typed
        assert main(words[1:] + (["--count", "20"] if words[1] == "evaluate" else [])) == 0
    assert (here / "one.png").is_file()
    assert (here / "one-export").is_dir()


@pytest.mark.takes_seconds
def test_what_to_type_next_can_be_typed_where_a_name_has_a_space(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/one", "my runs/a one")
    run = str(here / "my runs" / "a one")
    assert main(["evaluate", run, "--steps", "1", "--teacher-steps", "1", "--count", "20"]) == 0
    _, following = commands(capsys)
    drawn = ["fewstep", "sample", run, "--steps", "2", "--count", "64", "--out", "a one.png"]
    assert following == [drawn, ["fewstep", "export", run, "a one-export"]]
    assert main(["sample", run, "--count", "2"]) == 0
    _, following = commands(capsys)
    assert following == [["fewstep", "evaluate", run], ["fewstep", "export", run, "a one-export"]]
    assert main(["compare", run, run]) == 0
    _, following = commands(capsys)
    assert following == [["fewstep", "export", run, "a one-export"]]
    assert main(["export", run, "a one-export"]) == 0
    _, following = commands(capsys)
    folder = str(here / "a one-export")
    assert following == [["fewstep", "sample", folder, "--steps", "2"]]
    assert main(["sample", "--steps=2", "--seed", "3", "--count", "2", folder]) == 0
    _, following = commands(capsys)  # all that was said stays said
    more = ["--steps", "4", "--out", "samples-4.png"]
    assert following == [["fewstep", "sample", "--seed", "3", "--count", "2", folder, *more]]
    recipe = load_recipe("checkerboard-itvm", {"data": str(here / "my data.npy")})
    for model in (FlowMap(MLP(2, times=2), Linear()), CheckerboardField()):
        said = [shlex.split(line) for line in next_commands(Path(run), recipe, model)]
        assert [words[-1] for words in said[::2]] == ["a one.png", "a one-export"]
        assert run in said[1]
    assert said[1] == ["fewstep", "distill", "--teacher", run, "--data", recipe.data.name, "--out", f"{run}-itvm"]


def test_a_model_of_text_is_asked_for_something(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    field = DiffusionField(FAMILIES["UNet2DConditionModel"](tiny_model("sd")), FLOW)
    field.latents, field.text = Latents(tiny_vae()), Prompts(tmp_path)
    sample, *_ = next_commands(Path("runs/a"), load_recipe("sd15-itvm"), field)
    assert sample == "fewstep sample runs/a --steps 50 --count 64 --out a.png --prompt 'a photo of a cat'"


def test_videos_are_not_written_as_a_picture() -> None:
    field = DiffusionField(FAMILIES["WanTransformer3DModel"](wan_model()), FLOW)
    field.latents = Latents(wan_vae())
    assert suffix_of(field) == ".npz"
    field = DiffusionField(FAMILIES["UNet2DConditionModel"](tiny_model("sd")), FLOW)
    assert suffix_of(field) == ".npz"  # four channels, and nothing known that makes pictures of them
    field.latents = Latents(tiny_vae())
    assert suffix_of(field) == ".png"


def test_dry_run_prints_the_whole_recipe_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "checkerboard-itvm", "--dry-run", *TINY, "--objective.ema", "0.5"]) == 0
    out, following = commands(capsys)
    assert list(tmp_path.iterdir()) == []
    assert following[0] == ["fewstep", "distill", "checkerboard-itvm", *TINY, "--objective.ema", "0.5"]
    assert following[1][:3] == ["fewstep", "plan", "checkerboard-itvm"]
    assert main(following[1][1:]) == 0
    capsys.readouterr()
    (tmp_path / "mine.yaml").write_text(out)  # what it prints is a recipe
    assert main(["distill", "mine.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == out
    assert "ema: 0.5" in out


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out, following = commands(capsys)
    assert "checkerboard-itvm" in out
    assert following[0] == ["fewstep", "distill", "checkerboard-itvm"]
    assert main(["recipes", "checkerboard-itvm"]) == 0
    assert "teacher: checkerboard" in capsys.readouterr().out


@pytest.mark.takes_seconds
def test_train_needs_no_teacher_and_goes_on_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["checkerboard-itvm", *TINY[2:], "--teacher", "none", "--objective", "FlowMatching"]
    assert main(["train", *words]) == 0
    _, following = commands(capsys)
    assert [w[1] for w in following] == ["sample", "distill", "export"]
    assert "no teacher to distill" in refused(capsys, "distill", *words)
    assert main(["train", "runs/checkerboard-itvm", "--steps", "6"]) == 0
    assert (tmp_path / "runs" / "checkerboard-itvm" / "checkpoints" / "step-00000006").is_dir()


def test_samples_as_grid_arrays_and_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "runs/one", "--steps", "3", "--count", "5", "--out", "a.npy", "--batch", "2"]) == 0
    assert "5 samples, 3 network calls each" in capsys.readouterr().out
    assert main(["sample", "runs/one", "--steps", "3", "--count", "5", "--out", "b.npz"]) == 0
    with np.load("b.npz") as kept:
        np.testing.assert_allclose(np.load("a.npy"), kept["data"], atol=1e-5)
    assert np.load("a.npy").shape == (5, 2)
    assert main(["sample", "runs/one", "--count", "50", "--out", "deep/c.png"]) == 0
    assert Image.open("deep/c.png").width > 100
    assert (
        main(["sample", "runs/one", "--teacher", "--solver", "heun", "--steps", "4", "--count", "3", "--out", "t.npy"])
        == 0
    )
    assert "8 network calls" in capsys.readouterr().out
    assert not np.allclose(np.load("t.npy"), np.load("a.npy")[:3], atol=1e-2)
    main(["sample", "runs/one", "--count", "5", "--steps", "3", "--gamma", "0.9", "--out", "g.npy"])
    assert not np.allclose(np.load("g.npy"), np.load("a.npy"), atol=1e-3)
    main(["sample", "runs/one", "--count", "5", "--steps", "3", "--grid", "shifted", "--out", "s.npy"])
    assert not np.array_equal(np.load("s.npy"), np.load("a.npy"))


def test_pictures_go_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.generation.images import check_out, write

    monkeypatch.chdir(tmp_path)
    import torch

    images = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    check_out(Path("pics"), (3, 4, 4))
    write(images, {}, Path("pics"))
    assert sorted(f.name for f in Path("pics").iterdir()) == ["00000.png", "00001.png"]
    pixels = np.asarray(Image.open("pics/00001.png"))
    assert pixels.shape == (4, 4, 3)
    assert (pixels.min(), pixels.max()) == (129, 255)
    with pytest.raises(FileExistsError, match="not empty"):
        check_out(Path("pics"), (3, 4, 4))


def test_arrays_come_back_in_the_units_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("field.npy", (1000 + rng.normal(size=(40, 3))).astype(np.float32))
    (tmp_path / "own.yaml").write_text(
        "data: {name: field.npy, normalize: true}\nobjective: FlowMatching\n"
        "student: {network: mlp, options: {width: 8, depth: 2}}\n"
        "training: {steps: 2, batch: 8, quiet: true}\nevaluation: {count: 0}\n"
    )
    assert main(["train", "own.yaml"]) == 0
    assert main(["sample", "runs/own", "--count", "20", "--steps", "4"]) == 0
    assert "samples.npy" in capsys.readouterr().out
    assert 990 < np.load("samples.npy").mean() < 1010


@pytest.mark.takes_seconds
def test_evaluate_and_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "checkerboard-lmd", *TINY, "--out", "runs/two", "--evaluation.count", "0"]) == 0
    assert "runs/two has not been evaluated: fewstep evaluate runs/two" in refused(capsys, "compare", "runs/two")
    assert main(["compare", "runs/one", "runs/two", "--out", "one"]) == 0
    assert "note: runs/two has not been evaluated, and is left out" in capsys.readouterr().err
    for run in ("runs/one", "runs/two"):
        assert main(["evaluate", run, "--steps", "1", "2", "--teacher-steps", "2", "--count", "20"]) == 0
    assert "sliced_w2" in capsys.readouterr().out
    assert main(["compare", "runs/one", "runs/two", "--out", "side"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "two", "teacher", "rmse"))
    assert {f.name for f in (here / "side").iterdir()} == {
        "compare.html", "rmse.png", "error_median.png", "sliced_w2.png",
    }  # fmt: skip
    assert main(["evaluate", "runs/two", "--count", "10"]) == 0
    assert main(["compare", "runs/one", "runs/two", "--out", "apart"]) == 0
    said = capsys.readouterr()
    assert "one: samples of 2, 20 of them" in said.out
    assert "two: samples of 2, 10 of them" in said.out
    assert "not measured alike" in said.err
    assert {f.name for f in (here / "apart").glob("rmse*.png")} == {"rmse.png", "rmse-2.png"}
    with pytest.raises(ValueError, match="evaluate both alike"):
        compare(
            {name: Evaluation.from_json((here / "runs" / name / "quality.json").read_text()) for name in ("one", "two")}
        )


def test_an_export_carries_its_table_and_is_sampled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/one", "exported"]) == 0
    assert "| student | 1 |" in (here / "exported" / "README.md").read_text()
    _, following = commands(capsys)
    assert main([*following[0][1:], "--count", "4"]) == 0
    assert main(["sample", "exported", "--count", "4", "--out", "x.npy"]) == 0
    assert main(["sample", "runs/one", "--count", "4", "--out", "y.npy"]) == 0
    assert np.array_equal(np.load("x.npy"), np.load("y.npy"))
    assert "--overwrite" in refused(capsys, "export", "runs/one", "exported")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distill", "needs a recipe or --teacher"),
        ("train", "needs a recipe or --data"),
        ("distill checkerboard-itm", "did you mean 'checkerboard-itvm'?"),
        ("distill checkerboard-itvm --stpes 3", "unknown recipe key 'stpes'"),
        ("distill checkerboard-itvm --ema 0.9", "did you mean 'training.ema'?"),
        ("distill checkerboard-itvm --objective ITMV", "did you mean 'ITVM'?"),
        ("distill checkerboard-itvm --steps 0", "training.steps is 0"),
        ("distill checkerboard-itvm --steps", "--steps needs a value"),
        ("distill checkerboard-itvm --training.schedule cosin", "did you mean 'cosine'?"),
        ("distill checkerboard-itvm --training.batch 7 --training.chunk 2", "batch=7 cannot be shared"),
        ("distill checkerboard-itvm --data nowhere/", "no data at nowhere/"),
        ("distill checkerboard-itvm --data ./empty", "no images"),
        ("distill checkerboard-itvm --teacher ./empty", "no model in empty"),
        ("distill --teacher ./nowhere", "no folder ./nowhere"),
        ("sample nowhere", "no folder nowhere"),
        ("sample runs/one --steps 0", "steps is 0"),
        ("sample runs/one --count 0", "count is 0"),
        ("sample runs/one --out a.gif", "--out a.gif"),
        ("sample runs/one --out folder", "no images"),
        ("sample runs/one --gamma 2", "gamma is 2.0"),
        ("sample runs/one --solver heun", "is for velocity fields"),
        ("sample runs/one --grid even", "unknown step grid 'even'"),
        ("sample runs/one --labels 3", "the model has no classes"),
        ("sample runs/one --labels three", "class 'three': the names of this model's classes are not known"),
        ("evaluate nowhere", "there is no run in nowhere"),
        ("evaluate runs/one --steps 0", "evaluation.steps.0 is 0"),
        ("evaluate runs/one --count 2", "evaluation.count is 2"),
        ("compare nowhere", "nowhere has not been evaluated"),
        ("export nowhere out", "no folder nowhere"),
        ("recipes nothing", "there is no recipe 'nothing'"),
    ],
)
def test_bad_input_is_one_line(words: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir(exist_ok=True)
    assert said in refused(capsys, *words.split())


def test_another_recipe_in_the_folder_is_refused_with_the_flag_to_start_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "distill", "checkerboard-itvm", *TINY, "--objective.ema", "0.5", "--out", "runs/one")
    assert "runs/one belongs to another recipe" in said
    assert "--fresh" in said
    assert "resume=" not in said


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        main(["sample", "nowhere", "--debug"])


def test_a_training_that_fails_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise TrainingError("could not write the checkpoint of step 3:\nno room")

    monkeypatch.setattr(runs, "fit", full)
    assert main(["distill", "checkerboard-itvm", *TINY, "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: could not write the checkpoint of step 3: no room\n"


@pytest.mark.takes_seconds
def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt(self: watch.Watch, run: Any) -> None:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "__call__", interrupt)
        assert main(["distill", "checkerboard-itvm", *TINY, "--out", "run", "--fresh"]) == 130
    _, following = commands(capsys)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert "--fresh" not in following[0]
    assert main(following[0][1:]) == 0  # and so it does
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_python_m_fewstep_is_the_same_command() -> None:
    said = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True)
    assert said.stdout.strip() == f"fewstep {fewstep.__version__}"


def test_torchrun_shows_the_line_of_the_process_that_was_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from fewstep.commands.messages import tell_torchrun
    from fewstep.common.distributed import LostProcessError

    files = [tmp_path / "0.json", tmp_path / "1.json"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[0]))
    tell_torchrun(LostProcessError("another process of this run has ended"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[1]))
    said = refused(capsys, "distill", "no-such-recipe")
    failures = {rank: ProcessFailure(rank, 1, 2, str(file)) for rank, file in enumerate(files)}
    shown = str(ChildFailedError("fewstep", failures)).partition("Root Cause")[2]
    assert f"traceback : {said.splitlines()[0].removeprefix('error: ')}\n" in shown
    assert "another process" not in shown
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "0.json"))
    assert refused(capsys, "distill", "no-such-recipe") == said
