"""Steering an MNIST map to a class and to an amount of ink, at equal network calls.

    fewstep distill mnist-vit-itvm --teacher.options.guidance 1 --drop "{share: 1, null: {class_labels: 10}}" \\
        --steps 1800 --training.ema 0.996 --out runs/mnist-any          # an unconditional student, once
    python benchmarks/steering.py runs/mnist-any

Both with FEWSTEP_DATA, as ``examples/mnist_vit.py`` says: the student is of that published transformer, which is asked
for no class at all. Each image is made with 28 or 112 network calls: by best-of-n, by weights alone, and by populations
that look ahead by the denoiser or by the map, without and with the reward's gradient. Classes are judged by a network
that did not steer. Writes benchmarks/results/steering.json and docs/images/steering.png.
"""

import argparse
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import sample_generators
from fewstep.evaluation.extractor import trained_classifier
from fewstep.flows import steering
from fewstep.flows.calls import count_calls
from fewstep.flows.kernels import Cond, Known, MapKernel
from fewstep.flows.population import Particles
from fewstep.flows.sampling import sample_noise

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "steering.png"
STEPS, WANTED, NONE = 4, 5, 10  # of the map; the class; what the transformer is told for no class
SHARP, SEEDS = 4, (0, 1, 2)


class ByDenoiser(MapKernel):
    """The map's steps, with ``E[x1 | x_t]`` to look ahead in the place of the map."""

    def ahead(self, i: int, x: Tensor, cond: Cond) -> tuple[Tensor, Known]:
        t = self.times[i]
        return x + (1 - t) * self.model.velocity(x, t, **cond), {}


class Task:
    """A reward, and what says of images (n, 1, 28, 28) in [-1, 1] how well they do, (n,)."""

    def __init__(self, name: str, reward: Any, judged: Any) -> None:
        self.name, self.reward, self.judged = name, reward, judged


def ink(images: Tensor) -> Tensor:
    """The mean of an image, 0 for black and 1 for white."""
    return images.clamp(-1, 1).mean(dim=(1, 2, 3)).add(1).div(2)


def tasks(plain: Tensor, steers: Any, judge: Any) -> list[Task]:
    def of_class(images: Tensor) -> Tensor:
        return SHARP * steers.classify(images).log_softmax(1)[:, WANTED]

    def is_judged(images: Tensor) -> Tensor:
        return (judge.classify(images).argmax(1) == WANTED).float()

    mean, spread = float(ink(plain).mean()), float(ink(plain).std())
    wanted, width = mean + 2 * spread, spread / 4
    print(f"ink {mean:.4f} +- {spread:.4f}: wanted {wanted:.4f} +- {width:.4f}")

    def of_ink(images: Tensor) -> Tensor:
        return -((images.mean(dim=(1, 2, 3)).add(1).div(2) - wanted) ** 2) / (2 * width**2)

    def is_near(images: Tensor) -> Tensor:
        return ((ink(images) - wanted).abs() < 2 * width).float()

    return [Task(f"a {WANTED}", of_class, is_judged), Task("ink", of_ink, is_near)]


def by_population(
    model: Any, task: Task, seed: int, images: int, particles: int, steps: int = STEPS, **options: Any
) -> tuple[Particles, list[torch.Generator]]:
    generators = sample_generators(seed, range(images * particles))
    noise = sample_noise((images * particles, 1, 28, 28), generators)
    reward = fewstep.Reward(task.reward, gradient=options.pop("gradient", False))
    labels = torch.full((len(noise),), NONE)
    if not options.get("greedy"):
        options["groups"] = images
    else:
        options["groups"] = len(noise)
    return steering.steer(model, noise, steps, reward, generator=generators, class_labels=labels, **options), generators


METHODS: dict[str, dict[str, Any]] = {
    "best of n": {"ess": 0.0},
    "weights alone": {"ess": 0.0},
    "denoiser ahead": {"kernel": ByDenoiser},
    "map ahead": {},
    "map ahead, gradient": {"gradient": True},
    "the same, 8 steps": {"gradient": True, "steps": 8},
    "greedy": {"greedy": True, "gamma": None},
}
CALLS = {
    "best of n": 4,
    "weights alone": 4,
    "denoiser ahead": 7,
    "map ahead": 7,
    "map ahead, gradient": 10,
    "the same, 8 steps": 22,
    "greedy": 8,
}


def measured(student: Any, task: Task, method: str, budget: int, seed: int, images: int) -> dict[str, Any]:
    options = dict(METHODS[method])
    particles = 1 if method == "greedy" else budget // CALLS[method]
    kernel = options.pop("kernel", MapKernel)
    with count_calls(student) as calls, mock.patch.object(steering, "MapKernel", kernel):
        found, generators = by_population(student, task, seed, images, particles, **options)
    if method == "best of n":
        with torch.no_grad():
            best = task.reward(found.x).reshape(images, particles).argmax(1)
        drawn = found.x.reshape(images, particles, 1, 28, 28)[torch.arange(images), best]
    else:
        drawn = found.draw(generators)
    with torch.no_grad():
        reward, judged = float(task.reward(drawn).mean()), float(task.judged(drawn).mean())
    plain = method in ("best of n", "greedy")
    return {
        "particles": particles,
        "calls": calls.rows / images,
        "drawn": drawn,
        "reward": reward,
        "as wanted": judged,
        "log E e^r": None if plain else float(found.log_normalizer.exp().mean().log()),
    }


def spread(values: list[float | None], digits: int) -> Any:
    found = [value for value in values if value is not None]
    if not found:
        return None
    t = torch.tensor(found, dtype=torch.float64)
    return {"mean": f"{float(t.mean()):.{digits}f}", "std": f"{float(t.std()):.{digits}f}"}


def measure(run: str, images: int) -> None:
    data = fewstep.load_data("mnist")
    steers, judge = trained_classifier(data, seed=0), trained_classifier(data, seed=1)
    student: Any = fewstep.load(run, trust=True)
    student.eval()
    updates = max(int(path.name.rpartition("-")[2]) for path in Path(run, "checkpoints").glob("step-*"))
    noise = sample_noise((4000, 1, 28, 28), sample_generators(99, range(4000)))
    labels = torch.full((4000,), NONE)
    plain = fewstep.sample(
        student, noise, STEPS, gamma=1.0, generator=torch.Generator().manual_seed(99), class_labels=labels
    )
    rows: dict[tuple[str, int, int], list[Any]] = {}
    strips: dict[str, dict[str, Tensor]] = {}
    for task in tasks(plain, steers, judge):
        with torch.no_grad():
            value, judged = task.reward(plain).double(), task.judged(plain).double()
        weights = value.softmax(0)
        total = f"{float(value.exp().mean().log()):.2f}"
        for name, count, w in (("the map itself", 1, None), ("the target, by 4,000 weights", len(plain), weights)):
            reward, share = ((v.mean() if w is None else w @ v) for v in (value, judged))
            row = [f"{float(share):.2f}", f"{float(reward):.1f}", total]
            rows.setdefault((name, count, STEPS * count), []).extend(row)
        strips[task.name] = {"the map itself": plain[:12]}
        for budget in (28, 112):
            for method in METHODS:
                if budget < 2 * CALLS[method] or (method == "greedy" and budget > 28):
                    continue
                each = [measured(student, task, method, budget, seed, images) for seed in SEEDS]
                named = {key: [one[key] for one in each] for key in each[0]}
                row = [spread(named["as wanted"], 2), spread(named["reward"], 1), spread(named["log E e^r"], 2)]
                key = (method, each[0]["particles"], round(each[0]["calls"]))
                rows.setdefault(key, []).extend(row)
                print(task.name, key, row, flush=True)
                if budget == 112 or method == "greedy":
                    strips[task.name][method] = each[0]["drawn"][:12]
    notes = [
        f"The student was stopped after {updates:,} steps of training.",
        f"An unconditional MNIST map in {STEPS} steps, gamma 1; {images} images for each seed, each of a population of "
        "its own; mean and standard deviation over seeds.",
        f"a {WANTED}: the reward is {SHARP} log p({WANTED} | image) of one small classifier; as wanted: the share that "
        f"another one calls a {WANTED}.",
        "ink: the reward is minus the squared distance to an ink of two deviations above the mean, over 2 (deviation "
        "/ 4)^2; as wanted: within half a deviation of it.",
        "calls: network calls an image. Of the gradient's 10 a particle 3 are followed by a backward pass, of greedy's "
        "8 it is 4; in 8 steps it is 7 of 22.",
        "log E e^r: of the map itself from 4,000 plain samples, of the others by the populations, averaged over "
        "images.",
    ]
    parts = [f"{name}: {what}" for name in strips for what in ("as wanted", "reward", "log E e^r")]
    columns = ["method", "particles", "calls", *parts]
    write(FOLDER / "steering.json", title="Steering an MNIST map", columns=columns,
          rows=[[*key, *row] for key, row in rows.items()], formats=dict.fromkeys(parts, "{mean} ± {std}"),
          **here(seeds=SEEDS, notes=notes))  # fmt: skip
    draw(strips)


def draw(strips: dict[str, dict[str, Tensor]]) -> None:
    from matplotlib.figure import Figure

    count = len(next(iter(strips.values())))
    figure = Figure(figsize=(9.5, 0.36 * count + 0.4), layout="constrained")
    panels = figure.subplots(count, len(strips), squeeze=False)
    for column, (name, rows) in enumerate(strips.items()):
        for axis, (method, images) in zip(panels[:, column], rows.items(), strict=True):
            strip = images.clamp(-1, 1)[:, 0].permute(1, 0, 2).flatten(1)
            axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            if not column:
                axis.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=9)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        panels[0, column].set_title("steered to " + ("more ink" if name == "ink" else name), fontsize=10)
    figure.savefig(PICTURE, dpi=110)
    print(f"{PICTURE} has the picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=64, help="for each seed, method and budget")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    measure(args.run, args.images)


if __name__ == "__main__":
    main()
