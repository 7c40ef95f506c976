"""Tiny random U-Nets for tests: of diffusers' own class, with everything a real one has."""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed
from fewstep.networks import UNet

LABELS = torch.tensor([0, 1, 4])


def tiny_unet(classes: int | None = None, seed: int = 0, **options: Any) -> UNet2DModel:
    """1 x 8 x 8 images, two levels, attention, 30,000 parameters; in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                "layers_per_block": 1,
                "num_class_embeds": classes,
                **options,
            }
        )
    return model.eval()


def tiny_field(prediction: str = "v_prediction", classes: int | None = None, **options: Any) -> NetworkField:
    """A field of a random U-Net: by a DDPM schedule, or ``prediction="flow"`` for a flow-match model."""
    network = UNet(tiny_unet(classes, **options))
    if prediction == "flow":
        return NetworkField(network, Reversed(), "flow", path=Linear())
    return DiffusionField(network, DDPMScheduler(prediction_type=prediction))


def tiny_student(prediction: str = "v_prediction", classes: int | None = None, **options: Any) -> FlowMap:
    """A flow map of a random U-Net whose second time speaks, as after training."""
    student = FlowMap.from_field(tiny_field(prediction, classes, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return student


def conditions(classes: int | None) -> dict[str, torch.Tensor]:
    """The conditions of three samples."""
    return {"class_labels": LABELS} if classes else {}
