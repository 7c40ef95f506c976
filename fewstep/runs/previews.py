"""What is seen of a run while it trains: samples at each step count, and how far they are from the teacher's."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.common import distributed
from fewstep.common.randomness import generator, sample_generators
from fewstep.common.shards import is_sharded
from fewstep.data.batch import Data, has_classes, is_prior
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.points import error_quantiles, rmse
from fewstep.evaluation.style import png
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.flows.sources import starting_points
from fewstep.flows.trajectories import teacher_states
from fewstep.runs.objective import strength_of
from fewstep.runs.recipe import Recipe
from fewstep.training.run import Run
from fewstep.training.run_files import SAMPLES

_POINTS = 8192  # in an image of a density
_MEASURED = 512  # points compared with the teacher's; its exact flow takes seconds for more
_COLUMNS = 8  # images a row
_SHARE, _FIRST = 0.05, 0.25  # of a training's time that images take; seconds that the first is taken to need


class Watch:
    """A callback of ``fit``: draws ``samples/step-XXXXXXXX.png`` and logs ``rmse@N``, the root mean squared distance of
    N-step samples to the end points of the teacher's ODE, from the same noise; of points its median and 99 % quantile,
    ``error_median@N`` and ``error_99@N``, too.

    Images are drawn of images with 1 or 3 channels (a row for each step count, the last the teacher's), of latents as
    their VAE decodes them, and of points in the plane; other samples are only measured.

    Each ``evaluation.every`` steps where that is said. Else at each eighth of the training where all images so far,
    and one more, take a small share of its time: a try of ten steps does not wait for eight of them.
    """

    def __init__(self, recipe: Recipe, data: Data, teacher: VelocityField | None, out: Path) -> None:
        self.steps, self.every, self.out = recipe.evaluation.steps, recipe.evaluation.every, out
        self.data, self.teacher, self.seed = data, teacher, recipe.seed
        self.device = recipe.training.device
        self.strength = strength_of(recipe)
        self._eighth: int | None = None
        self._spent, self._last = 0.0, _FIRST  # seconds of all images, and of the last
        self._ends: Tensor | None = None

    def __call__(self, run: Run) -> None:
        if self.every is not None:
            is_due = run.step % self.every == 0
        else:
            before, self._eighth = self._eighth, int(8 * run.progress)
            is_due = before is not None and self._eighth > before
            if is_due:  # by the clock of the main process, as all have to call a sharded model
                has_time = self._spent + self._last <= _SHARE * run.seconds
                is_due = bool(run.world.from_main(has_time) if run.is_sharded else has_time)
        if is_due:
            start = time.perf_counter()
            run.log(self.draw(run.ema, run.step))
            self._last = time.perf_counter() - start
            self._spent += self._last

    def draw(self, model: Any, step: int) -> dict[str, float]:
        """Draw the image of this step; returns the distances."""
        is_plane, shape, latents = self.data.shape == (2,), self.data.shape, getattr(model, "latents", None)
        is_image = len(shape) == 3 and (latents is not None or shape[0] in (1, 3))
        count = _POINTS if is_plane else _COLUMNS
        device, world = next(model.parameters()).device, distributed.environment()
        if is_sharded(model):  # whose shares may be kept elsewhere than it computes
            device = distributed.choose_device(self.device, world)
        generators = sample_generators(self.seed, range(count))
        noise = starting_points(model, (count, *self.data.shape), generators).to(device)
        cond = self._conditions(count, device)
        model.eval()
        drawn = {n: sample(model, noise, n, generator=generators, **cond) for n in self.steps}

        found: dict[str, float] = {}
        if self.teacher is not None and isinstance(model, FlowMap):
            few = slice(_MEASURED)
            if self._ends is None:
                some = {name: value[few] for name, value in cond.items()}
                self._ends = teacher_states(self.teacher, noise[few], torch.ones(1), **some)[-1]
            for n, samples in drawn.items():
                found[f"rmse@{n}"] = rmse(samples[few], self._ends)
                if is_plane:  # where there are enough to say
                    median, most = error_quantiles(samples[few], self._ends)
                    found |= {f"error_median@{n}": median, f"error_99@{n}": most}

        file = self.out / SAMPLES / f"step-{step:08d}.png"
        if not world.is_main:
            return found
        if is_plane:
            panels = {f"{n} step{'s' * (n > 1)}": samples for n, samples in drawn.items()}
            if not is_prior(self.data):
                index = torch.arange(count) % (self.data.size or count)
                panels["data"] = self.data.rows(index, generator(self.seed)).data
            png(points_figure(panels), file)
        elif is_image:
            rows = {f"{n} step{'s' * (n > 1)}": samples for n, samples in drawn.items()}
            if self._ends is not None:
                rows["teacher"] = self._ends
            shown = torch.cat([*rows.values()])
            image_grid(shown if latents is None else latents.decode(shown), file, columns=count, labels=list(rows))
        return found

    def _conditions(self, count: int, device: torch.device) -> dict[str, Any]:
        """Those of the first rows of the data, the classes in turn where there are some."""
        cond = getattr(self.data, "cond", None)
        if cond is None:
            cond = self.data.rows(torch.arange(count) % (self.data.size or count), generator(self.seed)).cond
        picked = {}
        for name, value in cond.items():
            classes = value.unique() if name == "class_labels" and has_classes(cond) else value
            picked[name] = classes[torch.arange(count) % len(classes)].to(device)
        if self.strength is not None:
            picked["guidance"] = torch.full((count,), self.strength, device=device)
        return picked
