"""What a diffusers scheduler says of the network it was made for: its path, and what it predicts.

The scheduler's own tables and config are read, never its sampler: shifts, spacings and Karras grids move the steps of
sampling, not what the network means at a time.
"""

import inspect
from typing import Any

from fewstep.common.errors import unknown
from fewstep.flows.paths import Forward, Path, Reversed
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.tabulated import Tabulated

# How diffusers' schedulers name what a network predicts: on a diffusion schedule, and under the scaling of EDM.
PREDICTION_TYPES = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}
_ON_A_TABLE = {name: kind for kind, name in PREDICTION_TYPES.items()}
_ON_EDM = {"epsilon": "edm", "v_prediction": "v"}
_ON_THE_LINE = {"flow_prediction": "flow", "epsilon": "noise", "sample": "data"}
_ON_A_CIRCLE = {"v_prediction": "v"}
# Zero terminal SNR. Some schedulers write just 2^-24 there for their own divisions; others reach less in earnest.
_NO_SIGNAL = (0.0, 2**-24)


def kind_of(prediction: str, native: Path) -> str:
    """fewstep's name of what a network predicts, for diffusers' name of it: ``epsilon``, ``sample``, ``v_prediction``,
    ``flow_prediction``; any other as it is."""
    known = _ON_EDM if isinstance(native, Preconditioned) else {**_ON_A_TABLE, "flow_prediction": "flow"}
    return known.get(prediction, prediction)


# What the first versions of diffusers called a key of a scheduler's config: those of today pass it over in silence.
_TIMESTEPS, _PREDICTS_NOISE = "timesteps", "predict_epsilon"


def todays_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a scheduler with the keys of the first versions of diffusers under their names of today.

    ``timesteps`` (0.0.x) is ``num_train_timesteps``, and ``predict_epsilon: false`` (to 0.12) the prediction type
    "sample", where the key of today says nothing, or what it says by default.
    """
    unsaid = config.get("_use_default_values", ())  # what diffusers has put in by itself
    config = {key: value for key, value in config.items() if key not in ("_use_default_values", *unsaid)}
    steps, is_noise = config.pop(_TIMESTEPS, None), config.pop(_PREDICTS_NOISE, None)
    if steps is not None:
        config.setdefault("num_train_timesteps", steps)
    if is_noise is False and config.get("prediction_type", "epsilon") == "epsilon":
        config["prediction_type"] = "sample"
    return config


def schedule_of(scheduler: Any) -> tuple[Path, str]:
    """The path and the prediction kind of the network that a diffusers scheduler belongs to.

    * flow-match schedulers: the linear path, whose time runs from data to noise, or from noise to data
      (``invert_sigmas``);
    * those with ``use_flow_sigmas``: the same path, where the network predicts what ``prediction_type`` says;
    * EDM schedulers, and Euler with continuous timesteps: the scaling of arXiv 2206.00364;
    * Stable Audio's (``CosineDPMSolverMultistepScheduler``) and Dance Diffusion's (``IPNDMScheduler``), whose timesteps
      are the share of a right angle: the cosine schedule, with v. Where sampling ends (``sigma_min``) is no end of what
      the network knows;
    * any other with ``alphas_cumprod``: that table.

    Raises:
        ValueError: for a scheduler that is none of these, a prediction type that is not known, or a table whose last
            step has no signal at all (zero terminal SNR) beside a noise prediction, which says nothing there.
    """
    name, config = type(scheduler).__name__, scheduler.config
    _check_heard(name, config)
    prediction = config.get("prediction_type", "epsilon")
    steps = float(config.get("num_train_timesteps", 1000))
    if "FlowMatch" in name or "FlowMap" in name:
        return (Forward(steps), "velocity") if config.get("invert_sigmas") else (Reversed(steps), "flow")
    if has_flow_sigmas(scheduler) or prediction == "flow_prediction":
        if prediction == "v_prediction":
            raise ValueError(
                f"{name} with use_flow_sigmas and prediction_type: v_prediction contradicts itself: v is of schedules "
                "with alpha^2 + sigma^2 = 1. Say what the network predicts: flow_prediction, epsilon or sample"
            )
        return Reversed(steps), _kind(prediction, _ON_THE_LINE)
    if name.startswith("EDM"):
        native = Preconditioned(config.sigma_data, config.sigma_min, config.sigma_max)
        return native, _kind(prediction, _ON_EDM)
    if name == "IPNDMScheduler":
        return Cosine(), "v"
    if name.startswith("CosineDPM"):
        if config.sigma_data != 1:
            raise ValueError(f"{name} with sigma_data {config.sigma_data}: it is known with 1 alone")
        return Cosine(), _kind(prediction, _ON_A_CIRCLE)
    table = getattr(scheduler, "alphas_cumprod", None)
    if name == "SCMScheduler":
        raise ValueError(
            "the SCMScheduler is that of a consistency model (Sana-Sprint), which knows where trajectories end, and no "
            "velocity: draw from it with diffusers, and load the model that it was made from (Sana)"
        )
    if table is None:
        raise ValueError(
            f"{name} has no alphas_cumprod, and is no EDM and no flow-match scheduler: wrap the network by hand as "
            "NetworkField(network, path, prediction)"
        )
    kind = _kind(prediction, _ON_A_TABLE)
    if not len(table):
        raise ValueError(f"{name} has a schedule of no steps: num_train_timesteps is less than one")
    if config.get("timestep_type") == "continuous":
        if kind != "v":
            raise ValueError(f"{name} with continuous timesteps is known with v_prediction alone, not {prediction}")
        noise = ((1 - table) / table).sqrt()
        return Preconditioned(1.0, config.sigma_min or float(noise[0]), config.sigma_max or float(noise[-1])), kind
    if float(table[-1]) in _NO_SIGNAL:
        if kind == "noise":
            raise ValueError(
                f"the last of the {len(table)} steps of this {name} has no signal (zero terminal SNR), where a noise "
                "prediction says nothing: leave it out, NetworkField(network, "
                "Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod[:-1]), 'noise')"
            )
        table = table.clone()
        table[-1] = 0
    try:
        return Tabulated.from_alphas_cumprod(table), kind
    except ValueError as error:
        raise ValueError(f"the schedule of this {name} cannot be: {error}") from None


def has_flow_sigmas(scheduler: Any) -> bool:
    """Whether it goes by flow sigmas: configs keep keys of other classes, of which a class makes nothing."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return "use_flow_sigmas" in known and bool(scheduler.config.use_flow_sigmas)


def _check_heard(name: str, config: Any) -> None:
    """That diffusers made a scheduler of all that its config says."""
    said = todays_config(config)
    heard = {"num_train_timesteps": 1000, "prediction_type": "epsilon", **config}
    if wrong := [key for key in ("num_train_timesteps", "prediction_type") if said.get(key, heard[key]) != heard[key]]:
        raise ValueError(
            f"the config of this {name} says {wrong[0]} {said[wrong[0]]!r} under an old name, and diffusers passed "
            f"over it: {name}.from_config(fewstep.flows.schedules.todays_config(scheduler.config))"
        )


def _kind(prediction: str, known: dict[str, str]) -> str:
    if prediction not in known:
        raise unknown("prediction type", str(prediction), known)
    return known[prediction]
