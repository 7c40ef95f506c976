"""Models of the families of diffusers, as exports have them, and how they are asked."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from fewstep.common.randomness import sample_generators
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.models.exported import FlowMapPipeline
from fewstep.networks import FAMILIES
from toys.families import MODELS, tiny_model


def family_field(name: str, **options: Any) -> DiffusionField:
    """A field of the tiny twin of a family, with latents of 4 x 8 x 8, on the schedule that its kind has."""
    network = FAMILIES[MODELS[name][0]](tiny_model(name, **options))
    if name == "flux":
        network.size = 8
    if name == "wan":
        network.size = (2, 8, 8)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if name in IS_FLOW else DDPMScheduler()
    return DiffusionField(network, scheduler)


def speak(model: Any, seed: int = 1) -> Any:
    """The model with all its weights moved, as after training: its second time speaks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return model


def family_map(name: str, **options: Any) -> FlowMap:
    return speak(FlowMap.from_field(family_field(name), **options))


def asked(steps: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "num_inference_steps": steps, "generator": sample_generators(7, range(2)), "output_type": "pt", **options,
    }  # fmt: skip


def pipeline(folder: Path) -> Any:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


IS_FLOW = ("sd3", "flux", "wan")
