"""Clothes made into other clothes: a flow map at 1, 2 and 4 steps against its teacher at 28, by class and by distance.

    python benchmarks/editing.py                       # Fashion-MNIST, three seeds; a quarter of an hour on one core
    python benchmarks/editing.py --picture docs/images/editing.png --out ""       # the picture alone; a minute

Each of the pictures (of the test set, drawn by the seed) is asked to be another class, drawn too. Measured of each
way: the share that the small classifier takes for the class that was asked for, the root mean square of what changed
(pixels from -1 to 1), and network calls a picture.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator, mix, sample_generators
from fewstep.evaluation.extractor import accuracy, trained_classifier
from fewstep.flows.calls import count_calls
from fewstep.flows.sampling import sample_noise

MAP, TEACHER = "fewstep:fashion-mnist-fast", "fewstep:fashion-mnist"
STEPS, OF_TEACHER = (1, 2, 4), 28


@dataclass(frozen=True)
class Asked:
    """Pictures, the classes that they have and are to have, and noise of their own."""

    pictures: Tensor
    classes: Tensor
    wanted: Tensor
    seed: int

    @property
    def source(self) -> dict[str, Tensor]:
        return {"class_labels": self.classes}

    @property
    def target(self) -> dict[str, Tensor]:
        return {"class_labels": self.wanted}

    @property
    def generators(self) -> list[torch.Generator]:
        return sample_generators(self.seed, range(len(self.pictures)))


def asked(data: Any, seed: int, count: int) -> Asked:
    draw = generator(seed, 1)
    batch = data.rows(torch.randperm(data.size, generator=draw)[:count], draw)
    classes = batch.cond["class_labels"]
    return Asked(batch.data, classes, (classes + 1 + torch.randint(9, (count,), generator=draw)) % 10, mix(seed))


def by_flow_edit(model: Any, of: Asked, steps: int, strength: float) -> Tensor:
    told = {"strength": strength, "generator": of.generators}
    return fewstep.flow_edit(model, of.pictures, of.source, of.target, steps, **told)


def by_sdedit(model: Any, of: Asked, steps: int, strength: float) -> Tensor:
    return fewstep.sdedit(model, of.pictures, steps, strength=strength, generator=of.generators, **of.target)


def by_inversion(model: Any, of: Asked, steps: int, strength: float) -> Tensor:
    state, _ = fewstep.invert(model, of.pictures, steps, strength=strength, **of.source)
    return fewstep.resume(model, state, steps, strength=strength, **of.target)


def anew(model: Any, of: Asked, steps: int, strength: float) -> Tensor:
    """No edit: a picture of the class, from noise that knows nothing of the source."""
    return fewstep.sample(model, sample_noise(tuple(of.pictures.shape), of.generators), steps, **of.target)


WAYS: dict[str, Callable[[Any, Asked, int, float], Tensor]] = {
    "FlowEdit": by_flow_edit, "SDEdit": by_sdedit, "inversion": by_inversion,
}  # fmt: skip


def measured(model: Any, way: Callable[..., Tensor], of: Asked, steps: int, strength: float, judge: Any) -> list[float]:
    with count_calls(model) as calls:
        edited = way(model, of, steps, strength)
    moved = (edited - of.pictures).flatten(1).square().mean(1).sqrt()
    return [calls.rows / len(of.pictures), accuracy(judge, edited, of.wanted), float(moved.mean())]


def rows_of(models: dict[str, Any], judge: Any, every: list[Asked], strengths: list[float]) -> list[list[Any]]:
    plans = [("a new sample", "map", 4, 1.0, anew)]
    for strength in strengths:
        for name, way in WAYS.items():
            plans += [(name, "map", steps, strength, way) for steps in STEPS]
            few = STEPS if name == "FlowEdit" else ()
            plans += [(name, "teacher", steps, strength, way) for steps in (*few, OF_TEACHER)]
    rows: list[list[Any]] = []
    of_class = [accuracy(judge, of.pictures, of.classes) for of in every]
    rows.append(["the picture itself", "-", 0, None, 0, _spread(of_class), _spread([0.0] * len(every))])
    for name, kind, steps, strength, way in plans:
        found = np.array([measured(models[kind], way, of, steps, strength, judge) for of in every])
        told = None if way is anew else strength
        rows.append([name, kind, steps, told, round(float(found[:, 0].mean()), 1), *map(_spread, found[:, 1:].T)])
        print(*rows[-1], flush=True)
    return rows


def _spread(values: Any) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "std": round(float(np.std(values, ddof=1)), 4)}


def picture(models: dict[str, Any], data: Any, file: Path, names: tuple[str, ...], strength: float) -> None:
    """Twelve pictures, what each is to be, and what comes of it by each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    of = asked(data, 4, 12)
    student, teacher = models["map"], models["teacher"]
    strips = {
        "the picture": of.pictures,
        "teacher, FlowEdit, 28 steps": by_flow_edit(teacher, of, OF_TEACHER, strength),
        "map, FlowEdit, 1 step": by_flow_edit(student, of, 1, strength),
        "map, FlowEdit, 2 steps": by_flow_edit(student, of, 2, strength),
        "map, FlowEdit, 4 steps": by_flow_edit(student, of, 4, strength),
        "map, SDEdit, 2 steps": by_sdedit(student, of, 2, strength),
        "map, inversion, 4 steps": by_inversion(student, of, 4, strength),
    }
    figure, axes = plt.subplots(len(strips), 1, figsize=(9.4, 0.68 * len(strips) + 0.3), layout="constrained")
    for axis, (name, images) in zip(axes, strips.items(), strict=True):
        strip = images.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2).squeeze(-1)
        axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", weight="bold" if "map" in name else None)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    side = of.pictures.shape[-1]
    axes[0].set_xticks([side * (i + 0.5) for i in range(len(of.wanted))])
    axes[0].set_xticklabels([names[int(i)].replace("T-shirt/top", "T-shirt") for i in of.wanted], fontsize=8)
    axes[0].xaxis.tick_top()
    axes[0].tick_params(length=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description="Clothes made into other clothes, by a map and by its teacher.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=64, help="pictures of each seed")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.85, 1.0])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--strength", type=float, default=0.85, help="of the picture")
    parser.add_argument("--out", default="editing.json", help="nothing is measured where it is empty")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {"map": fewstep.load(MAP), "teacher": fewstep.load(TEACHER)}
    data = fewstep.load_data("fashion-mnist", split="test")
    if arguments.picture is not None:
        picture(models, data, arguments.picture, models["map"].class_names, arguments.strength)
    if not arguments.out:
        return
    judge = trained_classifier(fewstep.load_data("fashion-mnist"))
    every = [asked(data, seed, arguments.count) for seed in arguments.seeds]
    rows = rows_of(models, judge, every, arguments.strengths)
    notes = [
        f"Fashion-MNIST, {arguments.count} pictures of the test set for each seed, each to be another class, drawn at "
        f"random. The classifier is right for {judge.accuracy:.4f} of the rows that it was not trained on.",
        "Changed is the root mean square over the pixels, from -1 to 1, of a picture, its mean over pictures. Mean and "
        "standard deviation over the seeds.",
        "Of the picture itself: the share that the classifier takes for the class that it has.",
        "Steps of the teacher are Euler's, and of its inversion Heun's on the way back. Calls are for one picture; "
        "those of an inversion count finding the noise and its check.",
    ]
    write(
        Path(arguments.out), title="Fashion-MNIST edited to another class, by a map and its teacher",
        columns=["way", "model", "steps", "strength", "calls", "asked class", "changed"], rows=rows,
        formats={"asked class": "{mean:.3f} ± {std:.3f}", "changed": "{mean:.3f} ± {std:.3f}"},
        **here(seeds=arguments.seeds, notes=notes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
