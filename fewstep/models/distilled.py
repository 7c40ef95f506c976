"""Networks that were distilled for a few steps, told apart from those that know the velocity of a flow.

An LCM, a Turbo or a Lightning model has the class and the config of an ordinary diffusion model, and predicts something
else: where a trajectory ends, not where it goes. As a teacher it would be read as a velocity, and the student would
learn nonsense. (A model that was distilled to be told the strength of guidance, as Flux.1-dev, still is a velocity.)
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewstep.common.model_files import read_json

# By the class of the scheduler that the model comes with.
_SCHEDULERS = {
    "LCMScheduler": "a latent consistency model (LCM)",
    "FlowMatchLCMScheduler": "a latent consistency model (LCM)",
    "TCDScheduler": "a trajectory consistency model (TCD)",
    "FlowMapEulerDiscreteScheduler": "a flow map",
}
# Those that Turbo, Lightning and Hyper models come with, where they begin at the last step of the schedule.
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# By a word of its name, between signs that are no letters.
_NAMES = {
    "lcm": "a latent consistency model (LCM)",
    "tcd": "a trajectory consistency model (TCD)",
    "turbo": "a Turbo model",
    "lightning": "a Lightning model",
    "hyper": "a Hyper-SD model",
    "schnell": "a schnell model",
    "sprint": "a Sana-Sprint model",
    "causvid": "a CausVid model",
    "fastwan2": "a FastWan model",
    "dmd": "a model of distribution matching distillation (DMD)",
    "dmd2": "a model of distribution matching distillation (DMD)",
}


def distilled_as(folder: Path, model: Path, scheduler: Any) -> str:
    """What the model of a diffusers folder was distilled into for a few steps, and how that is known; empty for an
    ordinary one.

    Args:
        model: the folder of its network.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in _SCHEDULERS:
        return f"{_SCHEDULERS[name]}: its scheduler is the {name}"
    if read_json(model / "config.json").get("use_meanflow") is True:  # HunyuanImage's
        return "a flow map: its config has use_meanflow, a second time of its own"
    if read_json(folder / "model_index.json").get("is_distilled") is True:  # Flux.2 klein's
        return "a model for a few steps: its model_index.json says is_distilled"
    if words := [word for called in _called(folder, model) for word in _words(called) if word in _NAMES]:
        return f"{_NAMES[words[0]]}: {words[0]!r} is in its name"
    if name in _EULER and config.get("timestep_spacing") == "trailing" and _is_of_noise(config):
        return f"a model for a few steps, as Turbo and Lightning are: its {name} has timestep_spacing: trailing"
    return ""


def _is_of_noise(config: Any) -> bool:
    """Whether a scheduler is of an ordinary schedule, on which nothing else asks for steps from its very end."""
    is_v = config.get("prediction_type") not in ("epsilon", "sample")
    return not (is_v or config.get("rescale_betas_zero_snr") or config.get("timestep_type") == "continuous")


def _called(folder: Path, model: Path) -> Iterable[str]:
    """The names of a model: that of its folder or its repository on the hub, and those that it was saved from."""
    parts = folder.resolve().parts
    hub = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    yield hub[-1] if hub else folder.resolve().name
    for file in (folder / "model_index.json", model / "config.json"):
        yield str(read_json(file).get("_name_or_path", "")).rstrip("/").rpartition("/")[2]


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
