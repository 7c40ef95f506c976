"""The configs of diffusers' models: what is kept of one, and what is changed, with the weights that go with it."""

from typing import Any

import torch
from torch import nn


def keep_facts(model: Any, source: Any) -> None:
    """Have the config of a model say what that of ``source`` does of its channels (see ``channels.state_channels``)."""
    facts = {name: source.config[name] for name in ("_state_channels", "_image_first") if name in source.config}
    model.register_to_config(**facts)


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


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
    keep_facts(model, teacher)
    weights = teacher.state_dict()  # pyright: ignore
    wide = torch.zeros_like(model.conv_in.weight)
    wide[:, :first] = weights["conv_in.weight"]
    model.load_state_dict({**weights, "conv_in.weight": wide})
    return type(network)(model.to(next(network.parameters())).train(network.training))


def set_size(model: Any, shape: tuple[int, ...]) -> None:
    """Have the config of a convolutional model, which takes images of any size, name that of ``shape`` (C, H, W)."""
    if len(shape) == 3:
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        if model.config["sample_size"] != size:
            model.register_to_config(sample_size=size)
