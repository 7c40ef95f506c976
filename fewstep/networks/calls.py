"""How the pipelines of diffusers call each of its models, on a state x (B, C, H, W) and a timestep (B,).

It is part of the ``two_times.py`` of an export, so it needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor


def call_unet(
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


def call_conditional_unet(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    class_labels: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    text_embeds: Tensor | None = None,
    time_ids: Tensor | None = None,
    image_embeds: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """A ``UNet2DConditionModel`` on the state x (B, C, H, W)."""
    added = {"text_embeds": text_embeds, "time_ids": time_ids, "image_embeds": image_embeds}
    output = model(
        beside(model, x, image),
        timestep,
        encoder_hidden_states,
        class_labels=class_labels,
        timestep_cond=timestep_cond,
        added_cond_kwargs={name: value for name, value in added.items() if value is not None} or None,
        encoder_attention_mask=encoder_attention_mask,
    )
    return mean_part(output.sample, x)


def call_dit(model: Any, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """A ``DiTTransformer2DModel`` on the state x (B, C, H, W)."""
    return mean_part(model(x, timestep, class_labels).sample, x)


def call_pixart(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    resolution: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
) -> Tensor:
    """A ``PixArtTransformer2DModel`` on the state x (B, C, H, W)."""
    output = model(
        x,
        encoder_hidden_states=encoder_hidden_states,
        timestep=timestep,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        encoder_attention_mask=encoder_attention_mask,
    )
    return mean_part(output.sample, x)


def call_sd3(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
) -> Tensor:
    """An ``SD3Transformer2DModel`` on the state x (B, C, H, W)."""
    return model(x, encoder_hidden_states, pooled_projections, timestep).sample


def call_flux(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """A ``FluxTransformer2DModel`` on the state x (B, C, H, W), which it sees as 2 x 2 patches."""
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents of {height} x {width} are not of 2 x 2 patches: even sides are needed")
    # Where each patch is: rows of (0, y, x).
    y, z = torch.meshgrid(*(torch.arange(side // 2, device=x.device) for side in (height, width)), indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, z], dim=-1).reshape(-1, 3).float()
    assert encoder_hidden_states is not None
    output = model(
        pack(x),
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        # The model multiplies it again, after the cast to its own type.
        timestep=timestep / 1000,
        img_ids=places,
        txt_ids=places.new_zeros(encoder_hidden_states.shape[1], 3),
        guidance=guidance,
    )
    return unpack(output.sample, height, width)


def call_wan(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_image: Tensor | None = None,
) -> Tensor:
    """A ``WanTransformer3DModel`` on the state x (B, C, F, H, W), a video."""
    return model(x, timestep, encoder_hidden_states, encoder_hidden_states_image).sample


def state_channels(config: Any) -> int:
    """How many channels the state of a U-Net has. An image may go in beside it, and a variance come out behind it: what
    is there of both is said as ``_state_channels`` where the numbers alone would not tell."""
    takes = config["in_channels"]
    return config.get("_state_channels") or min(takes, config["out_channels"] or takes)


def beside(model: Any, x: Tensor, image: Tensor | None) -> Tensor:
    """What goes into a U-Net: the state (B, C, H, W), and behind it the channels of an image it is conditioned on;
    before it where the config says ``_image_first``.

    Raises:
        ValueError: they are not as many channels as the model takes.
    """
    parts = [x] if image is None else [x, image.to(x)]
    both = torch.cat(parts[::-1] if model.config.get("_image_first") else parts, dim=1)
    if both.shape[1] != (takes := model.config["in_channels"]):
        own = f"the state has {x.shape[1]}" + ("" if image is None else f" and the condition image {image.shape[1]}")
        raise ValueError(f"this {type(model).__name__} takes {takes} channels, {own}: they must add up")
    return both


def mean_part(output: Tensor, x: Tensor) -> Tensor:
    """The first half of the channels where the model also predicts a variance."""
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a row of 2 x 2 patches, (B, H W / 4, 4 C)."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    rows, _, channels = patches.shape
    grid = patches.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)
