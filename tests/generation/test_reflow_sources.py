"""Pairs of a model between two data sets: each starts at a row of the source, and no training takes them for noise."""

import shlex
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.data import ArrayData, Pairs
from fewstep.data.couplings import Coupled
from fewstep.flows.sources import starting_points
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP

TINY = ["--training.steps", "2", "--training.batch", "8", "--training.quiet", "true", "--evaluation.count", "0"]
SOURCE = 100 + torch.arange(40.0).reshape(20, 2)


def between(source: torch.Tensor | None = SOURCE) -> fewstep.NetworkField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = fewstep.NetworkField(MLP(2, width=8, depth=1), fewstep.Interpolant())
    field.starts_from = None if source is None else fewstep.RowsOf(source)
    return field


def test_pairs_start_at_the_rows_that_samples_start_at(tmp_path: Path) -> None:
    field = between()
    make_pairs(field, tmp_path / "pairs", 6, steps=3, batch=4, solver="euler")
    rows = Pairs(tmp_path / "pairs").rows(torch.arange(6), torch.Generator())
    start = starting_points(field, (6, 2), sample_generators(0, range(6)))
    assert rows.noise is not None
    assert torch.equal(rows.noise, start)
    assert torch.allclose(rows.data, fewstep.sample(field, start, 3), atol=1e-5)


def test_a_folder_of_pairs_belongs_to_its_source(tmp_path: Path) -> None:
    make_pairs(between(), tmp_path / "pairs", 6, steps=1)
    make_pairs(between(), tmp_path / "pairs", 6, steps=1)
    with pytest.raises(ValueError, match="holds other pairs: source is"):
        make_pairs(between(SOURCE + 1), tmp_path / "pairs", 6, steps=1)
    with pytest.raises(ValueError, match=r"its source is not known here: .*--source DATA"):
        make_pairs(between(None), tmp_path / "none", 6, steps=1)
    assert not (tmp_path / "none").exists()


def test_pairs_and_student_start_at_the_same(tmp_path: Path) -> None:
    make_pairs(between(), tmp_path / "source", 6, steps=1)
    make_pairs(fewstep.NetworkField(MLP(2, width=8, depth=1)), tmp_path / "noise", 6, steps=1)
    source, noise, objective = Pairs(tmp_path / "source"), Pairs(tmp_path / "noise"), fewstep.FlowMatching()
    with pytest.raises(ValueError, match="starts from normal noise: the path between two data sets is"):
        objective.check_data(source, fewstep.NetworkField(MLP(2)))
    with pytest.raises(ValueError, match="leave the source out"):
        objective.check_data(noise, between())
    objective.check_data(source, between())
    objective.check_data(noise, fewstep.NetworkField(MLP(2)))
    with pytest.raises(ValueError, match="comes with its own"):
        Coupled(source)  # each row belongs to its data
    Coupled(fewstep.Between(ArrayData(SOURCE), SOURCE))


@pytest.mark.takes_seconds
def test_the_command_that_is_told_next_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "between.yaml"
    recipe.write_text(
        "source: eight-gaussians\ndata: checkerboard\nobjective: PSD\n"
        "student: {network: mlp, latent: quadratic, options: {width: 8, depth: 1}}\ntraining: {steps: 2}\n"
    )
    run, pairs = str(tmp_path / "run"), str(tmp_path / "pairs")
    assert main(["train", str(recipe), "--out", run, *TINY]) == 0
    capsys.readouterr()
    assert main(["reflow", run, "--count", "8", "--steps", "2", "--out", pairs]) == 0
    assert "--student.latent none" in capsys.readouterr().err
    words = ["--data", f'{{"name": "{pairs}"}}', "--student.latent", "none", "--objective", "FlowMatching"]
    assert main(["train", run, *words, "--out", str(tmp_path / "straight"), *TINY]) == 0
    model = fewstep.load(str(tmp_path / "straight"))
    assert model.path == fewstep.Interpolant()
    assert model.starts_from is not None
    # An export does not know its source.
    assert main(["export", run, str(tmp_path / "export")]) == 0
    words = ["reflow", str(tmp_path / "export"), "--count", "8", "--steps", "2", "--out", str(tmp_path / "again")]
    assert main(words) == 2
    assert "--source DATA" in capsys.readouterr().err
    assert main([*words, "--source", "eight-gaussians"]) == 0
    assert "--source eight-gaussians" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_what_is_told_after_a_velocity_with_a_denoiser_distills_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "denoised.yaml", str(tmp_path / "run")
    recipe.write_text(
        "source: eight-gaussians\ndata: checkerboard\nobjective: StochasticInterpolant\n"
        "student: {network: mlp, latent: brownian, options: {width: 8, depth: 1}}\ntraining: {steps: 2}\n"
    )
    assert main(["train", str(recipe), "--out", run, *TINY]) == 0
    said = capsys.readouterr()
    (told,) = [line for line in (said.out + said.err).splitlines() if "fewstep distill" in line]
    assert main([*shlex.split(told)[1:], *TINY]) == 0
    student = fewstep.load(f"{run}-itvm")
    assert student.path == fewstep.Interpolant(latent="brownian")
    assert student.starts_from is not None
