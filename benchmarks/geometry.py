"""The shape of trajectories: of two exact fields, and of the Fashion-MNIST teacher and student that come along.

python benchmarks/geometry.py        # some minutes; the table, and the figure of the student beside its teacher
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.evaluation.geometry import Geometry
from fewstep.evaluation.plots import geometry_figure
from fewstep.evaluation.style import png
from fewstep.flows.exact import eight_gaussians

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "geometry.png"
COLUMNS = ["model", "curve", "1 component", "2 components", "3 components", "length / chord", "off the chord", "slope"]


def rows_of(name: str, found: Geometry) -> list[list[Any]]:
    return [
        [name, curve, *map(float, shape.planarity), shape.length, float(shape.off_chord.max()), found.slope]
        for curve, shape in (("x_t", found.state), ("D_t(x_t)", found.denoised))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "geometry.json")
    args = parser.parse_args()
    draw, rows = torch.Generator().manual_seed(0), []
    points = torch.randn(64, 2, generator=draw)
    for name, field in (("eight Gaussians", eight_gaussians()), ("checkerboard", fewstep.CheckerboardField())):
        rows += rows_of(name, fewstep.geometry(field, points))
    teacher: Any = fewstep.load("fewstep:fashion-mnist")
    student: Any = fewstep.load("fewstep:fashion-mnist-fast")
    noise, labels = torch.randn(10, 1, 28, 28, generator=draw), torch.arange(10)
    found = fewstep.geometry(student, noise, teacher, class_labels=labels)
    rows += rows_of("Fashion-MNIST", found)
    for row in rows:
        print(*row)
    notes = [
        "64 points, 10 images of a class each. The slope is that of the error against uniform steps, 1 to 8: of Euler "
        "steps of the exact fields, and of the student's steps of Fashion-MNIST, whose trajectories are its teacher's."
    ]
    formats = dict.fromkeys(COLUMNS[2:5], "{:.4f}") | dict.fromkeys(COLUMNS[5:], "{:.2f}")
    write(args.out, title="The shape of trajectories", columns=COLUMNS, formats=formats, rows=rows, **here([0], notes))
    png(geometry_figure(found), PICTURE)


if __name__ == "__main__":
    main()
