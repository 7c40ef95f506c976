"""How the scheduler of a flow-match model moves the times of its steps, read from its config."""

import inspect
from collections.abc import Mapping
from typing import Any

from fewstep.flows.schedules import has_flow_sigmas
from fewstep.networks import OfDiffusers
from fewstep.pipelines.arguments import side_step
from fewstep.pipelines.shifts import Shift

__all__ = ["Shift", "shift_of", "shift_said"]

# Those that go by the noise levels of flow-match models, as their pipelines name them or they have them by themselves.
_FLOW_MATCH = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
_SPACED_OTHERWISE = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "invert_sigmas",
)


def shift_said(said: Mapping[str, Any]) -> Shift:
    """A shift as a file has it, ``dataclasses.asdict`` in JSON."""
    line = said.get("line")
    return Shift(**{**said, "line": line and tuple(map(tuple, line))})


def shift_of(scheduler: Any, network: Any = None) -> Shift | None:
    """How a flow-match scheduler, or another with ``use_flow_sigmas``, moves times; None for any other, and for one
    whose steps are spaced otherwise (Karras, exponential, beta) or run from noise to data.

    Args:
        network: of the model, which knows of its pipeline where the steps end, and how tokens become mu.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if any(config.get(key) for key in _SPACED_OTHERWISE) or "Inverse" in name:
        return None
    inner = network if isinstance(network, OfDiffusers) else None
    side = 1 if inner is None else None if inner.counts_channels else side_step(inner.model.config)
    if name == "FlowMapEulerDiscreteScheduler":
        return Shift(float(config.get("shift", 1.0)), side=side)
    has_flow = has_flow_sigmas(scheduler)
    if name not in _FLOW_MATCH and not has_flow:
        return None
    line, is_dynamic = None, bool(config.get("use_dynamic_shifting"))
    if is_dynamic and inner is None:
        return None
    if is_dynamic:
        (few, low), (many, high) = line = (
            (config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)),
            (config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)),
        )
        if None in (low, high) or few == many:
            return None
    factor, last = float(config.get("flow_shift" if has_flow else "shift", 1.0)), 1 / config["num_train_timesteps"]
    levels: dict[str, float] = {}
    is_named = inner is None or inner.names_sigmas
    takes_named = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if has_flow and not (takes_named and inner is not None and is_named):
        levels = {"after": last} if takes_named else {"most": 1 - last}  # UniPC, and all others
    elif not is_named:  # those of the scheduler, which moves its last one twice
        levels = {"least": last if is_dynamic else factor * last / (1 + (factor - 1) * last)}
    kind, terminal = config.get("time_shift_type", "exponential"), config.get("shift_terminal")
    return Shift(
        factor, line, kind, terminal, by_steps=getattr(network, "code", "") == "flux2", side=side, **levels
    )  # fmt: skip
