"""States between noise and data, kept with the pairs: on the model's trajectories, and none of the pairs changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import Pairs, load_data
from fewstep.data.batch import Batch
from fewstep.data.conditions import Dropped, Strengths
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_states
from fewstep.generation import reflow
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP
from fewstep.objectives import FlowMatching, Trajectory
from fewstep.training.batches import Batches

COUNT = 23


@pytest.fixture
def field() -> GaussianField:
    return GaussianField(torch.tensor([0.7, -1.1]), torch.tensor([[0.5, 0.3], [0.3, 1.7]]))


def make(field: Any, out: Path, **options: Any) -> Pairs:
    assert make_pairs(field, out, COUNT, **{"steps": 40, "shard": 10, "batch": 4, "device": "cpu", **options}) == 0
    return Pairs(out)


def whole(pairs: Pairs) -> Batch:
    return pairs.rows(torch.arange(COUNT), generator(0))


def ways(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.states is not None
    assert batch.times is not None
    return batch.states, batch.times


def test_states_are_on_the_flow_and_the_pairs_are_as_without(field: GaussianField, tmp_path: Path) -> None:
    plain, pairs = make(field, tmp_path / "plain", steps=200), make(field, tmp_path / "states", steps=200, states=5)
    assert (plain.states, pairs.states, plain.path, pairs.path) == (0, 5, None, field.path.quarters)
    one, two = whole(plain), whole(pairs)
    assert torch.equal(one.data, two.data)
    assert torch.equal(one.noise, two.noise)  # pyright: ignore
    assert (one.states, one.times) == (None, None)
    states, times = ways(two)
    assert states.shape == (COUNT, 5, 2)
    for k in range(5):
        exact = field.flow(two.noise, 0.0, times[:, k])  # pyright: ignore
        torch.testing.assert_close(states[:, k], exact, rtol=0, atol=1e-4)
        # One of each fifth of the steps, another for each row.
        assert ((times[:, k] >= 0.2 * k) & (times[:, k] <= 0.2 * (k + 1))).all()
        assert len(times[:, k].unique()) > 10
    assert (times.diff() > 0).all()


@pytest.mark.parametrize(("steps", "states"), [(2, 1), (4, 3), (7, 6), (9, 4), (64, 8)])
def test_as_many_states_as_there_are_steps_between(field: GaussianField, tmp_path: Path, steps: int, states: int):
    _, times = ways(whole(make(field, tmp_path, steps=steps, states=states)))
    assert ((times > 0) & (times < 1)).all()
    assert (times.diff() > 0).all()
    torch.testing.assert_close((times * steps).round(), times * steps)
    if states == steps - 1:
        torch.testing.assert_close(times, (torch.arange(1, steps) / steps).expand(COUNT, -1))


def test_states_of_a_flow_map_are_those_of_its_steps(gaussian_map: FlowMap, field: GaussianField, tmp_path: Path):
    batch = whole(make(gaussian_map.float(), tmp_path, steps=4, states=3, shape=(2,)))
    states, times = ways(batch)
    exact = torch.stack([field.flow(batch.noise, 0.0, times[:, k]) for k in range(3)], 1)  # pyright: ignore
    torch.testing.assert_close(states, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_the_last_state_is_the_sample(solver: str) -> None:
    torch.manual_seed(0)
    model, noise = NetworkField(MLP(2, width=8, depth=2)), torch.randn(5, 2)
    states = sample_states(model, noise, 6, solver=solver)
    assert states.shape == (5, 7, 2)
    assert torch.equal(states[:, 0], noise)
    assert torch.equal(states[:, -1], sample(model, noise, 6, solver=solver))


class Killed(BaseException):
    """What cannot be caught by mistake."""


def test_killed_and_started_again_the_bytes_are_the_same_and_no_others_are_mixed_in(
    field: GaussianField, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(field, tmp_path / "whole", states=3)
    real = reflow._draw

    def dying(field: Any, rows: list[int], *more: Any) -> dict[str, Tensor]:
        if rows[0] == 14:  # in the middle of the second shard
            raise Killed
        return real(field, rows, *more)

    monkeypatch.setattr(reflow, "_draw", dying)
    with pytest.raises(Killed):
        make(field, tmp_path / "killed", states=3)
    monkeypatch.setattr(reflow, "_draw", real)
    for other, said in (({"states": 4}, "states is 3 there and 4 here"), ({}, "states is 3 there and None here")):
        with pytest.raises(ValueError, match=f"other pairs: .*{said}"):
            make(field, tmp_path / "killed", **other)
    make(field, tmp_path / "killed", states=3)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert one == two
    make(field, tmp_path / "plain")
    with pytest.raises(ValueError, match="states is None there and 3 here"):
        make(field, tmp_path / "plain", states=3)
    # Written before there were states: no different from a folder that says it has none.
    facts = json.loads((tmp_path / "plain" / "pairs.json").read_text())
    (tmp_path / "plain" / "pairs.json").write_text(
        json.dumps({name: value for name, value in facts.items() if name not in ("states", "path")})
    )
    make(field, tmp_path / "plain")
    with pytest.raises(ValueError, match="states is None there and 3 here"):
        make(field, tmp_path / "plain", states=3)


def test_what_cannot_be_is_refused(field: GaussianField, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="states is 4: of 4 steps, 3 end between noise and data"):
        make(field, tmp_path / "none", steps=4, states=4)
    with pytest.raises(ValueError, match="states is -1"):
        make(field, tmp_path / "none", states=-1)
    with pytest.raises(ValueError, match="the adaptive one takes its own: say heun"):
        make(field, tmp_path / "none", states=2, solver="adaptive")
    assert not (tmp_path / "none").exists()


def test_times_of_other_tools_are_read_and_checked(field: GaussianField, tmp_path: Path) -> None:
    make(field, tmp_path, states=3)
    file = tmp_path / "pairs-00001.safetensors"
    tensors, before = load_file(file), file.read_bytes()
    for wrong, said in (([0.5, 0.25, 0.75], "0.5, 0.25"), ([0.0, 0.25, 0.75], "0.0"), ([0.1, 0.2, 1.0], "1.0")):
        tensors["times"][4] = torch.tensor(wrong)
        save_file(tensors, file)
        with pytest.raises(ValueError, match=rf"pairs-00001.*{said}.*\(row 4\), which do not rise within \(0, 1\)"):
            load_data(tmp_path)
    # A folder with times of its own, unlike those that fewstep draws.
    times = torch.tensor([1e-3, 0.9, 0.95]).expand(10, -1)
    noise = tensors["noise"]
    states = torch.stack([field.flow(noise, 0.0, t) for t in times[0].tolist()], 1)
    save_file({**tensors, "times": times.contiguous(), "states": states}, file)
    found, kept = ways(Pairs(tmp_path).rows(torch.arange(10, 20), generator(0)))
    assert torch.equal(found, states)
    assert torch.equal(kept, times)
    file.write_bytes(before)
    save_file({name: value for name, value in load_file(file).items() if name != "states"}, file)
    with pytest.raises(ValueError, match=r"pairs-00001\.safetensors holds .*'states'"):
        Pairs(tmp_path)


def test_states_go_through_all_that_is_around_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = make(NetworkField(MLP(2, width=8, depth=2, classes=3)), tmp_path, states=2)
    data = Strengths(Dropped(pairs, 0.5, {"class_labels": 3}), 1.0, 2.0)
    batch, _ = Batches(data, 16, 4, seed=0).micro(0, 0)
    states, times = ways(batch.to("cpu"))
    assert (states.shape, times.shape, set(batch.cond)) == ((16, 2, 2), (16, 2), {"class_labels", "guidance"})
    rows = (whole(pairs).data[:, None] == batch.data).all(-1).double().argmax(0)  # which each of them is
    assert torch.equal(states, ways(whole(pairs))[0][rows])
    assert torch.equal(times, ways(whole(pairs))[1][rows])
    assert (data.states, data.path) == (2, pairs.path)


@pytest.mark.takes_seconds
def test_a_map_learned_from_stored_trajectories_beats_the_teacher_at_its_cost(tmp_path: Path) -> None:
    """Without a teacher in the training, and better than one that is told the ends alone, whose states are lines."""
    field = GaussianField(torch.tensor([1.0, -1.0]), torch.diag(torch.tensor([0.04, 2.25])))
    noise = torch.randn(500, 2, generator=generator(9))
    ends = field.flow(noise, 0.0, 1.0)
    assert make_pairs(field, tmp_path, 4000, steps=40, states=6, device="cpu") == 0

    def error(model: Any, steps: int) -> float:
        return float((sample(model, noise, steps) - ends).square().sum(1).mean().sqrt())

    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=64, depth=2, times=2))
    options = {"steps": 300, "batch": 256, "lr": 3e-3, "ema": 0.98, "quiet": True, "device": "cpu"}
    result = fewstep.fit(student, Trajectory(diagonal=0.0), Pairs(tmp_path), **options)
    for steps in (1, 2, 4):
        assert error(result.ema, steps) < 0.12 < error(field, steps)


@pytest.mark.takes_seconds
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["reflow", "checkerboard", "--count", "40", "--steps", "8", "--states", "3", "--out", "ways"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == "ways: 40 pairs of noise and data, with 3 states between\n"
    tiny = ["--steps", "2", "--training.quiet", "true", "--training.batch", "16", "--training.chunk", "16"]
    tiny += ["--evaluation.count", "0"]
    following = said.err.partition("next:\n")[2].replace("'", "").split("fewstep ")[1]
    assert following.startswith('distill checkerboard-trajectory --data {"name": "ways"} --teacher checkerboard')
    data = ["--data", "ways", "--out", "run"]
    assert main(["distill", "checkerboard-trajectory", *data, "--teacher", "checkerboard", *tiny]) == 0
    # An old folder, without states: the teacher solves; without a teacher there is nothing to learn from.
    assert main([*words[:6], "--out", "old"]) == 0
    assert main(["distill", "checkerboard-trajectory", "--data", "old", "--out", "run2", *tiny]) == 0
    capsys.readouterr()
    alone = ["--objective.teacher", "none", "--objective.diagonal", "0"]
    assert main(["distill", "checkerboard-trajectory", "--data", "old", "--out", "run3", *alone, *tiny]) == 2
    assert "the data has none: fewstep reflow MODEL --states 8 makes some" in capsys.readouterr().err
    assert main(["distill", "checkerboard-trajectory", "--data", "ways", "--out", "run3", *alone, *tiny]) == 0
    assert main(["reflow", "checkerboard", "--count", "4", "--steps", "3", "--states", "3", "--out", "x"]) == 2
    assert "states is 3: of 3 steps, 2 end between noise and data" in capsys.readouterr().err
    assert FlowMatching().uses_data
