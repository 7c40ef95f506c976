"""`fewstep sample --steer`: each sample is one of a population of its own, by a reward of the user's."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys.sampling import Draw, close

from fewstep.cli import main
from fewstep.common.trust import only_looking
from fewstep.generation.steered import load_reward

REWARDS = '''
"""Rewards of images (N, C, H, W)."""
import torch


def bright(images):
    assert images.ndim == 4
    return 200 * images.mean(dim=(1, 2, 3))


def of_class(images, class_labels: torch.Tensor) -> torch.Tensor:
    return bright(images) * (2 * (class_labels == 1) - 1)


def number(images) -> float:
    return 1.0


def spread(images):
    return images.std()


class Bright(torch.nn.Module):
    pass
'''
STEER = ("--steer", "r.py:bright", "--particles", "4", "--steps", "3")


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARDS)


@pytest.mark.takes_seconds
def test_samples_have_more_of_it(draws: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    steered, plain = draws("plain", *STEER, "--count", "12"), draws("plain", "--steps", "3", "--count", "12")
    assert steered.shape == plain.shape
    assert steered.mean() > plain.mean() + 2 * plain.mean(axis=(1, 2, 3)).std() / np.sqrt(12)
    said = capsys.readouterr().out
    assert "12 samples, 20 network calls each" in said  # 4 particles, 2 steps of 2 calls and one of 1
    found = re.search(r"each is one of 4: ([\d.]+) of them effective at the least, ([\d.]+) ancestors left", said)
    assert found
    assert 1 <= float(found[1]) <= 4
    assert 1 <= float(found[2]) <= 4


@pytest.mark.takes_seconds
def test_a_sample_is_the_same_in_any_batch(draws: Draw) -> None:
    whole = draws("classes", *STEER, "--count", "6", "--seed", "3")
    close(draws("classes", *STEER, "--count", "6", "--seed", "3", "--batch", "5"), whole)
    close(draws("classes", *STEER, "--count", "2", "--first", "4", "--seed", "3"), whole[4:])
    assert np.abs(draws("classes", *STEER, "--count", "6", "--seed", "4") - whole).max() > 0.1


@pytest.mark.takes_seconds
def test_strength_and_gradient_reach_it(draws: Draw) -> None:
    weak, strong = (draws("plain", *STEER, "--count", "8", "--strength", s).mean() for s in ("-2", "2"))
    assert weak < strong
    other = draws("plain", *STEER, "--count", "8", "--strength", "2", "--steer-gradient")
    assert abs(other.mean() - strong) > 1e-4


@pytest.mark.takes_seconds
def test_the_next_command_steers_too(draws: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    draws("plain", *STEER, "--count", "2", "--strength", "0.5", "--steer-gradient")
    said = capsys.readouterr().err
    for words in ("--steer r.py:bright --particles 4", "--strength 0.5 --steer-gradient --steps 6 --out samples-6"):
        assert words in said
    draws("plain", "--steps", "3", "--count", "2")
    assert "--steer" not in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_a_reward_is_told_the_classes(draws: Draw) -> None:
    steer = ("--steer", "r.py:of_class", "--particles", "8", "--steps", "2", "--count", "8")
    brighter, darker = (draws("classes", *steer, "--labels", label).mean() for label in ("1", "2"))
    plain = [draws("classes", "--steps", "2", "--count", "8", "--labels", label).mean() for label in ("1", "2")]
    assert brighter > plain[0]
    assert darker < plain[1]


@pytest.mark.takes_seconds
def test_a_text_model_is_steered_by_its_images(draws: Draw) -> None:
    images = draws("sd", *STEER, "--count", "2", "--prompt", "a cat", "a dog")
    assert images.shape[1] == 3  # the reward saw images too: it asks for four axes, and latents have these as well
    latents = draws("sd", *STEER, "--count", "2", "--prompt", "a cat", "a dog", "--latents")
    assert latents.shape[1] != 3


@pytest.mark.takes_seconds
def test_a_folder_knows_what_steered_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(models / "plain"), "--device", "cpu", "--out", "images", *STEER, "--count"]
    assert main([*words, "2"]) == 0
    facts = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert {name: facts[name] for name in ("steer", "particles", "strength", "gradient")} == {
        "steer": "r.py:bright", "particles": 4, "strength": 1.0, "gradient": False,
    }  # fmt: skip
    assert main([*words, "2"]) == 0  # all are there
    assert "effective" not in capsys.readouterr().out.partition("were there")[2]
    (tmp_path / "r.py").write_text(REWARDS.replace("200", "100"))
    assert main([*words, "2"]) == 2
    assert "reward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steer", "r.py"), "'r.py' names no reward: FILE.py:NAME is needed"),
        (("--steer", "none.py:bright"), "there is no file"),
        (("--steer", "r.py:brigt"), "did you mean 'bright'?"),
        (("--steer", "r.py:number"), "a function that returns a float, and a Tensor is wanted"),
        (("--steer", "r.py:Bright"), "a class Bright"),
        (("--steer", "r.py:spread"), "of shape () for 64 samples: a number for each is needed"),
        (("--steer", "r.py:bright", "--particles", "1"), "particles is 1: steering needs two or more"),
        (("--steer", "r.py:bright", "--particles", "0"), "particles is 0"),
        (("--steer", "r.py:bright", "--strength", "inf"), "the strength of a reward is inf"),
        (("--steer", "r.py:bright", "--grid", "optimal"), "--grid optimal is found for samples that are not steered"),
        (("--steer", "r.py:bright", "--solver", "heun"), "--solver heun: steering takes steps of its own"),
        (("--particles", "4"), "--particles belongs to --steer"),
        (("--strength", "4"), "--strength belongs to --steer"),
        (("--steer-gradient",), "--steer-gradient belongs to --steer"),
    ],
)
def test_what_cannot_steer(refused: Any, words: tuple[str, ...], says: str) -> None:
    assert says in refused("plain", "--count", "4", *words)


def test_nothing_runs_where_one_only_looks(tmp_path: Path) -> None:
    with only_looking(), pytest.raises(ValueError, match="is code, and a command that only looks runs none"):
        load_reward(f"{tmp_path / 'r.py'}:bright")
