"""Small models that are converted."""

from typing import Any

from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from fewstep.flows.fields import DiffusionField
from fewstep.networks import FAMILIES, UNet
from toys.families import tiny_model
from toys.unet import tiny_unet


def toy(family: str, prediction: Any = "epsilon", **options: Any) -> Any:
    """A tiny random model of a family on a DDPM schedule."""
    if family == "unet":
        network: Any = UNet(tiny_unet(**options))
    else:
        model = tiny_model(family, **options)
        network = FAMILIES[type(model).__name__](model)
    return DiffusionField(network, DDPMScheduler(prediction_type=prediction))


def flow_grid(steps: int) -> Tensor:
    """The times of the steps of diffusers' flow-match scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return 1 - scheduler.sigmas
