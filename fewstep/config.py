"""The recipe: everything a run is made of, typed, in one place.

A recipe is a YAML file. ``load_recipe`` reads it, applies the flags of the command line, refuses what is not known, and
fills in every default, so that the ``recipe.yaml`` of a run folder says all that decided the run.
"""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fewstep.errors import unknown
from fewstep.options import arguments, find_object, in_one_line, parse_value, read_yaml

Count = Annotated[int, Field(gt=0)]
Above = Annotated[float, Field(gt=0)]

PATHS = ("linear", "trigonometric", "vp")
NETWORKS = ("auto", "mlp", "unet")
# The key that a section's short form gives: `teacher: checkerboard` is `teacher: {source: checkerboard}`.
_SHORT = {"teacher": "source", "student": "network", "data": "name", "objective": "name"}
# The same as flags, and the one that everybody types.
_FLAGS = {key: f"{key}.{inner}" for key, inner in _SHORT.items()} | {"steps": "training.steps"}


class Section(BaseModel):
    """A mapping of a recipe that takes its own keys and no others; a text alone is the value of its ``short`` key."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    short: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {cls.short: value} if cls.short and isinstance(value, str) else value


class Named(Section):
    """A ``name``, and the options of what it names: ``{name: ITVM, ema: 0.99}``."""

    model_config = ConfigDict(extra="allow")
    short = "name"
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Guidance(Section):
    """Classifier-free guidance of the teacher, or autoguidance by a weaker model; see ``fewstep.Guided``."""

    scale: float = Field(description="weight of the guided direction; 1 is no guidance")
    interval: tuple[float, float] = Field(
        default=(0.0, 1.0), description="times (0 noise, 1 data) between which it acts"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="strengths drawn for each row between these, and told to the student as the condition `guidance`; "
        "it is judged at scale",
    )
    null: dict[str, int] | Literal["text"] = Field(
        default_factory=dict,
        description="the conditions that stand for none, such as {class_labels: 10}, or text: an empty prompt",
    )
    weak: str | None = Field(default=None, description="a weaker model, named as a teacher is: autoguidance")

    @model_validator(mode="after")
    def _something_weaker(self) -> "Guidance":
        if not self.null and self.weak is None:
            raise ValueError("guidance needs null conditions, such as {class_labels: 10}, or a weak model")
        if self.range is not None and not self.range[0] <= self.scale <= self.range[1]:
            raise ValueError(
                f"the scale {self.scale:g}, at which the student is judged, is outside the range {list(self.range)} "
                "that it learns"
            )
        return self


class Teacher(Section):
    """The velocity field that is distilled."""

    short = "source"
    source: str = Field(
        description="an exact field (checkerboard, eight-gaussians, spiral), a diffusers folder or hub name, a run, "
        "fewstep:NAME for a model that comes along, or FILE.py:FUNCTION or MODULE:FUNCTION that returns a VelocityField"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of that function")
    guidance: Guidance | None = Field(default=None, description="classifier-free guidance, folded into the student")


class Lora(Section):
    """A low-rank adapter that trains in the place of the network's own weights; see ``fewstep.add_lora``."""

    rank: Count = Field(default=8, description="of the adapter")
    alpha: Above | None = Field(default=None, description="it is scaled by alpha / rank; else the rank")
    targets: list[str] | str | None = Field(
        default=None, description="layers by the ends of their names, or a regular expression; else by the model"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's input")


class Student(Section):
    """The network that is trained, and what it stands for."""

    short = "network"
    network: str = Field(
        "auto",
        description="auto (the teacher's), mlp, unet (diffusers' UNet2DModel), or FILE.py:FUNCTION or MODULE:FUNCTION "
        "that returns a network: net(x, s, t) for a flow map, net(x, t) for a field",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the network")
    kind: Literal["map", "field"] | None = Field(
        default=None, description="flow map or field; else what the objective trains"
    )
    path: str | None = Field(default=None, description="linear, trigonometric or vp; else the teacher's, or linear")
    prediction: str | None = Field(
        default=None, description="what the network predicts; else the teacher's, or velocity"
    )
    weights: Literal["teacher", "random"] | None = Field(
        None, description="the first weights; else the teacher's where it has a network"
    )
    lora: Lora | None = Field(default=None, description="train an adapter of these weights alone")
    guidance: bool | None = Field(
        default=None, description="an input for the strength of guidance; else where the teacher's has a range"
    )
    image: Count | None = Field(
        default=None,
        description="channels of the condition `image` (B, image, H, W), which a U-Net then takes beside its own",
    )
    conversion: Literal["none"] | None = Field(
        default=None,
        description="none: what the teacher's network predicts is taken for the flow as it stands (naive fine-tuning)",
    )


class Dropping(Section):
    """Conditions left out of some rows, so that guidance works with what is trained."""

    share: float = Field(default=0.1, ge=0, le=1, description="of the rows")
    null: dict[str, int] | Literal["text"] = Field(
        description="the conditions that stand for none, such as {class_labels: 10}, or text: an empty prompt"
    )


class Training(Section):
    """When and how the student is trained: the options of ``fewstep.fit``, which documents them."""

    steps: Count | None = Field(default=None, description="updates")
    max_seconds: Above | None = Field(default=None, description="wall time in seconds, everything counted")
    batch: Count = Field(default=256, description="rows of an update, over all processes")
    chunk: Count | None = Field(default=None, description="rows that share a random generator")
    accumulate: Count = Field(default=1, description="micro-batches of an update")
    lr: Above = Field(default=1e-3, description="highest learning rate of AdamW")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    schedule: str = Field(default="cosine", description="cosine or constant")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    clip: Above | None = Field(default=1.0, description="largest gradient norm; null for no limit")
    ema: float | None = Field(default=0.999, ge=0, lt=1, description="decay of the averaged weights; null for none")
    ema_warmup: bool = Field(default=True, description="whether that decay rises from 0.1 at the start")
    precision: str = Field(default="float32", description="float32, bf16 or fp16")
    compile: bool = Field(default=False, description="torch.compile the network")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1; else a GPU if there is one")
    checkpoint_every: Count = Field(default=1000, description="steps between checkpoints")
    keep: Count = Field(default=2, description="checkpoints kept")
    log_every: Count = Field(default=50, description="steps between lines of metrics.jsonl")
    track: tuple[str, ...] = Field(default=(), description="any of tensorboard, trackio, wandb")
    quiet: bool = Field(default=False, description="no progress bar")


class Evaluation(Section):
    """How the result is judged, and how often samples are drawn on the way."""

    steps: tuple[Count, ...] = Field(default=(1, 2, 4, 8), description="step counts of the student")
    teacher_steps: tuple[Count, ...] | None = Field(
        default=None, description="those of the teacher; else the same and 100"
    )
    count: int = Field(default=10_000, ge=0, description="samples judged at each step count; 0 for no evaluation")
    batch: Count = Field(default=500, description="samples drawn at once")
    data: Named | None = Field(default=None, description="what samples are held against; else the data trained on")
    metrics: tuple[str, ...] | None = Field(
        default=None, description="which of rmse, fd, kid, ... are measured; else all (rmse is dear on images)"
    )
    extractor: str = Field(
        default="auto",
        description="features of images: auto (a small classifier trained on the labels), none, or the file of FID's "
        "Inception weights",
    )
    every: Count | None = Field(
        default=None, description="training steps between sample grids; else eight grids in a run"
    )

    @field_validator("count")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 4:
            raise ValueError("4 samples at least are needed to judge by, or 0 for no evaluation")
        return value


class Recipe(Section):
    """A whole run."""

    name: str = Field(description="of the run; its folder is runs/NAME")
    teacher: Teacher | None = Field(default=None, description="what is distilled; none to train from data")
    student: Student = Field(default=Student.model_validate({}), description="what is trained")
    data: Named = Field(description="a data set by name or path, or `teacher`: its own samples stand in for data")
    coupling: Literal["independent", "ot"] = Field(
        default="independent", description="how noise is paired with data: ot, by optimal transport within a chunk"
    )
    drop: Dropping | None = Field(default=None, description="conditions left out of some rows")
    objective: Named = Field(description="a method by name, or FILE.py:CLASS or MODULE:CLASS of one's own")
    training: Training = Field(default=Training(), description="when and how")
    evaluation: Evaluation = Field(default=Evaluation(), description="how well")
    seed: int = Field(default=0, ge=0, description="decides the first weights and every random number")

    @model_validator(mode="before")
    @classmethod
    def _none_is_no_teacher(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("teacher") in ("none", {"source": "none"}, {"source": None}):
            return {**value, "teacher": None}
        return value

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe in plain values."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """The text of ``recipe.yaml``, which ``load_recipe`` reads back as the same recipe."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs one: all but the name and the evaluation."""
        # Runs from before there was a coupling say nothing of it, and may go on.
        without = {"name", "evaluation"} | ({"coupling"} if self.coupling == "independent" else set())
        return {key: value for key, value in self.as_dict().items() if key not in without}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a YAML file, of a name among those that come with fewstep, or of a mapping.

    Args:
        source: a path (of a run folder too), a name such as ``checkerboard-itvm``, or the keys themselves.
        overrides: dotted keys, and their values as YAML text: ``{"objective.ema": "0.99", "steps": "10"}``. Short
            forms: ``steps``, ``teacher``, ``student``, ``data``, ``objective``. Another objective, or network of the
            student, starts from its own defaults: the options in the file are those of the one that it replaces.

    Raises:
        FileNotFoundError: there is no such recipe, or no file that it names.
        ValueError: a key, a name or a value that cannot be; one line with the dotted key and what is known.
    """
    base = Path()
    if isinstance(source, Mapping):
        tree = dict(source)
    else:
        path = find_recipe(source)
        base, tree = path.parent, read_yaml(path)
        tree.setdefault("name", path.stem)
    # The short forms first, as they may take away options that others set.
    for key, text in sorted((overrides or {}).items(), key=lambda item: item[0] not in _FLAGS):
        value = parse_value(key, text)
        _replace(tree, key, value)
        _set(tree, key if isinstance(value, Mapping) else _FLAGS.get(key, key), value)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise in_one_line(error, Recipe) from None
    return _resolve(recipe, base)


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe, given by its path, its run folder or its name."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.is_file():
        return path
    known = known_recipes()
    if path.stem in known and str(path.parent) in (".", "recipes"):
        return known[path.stem]
    near = get_close_matches(path.stem, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"there is no recipe {str(source)!r}: {hint}`fewstep recipes` lists what comes with fewstep"
    )


def known_recipes() -> dict[str, Path]:
    """The recipes that come with fewstep, by name."""
    package = Path(__file__).parent
    # A wheel has them inside the package, a checkout beside it.
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe(recipe: Path) -> str:
    """What a recipe says it is: the comment on its first line."""
    first = recipe.read_text().split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find_objective(name: str) -> type:
    """The class of a method: fewstep's by name, or one's own by ``FILE.py:CLASS``."""
    from fewstep.objectives import OBJECTIVES

    if ":" in name:
        return find_object(name)
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def _replace(tree: dict[str, Any], key: str, value: Any) -> None:
    """Take away the options of a method or network that gives way to another."""
    section = tree.get(key)
    if key in ("objective", "student") and isinstance(section, dict) and section.get(_SHORT[key]) != value:
        kept = ("kind", "path", "prediction", "weights") if key == "student" else ()
        tree[key] = {name: section[name] for name in kept if name in section}


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key; short forms on the way are opened up to take an option."""
    *parents, key = dotted.split(".")
    for depth, parent in enumerate(parents):
        inner = tree.get(parent) or {}
        if isinstance(inner, str) and depth == 0 and parent in _SHORT:
            inner = {_SHORT[parent]: inner}
        if not isinstance(inner, dict):
            raise ValueError(f"unknown recipe key {dotted!r}: {parent} is {inner!r}, which has no keys inside")
        tree[parent] = tree = dict(inner)
    tree[key] = value


def _resolve(recipe: Recipe, base: Path) -> Recipe:
    """Names checked, files found, and the options of the method filled in."""
    teacher, student = recipe.teacher, recipe.student
    if student.path is not None and student.path not in PATHS:
        raise unknown("path", student.path, PATHS)
    if ":" not in student.network and student.network not in NETWORKS:
        raise unknown("network", student.network, NETWORKS)
    if recipe.training.steps is None and recipe.training.max_seconds is None:
        raise ValueError("training.steps or training.max_seconds is needed: when is the training done?")

    if teacher is not None:
        teacher.source = _beside(base, teacher.source)
        if teacher.guidance is not None and teacher.guidance.weak is not None:
            teacher.guidance.weak = _beside(base, teacher.guidance.weak)
        if teacher.guidance is not None and teacher.guidance.range is not None and student.network == "auto":
            student.guidance = True if student.guidance is None else student.guidance
    _check_student(recipe)
    student.network = _beside(base, student.network)
    recipe.data.name = _beside(base, recipe.data.name)
    recipe.objective.name = _beside(base, recipe.objective.name)

    method = find_objective(recipe.objective.name)
    options = recipe.objective.options
    alone = {"teacher": "none"} if "teacher" in options else {}
    if alone:
        _train_alone(recipe, method, options.pop("teacher"))
    # A run of long ago may have options that are no more: null ones decided nothing.
    known = inspect.signature(method).parameters
    options = {name: value for name, value in options.items() if value is not None or name in known}
    options = arguments("objective", method, options, given=("teacher",))
    recipe.objective = Named.model_validate({"name": recipe.objective.name, **alone, **options})
    wanted = inspect.signature(method).parameters.get("teacher")
    if teacher is None and wanted is not None and wanted.default is wanted.empty:
        raise ValueError(
            f"{recipe.objective.name} distills a teacher and there is none: say --teacher, or teacher: in the recipe"
        )
    if teacher is None and student.network == "auto":
        raise ValueError(
            "student.network is auto, the network of the teacher, and there is no teacher: say mlp or unet"
        )
    return recipe


def _check_student(recipe: Recipe) -> None:
    """Refuse what is asked of a student that would come to nothing."""
    student, guidance = recipe.student, recipe.teacher.guidance if recipe.teacher else None
    for key in ("image", "conversion"):
        if getattr(student, key) is not None and student.network != "auto":
            raise ValueError(
                f"student.{key} changes the network of the teacher, and student.network is {student.network}: say auto"
            )
    if student.guidance and (guidance is None or guidance.range is None):
        raise ValueError(
            "student.guidance is an input for the strength of guidance, and there are no strengths to learn: say "
            "teacher.guidance.range, such as [1, 3]"
        )
    if student.guidance and student.kind == "field":
        raise ValueError("student.guidance is for flow maps, and student.kind is field: leave one of them out")


def _train_alone(recipe: Recipe, method: type, value: Any) -> None:
    """Take in ``objective.teacher: none``: the loss, and the first weights, know the data alone, and the teacher is
    there for the evaluation."""
    wanted, name = inspect.signature(method).parameters.get("teacher"), recipe.objective.name
    if value not in ("none", None):
        raise ValueError(f"objective.teacher is {value!r}: none is all it can be; the teacher is named by `teacher`")
    if wanted is not None and wanted.default is wanted.empty:
        raise ValueError(f"objective.teacher is none, but {name} needs its teacher: leave it out")
    if recipe.student.network == "auto" and recipe.student.weights != "teacher":
        raise ValueError(
            "objective.teacher is none, and student.network is auto, which starts from the teacher's weights: say mlp "
            "or unet, or student.weights: teacher"
        )
    recipe.student.weights = recipe.student.weights or "random"


def _beside(base: Path, name: str) -> str:
    """A path that is not here but beside the recipe, as the path that is there; anything else as it is."""
    path, colon, inside = name.rpartition(":") if ".py:" in name else (name, "", "")
    looks_so = "/" in path or Path(path).suffix != ""
    return f"{base / path}{colon}{inside}" if looks_so and not Path(path).exists() and (base / path).exists() else name
