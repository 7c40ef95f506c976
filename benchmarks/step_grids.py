"""Grids of few steps, each found on some noise and measured on other noise.

    python benchmarks/step_grids.py                                    # some ten minutes; the table and the figure
    python benchmarks/step_grids.py --models eight-gaussians --rows 64 --out /tmp/grids.json

Euler steps of two exact fields, of the Fashion-MNIST teacher that comes along, and steps of its student, along uniform
times, those best for Gaussian data, and those that dynamic programming finds by each cost. The numbers are distances to
where the ODE of the field, or of the teacher, ends: roots of the mean squared norm over all components.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.evaluation.style import COLOURS, QUIET, panels, plain_log_ticks, png
from fewstep.flows.exact import eight_gaussians
from fewstep.flows.step_grids import StepErrors
from fewstep.flows.step_losses import COSTS, GITS, losses_of, rms, walk_of
from fewstep.flows.times import gaussian_grid, step_grid
from fewstep.flows.trajectories import teacher_states

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "step-grids.png"
STEPS = (2, 3, 4, 5, 6, 8)
MODELS = ("eight-gaussians", "checkerboard", "fashion-mnist, teacher", "fashion-mnist, student")
GRIDS = ("uniform", "gaussian", *COSTS)


def opened(name: str, rows: int) -> tuple[Any, Any, float, list[tuple[Tensor, dict[str, Tensor]]]]:
    """The model, its reference, the deviation of the data, and twice noise and conditions."""
    if name in ("eight-gaussians", "checkerboard"):
        field: Any = eight_gaussians() if name == "eight-gaussians" else fewstep.CheckerboardField()
        std = float(field.data(100_000, torch.Generator().manual_seed(0)).std())
        return field, field, std, [(noise(rows, 2, seed=seed).double(), {}) for seed in (0, 1)]
    teacher: Any = fewstep.load("fewstep:fashion-mnist")
    model: Any = teacher if name.endswith("teacher") else fewstep.load("fewstep:fashion-mnist-fast")
    data = fewstep.load_data("fashion-mnist").rows(torch.arange(2000), torch.Generator().manual_seed(0)).data
    few = max(10, rows // 48)
    labels = {"class_labels": torch.arange(few) % 10}
    return model, teacher, float(data.std()), [(noise(few, *data.shape[1:], seed=seed), labels) for seed in (0, 1)]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def measured(name: str, rows: int, candidates: int) -> Iterator[list[Any]]:
    model, reference, std, ((start, cond), (other, other_cond)) = opened(name, rows)
    ends = teacher_states(reference, other, torch.ones(1), **other_cond)[-1]
    walk, start = walk_of(model, reference, start, "euler", None, cond)
    at = step_grid(candidates if start.ndim == 2 else candidates // 2)
    states = walk.trajectories(start, at)  # once for all costs; else as fewstep.step_errors
    losses = {cost: losses_of(walk, states, at, cost, torch.Generator()) for cost in COSTS}
    found = {cost: StepErrors(at, table, GITS if cost == "deviation" else 1.0) for cost, table in losses.items()}
    for steps in STEPS:
        grids = {"uniform": step_grid(steps), "gaussian": gaussian_grid(steps, std)}
        grids |= {cost: errors.grid(steps) for cost, errors in found.items()}
        off = {
            kind: float(rms(fewstep.sample(model, other, grid=grid, **other_cond) - ends))
            for kind, grid in grids.items()
        }
        row = [f"{name}, {len(start)} trajectories", steps, *(off[kind] for kind in GRIDS)]
        print(*row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--rows", type=int, default=512, help="trajectories of points; a 48th of it, 10 at least, of images"
    )
    parser.add_argument("--candidates", type=int, default=24, help="for points; half of them for images")
    parser.add_argument("--out", type=Path, default=FOLDER / "step-grids.json")
    args = parser.parse_args()
    rows = [row for name in args.models for row in measured(name, args.rows, args.candidates)]
    notes = [
        f"Grids are found on noise of seed 0, of {args.candidates} candidates (images: half), and measured on as much "
        "noise of seed 1.",
        "gaussian has the deviation of the data; deviation is the cost of arXiv 2405.11326, reconstructed.",
    ]
    columns = ["model", "steps", *GRIDS]
    formats = dict.fromkeys(GRIDS, "{:.3f}")
    title = "Few steps along grids of times: the distance to the end of the ODE"
    write(args.out, title=title, columns=columns, formats=formats, group="model", rows=rows, **here([0, 1], notes))
    draw(rows)


def draw(rows: list[list[Any]]) -> None:
    """The error over that of the uniform grid against the number of steps, a panel a model."""
    names = list(dict.fromkeys(row[0] for row in rows))
    with panels(len(names), size=(3.1, 3.1), columns=4) as (figure, axes):
        for ax, name in zip(axes, names, strict=True):
            lines = [row for row in rows if row[0] == name]
            ns = [row[1] for row in lines]
            for kind, colour in zip(GRIDS, (QUIET, *COLOURS), strict=False):
                ratios = [row[2 + GRIDS.index(kind)] / row[2] for row in lines]
                ax.plot(ns, ratios, "--" if kind == "uniform" else "o-", markersize=4, color=colour, label=kind)
            ax.set(title=name.rpartition(", ")[0], xlabel="steps", ylim=(0.55, 1.65), xticks=ns)
            plain_log_ticks(ax)
        axes[0].set_ylabel("error / that of uniform times")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(GRIDS))
    png(figure, PICTURE)


if __name__ == "__main__":
    main()
