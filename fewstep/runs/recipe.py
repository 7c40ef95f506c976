"""The sections of a recipe: everything a run is made of, typed, in one place."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from fewstep.common.options import as_yaml
from fewstep.runs.sections import Above, Blank, Count, Named, Section, base_section

PATHS = ("linear", "trigonometric", "vp", "reflected")
BETWEEN = ("linear", "trigonometric", "encoding-decoding", "mirror")  # paths between two data sets
NETWORKS = ("auto", "mlp", "unet", "conv1d", "transformer", "continuous")
MADE = ("teacher", "prior")  # data that are no data set: samples of the teacher, and its shape and classes alone


class Guidance(Section):
    """Classifier-free guidance of the teacher, or autoguidance by a weaker model; see ``fewstep.Guided``."""

    scale: float = Field(description="weight of the guided direction; 1 is no guidance")
    scale_2: float | None = Field(
        default=None, description="the weight where the second of two experts answers (Wan 2.2); scale if not given"
    )
    interval: tuple[float, float] = Field(
        default=(0.0, 1.0), description="times (0 noise, 1 data) between which it acts"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="strengths drawn for each row between these, and told to the student as the condition `guidance`; "
        "it is judged at scale",
    )
    null: dict[str, Blank] | Literal["text"] = Field(
        default_factory=dict,
        description="the conditions that stand for none, such as {class_labels: 10} or {vector: nan}, or text: an "
        "empty prompt",
    )
    weak: str | None = Field(default=None, description="a weaker model, named as a teacher is: autoguidance")
    embedded: bool | None = Field(
        default=None,
        validation_alias=AliasChoices("embedded", "told"),
        description="the teacher is told the strength as it is, as Flux.1-dev: nothing else guides it",
    )

    @model_validator(mode="after")
    def _something_weaker(self) -> "Guidance":
        if self.embedded and (self.null or self.weak is not None):
            raise ValueError("guidance told to the teacher needs no null conditions or weak model: leave them out")
        if not self.embedded and not self.null and self.weak is None:
            raise ValueError(
                "guidance needs null conditions, such as {class_labels: 10}, a weak model, or embedded: true for a "
                "teacher that is told its strength"
            )
        if self.scale_2 is not None and (self.range is not None or self.embedded):
            raise ValueError("scale_2 is a fixed strength, and range or embedded tell the student one: leave one out")
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
        description="an exact field (checkerboard, eight-gaussians, spiral, orbital), a diffusers folder or hub name, "
        "a run, fewstep:NAME for a model that comes along, or FILE.py:FUNCTION or MODULE:FUNCTION that returns a "
        "VelocityField"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of that function")
    guidance: Guidance | None = Field(default=None, description="classifier-free guidance, folded into the student")
    distilled: bool | None = Field(
        default=None, description="a model for a few steps (LCM, Turbo, ...) is taken for a velocity all the same"
    )


class Lora(Section):
    """A low-rank adapter that trains in the place of the network's own weights; see ``fewstep.add_lora``."""

    rank: Count = Field(default=8, description="of the adapter")
    alpha: Above | None = Field(default=None, description="it is scaled by alpha / rank; else the rank")
    targets: list[str] | str | None = Field(
        default=None, description="layers by the ends of their names, or a regular expression; else by the model"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's input")
    base: Literal["float32", "bfloat16", "int8", "nf4"] = Field(
        default="float32",
        description="what the frozen linear layers are kept in, the teacher's too: bfloat16 halves them; int8 and nf4 "
        "(4 bits) take bitsandbytes",
    )


class Student(Section):
    """The network that is trained, and what it stands for."""

    short = "network"
    network: str = Field(
        "auto",
        description="auto (the teacher's), mlp, unet (diffusers' UNet2DModel), conv1d (for signals (C, L)), "
        "transformer (for rows of tokens), continuous (a U-Net of differential equations), or FILE.py:FUNCTION or "
        "MODULE:FUNCTION that returns a network: net(x, s, t) for a flow map, net(x, t) for a field",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the network")
    kind: Literal["map", "field", "denoised"] | None = Field(
        default=None,
        description="flow map, field, or denoised: a field with a denoiser beside its velocity; else what the "
        "objective trains",
    )
    path: str | None = Field(
        default=None,
        description="linear, trigonometric or vp (between two data sets linear, trigonometric, encoding-decoding or "
        "mirror; in a box linear or reflected); else the teacher's, or linear",
    )
    space: Named | None = Field(
        default=None,
        description="where samples live: box (low, high), torus (period), tokens (symbols), product (parts); else R^n, "
        "and tokens for data of text",
    )
    latent: Literal["none", "quadratic", "brownian", "sine"] | None = Field(
        default=None, description="noise on the way between two data sets (fewstep.Interpolant); else none"
    )
    prediction: str | None = Field(
        default=None, description="what the network predicts; else the teacher's, or velocity"
    )
    weights: Literal["teacher", "random"] | None = Field(
        None, description="the first weights; else the teacher's where it has a network"
    )
    start: str | None = Field(
        default=None,
        description="an export, a run or another model that fewstep.load reads, which the student is and goes on from",
    )
    lora: Lora | None = Field(default=None, description="train an adapter of these weights alone")
    guidance: bool | Literal["interval"] | None = Field(
        default=None,
        description="an input for the strength of guidance, or for it and the interval of times where it acts; else "
        "where the teacher's has a range, or the objective is guided",
    )
    second_time: Literal["t", "span", "late", "none"] | None = Field(
        default=None,
        description="how a diffusers model is told its second time: t (else), span (t - s), or late: the last blocks "
        "are told t in the place of s; none: not at all, for a consistency model that stock pipelines run",
    )
    late_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="the share of the blocks that late tells t; else a third of a transformer's, a U-Net's up blocks",
    )
    image: Count | None = Field(
        default=None,
        description="channels of the condition `image` (B, image, H, W), which a model of diffusers then takes beside "
        "its state; at first it does not heed it",
    )
    conversion: Literal["none"] | None = Field(
        default=None,
        description="none: what the teacher's network predicts is taken for the flow as it stands (naive fine-tuning)",
    )


class Dropping(Section):
    """Conditions left out of some rows, so that guidance works with what is trained."""

    share: float = Field(default=0.1, ge=0, le=1, description="of the rows")
    null: dict[str, Blank] | Literal["text"] = Field(
        description="the conditions that stand for none, such as {class_labels: 10} or {vector: nan}, or text: an "
        "empty prompt"
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
    optimizer: str | None = Field(
        default=None, description="adamw8bit: AdamW's two moments in 8 bits each, by bitsandbytes; else those of AdamW"
    )
    schedule: str = Field(default="cosine", description="cosine or constant")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    clip: Above | None = Field(default=1.0, description="largest gradient norm; null for no limit")
    ema: float | None = Field(default=0.999, ge=0, lt=1, description="decay of the averaged weights; null for none")
    ema_warmup: bool = Field(default=True, description="whether that decay rises from 0.1 at the start")
    precision: str = Field(default="float32", description="float32, bf16 or fp16")
    compile: bool = Field(default=False, description="torch.compile the network")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations of a diffusers model backward: less memory, more time"
    )
    shard: str | None = Field(
        default=None, description="fsdp2: share out weights, gradients, moments and averages over the processes"
    )
    offload: bool = Field(default=False, description="keep these shares on the CPU, where the optimizer then runs")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1; else a GPU if there is one")
    checkpoint_every: Count = Field(default=1000, description="steps between checkpoints")
    checkpoint_minutes: Above | None = Field(default=10.0, description="minutes after which there is one; null: none")
    keep: Count = Field(default=2, description="checkpoints kept")
    log_every: Count = Field(default=50, description="steps between lines of metrics.jsonl")
    track: tuple[str, ...] = Field(default=(), description="any of tensorboard, trackio, wandb")
    quiet: bool = Field(default=False, description="no progress bar")

    @field_validator("optimizer")
    @classmethod
    def _usual(cls, value: str | None) -> str | None:
        return None if value == "adamw" else value  # one run, whether said or not


class Evaluation(Section):
    """How the result is judged, and how often samples are drawn on the way."""

    steps: tuple[Count, ...] = Field(default=(1, 2, 4, 8), description="step counts of the student")
    teacher_steps: tuple[Count, ...] | None = Field(
        default=None, description="those of the teacher; else the same and 100"
    )
    count: int = Field(default=10_000, ge=0, description="samples judged at each step count; 0 for no evaluation")
    batch: Count = Field(default=500, description="samples drawn at once")
    data: Named | None = Field(
        default=None, description="what samples are held against; else the data trained on (no memorisation then)"
    )
    metrics: tuple[str, ...] | None = Field(
        default=None, description="which of rmse, fd, diversity, ... are measured; else all (rmse is dear on images)"
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
    data: Named = Field(
        description="a data set by name or path; `teacher`: its own samples stand in for data; or `prior`: no data, "
        "its shape and classes alone, for methods that start from noise"
    )
    source: Named | None = Field(
        default=None,
        description="where the flow starts: another data set, by name or path; else normal noise",
    )
    coupling: Literal["independent", "ot", "ot-within-labels"] = Field(
        default="independent",
        description="how noise, or the source, is paired with data: ot, by optimal transport (of a chunk, or within "
        "its labels)",
    )
    drop: Dropping | None = Field(default=None, description="conditions left out of some rows")
    blocks: tuple[Above, ...] | None = Field(
        default=None,
        min_length=1,
        description="train a chain of small flows one after the other (local flow matching), [0.1, 0.15, 0.225] four "
        "of them: the lengths of the steps towards noise of all but the last",
    )
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

    @model_validator(mode="after")
    def _between_two(self) -> "Recipe":
        student = self.student
        if self.source is not None and student.latent is None and self.teacher is None and student.start is None:
            student.latent = "none"
        if student.latent is not None and self.source is None:
            raise ValueError("student.latent is noise on the way between two data sets: say source: NAME too")
        if student.latent is not None and self.teacher is not None:
            raise ValueError("student.latent: a student with a teacher is on the teacher's path, leave it out")
        return self

    @model_validator(mode="after")
    def _blocks_alone(self) -> "Recipe":
        student, ot = self.student, None if self.coupling == "independent" else self.coupling
        asked = {"teacher": self.teacher, "source": self.source, "drop": self.drop, "coupling": ot}
        asked |= {f"student.{key}": getattr(student, key) for key in ("start", "lora", "space", "image")}
        if self.blocks is not None and (taken := [name for name, value in asked.items() if value is not None]):
            raise ValueError(f"blocks are trained from data alone, without {taken[0]}: leave one of them out")
        return self

    @property
    def objectives(self) -> list[Named]:
        """The objective and what it stands around (``{name: Corrected, base: ITVM}``), from the outside in."""
        found = [self.objective]
        while (base := found[-1].options.get("base")) is not None:
            found.append(base_section(base, "objective" + ".base" * len(found)))
        return found

    @property
    def guided(self) -> dict[str, Any]:
        """The options of the objective, or of the one that it stands around, that teaches guidance from data; none
        where no such does."""
        return next((section.options for section in self.objectives if section.options.get("guided")), {})

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe in plain values."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """The text of ``recipe.yaml``, which ``load_recipe`` reads back as the same recipe."""
        return as_yaml(self.as_dict())

    def fingerprint(self) -> dict[str, Any]:
        """What makes two runs one: all but the name and the evaluation."""
        # Runs from before there was a coupling say nothing of it, and may go on.
        without = {"name", "evaluation", "blocks"} | ({"coupling"} if self.coupling == "independent" else set())
        return {key: value for key, value in self.as_dict().items() if key not in without}
