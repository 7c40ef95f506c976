"""Pairs of noise and what a model makes of it: exact, whole or absent, the same however they were made."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import generator, sample_generators
from fewstep.data import Data, Pairs, load_data
from fewstep.data.couplings import Coupled
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.identity import identity
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample_noise
from fewstep.generation import reflow
from fewstep.generation.drawing import draw
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP
from fewstep.objectives.flow_matching import FlowMatching
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

COUNT, SHARD = 23, 5  # five shards, the last of three
TINY = ["--steps", "2", "--training.quiet", "true", "--training.batch", "8", "--evaluation.count", "0"]


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((watch, "_MEASURED"), (watch, "_POINTS"), (judge, "_POINTS")):
        monkeypatch.setattr(module, name, 8)


@pytest.fixture
def field() -> GaussianField:
    return GaussianField(torch.tensor([0.7, -1.1]), torch.tensor([[0.5, 0.3], [0.3, 1.7]]))


def make(field: Any, out: Path, **options: Any) -> int:
    return make_pairs(field, out, COUNT, **{"steps": 4, "shard": SHARD, "batch": 3, "device": "cpu", **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def labelled(classes: int = 3) -> NetworkField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NetworkField(MLP(2, width=8, depth=2, classes=classes))


def test_pairs_of_the_gaussian_are_its_flow(field: GaussianField, tmp_path: Path) -> None:
    assert make(field, tmp_path, steps=200) == 0
    pairs = load_data(tmp_path)
    assert isinstance(pairs, Pairs)
    assert isinstance(pairs, Data)
    assert (pairs.size, len(pairs), pairs.shape, pairs.cond) == (COUNT, COUNT, (2,), {})
    batch = pairs.rows(torch.arange(COUNT), generator(0))
    assert batch.noise is not None
    assert torch.equal(batch.noise, sample_noise((COUNT, 2), sample_generators(0, range(COUNT))))
    torch.testing.assert_close(batch.data, field.flow(batch.noise, 0.0, 1.0), rtol=0, atol=1e-4)


def test_pairs_are_the_samples_of_the_same_seed(tmp_path: Path) -> None:
    model = labelled()
    make(model, tmp_path, seed=4, solver="midpoint")
    samples, cond, _ = draw(model, COUNT, 4, shape=(2,), seed=4, solver="midpoint")
    index = torch.randperm(COUNT, generator=generator(1))
    batch = Pairs(tmp_path).rows(index, generator(0))
    torch.testing.assert_close(batch.data, samples[index])
    assert torch.equal(batch.cond["class_labels"], cond["class_labels"][index])
    assert torch.equal(Pairs(tmp_path).cond["class_labels"], torch.arange(COUNT) % 3)


def test_labels_asked_for_and_those_that_are_not_there(tmp_path: Path) -> None:
    make(labelled(), tmp_path / "two", labels=[2, 0])
    assert Pairs(tmp_path / "two").cond["class_labels"][:4].tolist() == [2, 0, 2, 0]
    with pytest.raises(ValueError, match=r"labels \[3\]: the model has the classes 0 to 2"):
        make(labelled(), tmp_path / "none", labels=[3])
    with pytest.raises(ValueError, match=r"labels \[0\]: the model has no classes"):
        make(labelled(0), tmp_path / "none", labels=[0])
    assert not (tmp_path / "none").exists()


def test_pairs_of_a_flow_map(gaussian_map: FlowMap, field: GaussianField, tmp_path: Path) -> None:
    make(gaussian_map.float(), tmp_path, steps=1, shape=(2,))
    batch = Pairs(tmp_path).rows(torch.arange(COUNT), generator(0))
    assert batch.noise is not None
    torch.testing.assert_close(batch.data, field.flow(batch.noise, 0.0, 1.0), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "pairs.json").read_text())["solver"] is None
    with pytest.raises(ValueError, match=r"a flow map takes its steps itself: solver='heun'"):
        make(gaussian_map, tmp_path / "other", shape=(2,), solver="heun")


class Killed(BaseException):
    """What cannot be caught by mistake."""


def test_killed_and_started_again_the_bytes_are_the_same(
    field: GaussianField, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(field, tmp_path / "whole")
    out, real, drawn = tmp_path / "killed", reflow._draw, []

    def dying(field: Any, rows: list[int], *more: Any) -> dict[str, Tensor]:
        if rows[0] == 13:  # in the middle of the third shard
            raise Killed
        return real(field, rows, *more)

    def counting(field: Any, rows: list[int], *more: Any) -> dict[str, Tensor]:
        drawn.extend(rows)
        return real(field, rows, *more)

    monkeypatch.setattr(reflow, "_draw", dying)
    with pytest.raises(Killed):
        make(field, out)
    kept = {f"pairs-{i:05d}.safetensors" for i in (0, 1)}
    assert files(out).keys() == {"pairs.json", *kept}
    with pytest.raises(FileNotFoundError, match=r"3 of 5 shards are missing, the first is .*pairs-00002"):
        Pairs(out)

    monkeypatch.setattr(reflow, "_draw", counting)
    seen: list[tuple[int, int]] = []
    assert make(field, out, progress=lambda done, total: seen.append((done, total))) == 0
    assert drawn == list(range(10, COUNT))
    assert seen[:2] == [(5, COUNT), (10, COUNT)]  # the two shards that are there
    assert len(seen) == 2 + 5 * 8  # then more of them with each call of the field, of which a batch takes eight
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (pytest.approx(COUNT), COUNT)
    assert files(out) == files(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_made_again(field: GaussianField, tmp_path: Path) -> None:
    make(field, tmp_path, command="fewstep reflow ./model --count 23")
    before, file = files(tmp_path), tmp_path / "pairs-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"pairs-00003\.safetensors is damaged .*fewstep reflow \./model --count 23"):
        load_data(tmp_path)
    # A whole file of something else.
    file.write_bytes((tmp_path / "pairs-00004.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"pairs-00003\.safetensors holds .*\(3, 2\).* and not .*\(5, 2\)"):
        Pairs(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 5 shards .*pairs-00003.*: fewstep reflow \./model --count 23"):
        Pairs(tmp_path)
    make(field, tmp_path, command="fewstep reflow ./model --count 23")
    assert files(tmp_path) == before


def test_other_settings_in_the_folder_are_refused(field: GaussianField, tmp_path: Path) -> None:
    make(field, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"other pairs: seed is 0 there and 1 here; steps is 4 there and 5 here\."):
        make(field, tmp_path, seed=1, steps=5)
    with pytest.raises(ValueError, match=r"solver is heun there and euler here"):
        make(field, tmp_path, solver="euler")
    with pytest.raises(ValueError, match=r"model is GaussianField \w+ there and GaussianField \w+ here"):
        make(GaussianField(torch.zeros(2), torch.eye(2)), tmp_path)
    make(field, tmp_path, batch=7, command="another")  # these two change nothing
    assert files(tmp_path) == before

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"notes holds something else than pairs"):
        make(field, tmp_path / "notes")
    with pytest.raises(ValueError, match=r"thesis\.txt holds something else"):
        make(field, tmp_path / "notes" / "thesis.txt")
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*notes"):
        Pairs(tmp_path / "notes")
    facts = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(ValueError, match=r"pairs\.json has format 2, this fewstep reads 1"):
        Pairs(tmp_path)
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(ValueError, match=r"pairs\.json is not JSON"):
        Pairs(tmp_path)


def test_a_model_is_known_by_its_weights_and_settings() -> None:
    one = labelled()
    assert identity(one) == identity(labelled())
    assert identity(one) != identity(NetworkField(one.network, prediction="data"))
    guided = [Guided(one, scale, null={"class_labels": 2}) for scale in (1.5, 2.0)]
    assert identity(guided[0]) != identity(guided[1])
    before = identity(one)
    with torch.no_grad():
        next(one.parameters())[0] += 1e-3
    assert identity(one) != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"shard": -1}, "shard must be at least 1, got -1"),
        ({"solver": "huen"}, r"unknown solver 'huen': did you mean 'heun'\?"),
    ],
)
def test_what_cannot_be_is_refused(field: GaussianField, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(field, tmp_path / "pairs", **options)
    assert not (tmp_path / "pairs").exists()


def test_numbers_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x / 0

    with pytest.raises(ValueError, match=r"not finite for pairs 0 to 4"):
        make(NetworkField(Broken()), tmp_path, shape=(2,))
    assert files(tmp_path).keys() == {"pairs.json"}


def test_processes_share_out_the_shards(field: GaussianField, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(field, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in ((1, 3), (0, 0)):  # in any order
        monkeypatch.setenv("RANK", str(rank))
        assert make(field, tmp_path / "two") == missing
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_pairs_come_with_their_noise_and_are_not_coupled_again(field: GaussianField, tmp_path: Path) -> None:
    make(field, tmp_path)
    with pytest.raises(ValueError, match=r"'ot' pairs data with noise, and the data \(Pairs\) comes with its own"):
        Coupled(Pairs(tmp_path))
    with pytest.raises(ValueError, match=r"takes no options, got 'flip'"):
        load_data(tmp_path, flip=True)
    recipe = {
        "name": "x", "data": str(tmp_path), "coupling": "ot", "objective": "FlowMatching",
        "student": {"network": "mlp"}, "training": {"steps": 1},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"say coupling: independent"):
        run(load_recipe(recipe), tmp_path / "run")


class Affine(nn.Module):
    """``v(x, t) = a(t) + B(t) x`` with polynomial coefficients: it holds the straight field of a Gaussian's pairs, and
    nearly the curved one."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(6 * 3, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        powers = t[:, None] ** torch.arange(6)
        features = torch.cat([torch.ones(len(x), 1), x], 1)
        return (powers[:, :, None] * features[:, None, :]).flatten(1) @ self.weights


@pytest.mark.takes_seconds
def test_the_second_field_is_straighter(tmp_path: Path) -> None:
    """One Euler step from its start is the whole way: the flow of the first."""
    field = GaussianField(torch.tensor([1.0, -1.0]), torch.diag(torch.tensor([0.04, 2.25])))
    noise = torch.randn(500, 2, generator=generator(9))
    ends = field.flow(noise, 0.0, 1.0)

    def one_step(model: Any) -> float:
        return float((fewstep.sample(model, noise, 1) - ends).square().sum(1).mean().sqrt())

    assert make_pairs(field, tmp_path, 4000, steps=100, device="cpu") == 0
    second = NetworkField(Affine())
    # 400 steps of Adam are not enough for a figure, but to tell straight from curved.
    options = {"steps": 400, "batch": 256, "lr": 0.05, "ema": None, "quiet": True, "device": "cpu"}
    fewstep.fit(second, FlowMatching(), Pairs(tmp_path), **options)
    assert one_step(second) < 0.15 * one_step(field)
    independent = NetworkField(Affine())
    fewstep.fit(independent, FlowMatching(), Pairs(tmp_path)._shards[0]["data"], **options)
    assert one_step(independent) > 5 * one_step(second)


@pytest.mark.takes_seconds
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--student.options.width", "8", "--student.options.depth", "2", "--training.chunk", "8", *TINY]
    assert main(["train", "checkerboard-reflow", *small, "--out", "runs/first"]) == 0
    words = ["reflow", "runs/first", "--count", "23", "--steps", "3", "--shard", "10", "--out", "pairs"]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == "pairs: 23 pairs of noise and data\n"
    following = shlex.split(said.err.partition("next:\n")[2])
    assert following[:4] == ["fewstep", "distill", "--teacher", "runs/first"]
    assert main([*following[1:], *TINY, "--training.chunk", "8"]) == 0
    assert (tmp_path / "pairs-trained" / "checkpoints" / "step-00000002").is_dir()
    assert main(["train", "checkerboard-reflow", *small, "--data", "pairs", "--out", "runs/second"]) == 0
    assert main([*words, "--teacher"]) == 2
    assert "no run that has a teacher" in capsys.readouterr().err

    (tmp_path / "pairs" / "pairs-00001.safetensors").unlink()
    assert main(["train", "checkerboard-reflow", *small, "--data", "pairs", "--out", "runs/third"]) == 2
    error = capsys.readouterr().err
    assert "pairs/pairs-00001.safetensors" in error
    assert shlex.join(["fewstep", *words]) in error
    assert main(words) == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words[:-1], "shared"]) == 0
    assert "shared: 1 shards are still missing" in capsys.readouterr().out


@pytest.mark.takes_seconds
def test_the_teacher_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--student.options.width", "8", "--student.options.depth", "2", "--training.chunk", "8", *TINY]
    teacher = ["--teacher", "eight-gaussians", "--data", "eight-gaussians", "--training.batch", "32"]
    assert main(["distill", "checkerboard-itvm", *small, *teacher, "--training.chunk", "32", "--out", "map"]) == 0
    pairs = ["--count", "9", "--steps", "40"]
    for flag, out in ((["--teacher"], "exact"), ([], "of-map")):
        capsys.readouterr()
        assert main(["reflow", "map", *flag, *(pairs if flag else pairs[:2]), "--out", out]) == 0
        following = shlex.split(capsys.readouterr().err.partition("next:\n")[2])
        assert following[:3] == ["fewstep", "train", "map"]
        # The batch of that run is the same; what is trained is a field now.
        assert main([*following[1:], "--dry-run"]) == 0
        assert f"data: {{name: {out}}}" in capsys.readouterr().out
    batch = Pairs("exact").rows(torch.arange(9), generator(0))
    assert batch.noise is not None
    error = (batch.data - eight_gaussians().flow(batch.noise, 0.0, 1.0)).abs().max()
    assert float(error) < 0.05
    assert Pairs("of-map").facts["steps"] == 2
