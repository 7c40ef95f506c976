"""A picture of each method: what the runs of a comparison draw in 1, 2, 4 and 8 calls, for the pages in docs/methods.

    fewstep compare checkerboard-itvm --methods ... --out runs/checkerboard
    python benchmarks/method_figures.py runs/checkerboard docs/images/methods

Runs that were not evaluated are left out.
"""

import argparse
from pathlib import Path

from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.style import png
from fewstep.generation.drawing import draw
from fewstep.runs.loading import load_run

STEPS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the folder of a comparison")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for run in sorted(path for path in arguments.runs.glob("*-seed0") if (path / "quality.json").is_file()):
        model = load_run(run)
        panels = {f"{n} step{'s' * (n > 1)}": draw(model, 8000, n, shape=(2,), seed=0, batch=8000)[0] for n in STEPS}
        png(points_figure(panels), arguments.out / f"{run.name.removesuffix('-seed0')}.png")


if __name__ == "__main__":
    main()
