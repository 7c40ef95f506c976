"""AdamW's moments in 8 bits: as good as AdamW, whole in a checkpoint, counted by a plan, refused where it cannot be."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys.training import Gaussian, Student, train

from fewstep import FlowMap, fit
from fewstep.flows.exact import eight_gaussians
from fewstep.networks import MLP
from fewstep.objectives import ITVM, Corrected
from fewstep.planning.plan import plan
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.moments import give_back, moments_of
from fewstep.training.step import adamw, players_of

WIDTH = 64  # 64 x 64 weights are the fewest that get 8 bits
EIGHT = {"optimizer": "adamw8bit"}


def wide() -> FlowMap:
    torch.manual_seed(0)
    return FlowMap(MLP(2, width=WIDTH, depth=2, times=2))


def two_players(out: Path | None = None, steps: int = 8, **options: Any) -> Any:
    """The second player begins late and moves every other step."""
    objective = Corrected(ITVM(eight_gaussians()), begin=0.3, every=2, rollout=(1, 2))
    options = {"steps": steps, "batch": 32, "chunk": 8, "quiet": True, "schedule": "constant", **EIGHT, **options}
    return fit(wide(), objective, Gaussian(), out=out, **options)


def recipe(**training: Any) -> Any:
    return load_recipe({
        "name": "wide", "teacher": "eight-gaussians", "data": "eight-gaussians", "objective": "ITVM",
        "student": {"network": "mlp", "options": {"width": WIDTH, "depth": 2}},
        "training": {"steps": 2, "batch": 32, "quiet": True, **training}, "evaluation": {"count": 0},
    })  # fmt: skip


@pytest.mark.takes_seconds
def test_it_learns_what_adamw_learns() -> None:
    pytest.importorskip("bitsandbytes")
    losses = []
    for optimizer in ("adamw", "adamw8bit"):
        done = fit(
            wide(), ITVM(eight_gaussians()), Gaussian(), steps=100, batch=64, lr=3e-3, log_every=50, quiet=True,
            optimizer=optimizer,
        )  # fmt: skip
        losses.append(done.losses["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.takes_seconds
def test_two_players_go_on_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = two_players(tmp_path / "whole", checkpoint_every=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000008")
    again = two_players(tmp_path / "again", checkpoint_every=5)
    for ours, theirs in ((whole.student, again.student), (whole.ema, again.ema)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    files = {file.name for file in (tmp_path / "whole/checkpoints/step-00000008").iterdir()}
    of_players = sorted(name for name in files if name.startswith("optimizer-"))
    assert len(of_players) == 2
    for name in of_players:
        kept, back = (load_file(tmp_path / run / "checkpoints/step-00000008" / name) for run in ("whole", "again"))
        assert kept.keys() == back.keys()
        assert all(torch.equal(value, back[key]) for key, value in kept.items())
        # Large weights in 8 bits, biases in 32.
        assert {value.dtype for key, value in kept.items() if key.endswith("state1")} == {torch.uint8, torch.float32}
        # Each stood still in three of the steps: the fake before it began, the student in the fake's turns.
        assert {int(value) for key, value in kept.items() if key.endswith("step")} == {5}


def test_moments_of_others_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    student, objective = wide(), ITVM(eight_gaussians())
    players = players_of(objective, student)
    options: Any = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}
    eight, whole = (adamw(players, torch.device("cpu"), eight_bit=bits, **options)["student"] for bits in (True, False))
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    eight.step(), whole.step()
    kept = moments_of(eight, players["student"])
    give_back(eight, kept)
    for name, wrong in (("absmax1", torch.zeros(3)), ("state1", torch.zeros(3, 3)), ("more", torch.zeros(1))):
        place = next(key.split(".")[0] for key in kept if key.endswith("absmax1"))
        with pytest.raises(ValueError, match=rf"moments of parameter {place} are not those that adamw8bit keeps of it"):
            give_back(eight, {**kept, f"{place}.{name}": wrong})
    with pytest.raises(ValueError, match="not those that AdamW keeps"):
        give_back(whole, kept)
    with pytest.raises(ValueError, match="not those that adamw8bit keeps"):
        give_back(eight, moments_of(whole, players["student"]))


@pytest.mark.parametrize("change", ["to", "from"])
def test_a_run_keeps_its_optimizer(tmp_path: Path, change: str) -> None:
    pytest.importorskip("bitsandbytes")
    before, after = ("adamw", "adamw8bit") if change == "to" else ("adamw8bit", None)
    train(tmp_path / "run", optimizer=before, steps=2)
    with pytest.raises(ValueError, match=r"training.optimizer is \w+ there and \w+ here\. Use another output folder"):
        train(tmp_path / "run", optimizer=after, steps=4)
    if before == "adamw":  # the usual one, whether it is said or not
        assert train(tmp_path / "run", steps=4).step == 4


def test_a_recipe_says_it_and_a_plan_counts_what_is_kept(tmp_path: Path) -> None:
    planned, usual = plan(recipe(**EIGHT)), plan(recipe(optimizer="adamw"))
    parts = {part.name: part for part in planned.parts}
    assert parts["two moments in 8 bits"].bytes < 0.5 * {p.name: p for p in usual.parts}["two moments of AdamW"].bytes
    assert planned.checkpoint < usual.checkpoint
    pytest.importorskip("bitsandbytes")
    run(recipe(**EIGHT), tmp_path / "run")
    kept = load_file(tmp_path / "run/checkpoints/step-00000002/optimizer-student.safetensors")
    moments = [x for key, x in kept.items() if key.endswith(("state1", "state2", "absmax1", "absmax2"))]
    assert sum(x.nbytes for x in moments) == parts["two moments in 8 bits"].bytes
    assert sum(x.numel() for key, x in kept.items() if "state" in key) == parts["two moments in 8 bits"].numbers
    assert run(recipe(**EIGHT), tmp_path / "run").result.step == 2


def test_what_it_cannot_do_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'adam8bit': did you mean 'adamw8bit'\? Known: adamw"):
        train(optimizer="adam8bit")
    with pytest.raises(ValueError, match=r"adamw8bit does not go with shard: fsdp2: .* leave one of them out"):
        plan(recipe(**EIGHT, shard="fsdp2"))
    with pytest.raises(ValueError, match="unknown optimizer"):
        plan(recipe(optimizer="lion"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r"bitsandbytes, which is not .*: pip install 'fewstep\[quantised\]'"):
            train(**EIGHT)
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"computes in float32, and network\.0\.weight of the Student is in float64"):
        train(student=Student().double(), **EIGHT)
