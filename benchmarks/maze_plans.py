"""Plans in a maze by a guided flow and its map, which is told the strength of guidance (arXiv 2311.13443): who arrives,
and which plans go through walls.

    python benchmarks/maze_plans.py FOLDER --seeds 0      # trains what FOLDER lacks, judges, writes the table

Data are those of examples/maze.py; the return is not known in a sixth of them. The velocity is a ``Conv1dNet`` by
``FlowMatching``, all that is told being left out of a quarter of the rows. It is guided by all that is told, or by
the return alone; the student (``ITVM``) follows the second, between 0 and 3. Judged are pairs of cells at least six
cells apart: whether the mass, which follows eight places of a plan before it plans again, is at the goal within 100
steps; and which of the plans cross a wall. The return that is asked for is that of the best tenth of the data between
the two cells. Beside them the window of the data that was told most nearly the same.

Writes benchmarks/results/maze.json (--out), and a picture to --picture.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Dropped, Strengths
from fewstep.evaluation.style import COLOURS, INK, frame, panels, png
from fewstep.networks import Conv1dNet

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from maze import LENGTH, STEPS, Array, Maze, control, windows

NULL = {"vector": float("nan")}
CALLS, SCALES = (1, 2, 4, 20), (0.0, 1.0, 1.5, 2.0, 3.0)
EVERY, NEAR = 8, 0.5  # steps between plans; how near the goal is reached, in cells
Planner = Callable[[Array], Array]  # what is told (B, 5) as plans (B, 2, 32)


class NoReturn(fewstep.VelocityField):
    """A field that is not told the return."""

    def __init__(self, field: fewstep.VelocityField) -> None:
        super().__init__()
        self.field, self.path = field, field.path

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        vector = cond["vector"].clone()
        vector[:, 4] = float("nan")
        return self.field(x, t, **{**cond, "vector": vector})


def guided(field: fewstep.VelocityField, by: str, scale: float = 1.0) -> fewstep.Guided:
    return fewstep.Guided(field, scale, **({"null": NULL} if by == "all" else {"weak": NoReturn(field)}))  # pyright: ignore


def trained(folder: Path, data: ArrayData, seed: int, steps: int) -> tuple[Any, Any]:
    """The velocity and the map of it, from the folder if they are there."""
    torch.manual_seed(seed)
    field = fewstep.NetworkField(Conv1dNet(*data.shape, vector=5), prediction="data")  # pyright: ignore
    _fitted(field, fewstep.FlowMatching(), Dropped(data, 0.25, NULL), steps, folder / f"field-{seed}.pt", seed)
    student = fewstep.FlowMap.from_field(field, guidance=True)
    strong = Strengths(data, min(SCALES), max(SCALES))
    objective = fewstep.ITVM(guided(field, "return"))
    _fitted(student, objective, strong, steps // 3, folder / f"map-{seed}.pt", seed)
    return field, student


def _fitted(model: Any, objective: Any, data: Any, steps: int, file: Path, seed: int) -> None:
    if not file.exists():
        begun = time.process_time()
        options: dict[str, Any] = {"batch": 128, "warmup": 100, "ema": 0.998, "quiet": True, "seed": seed}
        lr = 6e-3 if isinstance(objective, fewstep.FlowMatching) else 3e-3
        torch.save(fewstep.fit(model, objective, data, steps, lr=lr, **options).ema.state_dict(), file)
        print(f"{file.name}: {time.process_time() - begun:.0f} s of CPU", flush=True)
    model.load_state_dict(torch.load(file, weights_only=True))


def planner(model: Any, calls: int, scale: float, seed: int) -> Planner:
    draw, is_map = generator(seed, 7), isinstance(model, fewstep.FlowMap)

    def plan(told: Array) -> Array:
        noise = torch.randn(len(told), 2, LENGTH, generator=draw)
        cond: dict[str, Any] = {"vector": torch.as_tensor(told, dtype=torch.float32)}
        if is_map:
            cond["guidance"] = torch.full((len(told),), scale)
        return fewstep.sample(model, noise, calls, **cond).numpy()

    return plan


def nearest(data: ArrayData) -> Planner:
    known = data.cond["vector"].nan_to_num()

    def plan(told: Array) -> Array:
        distance = torch.cdist(torch.as_tensor(told, dtype=torch.float32), known)
        return np.asarray(data.array[distance.argmin(1).numpy()])

    return plan


def returns(maze: Maze, told: Array) -> dict[tuple[int, ...], float]:
    """The return that the best tenth of the windows between two cells have."""
    found: dict[tuple[int, ...], list[float]] = {}
    for pair, value in zip(map(tuple, np.floor(maze.unscaled(told[:, :4])).astype(int)), told[:, 4], strict=True):
        if value == value:
            found.setdefault(pair, []).append(float(value))
    return {pair: float(np.quantile(values, 0.9)) for pair, values in found.items()}


def pairs(maze: Maze, count: int, apart: int = 6) -> tuple[Array, Array]:
    """Starts and goals (count, 2) at least so many cells apart."""
    draw = np.random.default_rng(1)
    far = [(start, goal) for goal in maze.cells for start, d in maze.far(tuple(goal)).items() if d >= apart]
    cells = np.array([far[k] for k in draw.integers(len(far), size=count)]) + draw.uniform(0.3, 0.7, (count, 2, 2))
    return cells[:, 0], cells[:, 1]


def judged(maze: Maze, plan: Planner, asked: dict[tuple[int, ...], float], count: int) -> tuple[list[float], Array]:
    """The share that arrives, the steps of those, the share of plans through a wall; and the first plans, in cells."""
    x, goals = pairs(maze, count)
    v, arrived, aims = np.zeros_like(x), np.full(count, -1), np.zeros((count, 2, LENGTH))
    made: list[Array] = []
    for step in range(STEPS):
        arrived[(arrived < 0) & (np.linalg.norm(x - goals, axis=1) < NEAR)] = step
        going = arrived < 0
        if not going.any():
            break
        if step % EVERY == 0:
            cells = np.floor(np.concatenate([x, goals], 1)).astype(int)[going]
            value = [asked.get(tuple(cell), min(asked.values())) for cell in cells]
            told = np.column_stack([maze.scaled(x[going]), maze.scaled(goals[going]), value])
            made.append(maze.unscaled(plan(told)))
            aims[going] = made[-1]
        k = step % EVERY + 1
        x, v = maze.move(x, v, control(x, v, aims[:, :, k], aims[:, :, k] - aims[:, :, k - 1]))
    times, crossed = arrived[arrived >= 0], [~maze.inside(plans) for plans in made]
    return [
        float((arrived >= 0).mean()),
        float(times.mean()) if len(times) else float("nan"),
        float(np.concatenate(crossed).mean()),
    ], made[0]


def picture(maze: Maze, plans: dict[str, Array], out: Path) -> None:
    """Plans (K, 2, 32) between two places, a panel a way of drawing them."""
    with panels(len(plans), size=2.3, columns=4) as (figure, axes):
        for ax, (name, some) in zip(axes, plans.items(), strict=True):
            ax.imshow(
                ~maze.free.T, origin="lower", extent=(0, len(maze.free), 0, maze.free.shape[1]), cmap="Greys", alpha=0.6
            )
            for one in some:
                is_in = maze.inside(one[None])[0]
                ax.plot(*one, color=COLOURS[0] if is_in else COLOURS[1], lw=1.1, alpha=0.75)
            ax.plot(*some[0, :, 0], "o", color=INK, ms=5)
            ax.set(xticks=[], yticks=[])
            frame(ax, name)
        png(figure, out)


def spread(values: Sequence[float]) -> Any:
    known = [value for value in values if value == value]
    if len(known) < 2:
        return f"{known[0]:.2f}" if known else None
    return {"mean": f"{statistics.mean(known):.2f}", "std": f"{statistics.stdev(known):.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000, help="of the velocity; its map has a third")
    parser.add_argument("--episodes", type=int, default=6000)
    parser.add_argument("--count", type=int, default=100, help="pairs of cells")
    parser.add_argument("--out", type=Path, default=FOLDER / "maze.json")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    maze = Maze()
    plans, told = windows(maze, args.episodes)
    asked = returns(maze, told)
    told[np.random.default_rng(2).random(len(told)) < 1 / 6, 4] = np.nan
    data = ArrayData(plans, {"vector": told})
    found: dict[tuple[Any, ...], list[list[float]]] = {}

    def judge(key: tuple[Any, ...], plan: Planner) -> Array:
        values, first = judged(maze, plan, asked, args.count)
        found.setdefault(key, []).append(values)
        print(key, [round(value, 3) for value in values], flush=True)
        return first

    judge(("", "nearest window of the data", None, None), nearest(data))
    for seed in args.seeds:
        field, student = trained(args.folder, data, seed, args.steps)
        for scale in SCALES:
            for by, counts in (("return", CALLS), ("all", (20,))):
                for calls in counts:
                    judge((by, "velocity, Euler", calls, scale), planner(guided(field, by, scale), calls, 1, seed))
            for calls in CALLS:
                judge(("return", "map", calls, scale), planner(student, calls, scale, seed))
    write(
        args.out,
        title="Plans in a maze",
        group="model",
        columns=["model", "guided by", "calls", *(f"{what}, w = {w:g}" for what in MEASURES for w in SCALES)],
        rows=table(found),
        **here(args.seeds, NOTES),
    )
    if args.picture:
        picture(maze, some_plans(maze, field, student, data, asked, args.seeds[-1]), args.picture)


def table(found: dict[tuple[Any, ...], list[list[float]]]) -> list[list[Any]]:
    """A row a model and number of calls; the strengths of guidance side by side."""
    rows = []
    for by, model, calls in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((by, model, calls, w if calls else None)) for w in SCALES]
        cells = cells if calls else [*cells[:1], *[None] * (len(SCALES) - 1)]
        rows.append(
            [model, by, calls, *(each and spread([v[i] for v in each]) for i in range(len(MEASURES)) for each in cells)]
        )
    return sorted(rows, key=lambda row: row[:2])


MEASURES = ("arrived", "steps", "through a wall")
NOTES = [
    "Of 100 pairs of cells; the nearest window stands under w = 0.",
    "A guided step of the velocity is two calls of its network, and counts as one here.",
    "arrived: within 100 steps; steps: of those; through a wall: of all plans that were made on the way.",
]


def some_plans(
    maze: Maze,
    field: Any,
    student: Any,
    data: ArrayData,
    asked: dict[tuple[int, ...], float],
    seed: int,
    count: int = 24,
) -> dict[str, Array]:
    """Plans between the two cells of the first pair, in cells."""
    x, goal = (ends[:1] for ends in pairs(maze, 1))
    value = asked[tuple(np.floor(np.concatenate([x, goal], 1)).astype(int)[0])]
    told = np.repeat(np.column_stack([maze.scaled(x), maze.scaled(goal), [[value]]]), count, 0)
    ways: dict[str, Planner] = {}
    for scale in (1.0, 3.0):
        for calls in (1, 4):
            ways[f"velocity, {calls} Euler, w = {scale:g}"] = planner(guided(field, "return", scale), calls, 1, seed)
            ways[f"map, {calls} call{'s' * (calls > 1)}, w = {scale:g}"] = planner(student, calls, scale, seed)
    return {name: maze.unscaled(way(told)) for name, way in ways.items()}


if __name__ == "__main__":
    main()
