"""Wan 2.2 in its folder: two experts, and the timestep where the one takes over from the other."""

from pathlib import Path
from typing import Any

from torch import nn

from fewstep.common.errors import shown
from fewstep.common.model_files import class_of

SECOND = "transformer_2"


def boundary_of(folder: Path, index: dict[str, Any], scheduler: Any) -> float | None:
    """The timestep from which on the first expert answers, and below which the second does, as diffusers' pipelines
    have it; None for a pipeline of one model.

    Raises:
        FileNotFoundError: the second expert is not there.
        ValueError: no boundary, or none between data and noise.
    """
    ratio: Any = index.get("boundary_ratio")
    is_named = (index.get(SECOND) or [None])[0] is not None
    if ratio is None and not is_named and not (folder / SECOND / "config.json").is_file():
        return None
    what = f"the {class_of(index)} in {folder}"
    if not (folder / SECOND / "config.json").is_file():
        raise FileNotFoundError(
            f"{what} samples with {SECOND} too, and {folder / SECOND} is not there: fetch it. To take transformer by "
            "itself all the same, copy transformer/ and scheduler/ to a folder of their own, without model_index.json"
        )
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ValueError(
            f"{what} has a {SECOND}, and its boundary_ratio is {shown(ratio)}: say in model_index.json where it takes "
            "over, a share of the timesteps between 0 and 1 (0.875 for Wan 2.2 from text, 0.9 from images)"
        )
    return ratio * scheduler.config.get("num_train_timesteps", 1000)


def models_of(model: Any) -> dict[str, Any]:
    """The models that a network's model is in diffusers, by the names of their folders: one but for two experts."""
    if isinstance(getattr(model, SECOND, None), nn.Module):
        return {"transformer": model.transformer, SECOND: model.transformer_2}
    return {"unet" if "UNet" in type(model).__name__ else "transformer": model}


def boundary_said(model: Any, scheduler: Any) -> dict[str, float]:
    """What ``model_index.json`` says of the boundary between two experts; nothing for one model."""
    boundary = model.config.get("boundary_timestep")
    return {} if boundary is None else {"boundary_ratio": boundary / scheduler.config["num_train_timesteps"]}
