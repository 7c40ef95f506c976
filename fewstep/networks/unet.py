"""diffusers' ``UNet2DModel`` as a field's network, and what U-Nets have in common.

It is called with timesteps in the units the model was trained with, which the field's native path supplies.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.networks.calls import call_unet

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class OfDiffusers(nn.Module):
    """A network that calls a ``model`` of diffusers, and knows from its config what its samples are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one sample, (C, H, W)."""
        return sample_shape(self.model)

    @property
    def classes(self) -> int:
        """How many ``class_labels`` it knows, 0 for none."""
        return self.model.config.get("num_class_embeds") or 0

    @property
    def takes_guidance(self) -> bool:
        """Whether it is told the strength of guidance, the condition ``guidance`` (B,)."""
        return False

    @property
    def needed(self) -> list[str]:
        """The conditions without which it cannot be called."""
        return ["class_labels"] if self.classes else []

    def need(self, **cond: Tensor | None) -> None:
        """That the conditions which it needs are given.

        Raises:
            ValueError: one is not.
        """
        missing = next((name for name in self.needed if cond.get(name) is None), None)
        if missing is not None:
            is_text = missing not in ("class_labels", "guidance")
            way = "; field.text.encode(prompts) makes the conditions of prompts" if is_text else ""
            raise ValueError(
                f"this {type(self.model).__name__} needs the condition {missing}, one row a sample, and this call does "
                f"not have it: pass it{way}"
            )


class UNet(OfDiffusers):
    """``net(x, timestep, class_labels=None)`` over a diffusers ``UNet2DModel``; images (B, C, H, W)."""

    model: "UNet2DModel"

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        return call_unet(self.model, x, timestep, class_labels, image)


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def sample_shape(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of one sample of a diffusers model whose config has ``in_channels`` and ``sample_size``.

    Raises:
        ValueError: its config has no size.
    """
    size = model.config["sample_size"]
    if size is None:
        raise ValueError(f"the config of this {type(model).__name__} has no sample_size: say the shape of the samples")
    height, width = (size, size) if isinstance(size, int) else size
    # Fewer go out than in where an image stands beside the state, more where a variance is predicted too.
    channels = model.config["in_channels"]
    return min(channels, model.config["out_channels"] or channels), height, width


def with_image(network: Any, channels: int) -> Any:
    """A copy of a U-Net's network that takes the condition ``image`` (B, channels, H, W) beside the state, and does not
    heed it yet: the weights of the first convolution for it are zeros (as of the latents in arXiv 2211.09800).

    Raises:
        ValueError: for a network without a first convolution of its own.
    """
    teacher = getattr(network, "model", None)
    if not isinstance(getattr(teacher, "conv_in", None), nn.Conv2d):
        raise ValueError(f"student.image widens the first convolution of a U-Net, a {type(network).__name__} has none")
    config = public_config(teacher)
    first = config["in_channels"]
    model = type(teacher).from_config({**config, "in_channels": first + channels})  # pyright: ignore
    weights = teacher.state_dict()  # pyright: ignore
    wide = torch.zeros_like(model.conv_in.weight)
    wide[:, :first] = weights["conv_in.weight"]
    model.load_state_dict({**weights, "conv_in.weight": wide})
    return type(network)(model.to(next(network.parameters())).train(network.training))


def set_size(model: Any, shape: tuple[int, ...]) -> None:
    """Have the config of a convolutional model, which takes pictures of any size, name that of ``shape`` (C, H, W)."""
    if len(shape) == 3:
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        if model.config["sample_size"] != size:
            model.register_to_config(sample_size=size)
