"""The networks of flow maps, ``net(x, s, t, **cond)``, made of those of a field; both times in timesteps of the model.

They start as the network that they are made of: at s = t they predict what it does, to the last bit, and its weights
keep their names.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.networks.configs import keep_facts, public_config
from fewstep.networks.families import ENDS, STUDENTS, UNet, two_time_model
from fewstep.networks.frozen_base import take_packed
from fewstep.networks.two_times.base import SECOND_TIMES


def gains_second_time(network: nn.Module) -> bool:
    """Whether :func:`with_second_time` can give this network one."""
    return type(network) in STUDENTS or getattr(network, "with_second_time", None) is not None


def with_second_time(
    network: nn.Module,
    guidance: bool | str = False,
    second_time: str = "t",
    *,
    share: bool = False,
    late_share: float | None = None,
) -> nn.Module:
    """A copy of a field's network with a second time that is silent: ``net(x, s, s) == network(x, s)`` to the bit.

    Args:
        guidance: give it an input for the strength of guidance too, the condition ``guidance`` (B,), as silent; or
            ``interval``: for the strength and the times between which it acts, (B, 3).
        second_time: how the second time goes in: t, span or late (see ``fewstep.networks.two_times``); or none: the
            network of a map that knows the way to t = 1 alone, which stays the model that it is. A model that has a
            second time by itself stays as it is, and that goes in where the model takes it.
        late_share: the share of the blocks that are told t where the second time is ``late``.
        share: have it use the very weights of ``network``, which are frozen: for a student of which an adapter alone
            is trained.

    Raises:
        ValueError: for a network that is not of fewstep's families; the message shows the way by hand. A model that
            has no room for what is asked.
    """
    if second_time not in (*SECOND_TIMES, "none"):
        raise unknown("second_time", second_time, (*SECOND_TIMES, "none"))
    if type(network) in STUDENTS and (second_time == "none" or network.has_second_time):
        return _as_it_is(network, guidance, second_time, share)
    if type(network) in STUDENTS:
        more = {"second_time": second_time, "told_guidance": guidance, "late_share": late_share}
        return _student_of(network, more, share)
    make = getattr(network, "with_second_time", None)
    if make is None:
        raise ValueError(
            f"{type(network).__name__} has no second time and fewstep cannot add one: write a copy of its class that "
            "takes (x, s, t), adds SecondTime(dim)(t) to its time embedding, and pass an instance as "
            "FlowMap.from_field(field, network=...); the teacher's weights are loaded by name"
        )
    if second_time != "t":
        raise ValueError(f"second_time: {second_time} is for models of diffusers, a {type(network).__name__} is told t")
    if late_share is not None:
        raise ValueError(f"late_share is {late_share}: it belongs to second_time: late, of models of diffusers")
    return make(guidance=guidance) if guidance else make()


def _student_of(network: Any, more: dict[str, Any], share: bool) -> nn.Module:
    teacher = network.model
    _check_time(teacher)
    config = public_config(teacher)
    is_plain = more == {"second_time": "t", "told_guidance": False, "late_share": None}
    is_stock = isinstance(network, UNet) and is_plain and not network.classes
    if is_stock and config["class_embed_type"] is None:
        make: Any = type(teacher)
        options = {**config, "class_embed_type": "timestep"}
    else:
        make = two_time_model(type(teacher).__name__)
        options = {**config, **more}
    with torch.device("meta"):
        model = make.from_config(options)
    keep_facts(model, teacher)
    _take_weights(model, teacher, share)
    student = STUDENTS[type(network)](model)
    if hasattr(network, "size"):
        student.size = network.size
    # The teacher's mode too: dropout that is off in one and on in the other would part them.
    return student.train(teacher.training)


def _as_it_is(network: Any, guidance: bool | str, second_time: str, share: bool) -> nn.Module:
    """A copy of a field's network as that of a map to t = 1, or of the map that its model is by itself."""
    if guidance:
        raise ValueError("second_time: none leaves a model as it is, with no input for guidance: leave guidance out")
    weights = list(network.parameters()) if share else []
    if second_time not in ("none", "t"):
        name = type(network.model).__name__
        raise ValueError(f"this {name} has a second time of its own, as it was distilled: leave second_time out")
    kinds = ENDS if second_time == "none" else STUDENTS
    student = kinds[type(network)](deepcopy(network.model, {id(weight): weight for weight in weights}))
    if hasattr(network, "size"):
        student.size = network.size
    # Those of a teacher that is frozen already train in its student; what both share does not.
    for weight in student.parameters():
        weight.requires_grad_(not share)
    return student.train(network.training)


def _check_time(model: Any) -> None:
    """That a model's time can be any number from that of pure noise to that of clean data.

    Raises:
        ValueError: it takes the logarithm of it, or looks it up in a table.
    """
    project, name = getattr(model, "time_proj", None), type(model).__name__
    if getattr(project, "log", False):
        raise ValueError(
            f"a {name} with time_embedding_type: fourier takes the logarithm of its time, and that of clean data is 0: "
            "a student needs one with a positional time embedding"
        )
    if isinstance(project, nn.Embedding):
        raise ValueError(
            f"a {name} with time_embedding_type: learned knows whole timesteps alone, and a flow map is asked between "
            "them: a student needs one with a positional time embedding"
        )


def _take_weights(model: Any, teacher: Any, share: bool) -> None:
    """Give a new model the weights of its teacher, and to what is new those of the time embedding beside it, with a
    last layer of zeros."""
    from fewstep.networks.two_times.rows import LabelAndTimes

    take_packed(model, teacher)
    weights = teacher.state_dict(keep_vars=share)
    buffers = dict(teacher.named_buffers())
    for name, part in list(model.named_modules()):
        if isinstance(part, LabelAndTimes):  # holds the class embedding of the teacher, if that has one
            old = [key for key in weights if key.startswith(f"{name}.")]
            weights |= {key.replace(name, f"{name}.label", 1): weights.pop(key) for key in old}
    own = lambda value: value if share else value.detach().clone()  # noqa: E731
    model.load_state_dict({name: own(value) for name, value in weights.items()}, strict=False, assign=True)
    if share:  # taken over, they would train, and the teacher with them
        for value in weights.values():
            value.requires_grad_(False)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # those that are not saved
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, own(buffers[name]))
    _take_tables(model, teacher)
    for new, like in new_parts(model):
        start = {name: like[name].detach().clone() for name in new.state_dict()}
        new.load_state_dict(start, assign=True)
        nn.init.zeros_(new.linear_2.weight)
        if new.linear_2.bias is not None:
            nn.init.zeros_(new.linear_2.bias)


def _take_tables(model: Any, teacher: Any) -> None:
    """Give a new model the tables of frequencies of its teacher that are neither weights nor buffers."""
    parts = dict(teacher.named_modules())
    for name, part in model.named_modules():
        for key, value in list(vars(part).items()):
            held = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(entry, Tensor) and entry.is_meta for entry in held):
                setattr(part, key, getattr(parts[name], key))


def new_parts(model: Any) -> list[tuple[Any, dict[str, Tensor]]]:
    """The embeddings that the model of a student has and that of its teacher has not, each with the weights of the one
    beside it."""
    if not hasattr(model, "predict"):  # of diffusers' own class: a U-Net, or a flow map by itself
        labels = getattr(model, "class_embedding", None)
        return [] if labels is None else [(labels, model.time_embedding.state_dict())]
    module: Any = model
    parts = [part for part in module.modules() if hasattr(part, "like")]  # see fewstep.networks.two_times.rows
    return [(new, part.like) for part in parts for new in part.new]
