"""What a call of the pipeline asks for, checked before anything is computed.

It is part of the ``pipeline.py`` of an export, so it needs torch alone.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..networks.channels import patch_of, signal_step


def check_whole(name: str, value: Any) -> None:
    """That a number is whole, and not below 1."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}: a whole number from 1 on is needed")


def check_prompt(prompt: Any) -> None:
    """That prompts are a text or a list of texts."""
    texts = prompt if isinstance(prompt, list) else [prompt]
    if prompt is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt is {prompt!r}: a text, or a list of texts, is needed")


def count_of(batch_size: int | None, given: list[Any]) -> int:
    """How many images: ``batch_size``, or by default as many as there are of what is given."""
    lengths = [len(g) for g in given if isinstance(g, list) or (isinstance(g, Tensor) and g.ndim)]
    count = batch_size if batch_size is not None else lengths[0] if lengths else 1
    check_whole("the number of images", count)
    if any(length != count for length in lengths):
        named = "prompts, latents, images, generators, conditions or class_labels"
        raise ValueError(f"{count} images, but {lengths} {named}: one each is needed")
    return count


def sizes_of(height: int | None, width: int | None, own: Any, factor: int, config: Any) -> tuple[int, ...]:
    """The sizes of a state, of images of this height and width in pixels.

    Args:
        own: those that the model was made for, a number where they are equal; None where there are none.
        factor: how many pixels a latent is, along each side.
        config: of the network.
    """
    if own is not None and not isinstance(own, int) and len(own) == 1:
        if height is not None or width is not None:
            raise ValueError("this model makes sound, which has no height and width: leave them out")
        return tuple(own)
    if own is None and (height is None or width is None):
        other = "or the noise to start from as latents (B, C, H, W)"
        raise ValueError(f"this model has no fixed size: pass height and width, {other}")
    own, step = (own, own) if isinstance(own, int) else own or (None, None), factor * side_step(config)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, Integral) or side < 1 or side % step):
            raise ValueError(f"{name} is {side}: this model makes images of multiples of {step} pixels")
    rows, columns = (None if side is None else side // factor for side in (height, width))
    return *own[:-2], rows or own[-2], columns or own[-1]


def seconds_of(begin: float, end: float | None, longest: float | None) -> tuple[float, float] | None:
    """Where sound begins and ends, in seconds; None for what is none.

    Args:
        longest: how much the model makes at once; None where it is not known of it that it makes sound.
    """
    if longest is None:
        if begin or end is not None:
            raise ValueError("audio_start_in_s and audio_end_in_s are of models of sound: leave them out")
        return None
    end = longest if end is None else end
    if not 0 <= begin < end or end - begin > longest:
        raise ValueError(f"sound from {begin} to {end} seconds: this model makes {longest:g} seconds at most")
    return float(begin), float(end)


def check_state(shape: tuple[int, ...], channels: int, dims: int, config: Any) -> None:
    """That the network takes states of this shape, (B, channels, ...) with ``dims`` dimensions."""
    if len(shape) != dims or shape[1] != channels:
        raise ValueError(f"latents have shape {shape}: noise (B, {channels}, ...) of {dims} dimensions is needed")
    if any(size < 1 or size % side_step(config) for size in shape[2:][-2:]):
        raise ValueError(f"latents have shape {shape}: this model takes sides of multiples of {side_step(config)}")
    if _is_dit(config) and shape[-1] != shape[-2]:
        raise ValueError(f"states of {shape[-2]} x {shape[-1]} are asked for: this model makes squares alone")


def numbers(labels: Any, names: dict[str, str]) -> Tensor:
    """Classes by number, as they are or by their names."""
    if isinstance(labels, str) or (isinstance(labels, list) and any(isinstance(label, str) for label in labels)):
        known = {name.strip(): int(number) for number, many in names.items() for name in many.split(",")}
        named = [labels] if isinstance(labels, str) else labels
        if unknown := [name for name in named if name not in known]:
            raise ValueError(f"there is no class {unknown[0]!r}; known: {', '.join(known) or 'none by name'}")
        labels = known[labels] if isinstance(labels, str) else [known[name] for name in labels]
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.ndim > 1 or (found.numel() and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ValueError(f"class_labels are {labels!r}: one number or name for all images, or a list of one each")
    return found


def check_labels(labels: Tensor | None, config: Any) -> None:
    """That a network has classes of these numbers, and is told one where it has any."""
    # Both transformers of this family name a number, and for the one with this norm it is that of its classes.
    classes = config["num_embeds_ada_norm"] if _is_dit(config) else config.get("num_class_embeds")
    if (labels is None) != (classes is None):
        raise ValueError(f"class_labels are needed, 0 to {classes - 1}" if classes else "this model has no classes")
    if labels is not None and labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"class_labels run from 0 to {classes - 1}, these from {labels.min()} to {labels.max()}")


def check_image(image: Any, wanted: tuple[int, ...]) -> None:
    """That what stands beside the state has the shape that is wanted, and is not given where that has no channels."""
    if not wanted[1]:
        if image is not None:
            raise ValueError("this model takes no image beside the state: leave image out")
    elif image is None:
        raise ValueError(f"this model takes an image beside the state: image of shape {wanted} is needed")
    elif not isinstance(image, Tensor) or tuple(image.shape) != wanted:
        found = f"has shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"is a {type(image).__name__}"
        raise ValueError(f"image {found}, this model needs {wanted}")


def _is_dit(config: Any) -> bool:
    return config.get("norm_type") == "ada_norm_zero"


def side_step(config: Any) -> int:
    """Of what number both sides of a state are multiples: by the halvings of a U-Net, or the patches of a transformer.
    U-Nets of text pad what they halve."""
    if "extra_in_channels" in config:
        return signal_step(config)
    if "block_out_channels" in config:
        return 1 if "cross_attention_dim" in config else 2 ** (len(config["block_out_channels"]) - 1)
    patch = 2 if patch_of(config) > 1 else config.get("patch_size") or config.get("all_patch_size") or 1
    return patch if isinstance(patch, int) else patch[-1]
