"""Students that only know the way to t = 1 say so: they are sampled with fresh noise wherever they go."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from toys.unet import tiny_student

from fewstep.common.randomness import sample_generators
from fewstep.flows.sampling import sample, sample_noise
from fewstep.models.exported import FlowMapPipeline
from fewstep.networks import MLP
from fewstep.runs.export import export
from fewstep.runs.loading import load, load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

RECIPE = {
    "name": "consistency",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "SCM",
    "training": {"steps": 4, "batch": 32, "quiet": True},
    "evaluation": {"count": 0},
}


def drawn(model: torch.nn.Module, **options: float) -> torch.Tensor:
    generators = sample_generators(3, range(5))
    shape = (5, 2) if isinstance(model.network, MLP) else (5, 1, 8, 8)
    noise = sample_noise(shape, generators)
    return sample(model, noise, 3, generator=generators, **options)  # pyright: ignore


@pytest.mark.takes_seconds
@pytest.mark.parametrize("objective", ["SCM", "ConsistencyDistillation", "ConsistencyTraining", "CTM", "ITVM"])
def test_a_run_its_copy_and_its_export_know_how_they_are_sampled(objective: str, tmp_path: Path) -> None:
    recipe = load_recipe({**RECIPE, "objective": objective})
    gamma = 0.0 if objective in ("CTM", "ITVM") else 1.0
    assert run(recipe, tmp_path / "run").result.ema.gamma == gamma
    model = load_run(tmp_path / "run")
    again = load(export(model, tmp_path / "export"))
    for who in (model, deepcopy(model), again):
        assert torch.equal(drawn(who), drawn(who, gamma=gamma))
        assert not torch.equal(drawn(who), drawn(who, gamma=1 - gamma))


def test_an_exported_pipeline_samples_as_its_model_does(tmp_path: Path) -> None:
    model = tiny_student("flow", None)
    model.gamma = 1.0
    pipe = FlowMapPipeline.from_pretrained(export(model, tmp_path / "export"))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(generator=sample_generators(3, range(5)), num_inference_steps=3, output_type="pt", return_dict=False)[0]
    expected = (drawn(model) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    assert load(tmp_path / "export").gamma == 1.0  # pyright: ignore
