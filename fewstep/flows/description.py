"""A model in words: what it takes to make it anew, before its weights are loaded.

The runs that ``fewstep.fit`` leaves from Python are opened by it, and exports of networks that diffusers does not have.
A network of one's own is named by its class or function, ``FILE.py:NAME`` or ``MODULE:NAME``, and the options that this
takes: those it was made with where a recipe named it, else its ``config``, a mapping, where it has one. Naming it is
naming code: whoever reads a description that came with a folder asks ``fewstep.common.trust`` first
(:func:`code_named`).
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import briefly, refused, shown, unknown
from fewstep.common.model_files import check_numbers
from fewstep.common.options import arguments, find_object
from fewstep.common.parsing import checked
from fewstep.common.trust import is_code
from fewstep.flows.chained import ChainedPath
from fewstep.flows.described import AGAIN, Described
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Forward, Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.products import Product
from fewstep.flows.reflected import Reflected
from fewstep.flows.scheduler_classes import scheduler_class
from fewstep.flows.shifts import shift_said
from fewstep.flows.spaces import Box, Euclid, Space, Tokens, Torus
from fewstep.flows.tabulated import Tabulated
from fewstep.flows.token_times import Deciding
from fewstep.networks import (
    FAMILIES,
    MLP,
    STUDENTS,
    ContinuousUNet,
    Conv1dNet,
    OfDiffusers,
    ParallelTimes,
    SequenceTransformer,
    stock_model,
    two_time_model,
    with_second_time,
)
from fewstep.networks.configs import public_config

_MAKER, _WHERE = "_made_by", "the description of a model"
_SAID_OF_OWN = ("name", "options", "told_guidance")
_CONFIG = "its {name} cannot be made anew from its config, the mapping network.config of what its class takes"
# The networks of fewstep's own.
NETWORKS: dict[str, type[nn.Module]] = {
    c.__name__: c for c in (ContinuousUNet, Conv1dNet, MLP, ParallelTimes, SequenceTransformer)
}
_TRAJECTORIES: dict[str, type[Any]] = {
    c.__name__: c
    for c in (
        ChainedPath,
        Cosine,
        Deciding,
        Forward,
        Interpolant,
        Linear,
        Preconditioned,
        Reflected,
        Reversed,
        Tabulated,
        Trigonometric,
        VariancePreserving,
    )
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
        **({"grid": model.grid} if is_map and model.grid != "uniform" else {}),
        **(
            {}
            if model.shift is None or isinstance(model, DiffusionField)
            else {"shift": dataclasses.asdict(model.shift)}
        ),
        **({"class_names": list(model.class_names)} if model.class_names else {}),
        **_shape(model.network),
        **({} if isinstance(model.space, Euclid) else {"space": space_said(model.space)}),
        **({"scheduler": _scheduler(model.scheduler)} if isinstance(model, DiffusionField) else {}),
    }


def check_description(config: Mapping[str, Any], where: str) -> None:
    """That what a file says is a description.

    Raises:
        ValueError: it is none, by the first key that is wrong.
    """
    checked(Described, config, where, AGAIN)


def code_named(config: Mapping[str, Any]) -> dict[str, str]:
    """The code that a description names, by its key."""
    names = {key: str(config.get(key, {}).get("name", "")) for key in ("network", "native", "path")}
    return {key: name for key, name in names.items() if is_code(name)}


def set_maker(network: nn.Module, name: str, options: Mapping[str, Any], **second_time: Any) -> None:
    """Note on a network what it was made by, and how it got its second time where fewstep gave it."""
    vars(network)[_MAKER] = {"name": _in_full(name), "options": dict(options), **second_time}


def maker_of(network: nn.Module) -> dict[str, Any] | None:
    """What :func:`set_maker` noted; None where nothing did."""
    return vars(network).get(_MAKER)


def made_again(config: Mapping[str, Any], where: str = _WHERE) -> FlowMap | NetworkField:
    """The model of a description, with weights that mean nothing yet.

    Args:
        where: the file that it is from, for errors.

    Raises:
        ValueError: a class that fewstep does not know, or what no class can be made with.
    """
    check_description(config, where)
    is_map = config["_class_name"] == "FlowMap"
    network, native, path = _network_of(config["network"], is_map, where), config["native"], config["path"]
    model: FlowMap | NetworkField
    if config.get("scheduler"):
        model = DiffusionField(network, _scheduler_of(config["scheduler"], where), path=_trajectory_of(path, where))
    else:
        kind = FlowMap if is_map else NetworkField
        paths = _trajectory_of(native, where), _trajectory_of(path, where)
        space = space_of(config["space"], where) if config.get("space") else None
        model = kind(network, paths[0], config["prediction"], path=paths[1], space=space)
    model.class_names = tuple(config.get("class_names", ()))
    if config.get("shape"):
        say_shape(model, config["shape"])
    if isinstance(model, FlowMap):
        model.gamma, model.guidance = config.get("gamma", 0.0), config.get("guidance")
        model.grid = config.get("grid", "uniform")
    if config.get("shift"):
        model.shift = shift_said(config["shift"])
    return model


def _network(network: Any) -> dict[str, Any]:
    name = type(network).__name__
    if name in NETWORKS:
        return {"name": name, "options": network.config}
    if isinstance(network, OfDiffusers):
        model: Any = network.model
        size = {"size": network.size} if hasattr(network, "size") else {}
        return {"name": name, "model": type(model).__name__, "config": _plain(public_config(model)), **size}
    if maker := maker_of(network):
        return maker
    options = getattr(network, "config", {})
    options = dict(options) if isinstance(options, Mapping) else {}
    try:
        options = json.loads(json.dumps(options))
    except TypeError:
        raise ValueError(f"the config of its {name} is not of plain values, which can be written down") from None
    found = {"name": _name_of(type(network)), "options": options}
    try:
        made = _own(found)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{_CONFIG.format(name=name)} ({briefly(error)})") from None
    if {k: v.shape for k, v in made.state_dict().items()} != {k: v.shape for k, v in network.state_dict().items()}:
        raise ValueError(f"{_CONFIG.format(name=name)}, and has other weights")
    return found


def _shape(network: Any) -> dict[str, Any]:
    """The shape of one sample, of a network whose class need not say it."""
    return {"shape": list(network.shape)} if not _is_ours(network) and hasattr(network, "shape") else {}


def say_shape(model: Any, shape: Sequence[int]) -> None:
    """Note the shape of one sample on a network of one's own, where that does not say it itself."""
    if not _is_ours(model.network) and not hasattr(model.network, "shape"):
        vars(model.network)["shape"] = tuple(shape)


def _is_ours(network: nn.Module) -> bool:
    return isinstance(network, OfDiffusers) or type(network).__name__ in NETWORKS


def _own(config: Mapping[str, Any]) -> nn.Module:
    """A network of one's own, made anew."""
    with torch.random.fork_rng([]):
        network = find_object(config["name"], nn.Module)(**config["options"])
    if not isinstance(network, nn.Module):
        raise ValueError(f"{config['name']!r} gave a {type(network).__name__}, not a network")
    if "told_guidance" in config:
        network = with_second_time(network, config["told_guidance"])
    return network


def _name_of(kind: type) -> str:
    """The name that leads to a class: of its file, or of its module where that is part of a package."""
    try:
        file = "" if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__ else inspect.getfile(kind)
    except (TypeError, OSError):  # made where there is no file
        file = ""
    if not file:
        raise ValueError(f"its {kind.__name__} is made in the running script: put the class in a file of its own")
    is_file = "." not in kind.__module__ and not file.endswith("__init__.py")
    return f"{Path(file).resolve()}:{kind.__qualname__}" if is_file else f"{kind.__module__}:{kind.__qualname__}"


def _in_full(name: str) -> str:
    """A name of code with the whole path of its file."""
    file, _, inside = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{inside}" if file.endswith(".py") else name


def _network_of(config: Mapping[str, Any], is_map: bool, where: str) -> nn.Module:
    if is_code(config["name"]):
        network = _own(config)
        # So that it can be described again, whatever it keeps of its options itself.
        set_maker(network, **{key: value for key, value in config.items() if key in _SAID_OF_OWN})
        return network
    if "model" not in config:
        if config["name"] not in NETWORKS:
            raise unknown("network", config["name"], NETWORKS)
        own = NETWORKS[config["name"]]
        return own(**arguments(f"{where}: network.options", own, config["options"]))
    name = config["model"]
    stock = name.removeprefix("TwoTime")
    family = FAMILIES.get(stock)
    if family is None:
        raise unknown("model of diffusers", name, FAMILIES)
    made: Any = two_time_model(stock) if stock != name else stock_model(name)
    check_numbers(config.get("config", {}), f"{where}: network.config")
    with refused(f"{where}: diffusers cannot make the {name} that it describes", AGAIN):
        network: Any = (STUDENTS[family] if is_map else family)(made.from_config(config["config"]))
    if "size" in config:
        network.size = tuple(config["size"]) if isinstance(config["size"], list) else config["size"]
    return network


def _scheduler(scheduler: Any) -> dict[str, Any]:
    return {"name": type(scheduler).__name__, "config": _plain(public_config(scheduler))}


def _scheduler_of(config: Mapping[str, Any], where: str) -> Any:
    import diffusers

    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if config["name"] not in known:
        raise ValueError(f"diffusers has no scheduler {shown(config['name'])}: it was written by another version")
    check_numbers(config["config"], f"{where}: scheduler.config")
    with refused(f"{where}: diffusers cannot make the {config['name']} that it describes", AGAIN):
        return scheduler_class(config["name"]).from_config(config["config"])


def _trajectory(path: Trajectory) -> dict[str, Any]:
    is_own = _TRAJECTORIES.get(type(path).__name__) is not type(path)
    return {"name": _name_of(type(path)) if is_own else type(path).__name__, "options": dataclasses.asdict(path)}  # pyright: ignore[reportArgumentType]


def _trajectory_of(config: Mapping[str, Any], where: str) -> Trajectory:
    name = config["name"]
    if not is_code(name) and name not in _TRAJECTORIES:
        raise unknown("path", name, _TRAJECTORIES)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config["options"].items()}
    made = find_object(name, Trajectory) if is_code(name) else _TRAJECTORIES[name]
    return made(**arguments(f"{where}: options of {name}", made, options))


_SPACES: dict[str, type[Any]] = {"box": Box, "torus": Torus, "tokens": Tokens}


def space_said(space: Space) -> dict[str, Any]:
    """A space by its name and options, as JSON keeps it."""
    if isinstance(space, Product):
        return {"name": "product", "options": {"parts": [[space_said(one), list(shape)] for one, shape in space.parts]}}
    name = next((name for name, kind in _SPACES.items() if type(space) is kind), "euclid")
    return {"name": name, "options": dataclasses.asdict(space)}


def space_of(config: Mapping[str, Any], where: str) -> Space:
    """The space of a name and options.

    Raises:
        ValueError: a name that is not known, or options that it does not take.
    """
    name, options = config["name"], dict(config.get("options", {}))
    if name == "euclid":
        return Euclid()
    if name == "product":
        try:
            return Product(tuple((space_of(one, where), tuple(shape)) for one, shape in options["parts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: a product has parts, each [space, shape] ({briefly(error)})") from None
    if name not in _SPACES:
        raise unknown("space", name, ("euclid", *_SPACES, "product"))
    if isinstance(options.get("symbols"), list):
        return Tokens(tuple(map(str, options["symbols"])))
    return _SPACES[name](**arguments(f"{where}: space", _SPACES[name], options))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back; what JSON has no form for makes no model."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not isinstance(value, Tensor)}))
