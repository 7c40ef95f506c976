"""The maze of examples/maze.py: its ways and walls, its plans as data, and the recipes that train on them."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys.places import ROOT

import fewstep
from fewstep.cli import main

FILE = ROOT / "examples" / "maze.py"
spec: Any = importlib.util.spec_from_file_location("maze_example", FILE)
maze_example = sys.modules["maze_example"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maze_example)
Maze: Any = maze_example.Maze

U = "#####\n#...#\n#.#.#\n#.#.#\n#####"


def test_ways_are_shortest() -> None:
    maze = Maze(U)
    assert maze.far((1, 3))[3, 3] == 6
    draw = np.random.default_rng(0)
    assert maze.way((1, 3), (3, 3), draw) == [(1, 3), (1, 2), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3)]
    known = Maze()
    far = known.far((1, 1))
    for cell in map(tuple, known.cells):
        way = known.way(cell, (1, 1), draw)
        assert len(way) == far[cell] + 1
        assert (np.abs(np.diff(way, axis=0)).sum(1) == 1).all()


def test_walls_reflect_and_no_mass_gets_through() -> None:
    maze, draw = Maze(U), np.random.default_rng(0)
    x, v = maze.move(np.array([[1.1, 2.5]]), np.array([[-0.3, 0.2]]), np.zeros((1, 2)))
    np.testing.assert_allclose(x, [[1.1, 2.7]])
    np.testing.assert_allclose(v, [[0.15, 0.2]])
    _, v = maze.move(np.array([[1.5, 2.5]]), np.zeros((1, 2)), np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(v, [[0.06, 0.08]])  # 0.1 a, and |a| is 1 at most
    x, v = np.full((50, 2), 1.5), np.zeros((50, 2))
    for _ in range(300):
        x, v = maze.move(x, v, 3 * draw.normal(size=(50, 2)))
        assert not maze.hit(x).any()
    assert len({tuple(cell) for cell in np.floor(x).astype(int)}) > 3


def test_a_plan_through_a_wall_is_seen() -> None:
    maze = Maze(U)
    straight = np.linspace([1.5, 3.5], [3.5, 3.5], 32).T
    around = np.concatenate([np.linspace(a, b, 32) for a, b in (([1.5, 3.5], [1.5, 1.5]), ([1.5, 1.5], [3.5, 1.5]))]).T
    assert maze.inside(np.stack([around])).tolist() == [True]
    assert maze.inside(np.stack([straight])).tolist() == [False]
    assert maze.inside(np.array([[[1.5, 3.5], [3.5, 3.5]]])).tolist() == [
        False
    ]  # its two places are free, its line is not


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("######\n#.#..#\n######", r"no way from \(1, 1\) to \(3, 1\): open a wall"),
        ("#####\n#...#\n#.###", "a wall around: # at all"),
        ("#####\n#..#\n#####", "rows of one length"),
        ("#####\n#x..#\n#####", r"of \. \(free\) and #"),
        ("###\n#.#\n###", "a maze of 1 free cells: three"),
    ],
)
def test_a_maze_that_is_none_is_refused_in_a_line(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        Maze(text)
    assert "\n" not in str(error.value)


def test_windows_begin_where_they_say_and_end_at_the_goal() -> None:
    maze = Maze()
    plans, told = maze_example.windows(maze, 20, seed=1, every=1)
    assert plans.shape == (len(told), 2, 32)
    np.testing.assert_array_equal(plans[:, :, 0], told[:, :2])
    left = np.rint(-100 * told[:, 4]).astype(int)
    assert (left >= 0).all()
    for plan, row, steps in zip(plans, told, left, strict=True):
        if steps + 1 < 32:  # it has arrived, and stays
            np.testing.assert_array_equal(plan[:, steps + 1 :], np.repeat(row[2:4, None], 31 - steps, 1))
            assert np.linalg.norm(maze.unscaled(plan[:, steps]) - maze.unscaled(row[2:4])) < 0.3
    assert maze.inside(maze.unscaled(plans)).mean() > 0.97


@pytest.mark.takes_seconds
def test_plans_are_trained_on_distilled_and_sampled_by_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["maze.py", "data", "maze.npz", "--episodes", "10"])
    maze_example.main()
    few = ["--steps", "2", "--training.batch", "8", "--training.quiet", "true"]
    small = ["--student.options.width", "8", "--student.options.depth", "2"]
    judged = ["--evaluation.count", "8", "--evaluation.steps", "[1, 2]"]
    assert main(["train", "plans-teacher", *few, *small, *judged]) == 0
    assert main(["distill", "plans-itvm", *few, *judged, "--evaluation.teacher_steps", "[2]"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "fewstep sample runs/plans-itvm" in line]
    assert main([*line.split()[1:-1], "next.npz", "--count", "2"]) == 0
    assert line.endswith("plans-itvm.npz")  # and no picture, which would be refused
    asked = ["--steps", "1", "--guidance-scale", "1.5", "--count", "6", "--out", "plans.npz"]
    assert main(["sample", "runs/plans-itvm", *asked]) == 0
    found = np.load("plans.npz")
    assert found["data"].shape == (6, 2, 32)
    model = fewstep.load("runs/plans-itvm")
    vector = torch.from_numpy(found["vector"])
    plan = fewstep.sample(model, torch.randn(6, 2, 32), 1, vector=vector, guidance=torch.full((6,), 1.5))
    assert plan.isfinite().all()
