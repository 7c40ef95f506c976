"""A picture of the two ways to finish: one call of a student of the checkerboard, before and after.

    python benchmarks/finishing_figure.py FOLDER docs/images/finishing.png

A student of 1,500 steps of ITVM goes on for 300: by more of the same, with the corrector, and with a critic. What is in
FOLDER is not trained again. Prints the share of points outside the squares and the distance to the exact end points.
"""

import argparse
from pathlib import Path
from typing import Any

import fewstep
from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.style import png
from fewstep.generation.drawing import draw
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

FINISH = {"begin": 0.0, "ramp": 0.0}
WAYS: dict[str, dict[str, Any]] = {
    "ITVM goes on": {},
    "corrected": {"finish": "corrected", **FINISH},
    "adversarial": {"finish": "adversarial", **FINISH},
}


def trained(out: Path, training: dict[str, Any], **sections: Any) -> fewstep.FlowMap:
    """The map of a run folder, trained if it is not."""
    known = load_recipe("checkerboard-itvm").as_dict()
    objective = known["objective"] | sections.pop("objective", {})
    tree = known | {"training": known["training"] | training, "objective": objective, **sections}
    tree["evaluation"] |= {"count": 8000, "steps": [1, 2, 4], "teacher_steps": [1]}
    done = run(load_recipe(tree), out)
    assert done.evaluation is not None
    for row in done.evaluation.rows:
        if row["model"] == "student":
            print(f"{out.name}, {row['steps']} calls: RMSE {row['rmse']:.4f}, outside {row['outside']:.4f}", flush=True)
    model = fewstep.load(out)
    assert isinstance(model, fewstep.FlowMap)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="The two ways to finish, on the checkerboard.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=[1500, 300], help="of the student, and of each way")
    args = parser.parse_args()
    start = args.folder / "student"
    maps = {"student": trained(start, {"steps": args.steps[0]})}
    for name, objective in WAYS.items():
        training = {"steps": args.steps[1], "warmup": 20, "lr": 1e-3, "ema": 0.99}
        place = args.folder / name.replace(" ", "-")
        maps[name] = trained(place, training, student={"start": str(start)}, objective=objective)
    panels = {name: draw(model, 8000, 1, shape=(2,), seed=0, batch=8000)[0] for name, model in maps.items()}
    panels["the teacher's end points"] = draw(fewstep.CheckerboardField(), 8000, 64, seed=0, solver="midpoint")[0]
    png(points_figure(panels), args.out)


if __name__ == "__main__":
    main()
