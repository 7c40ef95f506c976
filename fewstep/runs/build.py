"""The parts of a run, each made from its section of the recipe: teacher, student, data, objective."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.console import progress_bar
from fewstep.common.distributed import environment
from fewstep.common.errors import refused, unknown
from fewstep.common.model_files import check_numbers
from fewstep.common.options import arguments, find_object
from fewstep.common.randomness import generator
from fewstep.common.trust import is_code
from fewstep.data import FACTS, Encoded, Pairs, load_data
from fewstep.data.batch import Data
from fewstep.data.conditions import Dropped, Strengths
from fewstep.data.couplings import Coupled
from fewstep.data.decode import check_side
from fewstep.data.encoded import NULL, read_null
from fewstep.data.sources import is_pictures
from fewstep.flows.description import maker_of, set_maker
from fewstep.flows.exact import CheckerboardField, eight_gaussians, spiral
from fewstep.flows.fields import Guided, NetworkField, VelocityField, unguided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.paths import Path as Trajectory
from fewstep.generation.drawing import Model, classes_of, needed_conditions, shape_of, takes
from fewstep.generation.encoding import check_model, encoded_once
from fewstep.generation.teacher_samples import PromptedSamples, TeacherSamples
from fewstep.latents.encoders import kept_null
from fewstep.latents.prompts import TEXT_CONDITIONS
from fewstep.networks import MLP, UNet, gains_second_time
from fewstep.networks.families import ConditionalUNet
from fewstep.networks.unet import set_size, with_image
from fewstep.objectives import OBJECTIVES
from fewstep.objectives.base import Objective, check_velocity
from fewstep.runs.recipe import PATHS, Named, Recipe, Student, Teacher
from fewstep.runs.recipes import find_objective
from fewstep.training.leaving import UNNAMED

EXACT: dict[str, Callable[[], VelocityField]] = {
    "checkerboard": CheckerboardField,
    "eight-gaussians": eight_gaussians,
    "spiral": spiral,
}
_PATHS: dict[str, Callable[[], Trajectory]] = dict(zip(PATHS, (Linear, Trigonometric, VariancePreserving), strict=True))


def make_teacher(section: Teacher, encoded: Path | None = None) -> VelocityField:
    """The field that is distilled.

    Args:
        encoded: a folder of encoded data, which has the conditions of an empty prompt too.

    Raises:
        ValueError: nothing of that name, or something that is no velocity field.
        FileNotFoundError: a path that is not there.
    """
    source = section.source
    if is_nowhere(source):
        raise ValueError(f"{unknown('teacher', source, EXACT)}; and nothing is at that path here")
    field = find_model(source, section.options)
    if isinstance(field, FlowMap):
        raise ValueError(
            f"the teacher {section.source!r} is a flow map, and what is distilled is a velocity field: "
            "name the teacher that it was made from; to train the map on, name it as student.start"
        )
    if (guidance := section.guidance) is not None:
        if guidance.told:
            check_told(source, field)
            return field
        weak = None if guidance.weak is None else find_model(guidance.weak)
        null = null_of(guidance.null, field, encoded)
        field = Guided(field, guidance.scale, guidance.interval, null=null, weak=weak)
    return field


def is_nowhere(source: str) -> bool:
    """Whether the name of a teacher is a bare word that neither fewstep nor this folder has."""
    return not any(mark in source for mark in "/:~") and source not in EXACT and not Path(source).exists()


def check_teacher(recipe: Recipe, teacher: VelocityField) -> None:
    """That what is distilled is a velocity, or the recipe says that it is to be taken for one.

    Raises:
        ValueError: it is a model that was distilled for a few steps.
    """
    if recipe.teacher is not None and recipe.teacher.distilled:
        teacher.distilled = ""
    if follows_teacher(recipe):
        check_velocity(teacher)


def check_told(source: str, field: VelocityField) -> None:
    """That a teacher is told the strength of guidance as it is.

    Raises:
        ValueError: it is not.
    """
    if not takes(field, "guidance"):
        raise ValueError(f"teacher.guidance.told: {source!r} is told no strength of guidance: say null")


def null_of(null: Mapping[str, int] | str, field: VelocityField | None, encoded: Path | None = None) -> dict[str, Any]:
    """The conditions that stand for none: as they are said, or those of an empty prompt, from the folder ``encoded`` if
    there is one, else as the teacher's text encoders gave them once.

    Raises:
        ValueError: a prompt for a model without text encoders.
    """
    if not isinstance(null, str):
        return dict(null)
    if encoded is not None and (kept := read_null(encoded)):
        return kept
    if field is None or field.text is None:
        raise ValueError("null: text is an empty prompt, and the teacher has no text encoders: name its conditions")
    return kept_null(copy(field.text))  # a copy, so that the encoders are let go again


def encoded_folder(recipe: Recipe) -> Path | None:
    """The folder of encoded data that a recipe names, if it has the conditions of an empty prompt."""
    folder = Path(recipe.data.name).expanduser()
    return folder if (folder / NULL).is_file() else None


def find_model(source: str, options: dict[str, Any] | None = None) -> Any:
    """What a name stands for: an exact field, a function of a file or module, or whatever ``fewstep.load`` takes."""
    if source in EXACT:
        return EXACT[source]()
    if is_code(source):
        function = find_object(source, VelocityField, FlowMap)
        model = function(**arguments("teacher.options", function, options or {}))
        if not isinstance(model, VelocityField | FlowMap):
            raise ValueError(f"{source!r} gave a {type(model).__name__}, not a VelocityField or FlowMap")
        return model
    from fewstep.models.loading import load

    return load(source, **arguments("teacher.options", load, options or {}, given=("source", "device", "trust")))


def make_student(
    section: Student, shape: tuple[int, ...], teacher: VelocityField | None, is_map: bool, seed: int
) -> FlowMap | VelocityField:
    """What is trained, for samples of ``shape``: its first weights come from the seed, or are the teacher's.

    Raises:
        ValueError: a network that does not fit the shape, options that are not known, weights that do not fit.
    """
    model = _bare_student(section, shape, teacher, is_map, seed)
    if (start := unguided(teacher)) is not None and model.latents is None:
        model.latents, model.text, model.class_names = start.latents, start.text, start.class_names
        model.moments = start.moments or model.moments
    if section.lora is not None:
        from fewstep.models.lora import add_lora

        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            add_lora(model, **section.lora.model_dump())  # pyright: ignore[reportArgumentType]
        first = getattr(getattr(model.network, "model", None), "conv_in", None)
        if section.image is not None and not hasattr(first, "lora_A"):
            raise ValueError(
                "student.image adds channels to the layer conv_in, and the adapter leaves that as it is, so that the "
                "image would never be seen: name conv_in among student.lora.targets"
            )
    return model


def _bare_student(
    section: Student, shape: tuple[int, ...], teacher: VelocityField | None, is_map: bool, seed: int
) -> FlowMap | VelocityField:
    inner = unguided(teacher)
    if section.start is not None:
        from fewstep.runs.warm_start import started

        return started(section, shape, teacher, is_map)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if section.network == "auto":
            if not isinstance(inner, NetworkField):
                raise ValueError(
                    f"student.network: auto takes the teacher's network, and {type(inner).__name__} has none: "
                    "say mlp, unet, or FILE.py:FUNCTION"
                )
            field = _started(inner, section, shape)
            if not is_map:
                return field.requires_grad_(True)
            return FlowMap.from_field(
                field,
                guidance=bool(section.guidance),
                second_time=section.second_time or "t",
                share=section.lora is not None,
            )
        is_random = not isinstance(inner, NetworkField) or section.weights == "random"
        if section.lora is not None and is_random and not is_code(section.network):
            raise ValueError(
                "student.lora trains an adapter of weights that stay as they are, and the student starts from random "
                "ones: start it from a teacher with a network, or leave lora out"
            )
        network = make_network(section, shape)
        if isinstance(network, FlowMap | VelocityField):
            return network
        start = inner if isinstance(inner, NetworkField) and section.weights != "random" else None
        if section.weights == "teacher" and start is None:
            raise ValueError("student.weights: teacher, but the teacher has no network to take them from")
        return _wrap(network, section, start, teacher, is_map)


def _started(field: NetworkField, section: Student, shape: tuple[int, ...]) -> NetworkField:
    """The teacher's field as a student starts: a copy, with what the recipe changes about its network."""
    # With an adapter the weights stay as they are, and the teacher and the student can have one copy of them.
    shared = {id(weight): weight for weight in field.parameters()} if section.lora is not None else {}
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
            return UNet(UNet2DModel(**fitting))
    function = find_object(section.network, nn.Module)
    network = function(**arguments("student.options", function, options))
    if not isinstance(network, nn.Module):
        raise ValueError(f"student.network: {section.network!r} gave a {type(network).__name__}, not a network")
    if not isinstance(network, FlowMap | VelocityField):
        set_maker(network, section.network, options)
    return network


def _wrap(
    network: nn.Module, section: Student, start: NetworkField | None, teacher: VelocityField | None, is_map: bool
) -> FlowMap | VelocityField:
    """The network as a map or a field, with the weights of ``start`` where there is one."""
    path = teacher.path if teacher is not None else _PATHS[section.path or "linear"]()
    native, prediction = path, section.prediction or "velocity"
    if isinstance(network, UNet):
        # Timesteps and output as diffusers' flow-match models have them, so that an export is one of those.
        native, prediction = Reversed(1000.0), section.prediction or "flow"
    if start is not None:
        native, prediction = start.native, start.prediction
    field = NetworkField(network, native, prediction, path=path)
    try:
        if is_map and not gains_second_time(network):
            # A network of one's own comes with its second time.
            return (
                FlowMap(network, native, prediction, path=path) if start is None else FlowMap.from_field(start, network)
            )
        if start is not None:
            new, extra = network.load_state_dict(start.network.state_dict(), strict=False)
            if extra or not all(name.startswith("strength.") for name in new):  # the strength of guidance may be new
                raise ValueError(f"unlike: {', '.join([*new, *extra])}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the teacher's weights do not fit the student's {type(network).__name__} "
            f"({' '.join(str(error).split())[:200]}): say student.weights: random, or student.network: auto"
        ) from None
    if not is_map:
        return field
    student = FlowMap.from_field(field, guidance=bool(section.guidance), second_time=section.second_time or "t")
    if maker := maker_of(network):
        set_maker(student.network, maker["name"], maker["options"], told_guidance=bool(section.guidance))
    return student


def make_objective(recipe: Recipe, teacher: VelocityField | None) -> Objective:
    """The training loss of a recipe."""
    method = find_objective(recipe.objective.name)
    takes_teacher = "teacher" in inspect.signature(method).parameters
    options = recipe.objective.options
    if options.pop("teacher", None) == "none":
        teacher = None
    return method(**({"teacher": teacher} if takes_teacher else {}), **options)


def trains_map(recipe: Recipe) -> bool:
    """Whether the student is a flow map: asked for, or what the objective trains."""
    kind, method = recipe.student.kind, find_objective(recipe.objective.name)
    return kind == "map" if kind else not getattr(method, "trains_field", False)


def strength_of(recipe: Recipe) -> float | None:
    """The strength of guidance at which a student that is told one is held against its teacher: the teacher's own."""
    guidance = recipe.teacher.guidance if recipe.teacher else None
    return guidance.scale if guidance is not None and (guidance.told or guidance.range is not None) else None


def follows_teacher(recipe: Recipe) -> bool:
    """Whether the student is to end where the teacher's trajectories do: it is distilled, or trained on what the
    teacher made. Otherwise the teacher is what it starts from, and fine-tuning leads elsewhere."""
    name = recipe.objective.name
    if recipe.data.name == "teacher" or (Path(recipe.data.name).expanduser() / FACTS).is_file():
        return True  # made by the teacher
    if name not in OBJECTIVES and ":" not in name:  # a method of one's own, from Python
        return recipe.teacher is not None
    return "teacher" in inspect.signature(find_objective(name)).parameters


def path_of(section: Student) -> Trajectory | None:
    """The path that a recipe asks for."""
    return _PATHS[section.path]() if section.path else None


def make_data(recipe: Recipe, teacher: VelocityField | None, out: Path | None, fresh: bool = False) -> Data:
    """The data of a recipe, coupled as it says; ``out`` is where samples of the teacher are kept, with ``fresh`` after
    those that are there have been thrown away.

    Raises:
        ValueError, FileNotFoundError: as :func:`data_of`; ``out`` holds samples of another teacher or other settings.
    """
    data = _uncoupled(recipe, teacher, out, fresh)
    if recipe.drop is not None:
        data = Dropped(data, recipe.drop.share, null_of(recipe.drop.null, teacher, encoded_folder(recipe)))
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    if guidance is not None and (guidance.told or guidance.range is not None):
        data = Strengths(data, *(guidance.range or (guidance.scale, guidance.scale)))
    return data if recipe.coupling == "independent" else Coupled(data, recipe.coupling)


def _uncoupled(recipe: Recipe, teacher: VelocityField | None, out: Path | None, fresh: bool) -> Data:
    if recipe.data.name != "teacher":
        return data_of(recipe.data, teacher, quiet=recipe.training.quiet)
    if teacher is None:
        raise ValueError("data: teacher takes samples of the teacher, and there is none: name a data set")
    options = recipe.data.options
    if teacher.text is None:
        options = arguments("data", TeacherSamples, options, given=("field", "seed", "file"))
        file = None if out is None else out / "teacher-samples.npz"
        return TeacherSamples(teacher, seed=recipe.seed, file=file, **options)
    if "prompts" not in options:
        raise ValueError(
            "data: teacher draws samples of the teacher, which is conditioned on text: say which prompts, a line each, "
            "data: {name: teacher, prompts: captions.txt}"
        )
    options = arguments("data", PromptedSamples, options, given=("field", "seed", "folder", "guidance", "fresh"))
    told = recipe.teacher is not None and recipe.teacher.guidance is not None and recipe.teacher.guidance.told
    folder = None if out is None else out / "teacher-samples"
    strength = strength_of(recipe) if told else None
    return PromptedSamples(teacher, seed=recipe.seed, folder=folder, guidance=strength, fresh=fresh, **options)


def encoded_shape(section: Named, model: Model | None) -> tuple[int, ...] | None:
    """The shape (c, h, w) that the pictures of a section will have as latents; None where nothing is to be encoded."""
    if model is None or model.latents is None or section.name == "teacher":
        return None
    if not is_pictures(section.name, section.options):
        return None
    size, latents = section.options.get("size"), model.latents
    if size is None:
        return shape_of(model)
    check_side(size)
    return latents.shape_of((latents.image_channels, size, size))


def data_of(section: Named, model: Model | None, quiet: bool = False) -> Data:
    """The data set that a section names. For a latent model, pictures come as their latents, encoded once into the
    cache, and data that was encoded has to be its own.

    Raises:
        ValueError, FileNotFoundError: as ``fewstep.load_data`` and ``fewstep.encode``.
    """
    name, options = section.name, section.options
    if name == UNNAMED:
        raise ValueError("the data of this run were given to fewstep.fit without a name: say --data NAME")
    if model is None or model.latents is None:
        return load_data(name, **options)
    if is_pictures(name, options):
        size = options.get("size") or model.latents.image_shape_of(shape_of(model))[-1]
        text = f"encoding the middle square of the pictures in {name} at {size} x {size} pixels, once"
        with progress_bar(text, quiet or not environment().is_main) as progress:
            return encoded_once(model, name, progress=progress, **options)
    data = load_data(name, **options)
    if isinstance(data, Encoded | Pairs):
        check_model(data, model, name)
    return data


def settled(recipe: Recipe, teacher: VelocityField | None) -> Recipe:
    """The recipe with what its teacher settles about pictures where nothing is said: their size in pixels, their
    channels, and that sub-folders are no classes where it knows none. Each is said once in a line."""
    inner = unguided(teacher)
    is_auto = recipe.student.network == "auto" and recipe.student.start is None
    if inner is None or recipe.data.name == "teacher" or not (is_auto or follows_teacher(recipe)):
        return recipe
    data, held_out = recipe.data, recipe.evaluation.data
    data = _pictures_for(inner, data, is_auto, "data")
    held_out = None if held_out is None else _pictures_for(inner, held_out, is_auto, "evaluation.data")
    evaluation = recipe.evaluation.model_copy(update={"data": held_out})
    return recipe.model_copy(update={"data": data, "evaluation": evaluation})


def _pictures_for(model: Model, section: Named, is_auto: bool, where: str) -> Named:
    """A section of data, of pictures that nothing is said of with the options that a model takes them with."""
    # A latent model has its own way from pictures to latents, where their size is settled too.
    if model.latents is not None or "size" in section.options or not is_pictures(section.name, section.options):
        return section
    try:
        channels, height, width = shape_of(model)
    except ValueError:  # it does not say, or takes no pictures
        return section
    if height != width or channels not in (1, 3, 4):
        return section
    network = getattr(model, "network", None)
    knows_classes = classes_of(model) > 0 or (not hasattr(network, "classes") and takes(model, "class_labels"))
    options = {
        "size": height,
        **({} if channels == 3 else {"channels": channels}),
        **({} if knows_classes or not is_auto else {"labels": False}),
        **section.options,
    }
    if environment().is_main:
        folder = Path(section.name).expanduser()
        has_folders = folder.is_dir() and any(inner.is_dir() for inner in folder.iterdir())
        flip = "mirrored at random" if options.get("flip") else f"not mirrored (--{where}.flip true does, at random)"
        classes = ", folders are no classes" if has_folders and options.get("labels") is False else ""
        warnings.warn(
            f"pictures in {section.name} are cut to their middle square and scaled to {height} x {height} pixels, the "
            f"teacher's size (--{where}.size takes another), {flip}{classes}",
            stacklevel=3,
        )
    return Named.model_validate({"name": section.name, **options})


def given_by(recipe: Recipe, model: Model, count: int, first: int = 0, text: bool = True) -> dict[str, Tensor]:
    """What a run's data gives the samples of its model besides their classes: the conditions of ``count`` of its rows,
    (n, ...) each, fewer where it has fewer. The data is read where the model needs them, or the recipe names them.

    Args:
        first: the row to begin with; they go around.
        text: whether those of a text model are wanted too, which prompts give otherwise.
    """
    others = {"guidance", *(() if text or model.text is None else TEXT_CONDITIONS)}
    needed = set(needed_conditions(model))
    if classes_of(model) or "class_labels" not in needed:  # else they are vectors or times
        others.add("class_labels")
    is_needed = needed - others or (text and model.text is not None)
    if recipe.data.name == "teacher" or not (is_needed or recipe.data.options.get("conditions")):
        return {}
    data = data_of(recipe.data, model)
    rows = first + torch.arange(min(count, data.size or count))
    cond = data.rows(rows % data.size if data.size else rows, generator(recipe.seed)).cond
    return {name: value for name, value in cond.items() if name not in others and takes(model, name)}
