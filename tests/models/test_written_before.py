"""Runs and exports of earlier versions open in this one: ``written_by_0.1.0`` was written once and stays as it is.

A later version that writes folders otherwise adds a folder of its own here, and changes none.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from toys.places import TESTS

import fewstep
from fewstep.cli import main

BEFORE = sorted(TESTS.glob("written_by_*"))


@pytest.fixture(params=BEFORE, ids=lambda folder: folder.name)
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, so that what is tested cannot change what was written."""
    return Path(shutil.copytree(request.param, tmp_path / "before"))


def test_there_is_one() -> None:
    assert "written_by_0.1.0" in [folder.name for folder in BEFORE]


def test_a_run_is_opened(before: Path) -> None:
    expected = load_file(before / "expected.safetensors")
    run = fewstep.load(before / "run")
    assert isinstance(run, fewstep.FlowMap)
    samples = fewstep.sample(run, expected["points"], steps=2)
    torch.testing.assert_close(samples, expected["samples"], rtol=1e-4, atol=1e-4)


@pytest.mark.takes_seconds
def test_a_run_goes_on(before: Path) -> None:
    run = before / "run"
    assert main(["distill", str(run / "recipe.yaml"), "--steps", "5", "--out", str(run)]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 3  # of the version before
    assert steps[-1] == 5


def test_an_export_is_opened(before: Path) -> None:
    expected = load_file(before / "expected.safetensors")
    model = fewstep.load(before / "export")
    assert isinstance(model, fewstep.FlowMap)
    images = fewstep.sample(model, expected["noise"], steps=2)
    torch.testing.assert_close(images, expected["images"], rtol=1e-4, atol=1e-4)


@pytest.mark.takes_seconds
def test_an_export_runs_in_diffusers(before: Path) -> None:
    expected = load_file(before / "expected.safetensors")
    pipeline: Any = DiffusionPipeline.from_pretrained(before / "export", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images
    np.testing.assert_allclose(images, expected["pipeline"].numpy(), rtol=1e-4, atol=1e-4)
