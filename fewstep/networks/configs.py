"""The configs of diffusers' models: what is kept of one, and what is changed, with the weights that go with it."""

from typing import Any

import torch

from fewstep.common.errors import shown
from fewstep.networks.families.base import OfDiffusers
from fewstep.networks.frozen_base import take_packed


def keep_facts(model: Any, source: Any) -> None:
    """Have the config of a model say what that of ``source`` does of its channels (see ``channels.state_channels``)."""
    facts = {name: source.config[name] for name in ("_state_channels", "_image_first") if name in source.config}
    model.register_to_config(**facts)


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private keys, which would keep ``from_config`` from taking changes."""
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def with_image(network: Any, channels: int) -> Any:
    """A copy of a network of diffusers' that takes the condition ``image`` (B, channels, H, W) beside the state, and
    does not heed it yet: the weights of its first layer for it are zeros (as of the latents in arXiv 2211.09800).

    Raises:
        ValueError: no model of diffusers, one that takes an image already, no whole number of channels.
    """
    if not isinstance(network, OfDiffusers):
        raise ValueError(
            f"an image beside the state widens the first layer of a model of diffusers, and a {type(network).__name__} "
            "is none: have its forward take image=None, which data with a condition of that name then give it"
        )
    teacher: Any = network.model
    if type(channels) is not int or channels < 1:
        raise ValueError(f"image is {channels!r}: how many channels it has is needed, such as 3")
    if taken := network.image_channels:
        raise ValueError(f"this {type(teacher).__name__} takes an image of {taken} channels already: leave image out")
    if not network.first:
        raise ValueError(f"a {type(teacher).__name__} has no layer that takes an image beside the state")
    own = teacher.config["in_channels"]
    wide = {"in_channels": own + network.patch * channels, "out_channels": teacher.config["out_channels"] or own}
    with torch.random.fork_rng([]):
        model = type(teacher).from_config({**public_config(teacher), **wide})
    keep_facts(model, teacher)
    # A variance behind the prediction would hide from the numbers alone what of them is the state.
    model.register_to_config(_state_channels=network.patch * network.channels)
    weights, name = teacher.state_dict(), f"{network.first}.weight"
    first = weights[name].new_zeros(model.state_dict()[name].shape)
    first[:, : weights[name].shape[1]] = weights[name]
    torch.nn.Module.to(model, next(network.parameters()))
    take_packed(model, teacher)
    model.load_state_dict({**weights, name: first})
    widened = type(network)(model)
    if hasattr(network, "size"):
        widened.size = network.size
    return widened.train(network.training)


def experts(transformer: Any, transformer_2: Any, boundary_timestep: float) -> Any:
    """Two ``WanTransformer3DModel``s, for timesteps from the boundary on and below it, as one model.

    Raises:
        ValueError: they are not of one shape.
    """
    from fewstep.networks.two_times.wan_experts import WanExpertsTransformer3DModel

    configs = [public_config(expert) for expert in (transformer, transformer_2)]
    if wrong := [key for key in configs[0] if configs[0][key] != configs[1].get(key)]:
        said = " and ".join(shown(config.get(wrong[0])) for config in configs)
        raise ValueError(f"the {wrong[0]} of transformer and transformer_2 are {said}: experts are of one shape")
    with torch.device("meta"):
        both: Any = WanExpertsTransformer3DModel.from_config({**configs[0], "boundary_timestep": boundary_timestep})
    both.transformer, both.transformer_2 = transformer, transformer_2
    return both.train(transformer.training)


def set_size(model: Any, shape: tuple[int, ...]) -> None:
    """Have the config of a convolutional model, which takes images of any size, name that of ``shape`` (C, H, W)."""
    if len(shape) == 3:
        size = shape[1] if shape[1] == shape[2] else shape[1:]
        if model.config["sample_size"] != size:
            model.register_to_config(sample_size=size)
