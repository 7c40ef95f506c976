"""What is trained: the student of a recipe, its network and its first weights."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fewstep.common.errors import refused
from fewstep.common.model_files import check_numbers
from fewstep.common.options import arguments, find_object
from fewstep.common.trust import is_code
from fewstep.flows.chained import ChainedPath
from fewstep.flows.description import maker_of, set_maker, space_of
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.interpolants import DenoisedField, Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.reflected import Reflected
from fewstep.flows.spaces import Box, Space, Tokens
from fewstep.flows.token_times import Deciding
from fewstep.models.lora import add_lora
from fewstep.networks import (
    MLP,
    ConditionalUNet,
    ContinuousUNet,
    Conv1dNet,
    OfDiffusers,
    SequenceTransformer,
    UNet,
    gains_second_time,
)
from fewstep.networks.configs import set_size, with_image
from fewstep.networks.frozen_base import keep_base
from fewstep.runs.recipe import PATHS, Student
from fewstep.runs.warm_start import started

_PATHS: dict[str, Callable[[], Trajectory]] = dict(
    zip(PATHS, (Linear, Trigonometric, VariancePreserving), strict=False)
)


def path_of(section: Student) -> Trajectory | None:
    """The path that a recipe asks for. Raises ValueError for a reflected one without a box."""
    space = space_in(section)
    if section.path == "reflected":
        if not isinstance(space, Box):
            raise ValueError("student.path: reflected is for a box: say student.space: {name: box, low: 0, high: 1}")
        return Reflected(space.low, space.high)
    if section.latent is not None or (space is not None and space.source is not None):
        return Interpolant(section.path or "linear", section.latent or "none")
    return _PATHS[section.path]() if section.path else None


def space_in(section: Student) -> Space | None:
    """Where samples live, as a recipe says it; None where it says nothing."""
    if section.space is None:
        return None
    return space_of({"name": section.space.name, "options": section.space.options}, "student.space")


def make_student(
    section: Student,
    shape: tuple[int, ...],
    teacher: VelocityField | None,
    is_map: bool,
    seed: int,
    start: FlowMap | VelocityField | None = None,
    lent: bool = False,
) -> FlowMap | VelocityField:
    """What is trained, for samples of ``shape``: its first weights come from the seed, or are the teacher's.

    Args:
        start: the model that ``student.start`` names, where it names one (``fewstep.runs.loading.start_of``).
        lent: begin on the memory of the teacher's weights, where both are about to be shared out over processes, and
            each takes its rows of either.

    Raises:
        ValueError: a network that does not fit the shape, options that are not known, weights that do not fit.
    """
    if (space := space_in(section)) is not None and teacher is not None and space != teacher.space:
        raise ValueError(f"student.space: a student lives where its teacher does, {teacher.space}: leave it out")
    if start is not None:
        model: FlowMap | VelocityField = started(start, section, shape, teacher, is_map)
    else:
        model = _bare_student(section, shape, teacher, is_map, seed, lent)
    if (inner := unguided(teacher)) is not None and model.latents is None:
        model.latents, model.text, model.class_names = inner.latents, inner.text, inner.class_names
        model.moments = inner.moments or model.moments
    if section.lora is not None:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            add_lora(model, **section.lora.model_dump(exclude={"base"}))  # pyright: ignore[reportArgumentType]
        keep_base(section.lora.base, *(m.network for m in (model, inner) if isinstance(m, FlowMap | NetworkField)))
        if section.image is not None and isinstance(network := model.network, OfDiffusers):
            first = network.first
            if not hasattr(network.model.get_submodule(first), "lora_A"):
                raise ValueError(
                    f"student.image adds channels to the layer {first}, and the adapter leaves that as it is, so that "
                    f"the image would never be seen: name {first} among student.lora.targets"
                )
    return model


def _bare_student(
    section: Student, shape: tuple[int, ...], teacher: VelocityField | None, is_map: bool, seed: int, lent: bool
) -> FlowMap | VelocityField:
    inner = unguided(teacher)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if section.network == "auto":
            if not isinstance(inner, NetworkField):
                raise ValueError(
                    f"student.network: auto takes the teacher's network, and {type(inner).__name__} has none: "
                    "say mlp, unet, or FILE.py:FUNCTION"
                )
            of_diffusers = isinstance(inner.network, OfDiffusers)
            lent = lent and of_diffusers  # of these every weight is shared out
            field = _started(inner, section, shape, of_diffusers and (lent or is_map))  # a map copies what it is given
            if not is_map:
                return field if section.lora else field.requires_grad_(True)  # an adapter says what trains
            student = FlowMap.from_field(field, share=lent or section.lora is not None, **_told(section))
            return student.requires_grad_(True) if lent and section.lora is None else student
        is_random = not isinstance(inner, NetworkField) or section.weights == "random"
        if section.lora is not None and is_random and not is_code(section.network):
            raise ValueError(
                "student.lora trains an adapter of weights that stay as they are, and the student starts from random "
                "ones: start it from a teacher with a network, or leave lora out"
            )
        network = make_network(section, shape)
        if isinstance(network, FlowMap | VelocityField):
            return network
        if section.kind == "denoised":
            return _denoised(network, section, shape)
        start = inner if isinstance(inner, NetworkField) and section.weights != "random" else None
        if section.weights == "teacher" and start is None:
            raise ValueError("student.weights: teacher, but the teacher has no network to take them from")
        return _wrap(network, section, start, teacher, is_map)


def _started(field: NetworkField, section: Student, shape: tuple[int, ...], lent: bool) -> NetworkField:
    """The teacher's field as a student starts: a copy, with what the recipe changes about its network; with ``lent``,
    on the memory of its weights."""
    shared: dict[int, Any] = {}
    if section.lora is not None:  # the weights stay as they are, and the teacher and the student can have one copy
        shared = {id(weight): weight for weight in field.parameters()}
    elif lent:
        shared = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in field.parameters()}
    field = deepcopy(field, shared)
    if section.image is not None:
        field.network = with_image(field.network, section.image)
    if isinstance(field.network, UNet | ConditionalUNet):
        set_size(field.network.model, shape)
    if section.conversion == "none":
        return NetworkField(field.network, Reversed(1000.0), "flow", path=Linear())
    return field


def make_network(section: Student, shape: tuple[int, ...]) -> Any:
    """The bare network of a recipe: with one time where fewstep can add the second, else as its function gives it."""
    options = section.options
    if section.network == "mlp":
        if len(shape) != 1:
            raise ValueError(f"student.network: mlp takes points (D,), the data has shape {shape}: say unet for images")
        return MLP(shape[0], **arguments("student.options", MLP, options, given=("dim", "times")))
    if section.network == "unet":
        from diffusers import UNet2DModel

        if len(shape) != 3:
            raise ValueError(
                f"student.network: unet takes images (C, H, W), the data has shape {shape}: say mlp for points"
            )
        size = {"sample_size": shape[1] if shape[1] == shape[2] else shape[1:]}
        fitting = {**size, "in_channels": shape[0], "out_channels": shape[0], **options}
        fitting = arguments("student.options", UNet2DModel, fitting)
        check_numbers(fitting, "student.options")
        with refused("student.options: diffusers cannot make a UNet2DModel of these"):
            network = UNet(UNet2DModel(**fitting))
        return network if section.image is None else with_image(network, section.image)
    if section.network == "conv1d":
        if len(shape) != 2:
            hint = "mlp for points" if len(shape) == 1 else "unet for images"
            raise ValueError(f"student.network: conv1d takes signals (C, L), the data has shape {shape}: say {hint}")
        if shape[0] > shape[1]:
            warnings.warn(
                f"signals of {shape[0]} channels at {shape[1]} places each: where it is the other way around, "
                "data.channels_last: true turns them",
                stacklevel=2,
            )
        own = arguments("student.options", Conv1dNet, options, given=("channels", "length", "times"))
        return Conv1dNet(*shape, **own)
    if section.network == "transformer":
        if len(shape) != 2:
            raise ValueError(f"student.network: transformer takes rows of tokens (L, V), the data has shape {shape}")
        own = arguments("student.options", SequenceTransformer, options, given=("length", "tokens", "times"))
        return SequenceTransformer(*shape, **own)
    if section.network == "continuous":
        if len(shape) != 3:
            raise ValueError(f"student.network: continuous takes images (C, H, W), the data has shape {shape}")
        own = arguments("student.options", ContinuousUNet, options, given=("shape", "times"))
        return ContinuousUNet((shape[0], shape[1], shape[2]), **own)
    function = find_object(section.network, nn.Module)
    fitting = arguments("student.options", function, options)
    with refused(f"student.options: {section.network} cannot be made of these"):
        network = function(**fitting)
    if not isinstance(network, nn.Module):
        raise ValueError(f"student.network: {section.network!r} gave a {type(network).__name__}, not a network")
    if not isinstance(network, FlowMap | VelocityField):
        set_maker(network, section.network, options)
    return network


def _denoised(network: nn.Module, section: Student, shape: tuple[int, ...]) -> DenoisedField:
    """A velocity and a denoiser, two networks of one kind, on a path between two data sets."""
    path = path_of(section)
    if not isinstance(path, Interpolant) or not path.has_latent:
        raise ValueError(
            "a denoiser knows the latent on the way between two data sets: say source: NAME and student.latent: "
            "quadratic, brownian or sine"
        )
    native = replace(path, time_scale=1000.0) if isinstance(network, UNet) else path
    return DenoisedField(network, make_network(section, shape), native)


def _wrap(
    network: nn.Module, section: Student, start: NetworkField | None, teacher: VelocityField | None, is_map: bool
) -> FlowMap | VelocityField:
    """The network as a map or a field, with the weights of ``start`` where there is one."""
    path = teacher.path if teacher is not None else path_of(section) or Linear()
    space = space_in(section) if teacher is None else teacher.space
    native, prediction = path, section.prediction or (space and space.predicts) or "velocity"
    if isinstance(space, Tokens) and isinstance(network, SequenceTransformer):
        native = Deciding(space.size)
    elif isinstance(network, UNet) and isinstance(path, Interpolant | ChainedPath | Reflected):
        native = replace(path, time_scale=1000.0)
    elif isinstance(network, UNet):
        # Timesteps and output as diffusers' flow-match models have them, so that an export is one of those.
        native, prediction = Reversed(1000.0), section.prediction or "flow"
    if start is not None:
        native, prediction = start.native, start.prediction
    field = NetworkField(network, native, prediction, path=path, space=space)
    try:
        if is_map and not gains_second_time(network):
            # A network of one's own comes with its second time.
            if start is not None:
                return FlowMap.from_field(start, network)
            return FlowMap(network, native, prediction, path=path, space=space)
        if start is not None:
            new, extra = network.load_state_dict(start.network.state_dict(), strict=False)
            # What it is told of guidance may be new.
            if extra or not all(name.startswith(("strength.", "interval.")) for name in new):
                raise ValueError(f"unlike: {', '.join([*new, *extra])}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the teacher's weights do not fit the student's {type(network).__name__} "
            f"({' '.join(str(error).split())[:200]}): say student.weights: random, or student.network: auto"
        ) from None
    if not is_map:
        return field
    student = FlowMap.from_field(field, **_told(section))
    if maker := maker_of(network):
        set_maker(student.network, maker["name"], maker["options"], told_guidance=section.guidance or False)
    return student


def _told(section: Student) -> dict[str, Any]:
    """What the network of a student is told beside its time, and how."""
    return {
        "guidance": section.guidance or False,
        "second_time": section.second_time or "t",
        "late_share": section.late_share,
    }
