"""Models of the families of diffusers, as exports have them, and how they are asked."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from fewstep.common.randomness import sample_generators
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_noise
from fewstep.models.exported import FlowMapPipeline
from fewstep.networks import FAMILIES
from toys.families import MODELS, tiny_model
from toys.unet import conditions


def family_field(name: str, **options: Any) -> DiffusionField:
    """A field of the tiny twin of a family, with latents of 4 x 8 x 8, on the schedule that its kind has."""
    network = FAMILIES[MODELS[name][0]](tiny_model(name, **options))
    if hasattr(network, "size"):
        network.size = 8
    scheduler: Any = DDPMScheduler() if name in DIFFUSIONS else FlowMatchEulerDiscreteScheduler(shift=3.0)
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


DIFFUSIONS = ("sd", "sdxl", "dit", "pixart")


def pixels(student: FlowMap, steps: int, gamma: float = 0.0, classes: int | None = None) -> Tensor:
    """What ``fewstep sample`` draws for the samples 0, 1, 2 of seed 7, as an image has it, in [0, 1]."""
    generators = sample_generators(7, range(3))
    noise = sample_noise((3, 1, 8, 8), generators)
    x = sample(student, noise, steps, gamma=gamma, generator=generators, **conditions(classes))
    return (x / 2 + 0.5).clamp(0, 1)
