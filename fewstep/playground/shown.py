"""The page of ``fewstep ui``: the same noise at 1, 2, 4, ... steps and by the teacher, side by side.

What the page shows is drawn by :class:`Playground`, which knows nothing of the page; gradio is imported where the page
is made.
"""

import inspect
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.style import COLOURS, png
from fewstep.flows.fields import VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import Model, classes_of, shape_of, takes
from fewstep.generation.drawing import draw
from fewstep.runs.datasets import given_by
from fewstep.runs.loading import find_model, make_teacher
from fewstep.training.run_files import is_run

# What a page that is left alone draws of the plane, and what is looked at to choose its extent.
POINTS, _LOOK = 4096, 1024
_GIVEN = 64  # rows of a run's data whose conditions are given to images in turn


@dataclass(frozen=True)
class Wish:
    """What is to be drawn.

    Args:
        steps: the most; see :func:`step_counts`. seed, count: as in ``fewstep sample``. gamma: the stochasticity of a
            flow map. guidance: its strength, None for what the model does if nothing is said. label: the class of all
            samples, None for all classes in turn. prompts: given to the samples in turn. teacher_steps: those of the
            image at the end.
    """

    steps: int = 8
    seed: int = 0
    count: int = 16
    gamma: float | None = None
    guidance: float | None = None
    label: int | None = None
    prompts: tuple[str, ...] = ()
    teacher_steps: int = 50


@dataclass(frozen=True)
class Panel:
    """One image: what it is called, its samples (N, ...) on the CPU, and what one of them cost."""

    name: str
    samples: Tensor
    seconds: float
    calls: float

    @property
    def cost(self) -> str:
        calls = f"{self.calls:g} network call{'s' * (self.calls != 1)}"
        return f"{seconds_of(self.seconds)} and {calls} each"


def seconds_of(value: float) -> str:
    """Seconds with a unit."""
    return f"{value:.2g} s" if value >= 1 else f"{1000 * value:.2g} ms" if value < 0.0995 else f"{1000 * value:.0f} ms"


def step_counts(most: int) -> list[int]:
    """The powers of two below ``most``, and ``most``.

    >>> step_counts(6)
    [1, 2, 4, 6]
    """
    return [n for n in (2**k for k in range(most.bit_length())) if n < most] + [most]


class Playground:
    """A model, and its teacher where there is one, with what it takes to draw images of both.

    Args:
        model: a flow map or velocity field of images with 1 or 3 channels, of their latents, or of points in the plane.
        name: what it is called. shape: of one sample; by default what the model says.
        teacher: drawn last, at its own number of steps; by default the model itself, if that is a field.
        classes: what its classes are called. given: other conditions of the samples, as in
            ``fewstep.generation.drawing.draw``.

    Raises:
        ValueError: samples that are no images, or conditions that nothing on the page would give.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        shape: tuple[int, ...] | None = None,
        teacher: VelocityField | None = None,
        classes: Sequence[str] = (),
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.name, self.given = model, name, dict(given or {})
        self.shape = shape or shape_of(model)
        self.classes = list(classes) or [f"class {i}" for i in range(classes_of(model))]
        self.is_map = isinstance(model, FlowMap)
        self.has_text = model.text is not None and "encoder_hidden_states" not in self.given
        # A text model that is told no strength is guided away from what it does without a prompt.
        can_be_guided = self.has_text and not self.is_map and not isinstance(model, Guided)
        self.takes_strength = told_strength(model) or can_be_guided
        self.lock = threading.Lock()
        self._of_teacher: tuple[Wish, Panel] | None = None
        self.picture_shape = self.shape if model.latents is None else tuple(model.latents.image_shape_of(self.shape))
        self.is_plane = self.picture_shape == (2,)
        if not self.is_plane and not (len(self.picture_shape) == 3 and self.picture_shape[0] in (1, 3)):
            raise ValueError(
                f"samples of shape {self.picture_shape} are no images that a page can show: fewstep sample {name} "
                "--out samples.npy writes the numbers"
            )
        # Called once now, so that what is missing is known before there is a page, and no image is timed cold.
        first = Wish(steps=1, count=1, prompts=("",) if self.has_text else ())
        self._panel("", model, 1, first)
        self.teacher: Model | None = teacher
        if teacher is not None:
            try:
                self._panel("", teacher, 1, first)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                warnings.warn(f"the teacher is not shown: {' '.join(str(error).split())[:240]}", stacklevel=3)
                self.teacher = None
        self.called = "teacher, "
        if self.teacher is None and not self.is_map:  # a field is held against itself, solved well
            self.teacher, self.called = model, ""
        self.box = self._extent() if self.is_plane else None

    @classmethod
    def open(cls, source: str, device: torch.device | str = "cpu", variant: str | None = None) -> "Playground":
        """Of a run, or of whatever else ``fewstep sample`` takes.

        Raises:
            FileNotFoundError, ValueError: as ``fewstep.runs.loading.open_run``, ``fewstep.load`` and the class.
        """
        from fewstep.runs.loading import open_run

        run = open_run(source) if is_run(Path(source).expanduser()) else None
        model = find_model(source, {"variant": variant} if variant else None) if run is None else run.model
        teacher, given = None, {}
        if run is not None:
            teacher = make_teacher(run.recipe.teacher).to(device).eval() if run.recipe.teacher else None
            rows = _GIVEN if len(run.shape) > 1 else 4 * POINTS  # as many as a page draws
            given = given_by(run.recipe, model, rows, text=False)
            if teacher is not None:
                teacher.moments = model.moments  # it knows the data as the run does
        name = Path(source).resolve().name if Path(source).is_dir() else source
        return cls(
            model.to(device).eval(),
            name,
            shape=None if run is None else run.shape,
            teacher=teacher,
            classes=_names(model),
            given=given,
        )

    def plan(self, wish: Wish) -> list[tuple[str, Model, int]]:
        """What is drawn: the name of each image, its model and steps."""
        drawn = [("", self.model, n) for n in step_counts(wish.steps)]
        drawn += [] if self.teacher is None else [(self.called, self.teacher, wish.teacher_steps)]
        return [(f"{who}{n} step{'s' * (n > 1)}", model, n) for who, model, n in drawn]

    def panels(self, wish: Wish) -> Iterator[Panel]:
        """The images of ``plan``, each as soon as it is drawn, all from the same noise."""
        own = len(step_counts(wish.steps))
        for i, (name, model, steps) in enumerate(self.plan(wish)):
            if i < own:
                yield self._panel(name, model, steps, wish)
                continue
            # Many steps are dear: what does not change them does not draw them again.
            same = replace(wish, steps=1, gamma=None)
            if self._of_teacher is None or self._of_teacher[0] != same:
                self._of_teacher = same, self._panel(name, model, steps, wish)
            yield self._of_teacher[1]

    def picture(self, samples: Tensor) -> bytes:
        """Samples as PNG: images as a grid, points of the plane as dots, on one extent in all images."""
        if self.box is None:
            return image_grid(samples)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2, 3.2), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.scatter(*samples.T, s=120 / len(samples) ** 0.5, color=COLOURS[0], alpha=0.6, linewidths=0)
        low, high = self.box
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axes.axis("off")
        return png(figure)

    @property
    def strength(self) -> float:
        """Where the slider of guidance starts: at what the model does if nothing is said."""
        if isinstance(self.model, FlowMap):
            return 1.0 if self.model.guidance is None else self.model.guidance
        if isinstance(self.model, Guided):
            return self.model.scale
        return 5.0 if self.has_text else 1.0

    def _panel(self, name: str, model: Model, steps: int, wish: Wish) -> Panel:
        guidance = _strength_for(model, wish.guidance if self.takes_strength else None)
        options: dict[str, Any] = {} if wish.gamma is None or not isinstance(model, FlowMap) else {"gamma": wish.gamma}
        # Those of the model for its teacher too, which may have one more, for none.
        labels = None if not self.classes else range(len(self.classes)) if wish.label is None else [wish.label]
        with self.lock:  # one call at a time, whoever asks
            start = time.perf_counter()
            samples, _, calls = draw(
                model,
                wish.count,
                steps,
                shape=self.shape,
                seed=wish.seed,
                labels=labels,
                prompts=wish.prompts if self.has_text else None,
                given=self.given,
                decode=True,
                batch=wish.count,
                guidance=guidance,
                **options,
            )
            seconds = (time.perf_counter() - start) / wish.count
        return Panel(name, samples, seconds, calls)

    def _extent(self) -> tuple[list[float], list[float]]:
        """The corners of a square around nearly all points, of the best that is there."""
        model, steps = (self.model, 8) if self.teacher is None else (self.teacher, 50)
        points = self._panel("", model, steps, Wish(count=_LOOK)).samples.double()
        low, high = points.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64), dim=0)
        centre, half = (low + high) / 2, 0.58 * (high - low).max()
        return (centre - half).tolist(), (centre + half).tolist()


def told_strength(model: Model) -> bool:
    """Whether a model's network has an input for the strength of guidance, or a guided field takes it."""
    if isinstance(model, Guided):
        return True
    inner: Any = getattr(model, "network", model)
    # By its name: an exact field takes any condition, and heeds none.
    return takes(model, "guidance") and "guidance" in inspect.signature(inner.forward).parameters


def _strength_for(model: Model, guidance: float | None) -> float | None:
    """The strength that a model is told where this one is asked for: a teacher may take none."""
    if guidance is None:
        return None
    is_guided_by_text = model.text is not None and isinstance(model, VelocityField)
    return guidance if told_strength(model) or is_guided_by_text else None


def _names(model: Model) -> list[str]:
    """What the classes of a model are called; by number where that is not known."""
    known = dict(enumerate(model.class_names))
    return [known.get(number) or f"class {number}" for number in range(classes_of(model))]
