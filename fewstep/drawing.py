"""Samples of a trained model: drawn in batches, written as pictures or arrays."""

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.evaluation.files import replace_file
from fewstep.evaluation.plots import image_grid, png, points_figure
from fewstep.exact import ExactField
from fewstep.fields import Guided, VelocityField, unguided
from fewstep.maps import FlowMap
from fewstep.networks import MLP, ConditionalUNet, TwoTimeUNet, UNet
from fewstep.randomness import generator, sample_generators
from fewstep.sampling import count_calls, sample, sample_noise

Model = FlowMap | VelocityField


def shape_of(model: Model) -> tuple[int, ...]:
    """The shape of one of a model's samples; a network of one's own says it as ``shape``.

    Raises:
        ValueError: its network does not say.
    """
    inner = _inside(model)
    if isinstance(inner, MLP):
        return (inner.config["dim"],)
    if isinstance(inner, ExactField):
        return tuple(inner.data(1, generator(0)).shape[1:])
    if hasattr(inner, "shape"):
        return tuple(inner.shape)
    raise ValueError(
        f"{type(inner).__name__} does not say what its samples look like: data: {{name: teacher, shape: [1, 28, 28]}}"
    )


def classes_of(model: Model) -> int:
    """How many classes a model is conditioned on, 0 for none; a network of one's own says it as ``classes``."""
    inner = _inside(model)
    return inner.config["classes"] if isinstance(inner, MLP) else getattr(inner, "classes", 0)


def image_channels(model: Model) -> int:
    """How many channels of an image a U-Net takes beside the state, as the condition ``image``; 0 for none."""
    inner = _inside(model)
    if not isinstance(inner, UNet | TwoTimeUNet | ConditionalUNet):
        return 0
    channels = inner.model.config["in_channels"]
    return channels - min(channels, inner.model.config["out_channels"] or channels)


def check_image(model: Model, cond: Mapping[str, Any]) -> None:
    """That a model which takes an image beside the state is given one.

    Raises:
        ValueError: it is not.
    """
    if (channels := image_channels(model)) and "image" not in cond:
        raise ValueError(
            f"the model takes an image of {channels} channels beside the state, the condition image, which is not "
            "given: the samples of a run take it from the run's data, and Python any, "
            f"fewstep.sample(model, noise, image=tensor of shape (B, {channels}, H, W))"
        )


def needed_conditions(model: Model) -> list[str]:
    """The names of the conditions without which a model cannot be called; not all networks say so."""
    times = 2 if isinstance(model, FlowMap) else 1
    inner = _inside(model)
    taken = list(inspect.signature(inner.forward).parameters.values())[1 + times :]
    required = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [*required, *(["image"] if image_channels(model) else [])]


def _inside(model: Model) -> Any:
    """The network of a model, or the model itself where it has none."""
    model = unguided(model)
    return getattr(model, "network", model)


def draw(
    model: Model,
    count: int,
    steps: int,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    given: Mapping[str, Tensor] | None = None,
    decode: bool = False,
    batch: int = 256,
    guidance: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Samples (count, ...) on the CPU, their conditions, and how often the network was called for each.

    Sample i of a seed is the same for any ``count`` and ``batch``.

    Args:
        shape: of one sample; by default what the model says.
        labels: classes, given to the samples in turn; by default all of them, where the model has classes.
        prompts: texts, given to the samples in turn; their conditions are not among those returned.
        given: other conditions, (n, ...) each, their rows given to the samples in turn.
        decode: images instead of latents, of a latent model.
        guidance: the strength of guidance, for a model that takes it; a text model that does not is guided away from
            what it does without a prompt.
        options: those of ``fewstep.sample``.

    Raises:
        ValueError: no samples asked for, labels that the model does not have, a text model without prompts or another
            with them, a model of an image without one, or as ``fewstep.sample``.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count is {count} and batch is {batch}: at least one sample is needed")
    shape, classes, inner = shape or shape_of(model), classes_of(model), _inside(model)
    labels = range(classes) if labels is None else labels
    if classes and not all(0 <= label < classes for label in labels):
        raise ValueError(f"labels {list(labels)}: the model has the classes 0 to {classes - 1}")
    if labels and not classes and (isinstance(inner, MLP | ExactField) or hasattr(inner, "classes")):
        raise ValueError(f"labels {list(labels)}: the model has no classes")
    cond = {"class_labels": torch.tensor([labels[i % len(labels)] for i in range(count)])} if labels else {}
    cond |= {name: value[torch.arange(count) % len(value)] for name, value in (given or {}).items()}
    check_image(model, cond)
    device = next((value.device for value in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    text = {} if given and "encoder_hidden_states" in given and not prompts else _conditions(model, prompts, device)
    if guidance is not None and text and isinstance(model, VelocityField) and not takes(model, "guidance"):
        assert model.text is not None
        model, guidance = Guided(model, guidance, null=model.text.null(device)), None
    if guidance is not None and not isinstance(model, Guided) and not takes(model, "guidance"):
        raise ValueError(
            f"guidance {guidance:g}: the model is told no strength of it. Recipes guide a teacher (teacher.guidance), "
            "and Python any field: Guided(field, scale, null=...)"
        )
    parts = []
    with count_calls(model) as calls:
        for rows in torch.arange(count).split(batch):
            # One generator a sample, for its first noise and for all that is added later.
            generators = sample_generators(seed, rows.tolist())
            noise = sample_noise((len(rows), *shape), generators).to(device)
            told: dict[str, Any] = {name: value[rows].to(device) for name, value in cond.items()}
            told |= {name: value[rows % len(value)] for name, value in text.items()}
            if guidance is not None:
                told["guidance"] = torch.full((len(rows),), guidance, device=device)
            if isinstance(model, FlowMap):
                told["generator"] = generators
            samples = sample(model, noise, steps, **options, **told)
            parts.append((model.latents.decode(samples) if decode and model.latents else samples).cpu())
    return torch.cat(parts), cond, calls.rows / count


def _conditions(model: Model, prompts: Sequence[str] | None, device: torch.device) -> dict[str, Tensor]:
    """The conditions of prompts, a row each; none for a model without text."""
    if model.text is None and prompts:
        raise ValueError(f"prompts {list(prompts)}: this model has no text encoders that fewstep knows")
    if model.text is None:
        return {}
    if not prompts:
        raise ValueError('the model is conditioned on text: give it prompts, --prompt "a cat" or prompts=["a cat"]')
    return model.text.encode(list(prompts), device=device)


def takes(model: Model, name: str) -> bool:
    """Whether a condition of this name may be given to a model."""
    inner = _inside(model)
    if name == "image" and isinstance(inner, UNet | TwoTimeUNet | ConditionalUNet):
        return image_channels(model) > 0
    taken = inspect.signature(inner.forward).parameters
    return name in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def check_out(out: Path, shape: tuple[int, ...]) -> None:
    """Refuse, before anything is drawn, a file that samples of this shape cannot be written to.

    Raises:
        ValueError: no suffix that is known, or pictures of what is none.
        FileExistsError: a folder with something in it.
    """
    if out.suffix not in ("", ".png", ".npy", ".npz"):
        raise ValueError(f"--out {out}: samples are written as .png (a grid), .npy, .npz, or into a folder of PNGs")
    is_image = len(shape) == 3 and shape[0] in (1, 3)
    if not is_image and not (shape == (2,) and out.suffix == ".png") and out.suffix not in (".npy", ".npz"):
        raise ValueError(f"--out {out}: samples of shape {shape} are no pictures, write them to a .npy or .npz file")
    if out.suffix == "" and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out {out}: the folder is not empty, and nothing in it is overwritten")


def write(samples: Tensor, cond: dict[str, Tensor], out: Path) -> None:
    """Samples (N, ...) to ``out``: a grid (.png), the numbers (.npy; .npz with conditions), or a folder of PNGs."""
    if out.suffix in (".npy", ".npz"):
        content = io.BytesIO()
        named: dict[str, Any] = {name: value.numpy() for name, value in {"data": samples, **cond}.items()}
        np.save(content, samples.numpy()) if out.suffix == ".npy" else np.savez(content, **named)
        replace_file(out, content.getvalue())
    elif out.suffix == ".png":
        image_grid(samples, out) if samples.ndim == 4 else png(points_figure({f"{len(samples)} samples": samples}), out)
    else:
        from PIL import Image

        out.mkdir(parents=True, exist_ok=True)
        digits = max(5, len(str(len(samples) - 1)))
        pixels = samples.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(out / f"{i:0{digits}d}.png")
