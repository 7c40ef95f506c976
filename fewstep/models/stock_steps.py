"""How stock pipelines of diffusers draw with a consistency model: the scheduler, and the code that says how."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Reversed
from fewstep.flows.schedules import PREDICTION_TYPES
from fewstep.flows.signature import rate_of
from fewstep.flows.tabulated import Tabulated
from fewstep.flows.times import NATIVE
from fewstep.networks import Wan, WanExperts

_CARD = """\
# A consistency model as an adapter

It draws in 1 to 8 steps with the pipeline of its base, and beside other adapters. `FOLDER` is this one:

```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained(BASE)
pipe.load_lora_weights(FOLDER, adapter_name="fast")
{second}pipe.scheduler = diffusers.{scheduler}.from_pretrained(FOLDER, subfolder="scheduler")
# pipe.load_lora_weights(STYLE, adapter_name="style"); pipe.set_adapters(["fast", "style"], [1.0, 0.8])
{named} = pipe("{prompt}", {steps}).{drawn}
```
"""
_SECOND = """\
pipe.load_lora_weights(
    FOLDER, subfolder="transformer_2", adapter_name="fast", load_into_transformer_2=True
)
"""


def scheduler_of(model: FlowMap) -> Any:
    """The scheduler of diffusers that draws with a map which knows the way to t = 1 alone, by consistency sampling.

    Of a flow, ``FlowMatchLCMScheduler``, which goes by the ``sigmas = 1 - t`` that it is told; of a diffusion model
    with a table of steps, ``LCMScheduler`` with that very table.

    Raises:
        ValueError: diffusers has none for what the network speaks.
    """
    import diffusers

    match model.native, model.prediction:
        case Reversed(scale=steps), "flow":
            moved: dict[str, Any] = shift_config(model) if model.grid == NATIVE else {"shift": 1.0}
            return diffusers.FlowMatchLCMScheduler(num_train_timesteps=round(steps), **moved)
        case Tabulated(log_ratios=table, ends_in_noise=is_noise), ("noise" | "data" | "v") as kind:
            powers = [1.0, *(1 / (1 + math.exp(-2 * ratio)) for ratio in table), *[0.0] * is_noise]  # alpha^2
            betas = [1 - after / before for before, after in pairwise(powers)]
            kind = PREDICTION_TYPES[kind]
            return diffusers.LCMScheduler(num_train_timesteps=len(betas), trained_betas=betas, prediction_type=kind)
    raise ValueError(
        f"diffusers has no scheduler for consistency sampling with a network that predicts {model.prediction} on "
        f"{model.native}: leave second_time out, and export the pipeline that carries its own"
    )


def shift_config(model: Any) -> dict[str, Any]:
    """What the config of a flow-match scheduler of diffusers says of how a model's moves times; empty where nothing."""
    if (shift := model.shift) is None:
        return {}
    said = {"shift": shift.factor, "shift_terminal": shift.terminal}
    if shift.line is None:
        return said
    (few, low), (many, high) = shift.line
    return said | {
        "use_dynamic_shifting": True, "base_image_seq_len": few, "base_shift": low, "max_image_seq_len": many,
        "max_shift": high, "time_shift_type": shift.kind,
    }  # fmt: skip


def write_scheduler(model: FlowMap, folder: Path) -> None:
    """The scheduler and the card that stand beside such a model's adapter."""
    scheduler: Any = scheduler_of(model)
    scheduler.save_pretrained(folder / "scheduler")
    second = _SECOND if isinstance(model.network, WanExperts) else ""
    told = {"scheduler": type(scheduler).__name__, "steps": steps_of(model), **drawn_as(model)}
    (folder / "README.md").write_text(_CARD.format(second=second, **told))


def a_prompt(model: Any) -> str:
    """What a model of text may be asked for, in examples."""
    return "rain on a tin roof" if rate_of(model) is not None else "a photo of a cat"


def drawn_by(model: Any) -> str:
    """What the output of a model's pipeline is called."""
    if rate_of(model) is not None:
        return "audios"
    return "frames" if model.latents is not None and model.latents.is_video else "images"


def drawn_as(model: Any) -> dict[str, str]:
    """The words of an example's call: what it asks for, what that is named, and what it is called there."""
    drawn = drawn_by(model)
    return {"prompt": a_prompt(model), "drawn": drawn, "named": "audios" if drawn == "audios" else "images"}


def steps_of(model: FlowMap) -> str:
    """What such a pipeline is called with for four steps; those of Wan take no sigmas."""
    network: Any = model.network
    by_sigmas = isinstance(model.native, Reversed) and not isinstance(network, Wan)
    by_sigmas = by_sigmas and (model.grid != NATIVE or network.names_sigmas)
    steps = "sigmas=[1.0, 0.75, 0.5, 0.25]" if by_sigmas else "num_inference_steps=4"
    guidance = model.guidance or 3.5 if network.takes_guidance else 1.0  # told, as Flux.1-dev is; or none
    return f"{steps}, guidance_scale={guidance}"
