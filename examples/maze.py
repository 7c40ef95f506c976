"""A maze, a point mass in it, and plans for that as data: where to go in the next 32 steps.

    python examples/maze.py data maze.npz       # episodes, cut into windows: ``plans`` (N, 2, 32), ``vector`` (N, 5)

The mass has a place and a velocity, ``v += 0.1 a`` with |a| <= 1; walls reflect it. Episodes go between random free
cells, by a PD controller along the cells of a shortest way (breadth first), with noise and now and then a detour. A
plan is a window of 32 places. What is told of it is ``vector``: its start, the goal, and the return, -steps / 100 until
the goal is reached. Places go from -1 to 1.
"""

import argparse
from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
LENGTH, STEPS = 32, 100
MAZE = """
#######
#.....#
#.#.#.#
#...#.#
#.#...#
#.....#
#######
"""


class Maze:
    """Free cells (.) and walls (#) of a text; cells are squares of side 1, the first at (0, 0).

    Raises:
        ValueError: a row of another length, no wall around, or free cells between which there is no way.
    """

    def __init__(self, text: str = MAZE) -> None:
        rows = text.split()
        if len({len(row) for row in rows}) != 1 or set("".join(rows)) - set("#."):
            raise ValueError("a maze is rows of one length, of . (free) and # (a wall)")
        self.free = np.array([[mark == "." for mark in row] for row in rows]).T
        if self.free[[0, -1]].any() or self.free[:, [0, -1]].any():
            raise ValueError("a maze has a wall around: # at all of its edges")
        self.cells = np.argwhere(self.free)
        if len(self.cells) < 3:
            raise ValueError(f"a maze of {len(self.cells)} free cells: three at least are needed")
        far = self.far(tuple(self.cells[0]))
        if len(far) < len(self.cells):
            lost = next(tuple(map(int, cell)) for cell in self.cells if tuple(cell) not in far)
            raise ValueError(f"the maze has no way from {tuple(map(int, self.cells[0]))} to {lost}: open a wall")

    def far(self, goal: tuple[int, int]) -> dict[tuple[int, int], int]:
        """How many cells from each cell to the goal, breadth first."""
        found, queue = {goal: 0}, deque([goal])
        while queue:
            x, y = queue.popleft()
            for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                if self.free[near] and near not in found:
                    found[near] = found[x, y] + 1
                    queue.append(near)
        return found

    def way(self, start: tuple[int, int], goal: tuple[int, int], draw: np.random.Generator) -> list[tuple[int, int]]:
        """The cells of a shortest way, drawn among all of them."""
        far, way = self.far(goal), [start]
        while way[-1] != goal:
            x, y = way[-1]
            near = [c for c in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)) if far.get(c, 1 << 20) < far[x, y]]
            way.append(near[draw.integers(len(near))])
        return way

    def hit(self, x: Array) -> NDArray[np.bool_]:
        """Whether places (..., 2), in cells, are in a wall."""
        cell = np.clip(np.floor(x).astype(int), 0, np.array(self.free.shape) - 1)
        return ~self.free[cell[..., 0], cell[..., 1]]

    def move(self, x: Array, v: Array, a: Array) -> tuple[Array, Array]:
        """A step of masses (B, 2); one that would be in a wall is thrown back, coordinate by coordinate."""
        v = np.clip(v + 0.1 * a / np.maximum(1, np.linalg.norm(a, axis=-1, keepdims=True)), -0.45, 0.45)
        for i in range(2):
            there = x.copy()
            there[..., i] += v[..., i]
            stop = self.hit(there)
            v[..., i] = np.where(stop, -0.5 * v[..., i], v[..., i])
            x = np.where(stop[..., None], x, there)
        return x, v

    def inside(self, plans: Array, between: int = 4) -> NDArray[np.bool_]:
        """Whether the straight lines between the places of plans (B, 2, L), in cells, keep out of the walls, (B,)."""
        first, last = plans[..., :-1], plans[..., 1:]
        return ~np.any(
            [self.hit((first + (last - first) * k / between).swapaxes(1, 2)) for k in range(between + 1)], 0
        ).any(1)

    def scaled(self, x: Array) -> Array:
        """Cells as numbers from -1 to 1."""
        return 2 * x / max(self.free.shape) - 1

    def unscaled(self, x: Array) -> Array:
        return (x + 1) / 2 * max(self.free.shape)


def control(x: Array, v: Array, aim: Array, speed: Array | float = 0.0) -> Array:
    """The PD controller: what to push with, to be at ``aim`` with ``speed``."""
    return 3.0 * (aim - x) + 9.0 * (speed - v)


def episode(maze: Maze, draw: np.random.Generator, noise: float = 0.5) -> tuple[Array, Array] | None:
    """The places (T, 2) of an episode, the last at the goal (2,); None where it took more than 100 steps."""
    stops = [tuple(maze.cells[k]) for k in draw.choice(len(maze.cells), 3, replace=False)]
    if draw.random() < 0.7:
        del stops[1]  # no detour
    way = [cell for first, last in pairwise(stops) for cell in maze.way(first, last, draw)[1:]]
    aims = np.array(way) + 0.5 + draw.uniform(-0.15, 0.15, (len(way), 2))
    x, v, k, places = np.array(stops[0]) + draw.uniform(0.2, 0.8, 2), np.zeros(2), 0, []
    for _ in range(STEPS):
        places.append(x)
        if np.linalg.norm(aims[-1] - x) < 0.3 and k == len(aims) - 1:
            return np.array(places), aims[-1]
        while k < len(aims) - 1 and np.linalg.norm(aims[k] - x) < 0.45:
            k += 1
        x, v = maze.move(x, v, control(x, v, aims[k]) + noise * draw.normal(size=2))
    return None


def windows(maze: Maze, episodes: int, seed: int = 0, every: int = 4) -> tuple[Array, Array]:
    """Plans (N, 2, 32) and what is told of them (N, 5), from -1 to 1; those that end early stay at the goal."""
    draw, plans, told = np.random.default_rng(seed), [], []
    for _ in range(episodes):
        if (found := episode(maze, draw)) is None:
            continue
        places, goal = maze.scaled(found[0]), maze.scaled(found[1])
        padded = np.concatenate([places, np.repeat(goal[None], LENGTH, 0)])
        for k in range(0, len(places), every):
            plans.append(padded[k : k + LENGTH].T)
            told.append([*places[k], *goal, -(len(places) - 1 - k) / 100])
    return np.array(plans, np.float32), np.array(told, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="a maze, and plans in it as data")
    parser.add_argument("what", choices=["data"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--episodes", type=int, default=3000)
    parser.add_argument("--maze", type=Path, help="a text of . and #")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    maze = Maze(args.maze.read_text() if args.maze else MAZE)
    plans, vector = windows(maze, args.episodes, args.seed)
    np.savez(args.out, plans=plans, vector=vector)
    print(f"{args.out}: plans {plans.shape}, vector {vector.shape}")


if __name__ == "__main__":
    main()
