"""`fewstep sample --grid optimal`: found once, kept with the run, and taken for nothing but what it was found with."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.step_grids import beside_uniform, step_errors
from fewstep.runs import step_grids
from fewstep.training import folder
from fewstep.training.run_files import STEP_GRIDS


def train(out: Path, *words: str) -> Path:
    words = ("--teacher", "eight-gaussians", "--data", "eight-gaussians", "--steps", "3", *words)
    assert main(["distill", "checkerboard-itvm", *words, "--training.quiet", "true", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("grids") / "run", "--evaluation.count", "0")


@pytest.fixture(scope="module")
def trained_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, judged by few samples."""
    words = ["--evaluation.count", "130", "--evaluation.steps", "[1]", "--evaluation.teacher_steps", "[1]"]
    return train(tmp_path_factory.mktemp("geometry") / "run", *words)


@pytest.fixture
def draws(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the command writes and what it says, from the run without grids of earlier tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_grids, "_POINTS", 6)
    monkeypatch.setattr(step_grids, "_USUAL", (2,))
    monkeypatch.setattr(step_grids, "CANDIDATES", 5)
    (trained / STEP_GRIDS).unlink(missing_ok=True)

    def run(*words: str, model: str | Path = trained) -> tuple[np.ndarray, str]:
        capsys.readouterr()
        given = ["--count", "4", "--steps", "3", "--grid", "optimal", "--device", "cpu", "--out", "x.npy"]
        assert main(["sample", str(model), *given, *words]) == 0
        return np.load("x.npy"), capsys.readouterr().err

    return run


def grids(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / STEP_GRIDS).read_text())["found"]


def test_found_once_and_shown_beside_uniform(draws: Any, trained: Path):
    first, said = draws()
    assert "found on 6 trajectories, measured on 6 others" in said
    assert "3 steps of the optimal grid end" in said
    assert "from the reference, of the uniform one" in said
    (kept,) = grids(trained)
    assert sorted(kept["grids"]) == ["2", "3"]
    assert kept["found_with"]["solver"] == "map"
    again, said = draws()
    assert "was found before" in said
    assert "found on" not in said
    assert np.array_equal(first, again)
    # What is drawn is drawn along the times that are kept, or along the uniform ones where these are as good.
    grid = kept["grids"]["3"]
    times = None if grid["uniform_error"] <= grid["error"] else torch.tensor(grid["times"], dtype=torch.float64)
    noise = sample_noise((4, 2), sample_generators(0, range(4)))
    model: Any = fewstep.load(trained)
    expected = sample(model, noise, 3) if times is None else sample(model, noise, grid=times)
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-5)


def test_the_kept_grid_is_the_one_that_is_taken(draws: Any, trained: Path):
    draws()
    tree = json.loads((trained / STEP_GRIDS).read_text())
    tree["found"][0]["grids"]["3"] = {"times": [0.0, 0.05, 0.1, 1.0], "error": 0.1, "uniform_error": 0.2}
    (trained / STEP_GRIDS).write_text(json.dumps(tree))
    drawn, said = draws()
    noise = sample_noise((4, 2), sample_generators(0, range(4)))
    model: Any = fewstep.load(trained)
    expected = sample(model, noise, grid=torch.tensor([0.0, 0.05, 0.1, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(drawn, expected.numpy(), atol=1e-5)
    assert "end 0.1 from the reference, of the uniform one 0.2\n" in said


@pytest.mark.takes_seconds
def test_another_guidance_weights_or_noise_find_anew(draws: Any, trained: Path):
    draws()
    _, said = draws("--gamma", "0.5")
    assert "were found with gamma 0, not 0.5: found anew" in said
    _, said = draws("--teacher", "--solver", "heun")
    assert "found with other weights: found anew" in said
    _, said = draws("--teacher", "--solver", "euler")
    assert "found with solver heun, not euler: found anew" in said
    assert len(grids(trained)) == 4
    facts = dict(grids(trained)[0]["found_with"])
    assert step_grids._difference(facts | {"guidance": 2.0}, facts | {"guidance": 3.5}) == "guidance 2, not 3.5"
    assert step_grids._difference(facts | {"guidance": 2.0}, facts) == "guidance 2, not none"
    assert step_grids._difference(facts, facts | {"shape": [3, 64, 64]}) == "shape 2, not 3 x 64 x 64"
    _, said = draws("--steps", "4")  # the same facts, another number
    assert "found anew" not in said
    assert [sorted(found["grids"]) for found in grids(trained)].count(["2", "3", "4"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"found": [{"found_with": {}, "grids": {"2": {"times": [0, 1], "error": 1, "uniform_error": 1}}}]}',
        '{"found": [{"found_with": {}, "grids": {"2": {"times": [0, 0.7, 0.5, 1], "error": 1, "uniform_error": 1}}}]}',
        '{"found": [{"found_with": {}, "grids": {"1": {"times": [0, 1], "error": NaN, "uniform_error": 1}}}]}',
    ],
)
def test_what_is_kept_and_cannot_be_read_is_found_anew(draws: Any, trained: Path, text: str):
    (trained / STEP_GRIDS).write_text(text)
    _, said = draws()
    assert "found anew" in said
    assert sorted(grids(trained)[0]["grids"]) == ["2", "3"]


def test_an_exact_field_is_its_own_reference_and_keeps_none(draws: Any, tmp_path: Path):
    _, said = draws(model="eight-gaussians")
    assert "from the reference" in said
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_images_of_a_folder_say_their_times(models: Path, draws: Any, tmp_path: Path):
    words = ["--out", "pictures", "--gamma", "0.2", "--count", "3"]
    for _ in range(2):  # the same command goes on with the folder
        assert (
            main(["sample", str(models / "classes"), "--steps", "3", "--grid", "optimal", "--device", "cpu", *words])
            == 0
        )
    times = json.loads((tmp_path / "pictures" / "samples.json").read_text())["grid"]
    assert len(times) == 4
    assert (times[0], times[-1]) == (0, 1)


def test_more_steps_than_candidates(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--steps", "25", "--grid", "optimal", "--out", str(tmp_path / "x.npy")]
    assert main(["sample", str(trained), *words]) == 2
    assert "steps is 25 and candidates 24" in capsys.readouterr().err


def test_several_processes_take_what_is_kept(trained: Path):
    with pytest.raises(ValueError, match="--grid optimal in one process finds it"):
        step_grids.grid_for(None, None, None, 7, {}, folder=trained, alone=False)  # pyright: ignore


def test_a_fresh_start_throws_grids_away(trained: Path, draws: Any, tmp_path: Path):
    draws()
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    assert (copy / STEP_GRIDS).exists()
    folder.throw_away(copy)
    assert not (copy / STEP_GRIDS).exists()


# fewstep diagnose


@pytest.mark.takes_seconds
def test_diagnose_draws_a_run_and_its_teacher(trained_again: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["diagnose", str(trained_again), "--count", "3", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    figure = trained_again / "diagnosis.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert f"{figure}: 3 trajectories, " in said.out
    assert "length / chord" in said.out
    assert "error at the end, uniform" in said.out
    assert f"fewstep sample {trained_again}" in said.err
    out = tmp_path / "one.png"
    words = ["--teacher", "--solver", "heun", "--count", "1", "--out", str(out), "--device", "cpu"]
    assert main(["diagnose", str(trained_again), *words]) == 0
    said = capsys.readouterr()
    assert "one trajectory" in said.out
    assert "best grid" not in said.out
    assert out.exists()


def test_the_report_has_the_geometry(trained_again: Path):
    report = (trained_again / "report.html").read_text()
    assert "Trajectories, and the errors of few steps (2 trajectories, " in report


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--count", "0"], "count is 0"),
        (["--steps", "13"], "steps is 13 and candidates 12"),
        (["--steps", "0"], "steps is 0"),
        (["--solver", "heun"], "a flow map takes its steps itself"),
        (["--out", "x.pdf"], "written as .png"),
        (["--guidance-scale", "3"], "told no strength"),
    ],
    ids=str,
)
def test_diagnose_refuses(trained_again: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["diagnose", str(trained_again), "--device", "cpu", *words]) == 2
    assert says in capsys.readouterr().err


def test_grids_are_measured_on_other_noise(draws: Any, trained: Path):
    draws("--teacher")
    (kept,) = grids(trained)
    field, noise = eight_gaussians(), sample_noise((12, 2), sample_generators(0, range(12)))
    errors = step_errors(field, field, noise[:6], 5)
    (found,) = beside_uniform(errors, field, field, noise[6:], [3])
    assert kept["grids"]["3"]["times"] == found.optimal.tolist()
    assert kept["grids"]["3"]["error"] == pytest.approx(found.error, abs=1e-5)
    assert kept["grids"]["3"]["uniform_error"] == pytest.approx(found.uniform_error, abs=1e-5)


def test_what_a_grid_is_found_with():
    def facts(model: Any, **asked: Any) -> dict[str, Any]:
        options = {"solver": "euler", "gamma": None, "guidance": None, "shape": (2,), "by": "itself"} | asked
        return step_grids.found_with(model, "weights", **options)

    student = fewstep.FlowMap(torch.nn.Identity())
    assert facts(student)["guidance"] is None
    student.guidance, student.gamma = 2.0, 1.0
    assert (facts(student)["guidance"], facts(student)["gamma"], facts(student)["solver"]) == (2.0, 1.0, "map")
    assert facts(student, guidance=3, gamma=0.5) != facts(student)
    assert facts(student, guidance=3)["guidance"] == 3.0
    guided = fewstep.Guided(eight_gaussians(), 4.0, weak=eight_gaussians())
    assert (facts(guided)["guidance"], facts(guided, solver="heun")["solver"]) == (4.0, "heun")
    assert facts(guided) != facts(guided, shape=(3,))
