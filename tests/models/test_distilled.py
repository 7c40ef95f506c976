"""Models that were distilled for a few steps: told apart, read all the same, and refused as teachers without a flag."""

import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline
from toys.families import tiny_model, tiny_pipeline
from toys.unet import tiny_unet

from fewstep import ITVM, FlowMatching, Guided, Linear, MeanFlow, Trigonometric, load, sample
from fewstep.flows.fields import KNOWN, DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.models.diffusers_configs import look_into
from fewstep.networks import UNet
from fewstep.planning.weightless import teacher_without_weights
from fewstep.runs.build import build
from fewstep.runs.recipe import Recipe

DISTILLED = {
    "lcm": (diffusers.LCMScheduler(), "model", "latent consistency model (LCM): its scheduler is the LCMScheduler"),
    "tcd": (diffusers.TCDScheduler(), "model", "trajectory consistency model (TCD): its scheduler"),
    "turbo": (
        diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), "model",
        "few steps, as Turbo and Lightning are: its EulerAncestralDiscreteScheduler has timestep_spacing: trailing",
    ),
    "lightning": (diffusers.EulerDiscreteScheduler(), "SDXL-Lightning-4step", "Lightning model: 'lightning' is in its"),
    "schnell": (diffusers.FlowMatchEulerDiscreteScheduler(), "FLUX.1-schnell", "schnell model"),
    "fastwan": (diffusers.FlowMatchEulerDiscreteScheduler(), "FastWan2.1-T2V-1.3B-Diffusers", "FastWan model"),
}  # fmt: skip
ORDINARY = {
    "ddim": (diffusers.DDIMScheduler(timestep_spacing="trailing"), "model"),
    "euler": (diffusers.EulerDiscreteScheduler(timestep_spacing="leading"), "hyperbolic-turbine"),
    "zero terminal SNR": (
        diffusers.EulerDiscreteScheduler(
            timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"
        ),
        "model",
    ),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(), "dev"),
}


def folder_of(scheduler: Any, folder: Path) -> Path:
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


def recipe(folder: Path, **teacher: Any) -> Recipe:
    parts = {"teacher": {"source": str(folder), **teacher}, "data": {"name": "teacher", "count": 8}}
    return Recipe.model_validate({"name": "x", "objective": {"name": "ITVM"}, **parts})


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("ignore:the model in")
@pytest.mark.parametrize("name", DISTILLED)
def test_they_are_named_and_refused_before_anything_is_drawn(name: str, tmp_path: Path) -> None:
    scheduler, called, what = DISTILLED[name]
    folder = folder_of(scheduler, tmp_path / called)
    with pytest.warns(UserWarning, match="is a .* draw from it with diffusers"):
        field = load(folder)
    assert isinstance(field, NetworkField)
    assert what in field.distilled
    assert sample(field, torch.randn(2, 1, 8, 8), steps=2).isfinite().all()
    for made in (field, field.on(Trigonometric()), Guided(field, 2.0, null={"class_labels": 0})):
        for method in (ITVM, MeanFlow):
            with pytest.raises(ValueError, match=r"needs a velocity, .* is a .* teacher\.distilled: true") as refusal:
                method(made)
            assert len(str(refusal.value)) < 400
    with pytest.raises(ValueError, match=r"teacher\.distilled: true"):
        teacher_without_weights(recipe(folder))
    with pytest.raises(ValueError, match=r"teacher\.distilled: true"):
        build(recipe(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Said so, it is a teacher; and what is trained from data may start from it as it is.
    assert teacher_without_weights(recipe(folder, distilled=True)) is not None
    field.distilled = ""
    ITVM(field)
    FlowMatching()


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not(name: str, tmp_path: Path) -> None:
    scheduler, called = ORDINARY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder_of(scheduler, tmp_path / called)).distilled == ""  # pyright: ignore


def test_a_network_that_is_told_the_strength_of_guidance_is_a_velocity(tmp_path: Path) -> None:
    tiny_model("sd", time_cond_proj_dim=8).save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    assert load(tmp_path).distilled == ""  # pyright: ignore


def test_what_is_known_of_a_field_goes_with_it() -> None:
    field = DiffusionField(UNet(tiny_unet(5)), diffusers.DDPMScheduler())
    known = [name for name in KNOWN if name != "space"]  # which belongs to a path: flows/test_spaces.py
    for name in known:
        setattr(field, name, f"its {name}")
    moved, guided = field.on(Linear()), Guided(field, 2.0, null={"class_labels": 0})
    for name in known:
        assert getattr(moved, name) == f"its {name}"
        assert getattr(guided, name) == (None if name == "source" else f"its {name}")


@pytest.mark.filterwarnings("ignore:the model in")
def test_families_that_say_so_themselves(tmp_path: Path) -> None:
    """HunyuanImage 2.1 as it was distilled, and Flux.2 klein but for its base."""
    for is_told in (True, False):
        tiny_model("hunyuanimage", use_meanflow=is_told).save_pretrained(tmp_path / "hunyuan" / "transformer")
        diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "hunyuan" / "scheduler")
        klein = tiny_pipeline("flux2")
        klein.register_to_config(is_distilled=is_told)
        klein.save_pretrained(tmp_path / "klein")
        for name, says in (("hunyuan", "a flow map: .* use_meanflow"), ("klein", "says is_distilled")):
            distilled = look_into(tmp_path / name).distilled
            assert bool(re.search(says, distilled)) == is_told
            assert bool(distilled) == is_told
        assert load(tmp_path / "klein").distilled == distilled  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(load(tmp_path / "hunyuan"), FlowMap) == is_told
