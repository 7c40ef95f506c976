"""What a model takes and gives: the shape of a sample, its classes, the conditions that it needs."""

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP, OfDiffusers
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
    most = (config.get("pos_embed_max_size") or 0) * factor * step
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
    """The network of a model, or the model itself where it has none."""
    model = unguided(model)
    return getattr(model, "network", model)


def takes(model: Model, name: str) -> bool:
    """Whether a condition of this name may be given to a model."""
    inner = network_of(model)
    if name == "image" and isinstance(inner, OfDiffusers):
        return inner.image_channels > 0
    if name == "guidance" and not getattr(inner, "takes_guidance", True):
        return False
    taken = inspect.signature(inner.forward).parameters
    return name in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())
