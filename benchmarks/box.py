"""The checkerboard in its square: a flow that cannot leave it, against one from normal noise, under guidance of 3.

    python benchmarks/box.py                # three seeds, a few minutes on one core

Two classes (left and right half), the null class in a fifth of the rows. Of each kind a velocity (``FlowMatching``),
guided by 3, and a flow map distilled from it (``ITVM``), in the same steps; samples of the two classes.

Writes benchmarks/results/box.json (--out), and a picture to --picture.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.data.densities import checkerboard
from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.style import png
from fewstep.flows.sources import starting_points
from fewstep.networks import MLP

BOARD = checkerboard()
SIDE = float(BOARD.sides.abs().max())
COUNT, SCALE, NULL = 8000, 3.0, 2
SETTINGS: dict[str, Any] = {"batch": 256, "lr": 3e-3, "warmup": 50, "ema": 0.99, "quiet": True}


class Halves:
    """Points of the board in [-1, 1]^2, by half; the label of a fifth of them left out."""

    shape, size = (2,), None
    labels = 3

    @property
    def cond(self) -> dict[str, Tensor]:
        return {"class_labels": torch.arange(self.labels)}

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        x = BOARD.draw(len(index), generator) / SIDE
        dropped = torch.rand(len(index), generator=generator) < 0.2
        return Batch(x, {"class_labels": torch.where(dropped, NULL, (x[:, 0] > 0).long())})


class Of(Halves):
    """The same without rows of the null class, which the student is not asked for."""

    labels = 2

    def rows(self, index: Tensor, generator: torch.Generator) -> Batch:
        x = BOARD.draw(len(index), generator) / SIDE
        return Batch(x, {"class_labels": (x[:, 0] > 0).long()})


def made(space: fewstep.Box | None, prediction: str, seed: int, steps: int) -> tuple[Any, Any]:
    """A guided velocity, and the map distilled from it."""
    torch.manual_seed(seed)
    path = fewstep.Linear() if space is None else fewstep.Interpolant()
    field = fewstep.NetworkField(MLP(2, width=128, classes=3), path, prediction, space=space)
    fewstep.fit(field, fewstep.FlowMatching(), Halves(), steps, seed=seed, **SETTINGS)
    guided = fewstep.Guided(field, SCALE, null={"class_labels": NULL})
    student = fewstep.FlowMap.from_field(field)
    fewstep.fit(student, fewstep.ITVM(guided), Of(), steps, seed=seed, **SETTINGS)
    return guided, student


def drawn(model: Any, steps: int, seed: int) -> Tensor:
    start = starting_points(model, (COUNT, 2), generator(seed, 1))
    return fewstep.sample(model, start, steps, class_labels=torch.arange(COUNT) % 2)


def judged(x: Tensor) -> dict[str, float]:
    return {
        "outside the square": float((x.abs() > 1).any(1).double().mean()),
        "outside the cells": float((~BOARD.inside(x * SIDE)).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=FOLDER / "box.json")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    kinds = {
        "box, data": (fewstep.Box(), "data"),
        "box, velocity": (fewstep.Box(), "velocity"),
        "normal noise, data": (None, "data"),
        "normal noise, velocity": (None, "velocity"),
    }
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    panels: dict[str, Tensor] = {}
    for name, (space, prediction) in kinds.items():
        for seed in arguments.seeds:
            guided, student = made(space, prediction, seed, arguments.steps)
            for who, model, calls in (("guided velocity", guided, (4, 50)), ("map", student, (1, 4))):
                for n in calls:
                    x = drawn(model, n, seed)
                    found.setdefault((name, who, n), []).append(judged(x))
                    if seed == arguments.seeds[0] and who == "map" and prediction == "data":
                        panels[f"{name.removesuffix(', data')}: map, {n} call{'s' * (n > 1)}"] = x[:4000]
    columns = ("outside the square", "outside the cells")
    rows = [[*key, *(spread([one[column] for one in values]) for column in columns)] for key, values in found.items()]
    write(
        arguments.out,
        title="The checkerboard in its square, guided by 3",
        group="kind",
        formats=dict.fromkeys(columns, "{mean} ± {std}"),
        columns=["kind", "model", "calls", *columns],
        rows=rows,
        **here(arguments.seeds),
    )
    if arguments.picture:
        png(points_figure(panels), arguments.picture)


def spread(values: list[float]) -> Any:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return {"mean": f"{statistics.mean(values):.3f}", "std": f"{statistics.stdev(values):.3f}"}


if __name__ == "__main__":
    main()
