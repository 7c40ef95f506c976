"""A ``UNet2DModel``: how it is called, and it with a second time."""

from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from ..channels import beside, mean_part
from .labelled_times import LabelledTimes


def call(
    model: Any, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
) -> Tensor:
    """A ``UNet2DModel`` on the state x (B, C, H, W), behind which an image may stand.

    Raises:
        ValueError: sides that its levels cannot halve, as the others take what they pad.
    """
    step = 2 ** (len(model.config["block_out_channels"]) - 1)
    if any(side % step for side in x.shape[-2:]):
        raise ValueError(
            f"a state of {x.shape[-2]} x {x.shape[-1]}: this UNet2DModel halves it {step.bit_length() - 1} times, so "
            f"both sides must be multiples of {step}"
        )
    return mean_part(model(beside(model, x, image), timestep, class_labels=class_labels).sample, x)


class TwoTimeUNet2DModel(LabelledTimes, UNet2DModel):
    """A ``UNet2DModel``."""

    call = staticmethod(call)
