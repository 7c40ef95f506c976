"""The parts of a run, each made from its section of the recipe: teacher, student, data, objective."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.config import find_objective
from fewstep.couplings import Coupled
from fewstep.data import FACTS, ArrayData, load_data
from fewstep.data.batch import Batch, Data
from fewstep.data.conditions import Dropped, Strengths
from fewstep.drawing import classes_of, draw, shape_of, write
from fewstep.errors import unknown
from fewstep.exact import CheckerboardField, eight_gaussians, spiral
from fewstep.fields import Guided, NetworkField, VelocityField, unguided
from fewstep.maps import FlowMap
from fewstep.networks import MLP, UNet
from fewstep.networks.families import ConditionalUNet
from fewstep.networks.unet import set_size, with_image
from fewstep.objectives.base import Objective
from fewstep.options import arguments, find_object
from fewstep.paths import KINDS, Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.paths import Path as Trajectory
from fewstep.randomness import generator
from fewstep.recipe import PATHS, Recipe, Student, Teacher

EXACT: dict[str, Callable[[], VelocityField]] = {
    "checkerboard": CheckerboardField,
    "eight-gaussians": eight_gaussians,
    "spiral": spiral,
}
_PATHS: dict[str, Callable[[], Trajectory]] = dict(zip(PATHS, (Linear, Trigonometric, VariancePreserving), strict=True))


def make_teacher(section: Teacher) -> VelocityField:
    """The field that is distilled.

    Raises:
        ValueError: nothing of that name, or something that is no velocity field.
        FileNotFoundError: a path that is not there.
    """
    source = section.source
    if not any(mark in source for mark in "/:~") and source not in EXACT and not Path(source).exists():
        raise unknown("teacher", source, EXACT)
    field = find_model(source, section.options)
    if isinstance(field, FlowMap):
        raise ValueError(
            f"the teacher {section.source!r} is a flow map, and what is distilled is a velocity field: "
            "name the teacher that it was made from"
        )
    if not isinstance(field, VelocityField):
        raise ValueError(f"the teacher {section.source!r} gave a {type(field).__name__}, not a VelocityField")
    if (guidance := section.guidance) is not None:
        weak = None if guidance.weak is None else find_model(guidance.weak)
        null = null_of(guidance.null, field)
        field = Guided(field, guidance.scale, guidance.interval, null=null, weak=weak)
    return field


def null_of(null: Mapping[str, int] | str, field: VelocityField | None) -> dict[str, Any]:
    """The conditions that stand for none: as they are said, or those of an empty prompt.

    Raises:
        ValueError: a prompt for a model without text encoders.
    """
    if not isinstance(null, str):
        return dict(null)
    if field is None or field.text is None:
        raise ValueError("null: text is an empty prompt, and the teacher has no text encoders: name its conditions")
    return field.text.null()


def find_model(source: str, options: dict[str, Any] | None = None) -> Any:
    """What a name stands for: an exact field, a function of a file or module, or whatever ``fewstep.load`` takes."""
    if source in EXACT:
        return EXACT[source]()
    if ":" in source and not source.startswith("fewstep:"):
        function = find_object(source)
        return function(**arguments("teacher.options", function, options or {}))
    from fewstep.loading import load

    return load(source)


def make_student(
    section: Student, shape: tuple[int, ...], teacher: VelocityField | None, is_map: bool, seed: int
) -> FlowMap | VelocityField:
    """What is trained, for samples of ``shape``: its first weights come from the seed, or are the teacher's.

    Raises:
        ValueError: a network that does not fit the shape, options that are not known, weights that do not fit.
    """
    model = _bare_student(section, shape, teacher, is_map, seed)
    if (start := unguided(teacher)) is not None and model.latents is None:
        model.latents, model.text = start.latents, start.text
    if section.lora is not None:
        from fewstep.lora import add_lora

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
            return FlowMap.from_field(field, guidance=bool(section.guidance))
        is_random = not isinstance(inner, NetworkField) or section.weights == "random"
        if section.lora is not None and is_random and ":" not in section.network:
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
        return UNet(UNet2DModel(**arguments("student.options", UNet2DModel, fitting)))
    function = find_object(section.network)
    return function(**arguments("student.options", function, options))


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
    if prediction not in KINDS:
        raise unknown("prediction kind", prediction, KINDS)
    field = NetworkField(network, native, prediction, path=path)
    try:
        if is_map and getattr(network, "with_second_time", None) is None:
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
    return FlowMap.from_field(field, guidance=bool(section.guidance)) if is_map else field


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
    return None if guidance is None or guidance.range is None else guidance.scale


def follows_teacher(recipe: Recipe) -> bool:
    """Whether the student is to end where the teacher's trajectories do: it is distilled, or trained on what the
    teacher made. Otherwise the teacher is what it starts from, and fine-tuning leads elsewhere."""
    made_by_teacher = recipe.data.name == "teacher" or (Path(recipe.data.name).expanduser() / FACTS).is_file()
    return made_by_teacher or "teacher" in inspect.signature(find_objective(recipe.objective.name)).parameters


def path_of(section: Student) -> Trajectory | None:
    """The path that a recipe asks for."""
    return _PATHS[section.path]() if section.path else None


class TeacherSamples:
    """Samples of the teacher in the place of data, drawn when they are first needed and kept in a file.

    Args:
        field: the teacher. shape: one sample's; by default what the teacher's network or data has.
        count: how many. steps, solver: see ``fewstep.sample``. classes: draw ``class_labels`` below this; by default
            the classes of the teacher's network. seed: decides them. file: an ``.npz`` to keep them in.
    """

    def __init__(
        self,
        field: VelocityField,
        count: int = 50_000,
        steps: int = 50,
        solver: str = "heun",
        shape: Sequence[int] | None = None,
        classes: int | None = None,
        seed: int = 0,
        file: Path | None = None,
    ) -> None:
        self.field, self.steps, self.solver, self.seed, self.file = field, steps, solver, seed, file
        self.shape = shape_of(field) if shape is None else tuple(shape)
        self.size: int | None = count
        classes = classes_of(field) if classes is None else classes
        draw = generator(seed, 1)
        self.cond = {"class_labels": torch.randint(classes, (count,), generator=draw)} if classes else {}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        return self._array.rows(index, generator)

    @cached_property
    def _array(self) -> ArrayData:
        if self.file is not None and self.file.exists():
            with np.load(self.file, allow_pickle=False) as kept:
                return ArrayData(kept["data"], {name: kept[name] for name in self.cond})
        labels = self.cond["class_labels"].tolist() if self.cond else None
        print(f"drawing {self.size} samples of the teacher, once", file=sys.stderr, flush=True)
        samples, cond, _ = draw(
            self.field, self.size or 0, self.steps, shape=self.shape, seed=self.seed, labels=labels, solver=self.solver
        )
        if self.file is not None:
            write(samples, cond, self.file)
        return ArrayData(samples, cond)


def make_data(recipe: Recipe, teacher: VelocityField | None, out: Path | None) -> Data:
    """The data of a recipe, coupled as it says; ``out`` is where samples of the teacher are kept."""
    data = _uncoupled(recipe, teacher, out)
    if recipe.drop is not None:
        data = Dropped(data, recipe.drop.share, null_of(recipe.drop.null, teacher))
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    if guidance is not None and guidance.range is not None:
        data = Strengths(data, *guidance.range)
    return data if recipe.coupling == "independent" else Coupled(data, recipe.coupling)


def _uncoupled(recipe: Recipe, teacher: VelocityField | None, out: Path | None) -> Data:
    if recipe.data.name != "teacher":
        return load_data(recipe.data.name, **recipe.data.options)
    if teacher is None:
        raise ValueError("data: teacher takes samples of the teacher, and there is none: name a data set")
    options = arguments("data", TeacherSamples, recipe.data.options, given=("field", "seed", "file"))
    file = None if out is None else out / "teacher-samples.npz"
    return TeacherSamples(teacher, seed=recipe.seed, file=file, **options)
