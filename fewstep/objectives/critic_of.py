"""Critics by name, and what can be known of a critic before anything is computed."""

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fewstep.common.errors import briefly, is_out_of_memory, refused, unknown
from fewstep.common.options import arguments, find_object
from fewstep.common.randomness import generator
from fewstep.common.trust import is_code
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import blank_conditions, classes_of, device_of, needed_conditions, network_of, shape_of
from fewstep.networks import ConvCritic, MLPCritic
from fewstep.objectives.diffused import Diffused
from fewstep.objectives.teacher_critic import TeacherCritic, recording

CRITICS: dict[str, Any] = {"conv": ConvCritic, "mlp": MLPCritic, "teacher": TeacherCritic}
_GIVEN = ("teacher", "level", "classes", "cond")  # what no option says
_SMALLEST = 8  # sides of images for conv


def check_name(wanted: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a critic and its options, of a name or a mapping with one.

    Raises:
        ValueError: a critic that is not known, or an option that it does not take.
        FileNotFoundError: there is no such file of code.
    """
    options = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    name = str(options.pop("name", "auto"))
    if is_code(name):
        return name, arguments("objective.critic", find_object(name, nn.Module), options)
    if name != "auto" and name not in CRITICS:
        raise unknown("critic", name, ("auto", *CRITICS, "FILE.py:FUNCTION"))
    if name == "auto" and options:
        raise ValueError(f"critic has options ({', '.join(options)}) and no name: say which it is, such as name: conv")
    if name != "auto":
        arguments("objective.critic", CRITICS[name], {"shape": (), **options} if name != "teacher" else options, _GIVEN)
    return name, options


def critic_of(
    wanted: str | Mapping[str, Any], student: FlowMap, teacher: VelocityField | None, level: bool
) -> nn.Module:
    """The critic that is wanted, for the samples of a student.

    Args:
        level: it is to be told the noise on its rows.

    Raises:
        ValueError: a critic that is not known or does not fit these samples, a student that does not say what they look
            like, no teacher for the critic ``teacher``.
    """
    name, options = check_name(wanted)
    if is_code(name):
        with refused(f"objective.critic: {name} cannot be made of these options"):
            made = find_object(name, nn.Module)(**options)
        if not isinstance(made, nn.Module):
            raise ValueError(f"{name} gave a {type(made).__name__}, and a critic is a torch module")
        return made
    if name == "teacher":
        if teacher is None:
            raise ValueError("the critic teacher is made of the teacher's network, and there is no teacher: take conv")
        return TeacherCritic(teacher, **options)
    shape = tuple(options.pop("shape", ())) or _shape_of(student, teacher)
    if name == "auto":
        name = "conv" if len(shape) == 3 and min(shape[1:]) >= _SMALLEST else "mlp"
    return CRITICS[name](shape, **{"classes": classes_of(student), **({"level": True} if level else {}), **options})


def _shape_of(student: FlowMap, teacher: VelocityField | None) -> tuple[int, ...]:
    for model in (student, *([] if teacher is None else [teacher])):
        with suppress(ValueError):
            return shape_of(model)
    raise ValueError(
        f"the network {type(network_of(student)).__name__} does not say what its samples look like: say it to the "
        "critic, critic: {name: conv, shape: [3, 32, 32]}, or pass a critic of your own"
    )


def conditions_of(critic: nn.Module, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those conditions that a critic takes: all that its ``forward`` names, or all where it takes any."""
    inner = critic.critic if isinstance(critic, Diffused) else critic
    taken = inspect.signature(getattr(inner, "_orig_mod", inner).forward).parameters  # as it was before torch.compile
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return dict(cond)
    return {name: value for name, value in cond.items() if name in taken}


def example_rows(student: FlowMap, rows: int = 4) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Rows like a student's samples, and conditions like theirs; None where its network does not say what they are."""
    try:
        shape = shape_of(student)
    except ValueError:
        return None
    cond = blank_conditions(student, shape, rows)
    if set(needed_conditions(student)) - set(cond):
        return None
    return torch.linspace(-1, 1, rows).reshape(-1, *[1] * len(shape)).expand(rows, *shape), cond


def type_of(critic: nn.Module) -> torch.dtype:
    """The type of a critic's weights, which its rows are to have."""
    return next((p.dtype for p in critic.parameters() if p.is_floating_point()), torch.float32)


def check_rows(critic: nn.Module, x: Tensor, cond: Mapping[str, Tensor]) -> None:
    """That a critic takes rows like these.

    Raises:
        ValueError: it fails on them, or does not give a logit a row.
    """
    device = device_of(critic)
    x = x.to(device, type_of(critic))
    told = conditions_of(critic, {name: value.to(device) for name, value in cond.items()})
    if (draws := getattr(critic, "draws", None)) is not None:
        told |= draws(x, generator(0))
    try:
        with torch.no_grad():
            logits = critic(x, **told)
    except Exception as error:  # whatever the user's code makes of rows that do not fit
        if is_out_of_memory(error):
            raise
        beside = f" with {', '.join(told)}" if told else ""
        raise ValueError(
            f"the critic {_name(critic)} does not take rows of shape {tuple(x.shape)}{beside} ({briefly(error)})"
        ) from error
    check_logits(critic, logits, len(x))


def last_weight(student: FlowMap) -> str:
    """The name of the weight that trains and runs last; of a network that does not say what its rows are, the weight
    that was registered last."""
    weights = {name: p for name, p in student.named_parameters() if p.requires_grad and p.ndim > 1}
    example = example_rows(student, 1)
    if example is None:
        return list(weights)[-1]
    device, dtype = device_of(student), next(iter(student.parameters())).dtype
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    x, cond = example
    with torch.no_grad(), recording(student, modules) as seen:
        student(x.to(device, dtype), 0.0, 1.0, **{name: value.to(device) for name, value in cond.items()})
    return next(name for name in weights if name.rpartition(".")[0] == list(seen)[-1])


def _name(critic: nn.Module) -> str:
    inner = critic.critic if isinstance(critic, Diffused) else critic
    return type(getattr(inner, "_orig_mod", inner)).__name__


def check_logits(critic: nn.Module, logits: Any, rows: int) -> None:
    """That a critic gave one number a row.

    Raises:
        ValueError: it gave something else.
    """
    if isinstance(logits, Tensor) and logits.shape == (rows,):
        return
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    way = ""
    if isinstance(logits, Tensor) and logits.ndim and len(logits) == rows:
        way = ": end its forward by .flatten(1).mean(1)"
    raise ValueError(
        f"the critic {_name(critic)} gave {given} for {rows} rows, and one logit a row is wanted, ({rows},){way}"
    )


def check_critic(critic: nn.Module) -> None:
    """Warn of batch norms, and refuse a critic that does not train.

    Raises:
        ValueError: no parameter of it trains.
    """
    name = type(critic).__name__
    if not any(p.requires_grad for p in critic.parameters()):
        raise ValueError(f"the critic {name} has no parameter with requires_grad: there is nothing to train")
    if any(isinstance(part, _BatchNorm) for part in critic.modules()):
        warnings.warn(
            f"the critic {name} has batch norms: real and made rows are judged apart, each with the statistics of its "
            "own rows (and of its own process), which can tell them apart by themselves. Take GroupNorm, or no norm",
            stacklevel=3,
        )
