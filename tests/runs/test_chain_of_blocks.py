"""Local flow matching: blocks trained one after the other, their folder, and a map distilled from the chain."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import fewstep
from fewstep.cli import main
from fewstep.data import ArrayData
from fewstep.data.pairs import Pairs
from fewstep.flows.trajectories import flow_of
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP
from fewstep.runs.recipes import load_recipe

TINY: dict[str, Any] = {"batch": 32, "chunk": 32, "quiet": True}
RECIPE = {
    "data": "checkerboard", "objective": "FlowMatching", "blocks": [0.1, 0.3],
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}}, "training": {"steps": 8, **TINY},
}  # fmt: skip


def block(width: int = 16, **options: Any) -> fewstep.NetworkField:
    torch.manual_seed(0)
    return fewstep.NetworkField(MLP(2, width=width, depth=3, **options), fewstep.Interpolant())


def weights(model: Any) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.fixture
def labelled() -> ArrayData:
    rows = torch.randn(90, 2, generator=torch.Generator().manual_seed(1)) * 0.3
    return ArrayData(rows, {"class_labels": torch.arange(90) % 3}, classes=("a", "b", "c"), normalize=True)


@pytest.mark.takes_seconds
def test_a_chain_is_the_same_from_its_folder_and_goes_on_where_it_was_stopped(
    tmp_path: Path, labelled: ArrayData
) -> None:
    def made(out: Path | None, steps: int = 6, **options: Any) -> Any:
        options = {"ou_times": [0.2, 0.3], "solver_steps": 4, **TINY, **options}
        return fewstep.fit_blocks(block(classes=3), labelled, steps, out=out, **options).ema

    chain, noise, labels = made(None), torch.randn(12, 2), torch.arange(12) % 3
    assert len(chain.fields) == 3
    assert (chain.class_names, chain.moments) == (("a", "b", "c"), labelled.moments)
    kept = made(tmp_path / "local")
    again = fewstep.load(tmp_path / "local")
    for other in (kept, again, made(tmp_path / "local")):
        assert torch.equal(weights(other), weights(chain))
        assert (other.class_names, other.moments) == (chain.class_names, chain.moments)
    assert again.source == str(tmp_path / "local")
    samples = fewstep.sample(chain, noise, 6, class_labels=labels)
    assert torch.equal(fewstep.sample(again, noise, 6, class_labels=labels), samples)  # pyright: ignore[reportArgumentType]
    shutil.rmtree(tmp_path / "local/block-3")
    shutil.rmtree(tmp_path / "local/block-2")
    with pytest.raises(FileNotFoundError, match="block-3"):
        fewstep.load(tmp_path / "local")
    assert torch.equal(weights(made(tmp_path / "local")), weights(chain))
    moved = tmp_path / "elsewhere"
    (tmp_path / "local").rename(moved)  # it leads nowhere else
    assert torch.equal(weights(fewstep.load(moved)), weights(chain))
    with pytest.raises(ValueError, match="a chain trained otherwise"):
        made(moved, solver_steps=5)
    assert not torch.equal(weights(made(moved, solver_steps=5, resume=False)), weights(chain))


def test_each_block_begins_at_the_rows_and_the_weights_that_the_one_before_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.training import blocks

    seen: list[tuple[Tensor, Any]] = []
    really = blocks.fit

    def spied(student: Any, objective: Any, data: Any, *args: Any, **options: Any) -> Any:
        rows = data.rows(torch.arange(40), torch.Generator().manual_seed(3))
        seen.append((weights(student).clone(), rows))
        return really(student, objective, data, *args, **options)

    monkeypatch.setattr(blocks, "fit", spied)
    data = torch.randn(40, 2)
    chain: Any = fewstep.fit_blocks(block(), data, 5, ou_times=(0.2, 0.3), solver_steps=8, **TINY).ema
    for n in (1, 2):
        before = chain.fields[3 - n]  # the n-th that was trained
        assert torch.equal(seen[n][0], weights(before))
        assert torch.allclose(seen[n][1].data, flow_of(before, seen[n - 1][1].data, 1.0, 0.0, steps=8), atol=1e-6)
    assert float(torch.corrcoef(torch.stack([seen[0][1].data.flatten(), seen[0][1].noise.flatten()]))[0, 1]) > 0.7
    last = seen[2][1]
    assert abs(float(torch.corrcoef(torch.stack([last.data.flatten(), last.noise.flatten()]))[0, 1])) < 0.35


@pytest.mark.takes_seconds
def test_a_map_of_the_chain_beats_its_euler_steps(tmp_path: Path) -> None:
    """Four Gaussians far apart: one call of the map, from stored states, against many of the chain itself."""
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    data = centres[torch.arange(8000) % 4] + 0.2 * torch.randn(8000, 2, generator=torch.Generator().manual_seed(2))
    quick: dict[str, Any] = {"batch": 128, "chunk": 128, "lr": 4e-3, "ema": 0.98, "quiet": True}
    chain = fewstep.fit_blocks(block(32), data, 250, ou_times=(0.2, 0.4), **quick).ema
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(4))
    ends = flow_of(chain, noise, 0.0, 1.0, steps=96)
    nearest = torch.cdist(ends, centres).min(1).values
    assert float((nearest < 0.8).float().mean()) > 0.85
    make_pairs(chain, tmp_path / "states", 8000, steps=24, states=8, batch=4000)
    torch.manual_seed(0)
    student = fewstep.FlowMap.from_field(chain, MLP(2, width=64, depth=3, times=2))
    objective = fewstep.Trajectory(chain)
    fewstep.fit(student, objective, Pairs(tmp_path / "states"), 700, **quick)

    def off(x: Tensor) -> float:
        return float((x - ends).square().sum(1).mean().sqrt())

    one = off(fewstep.sample(student, noise, 1))
    assert one < 0.6
    assert one < 0.5 * off(fewstep.sample(chain, noise, 6))
    alone = fewstep.FlowMap(MLP(2, width=8, depth=2, times=2), chain.path)  # the states say all
    assert fewstep.fit(alone, fewstep.Trajectory(diagonal=0.0), Pairs(tmp_path / "states"), 1, quiet=True).step == 1
    other = fewstep.Chained(list(chain.fields), (0, 0.5, 0.75, 1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="on another path"):
        fewstep.fit(fewstep.FlowMap.from_field(other, MLP(2, times=2)), fewstep.Trajectory(other),
                    Pairs(tmp_path / "states"), 1)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ou_times": []}, "ou_times"),
        ({"ou_times": [0.1, -0.2]}, "all are above 0"),
        ({"ou_times": [float("inf")]}, "all are above 0"),
        ({"rows": 0}, "0 rows"),
        ({"objective": fewstep.PSD()}, "by FlowMatching, not by PSD"),
        ({"student": fewstep.NetworkField(MLP(2))}, "Interpolant"),
        ({"student": fewstep.NetworkField(MLP(2), fewstep.Interpolant(latent="quadratic"))}, "Interpolant"),
        ({"data": fewstep.Between(torch.randn(8, 2), torch.randn(8, 2))}, "bring noise of their own"),
    ],
)
def test_what_cannot_be_blocks_is_refused_before_anything_is_written(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = {"student": block(), "data": torch.randn(8, 2), "steps": 1, "out": tmp_path / "x", **TINY, **options}
    with pytest.raises(ValueError, match=said):
        fewstep.fit_blocks(**given)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_no_chain(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no fewstep run"):
        fewstep.fit_blocks(block(), torch.randn(8, 2), 1, out=out, **TINY)
    chain = {"blocks": ["../mine"]}
    (out / "chain.json").write_text(json.dumps(chain))
    with pytest.raises(ValueError, match="no path"):
        fewstep.load(out)
    (out / "chain.json").write_text(json.dumps({"blocks": []}))
    with pytest.raises(ValueError, match=r"chain\.json is not as fewstep writes it"):
        fewstep.load(out)


@pytest.mark.takes_seconds
def test_the_commands_train_sample_and_distill_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["train", "local.yaml", "--dry-run"]) == 0
    assert not Path("runs").exists()
    assert main(["train", "local.yaml", "--out", "local"]) == 0
    said = capsys.readouterr()
    assert "local is a chain of 3 blocks" in said.out
    assert "fewstep reflow local --steps 24 --states 8" in said.err + said.out
    before = weights(fewstep.load("local"))
    assert main(["train", "local"]) == 0  # there is nothing left to do
    assert torch.equal(weights(fewstep.load("local")), before)
    assert main(["sample", "local", "--steps", "6", "--count", "5", "--out", "x.npy"]) == 0
    assert np.load("x.npy").shape == (5, 2)
    assert main(["reflow", "local", "--steps", "12", "--states", "3", "--count", "60", "--out", "states"]) == 0
    facts = json.loads(Path("states/pairs.json").read_text())
    assert (facts["solver"], facts["path"]) == ("midpoint", [0.0, round(1 / 3, 5), round(2 / 3, 5), 1.0])
    small = ["--steps", "3", "--training.batch", "16", "--training.chunk", "16", "--student.options.width", "16"]
    small += ["--evaluation.count", "0", "--training.quiet", "true"]
    distill = ["distill", "checkerboard-trajectory", "--teacher", "local", *small]
    assert main([*distill, "--data", "states", "--out", "fast"]) == 0
    assert main(["sample", "fast", "--steps", "1", "--count", "5", "--out", "y.npy"]) == 0
    assert main(["evaluate", "fast", "--count", "16", "--steps", "1", "--teacher-steps", "3"]) == 0
    assert main(["export", "fast", "exported"]) == 0
    assert main(["cite", "local"]) == 0
    assert "2410.02548" in capsys.readouterr().out
    for words, why in (
        (["export", "local", "other"], "kept as its folder"),
        (["evaluate", "local"], "is a chain of blocks"),
        (["train", "local.yaml", "--blocks", "[0.2]", "--out", "local"], "a chain trained otherwise"),
        (["train", "checkerboard-reflow", "--out", "local"], "has a chain of blocks"),
        (["train", "local.yaml", "--out", "fast"], "has another run"),
        ([*distill, "--objective", "ITVM", "--data", "states", "--out", "z"], "take Trajectory"),
        ([*distill, "--student.path", "linear", "--out", "z"], "no other path"),
    ):
        assert main(words) == 2
        assert why in capsys.readouterr().err
    assert main(["train", "local.yaml", "--blocks", "[0.2]", "--out", "local", "--fresh"]) == 0
    assert len(fewstep.load("local").fields) == 2  # pyright: ignore


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"blocks": []}, "blocks"),
        ({"blocks": [0]}, "greater than 0"),
        ({"coupling": "ot"}, "without coupling"),
        ({"source": "checkerboard"}, "without source"),
        ({"teacher": "checkerboard"}, "without teacher"),
        ({"student": {"network": "mlp", "space": {"name": "torus"}}}, r"without student\.space"),
    ],
)
def test_recipes_of_blocks_are_of_data_alone(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe({"name": "x", **RECIPE, **keys})


def test_recipes_without_blocks_keep_their_fingerprint() -> None:
    assert "blocks" not in load_recipe({"name": "x", **RECIPE}).fingerprint()
