"""Encoding and sampling by the workers of a Ray cluster: what one process makes, also where a worker is killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys.captions import captioned_folder, pipeline_folder
from toys.dying import dying_rows, squares
from toys.places import ROOT, TESTS

import fewstep
from fewstep.cli import main
from fewstep.common import on_ray as engine
from fewstep.common.on_ray import on_ray
from fewstep.data.captions import Captioned
from fewstep.data.sources import listed
from fewstep.runs.encode import encode


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two machines of one CPU each, as Ray sees them."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    said = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_usage_threshold": "1.0"}
    said |= {"RAY_worker_niceness": "0"}  # on a machine that does other things too
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        each = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=each)
        made.add_node(num_cpus=1, object_store_memory=80 << 20)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made.address
        made.shutdown()


@pytest.mark.takes_seconds
def test_a_worker_that_is_killed_is_started_again(cluster: str, tmp_path: Path) -> None:
    found = list(on_ray(range(7), partial(squares, tmp_path)))
    assert sorted(square for square, _ in found) == [0, 1, 4, 9, 16, 25, 36]
    assert (tmp_path / "died").exists()
    assert len({process for _, process in found}) >= 2
    assert os.getpid() not in {process for _, process in found}
    with pytest.raises(ValueError, match=r"^7 has no square here$"):
        list(on_ray(range(6, 9), partial(squares, tmp_path)))
    with pytest.raises(ValueError, match=r"^5 workers, and the Ray cluster has room for 2: one a CPU$"):
        list(on_ray(range(3), partial(squares, tmp_path), workers=5))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.takes_seconds
def test_encoded_as_by_one_process_though_a_worker_is_killed(cluster: str, tmp_path: Path) -> None:
    sd, photos = pipeline_folder(tmp_path / "sd", "sd"), captioned_folder(tmp_path / "photos")
    how: dict[str, Any] = {"size": 16, "shard": 2, "batch": 2, "device": "cpu"}
    assert encode(sd, photos, tmp_path / "one", **how) == 0
    mark, seen = tmp_path / "died", listed(photos)
    dying = Captioned(seen.name, seen.identity, partial(dying_rows, photos, 3, mark))
    ticks: list[tuple[int, int]] = []
    done = encode(sd, dying, tmp_path / "two", engine="ray", progress=lambda *tick: ticks.append(tick), **how)
    assert (done, mark.exists(), ticks[-1]) == (0, True, (9, 9))  # five images, four captions
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(fewstep.load_data(tmp_path / "two")) == 5


REWARD = """
from pathlib import Path
from toys.dying import die_once

def reward(x):
    if float(x.sum()) != 0:
        die_once(Path(__file__).parent / "died")
    return -x.flatten(1).square().sum(1)
"""


@pytest.mark.takes_seconds
def test_drawn_as_by_one_process_though_a_worker_is_killed(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    words = ["sample", "eight-gaussians", "--steps", "4", "--count", "7", "--batch", "4", "--device", "cpu"]
    words += ["--steer", "reward.py:reward", "--particles", "2"]
    Path("died").touch()
    assert main([*words, "--out", "one.npy"]) == 0
    alone = capsys.readouterr().out
    Path("died").unlink()
    assert main([*words, "--out", "two.npy", "--engine", "ray"]) == 0
    assert Path("died").exists()
    assert Path("two.npy").read_bytes() == Path("one.npy").read_bytes()
    assert capsys.readouterr().out == alone.replace("one.npy", "two.npy")


@pytest.mark.takes_seconds
def test_a_folder_is_gone_on_with_by_either_engine(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "sample",
        "fewstep:fashion-mnist-fast",
        "--count",
        "9",
        "--batch",
        "2",
        "--out",
        "shoes",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    whole = contents(Path("shoes"))
    for name in ("00002.png", "00003.png", "00008.png"):
        Path("shoes", name).unlink()
    capsys.readouterr()
    assert main([*words, "--engine", "ray", "--workers", "2"]) == 0
    assert "9 samples (6 were there)" in capsys.readouterr().out
    assert contents(Path("shoes")) == whole
    assert main([*words, "--engine", "ray", "--seed", "1"]) == 2
    assert "holds other images" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_without_an_address_this_machine_does_it(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": path, "RAY_worker_niceness": "0"}
    words = [
        sys.executable,
        "-m",
        "fewstep",
        "sample",
        "eight-gaussians",
        "--steps",
        "4",
        "--count",
        "6",
        "--batch",
        "3",
    ]
    words += ["--device", "cpu", "--out", "x.npy", "--engine", "ray"]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (0, "x.npy: 6 samples, 4 network calls each\n"), done.stderr
    assert "next:" in done.stderr
    assert [line for line in done.stderr.splitlines() if "deprecated" in line or " E " in line] == []
    assert len(np.load(tmp_path / "x.npy")) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "dask"], "error: unknown engine 'dask': Known: processes, ray"),
        (["--workers", "2"], "error: workers is 2: a number of 1 or more, and of engine ray (torchrun starts others)"),
        (["--engine", "ray", "--workers", "0"], "error: workers is 0: a number of 1 or more, and of engine ray"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "encode"])
def test_engines_that_cannot_be(command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    begun = {
        "sample": ["sample", "eight-gaussians"],
        "encode": ["encode", "--teacher", "t", "--data", "d", "--out", "o"],
    }
    assert main([*begun[command], *words]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_ray_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", "eight-gaussians", "--engine", "ray", "--out", "x.npy"]
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert main(words) == 2
    assert "engine ray needs Ray, which is not installed: pip install 'fewstep[scale]'" in capsys.readouterr().err
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"RAY_ADDRESS is '{address}', and no Ray cluster can be reached there" in said
        assert said.count("\n") == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "engine ray shares out the work itself: start one process, without torchrun" in capsys.readouterr().err
    assert not Path("x.npy").exists()
