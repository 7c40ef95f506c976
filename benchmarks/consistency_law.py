"""The 1/N law of consistency training, measured by the method itself on Gaussian data.

    python benchmarks/consistency_law.py                     # a minute; the table and the figure
    python benchmarks/consistency_law.py --rows 20000        # quicker, with more noise

Of data N(0, c^2) the best one-step sampler that consistency training with N steps can find has the deviation
``c prod_i cos(theta_i - theta_{i+1})``, ``tan theta = (1 - t) / (c t)``: too small by an amount of order 1/N, whatever
the network. Here the fixed point is found by regression with ``fewstep.ConsistencyTraining`` on drawn rows, a scale
for each of the N times, and stands beside that closed form, on uniform times and on those uniform in theta.
"""

import argparse
import math
from pathlib import Path

import torch
from record import FOLDER, here, write
from torch import Tensor, nn

import fewstep
from fewstep.evaluation.style import COLOURS, panels, plain_log_ticks, png
from fewstep.flows.times import gaussian_grid, step_grid
from fewstep.objectives.rows import Now, Rows

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "consistency-law.png"
STD, STEPS = 0.5, (2, 4, 8, 16, 32, 64)


def closed_form(grid: Tensor, std: float) -> float:
    """The deviation of one-step samples at the fixed point of consistency training along a grid."""
    theta = torch.atan2(1 - grid, std * grid)
    return std * float(theta.diff().cos().prod())


class Scales(nn.Module):
    """``X_{s,1}(x) = a x``, with a of its own from one time on, and another, known, from the next one on."""

    def __init__(self, own: float, later: float, next_time: float) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.tensor(own, dtype=torch.float64))
        self.later, self.next_time = later, next_time

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        scale = torch.where(s < self.next_time - 1e-9, self.own, self.later)
        return ((scale - 1) / (1 - s).clamp(min=1e-9))[:, None] * x


def fixed_point(grid: Tensor, noise: Tensor, data: Tensor) -> float:
    """The scale of ``X_{0,1}`` at which ``ConsistencyTraining`` comes to rest on rows of noise and data (n, 1), found
    backwards in time: the scale of each time by one Newton step, which for a squared error is exact."""
    later = 1.0
    for s, near in zip(grid[:-1].tolist()[::-1], grid[1:].tolist()[::-1], strict=True):
        objective = fewstep.ConsistencyTraining(stages=1, huber=0.0)
        objective.q = (1 - s) / (near - s)  # a gap of q^-1 (1 - s)
        s_of = torch.full((len(noise),), s, dtype=noise.dtype)
        x, dx = fewstep.Linear().sample(noise, data, s_of)
        rows = Rows("", x, dx, s_of, torch.ones_like(s_of), noise, data, s_of, {})
        slopes = []
        for own in (0.0, 1.0):
            student = fewstep.FlowMap(Scales(own, later, near))
            error = objective.errors(student, rows, {}, Now())["consistency"].mean()
            (slope,) = torch.autograd.grad(error, [student.network.own])
            slopes.append(float(slope))
        later = slopes[0] / (slopes[0] - slopes[1])
    return later


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000, help="noise and data drawn for each regression")
    parser.add_argument("--out", type=Path, default=FOLDER / "consistency-law.json")
    args = parser.parse_args()
    draw, rows = torch.Generator().manual_seed(0), []
    for steps in STEPS:
        noise = torch.randn(args.rows, 1, generator=draw, dtype=torch.float64)
        data = STD * torch.randn(args.rows, 1, generator=draw, dtype=torch.float64)
        for name, grid in (("uniform", step_grid(steps)), ("gaussian", gaussian_grid(steps, STD))):
            closed, found = closed_form(grid, STD), fixed_point(grid, noise, data)
            rows.append([name, steps, closed, found, steps * (STD - closed)])
            print(*rows[-1])
    columns = ["times", "steps N", "closed form", "regression", "N times the error"]
    formats = {"closed form": "{:.4f}", "regression": "{:.4f}", "N times the error": "{:.3f}"}
    title = "Consistency training on N(0, 1/4): the deviation of its one-step samples, which should be .5"
    notes = [f"The regression is of {args.rows:,} rows of noise and data, with the squared error, at each time."]
    write(args.out, title=title, columns=columns, formats=formats, group="times", rows=rows, **here([0], notes))
    draw_law(rows)


def draw_law(rows: list[list]) -> None:
    """The error of the deviation against N, measured and in closed form."""
    with panels(1, size=(5.2, 3.6)) as (figure, (ax,)):
        for colour, name in zip(COLOURS, ("uniform", "gaussian"), strict=False):
            grid = gaussian_grid if name == "gaussian" else lambda n, _: step_grid(n)
            lines = [row for row in rows if row[0] == name]
            ns = range(2, 65)
            ax.plot(
                ns, [STD - closed_form(grid(n, STD), STD) for n in ns], color=colour, label=f"{name} times, closed form"
            )
            ax.plot(
                [r[1] for r in lines], [STD - r[3] for r in lines], "o", color=colour, label=f"{name} times, regression"
            )
        ax.plot([2, 64], [math.pi**2 * STD / 8 / n for n in (2, 64)], ":", color="#5f6368", label="(pi^2 c / 8) / N")
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="steps N of consistency training",
            ylabel="c minus the deviation of samples",
        )
        ax.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        ax.minorticks_off()
        plain_log_ticks(ax)
        ax.legend()
    png(figure, PICTURE)


if __name__ == "__main__":
    main()
