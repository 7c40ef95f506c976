"""The picture of the README: the same noise through a student and its teacher at several numbers of network calls.

python benchmarks/readme_picture.py runs/fashion-mnist-itvm docs/images/fashion-mnist.png
"""

import sys
from pathlib import Path

import matplotlib

from fewstep.generation.drawing import draw
from fewstep.runs.loading import load_run, make_teacher
from fewstep.runs.recipes import load_recipe

COLUMNS = 14


def main(run: str, out: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    student, section = load_run(run), load_recipe(run).teacher
    if section is None:
        raise ValueError(f"{run} has no teacher")
    teacher = make_teacher(section)
    models = [("teacher", teacher, n) for n in (1, 2, 4, 100)] + [("fewstep", student, n) for n in (1, 2, 4)]
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 0.66 * len(models)), layout="constrained")
    for axis, (name, model, steps) in zip(axes, models, strict=True):
        samples, _, _ = draw(model, COLUMNS, steps, seed=3)
        strip = samples.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)
        axis.imshow(strip.squeeze(-1).add(1).div(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        label = f"{name}, {steps} call{'s' * (steps > 1)}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center", weight="bold" if name == "fewstep" else None)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
