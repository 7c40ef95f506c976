"""What a model takes and gives: the shape of a sample, its classes, the conditions that it needs."""

import inspect
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.flows.chained import Chained
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided, unguided
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP, ContinuousUNet, Conv1dNet, OfDiffusers, SequenceTransformer
from fewstep.pipelines.arguments import side_step

Model = FlowMap | VelocityField


def device_of(model: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """Where a model is: its first parameter or buffer; ``default`` for one without."""
    return next((value.device for value in chain(model.parameters(), model.buffers())), torch.device(default))


def shape_of(model: Model) -> tuple[int, ...]:
    """The shape of one of a model's samples; a network of one's own says it as ``shape``.

    Raises:
        ValueError: its network does not say.
    """
    inner = network_of(model)
    if isinstance(inner, MLP):
        return (inner.config["dim"],)
    if hasattr(inner, "shape"):
        return tuple(inner.shape)
    raise ValueError(
        f"{type(inner).__name__} does not say what its samples look like: data: {{name: teacher, shape: [1, 28, 28]}}"
    )


def rate_of(model: Model) -> int | None:
    """Of a model of sound, how many numbers of a waveform (C, L) are a second; None for another, or where it does not
    say."""
    if model.latents is not None:
        return model.latents.rate
    rate = getattr(network_of(model), "rate", None)
    return rate if type(rate) is int and rate > 0 else None


def shape_at(model: Model, size: tuple[int, int], own: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of a model's samples, of images of ``size`` (height, width) in pixels.

    Args:
        own: of its own samples; by default what its network says.

    Raises:
        ValueError: a size that the VAE does not take, or a network that does not say the shape of its samples.
    """
    if model.latents is None:
        return (*(own or shape_of(model))[:-2], *size)
    frames = () if own is None else model.latents.image_shape_of(own)[1:-2]
    return model.latents.shape_of((model.latents.image_channels, *frames, *size))


def sized(model: Model, shape: tuple[int, ...] | None, size: tuple[int, int]) -> tuple[int, ...]:
    """As :func:`shape_at`, once it is known that the network takes images of that size, which is not its own.

    Args:
        shape: of its own samples; None for a model that does not say.

    Raises:
        ValueError: samples that are no images, or a size that the VAE or the network does not take.
    """
    said, inner = f"size {size[0]}x{size[1]}", network_of(model)
    own = getattr(inner, "model", None)
    kind, config = type(own).__name__, getattr(own, "config", {})
    if shape is None:
        is_free = isinstance(inner, OfDiffusers) and not inner.has_size
        shape = (inner.channels, *size) if is_free else shape_of(model)
    if len(shape) < 3:
        raise ValueError(f"{said}: samples of shape {shape} are no images")
    height, width = size
    factor = 1 if model.latents is None else model.latents.factor
    step = side_step(config)
    if min(size) < 1 or height % (factor * step) or width % (factor * step):
        raise ValueError(f"{said}: both sides must be multiples of {factor * step} pixels for this model")
    if "DiT" in kind and height != width:
        raise ValueError(f"{said}: a {kind} draws squares alone")
    places = config.get("pos_embed_max_size") or 0
    # AuraFlow counts all places of its table, which is a square, the others those along a side.
    most = (math.isqrt(places) if "AuraFlow" in kind else places) * factor * step
    if most and max(size) > most:
        raise ValueError(f"{said}: this {kind} draws up to {most}x{most}")
    return shape_at(model, size, shape)


def classes_of(model: Model) -> int:
    """How many classes a model is conditioned on, 0 for none; a network of one's own says it as ``classes``."""
    inner = network_of(model)
    return inner.config["classes"] if isinstance(inner, MLP) else getattr(inner, "classes", 0)


def image_channels(model: Model) -> int:
    """Channels of the image that a model of diffusers takes beside the state, the condition ``image``; 0 for none."""
    inner = network_of(model)
    return inner.image_channels if isinstance(inner, OfDiffusers) else 0


def check_image(model: Model, cond: Mapping[str, Any]) -> None:
    """That a model which takes an image beside the state is given one.

    Raises:
        ValueError: it is not.
    """
    if (channels := image_channels(model)) and "image" not in cond:
        raise ValueError(
            f"the model takes an image of {channels} channels beside the state, the condition image, which is not "
            "given: the samples of a run take it from the run's data, `fewstep sample --image FILE` from a file or a "
            f"folder, and Python any, fewstep.sample(model, noise, image=tensor of shape (B, {channels}, H, W))"
        )


def needed_conditions(model: Model) -> list[str]:
    """The names of the conditions without which a model cannot be called; not all networks say so."""
    times = 2 if isinstance(model, FlowMap) else 1
    inner = network_of(model)
    if isinstance(inner, OfDiffusers):
        return [*inner.needed, *(["image"] if inner.image_channels else [])]
    taken = list(inspect.signature(inner.forward).parameters.values())[1 + times :]
    required = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return required


def blank_conditions(
    model: Model, shape: tuple[int, ...], rows: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Conditions of ``rows`` samples of this shape that say nothing: zeros of what the network says it needs."""
    inner = network_of(model)
    if isinstance(inner, OfDiffusers):
        return inner.blank(shape, rows, 8, device)
    return {"class_labels": torch.zeros(rows, dtype=torch.long, device=device)} if classes_of(model) else {}


def network_of(model: Model) -> Any:
    """The network of a model, that of its last block for a chain, or the model itself where it has none."""
    model = unguided(model)
    while isinstance(model, Chained):  # its blocks are of one kind
        model = unguided(model.fields[-1])
    return getattr(model, "network", model)


def check_call(model: Model, x: Tensor, cond: Mapping[str, Any]) -> None:
    """That a model can be called at x (B, ...) with these conditions, as far as its network says.

    Raises:
        ValueError: states of another type of number than the weights of a network that does not turn them into its own,
            or a condition that the network does not take.
    """
    inner, told = network_of(model), type(network_of(model)).__name__
    if type(unguided(model)).forward not in (FlowMap.forward, NetworkField.forward):
        return  # a class of one's own, which may hand on what it likes
    weights, is_cast = _first_weights(inner), x.is_meta or torch.is_autocast_enabled(x.device.type)
    if weights is not None and weights.is_floating_point() and x.dtype != weights.dtype and not is_cast:
        given, own = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, weights.dtype))
        raise ValueError(f"states of {given} for a {told} with weights of {own}: start from x.to(torch.{own})")
    for name in cond:
        is_strength = name == "guidance" and (isinstance(model, Guided) or name in _taken(inner))
        if not is_strength and not takes(model, name):
            raise unknown("condition", name, [known for known in _conditions_of(model) if takes(model, known)])


def _first_weights(network: Any) -> Tensor | None:
    """The weights of the layer that sees the state, of a network that is known to hand it over as it is."""
    if "forward" in vars(network):  # placed in half precision, which turns what comes in
        return None
    if isinstance(network, OfDiffusers):
        layer = network.model.get_submodule(network.first)
        layer = getattr(layer, "base_layer", layer)  # within an adapter
        return None if getattr(layer, "takes_any_type", False) else getattr(layer, "weight", None)
    if isinstance(network, MLP | SequenceTransformer | Conv1dNet | ContinuousUNet):
        return getattr(network.input, "weight", None)
    return None


def _taken(network: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(network.forward).parameters


def _conditions_of(model: Model) -> list[str]:
    """The names that the forward of a model's network has after the state and the times."""
    kinds, leading = inspect.Parameter, 3 if isinstance(model, FlowMap) else 2
    found = list(_taken(network_of(model)).values())
    places = [p.kind for p in found]
    if kinds.VAR_POSITIONAL in places:  # net(x, *times, ...)
        leading = places.index(kinds.VAR_POSITIONAL)
    return [p.name for p in found[leading:] if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]


def takes(model: Model, name: str) -> bool:
    """Whether a condition of this name may be given to a model."""
    inner = network_of(model)
    if name == "image" and isinstance(inner, OfDiffusers):
        return inner.image_channels > 0
    if name == "guidance" and not getattr(inner, "takes_guidance", True):
        return False
    taken = _taken(inner)
    return name in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
