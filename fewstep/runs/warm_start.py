"""A student that goes on from a model on disk: an export, a run, or a model of diffusers."""

from pathlib import Path

from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import classes_of, shape_of
from fewstep.networks import ConditionalUNet, OfDiffusers, UNet
from fewstep.networks.configs import set_size
from fewstep.runs.recipe import Student
from fewstep.training.run_files import RECIPE, TRAINING


def started(
    model: FlowMap | VelocityField,
    section: Student,
    shape: tuple[int, ...],
    teacher: VelocityField | None,
    is_map: bool,
) -> FlowMap | NetworkField:
    """The ``model`` that ``student.start`` names, as a student for samples of ``shape``.

    Raises:
        ValueError: it is of another kind than what is trained, on another path than the teacher, for other samples, or
            told its second time, or no guidance, otherwise than the recipe says.
    """
    said = f"student.start: {section.start} is"
    if not isinstance(model, FlowMap | NetworkField):
        raise ValueError(f"{said} a {type(model).__name__}, which has no network to train")
    if is_map and not isinstance(model, FlowMap):
        raise ValueError(
            f"{said} a velocity field, and a flow map is trained: name it as the teacher, from which the student "
            "starts, or say student.kind: field"
        )
    if not is_map and isinstance(model, FlowMap):
        raise ValueError(f"{said} a flow map, and a velocity field is trained: say student.kind: map")
    if teacher is not None and not model.path.same_as(teacher.path):
        raise ValueError(f"{said} on {model.path}, and the teacher on {teacher.path}: they must be on one path")
    network = model.network
    own = getattr(network, "second_time", None) if isinstance(network, OfDiffusers) else None
    if section.second_time is not None and own != section.second_time:
        raise ValueError(f"{said} told its second time as {own or 'its network is'}, not {section.second_time}")
    if section.guidance and not getattr(network, "takes_guidance", False):
        raise ValueError(
            f"{said} told no strength of guidance, and strengths are drawn: leave teacher.guidance.range out, or start "
            "from a map that was trained with one"
        )
    if teacher is not None and (classes := classes_of(teacher)) != classes_of(model):
        raise ValueError(f"{said} for {classes_of(model) or 'no'} classes, and the teacher for {classes or 'none'}")
    if isinstance(network, UNet | ConditionalUNet):
        set_size(network.model, shape)  # which takes any
    if isinstance(network, OfDiffusers) and shape_of(model)[0] != shape[0]:
        raise ValueError(f"{said} for samples of shape {shape_of(model)}, these are {shape}")
    return model.requires_grad_(True)


def recipe_of(start: str) -> Path | None:
    """The recipe of the run, or export of one, that a student goes on from; None where there is none."""
    folder = Path(start).expanduser()
    found = [file for file in (folder / RECIPE, folder / TRAINING / RECIPE) if file.is_file()]
    return found[0] if found else None
