"""A model in words: what it takes to make it anew, before its weights are loaded.

The runs that ``fewstep.fit`` leaves from Python are opened by it, and exports of networks that diffusers does not have.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewstep.errors import unknown
from fewstep.fields import DiffusionField, NetworkField
from fewstep.maps import FlowMap
from fewstep.networks import FAMILIES, MLP, STUDENTS, two_times
from fewstep.networks.unet import OfDiffusers, public_config
from fewstep.paths import Forward, Linear, Preconditioned, Reversed, Tabulated, Trigonometric, VariancePreserving
from fewstep.paths import Path as Trajectory

# The networks of fewstep's own.
NETWORKS: dict[str, type[nn.Module]] = {"MLP": MLP}
_TRAJECTORIES: dict[str, type[Any]] = {
    c.__name__: c for c in (Forward, Linear, Preconditioned, Reversed, Tabulated, Trigonometric, VariancePreserving)
}


def describe(model: Any) -> dict[str, Any]:
    """What :func:`made_again` makes the model from, as JSON; its weights are not in it.

    Raises:
        ValueError: it cannot be said in words; the message says what is missing.
    """
    if not isinstance(model, FlowMap | NetworkField):
        raise ValueError(f"a {type(model).__name__} is no FlowMap or NetworkField")
    is_map = isinstance(model, FlowMap)
    return {
        "_class_name": "FlowMap" if is_map else "NetworkField",
        "network": _network(model.network),
        "native": _trajectory(model.native),
        "prediction": model.prediction,
        "path": _trajectory(model.path),
        **({"gamma": model.gamma, "guidance": model.guidance} if is_map else {}),
        **({"scheduler": _scheduler(model.scheduler)} if isinstance(model, DiffusionField) else {}),
    }


def made_again(config: Mapping[str, Any]) -> FlowMap | NetworkField:
    """The model of a description, with weights that mean nothing yet.

    Raises:
        ValueError: a class that fewstep does not know.
    """
    is_map = config["_class_name"] == "FlowMap"
    network, native, path = _network_of(config["network"], is_map), config["native"], config["path"]
    model: FlowMap | NetworkField
    if config.get("scheduler"):
        model = DiffusionField(network, _scheduler_of(config["scheduler"]), path=_trajectory_of(path))
    else:
        kind = FlowMap if is_map else NetworkField
        model = kind(network, _trajectory_of(native), config["prediction"], path=_trajectory_of(path))
    if isinstance(model, FlowMap):
        model.gamma, model.guidance = config.get("gamma", 0.0), config.get("guidance")
    return model


def _network(network: Any) -> dict[str, Any]:
    name = type(network).__name__
    if name in NETWORKS:
        return {"name": name, "options": network.config}
    if isinstance(network, OfDiffusers):
        model: Any = network.model
        size = {"size": network.size} if hasattr(network, "size") else {}
        return {"name": name, "model": type(model).__name__, "config": _plain(public_config(model)), **size}
    raise ValueError(f"{name} is neither a network of fewstep's nor one of diffusers' models")


def _network_of(config: Mapping[str, Any], is_map: bool) -> nn.Module:
    if "model" not in config:
        if config["name"] not in NETWORKS:
            raise unknown("network", config["name"], NETWORKS)
        return NETWORKS[config["name"]](**config["options"])
    import diffusers

    name = config["model"]
    family = FAMILIES.get(name.removeprefix("TwoTime"))
    if family is None:
        raise unknown("model of diffusers", name, FAMILIES)
    made = getattr(two_times if name.startswith("TwoTime") else diffusers, name)
    network: Any = (STUDENTS[family] if is_map else family)(made.from_config(config["config"]))
    if "size" in config:
        network.size = tuple(config["size"]) if isinstance(config["size"], list) else config["size"]
    return network


def _scheduler(scheduler: Any) -> dict[str, Any]:
    return {"name": type(scheduler).__name__, "config": _plain(public_config(scheduler))}


def _scheduler_of(config: Mapping[str, Any]) -> Any:
    import diffusers

    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if config["name"] not in known:
        raise ValueError(f"diffusers has no scheduler {config['name']!r}: it was written by another version")
    return getattr(diffusers, config["name"]).from_config(config["config"])


def _trajectory(path: Trajectory) -> dict[str, Any]:
    if _TRAJECTORIES.get(type(path).__name__) is not type(path):
        raise ValueError(f"its path {type(path).__name__} is none of fewstep's")
    return {"name": type(path).__name__, "options": dataclasses.asdict(path)}  # pyright: ignore[reportArgumentType]


def _trajectory_of(config: Mapping[str, Any]) -> Trajectory:
    if config["name"] not in _TRAJECTORIES:
        raise unknown("path", config["name"], _TRAJECTORIES)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config["options"].items()}
    return _TRAJECTORIES[config["name"]](**options)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back; what JSON has no form for makes no model."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not isinstance(value, Tensor)}))
