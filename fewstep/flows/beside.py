"""Models with a dense condition: an image that stands beside the state, channel by channel."""

from copy import deepcopy
from typing import Any, TypeVar

from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.networks.configs import with_image as widened

Model = TypeVar("Model", NetworkField, FlowMap)


def with_image(model: Model, channels: int) -> Model:
    """A copy of a model that takes the condition ``image`` (B, channels, H, W) beside its state (B, C, H, W).

    It starts as the model: the weights of its first layer for the image are zeros, until it is trained.

    For depth of a photo, high resolution of low, the next field of a flow: what is known at every place goes in at
    every place (the channels beside the state as of arXiv 2211.09800; the depth model of arXiv 2506.02221 is one).
    The image has the sides of the state; for a latent model it is latents too, or scaled to their sides.

    Args:
        model: a field or a flow map with a network of diffusers' (any of the families that ``fewstep.load`` reads).
        channels: of the image; videos (B, channels, F, H, W) have as many for each frame.

    Raises:
        ValueError: a network of one's own (whose forward takes ``image=None`` by itself), a model that takes an image
            already, no whole number of channels.

    >>> field = with_image(fewstep.load("./my-ddpm"), 3)
    >>> fit(field, FlowMatching(), ArrayData(depths, {"image": photos}), steps=5_000)
    >>> student = FlowMap.from_field(field)
    """
    inner: Any = model
    if getattr(inner, "network", None) is None:
        raise ValueError(f"a {type(model).__name__} has no network that an image could go into beside the state")
    return deepcopy(model, {id(model.network): widened(model.network, channels)})
