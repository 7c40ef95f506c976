"""Reflected diffusion in a box against flow matching in it: the checkerboard in its square, guided by 3, in few calls.

    python benchmarks/reflected.py          # three seeds, some ten minutes on one core

The classes and the guidance are those of ``benchmarks/box.py``; three times the steps, as a score needs them. Of each
kind a field, and a flow map distilled from the guided field (``ITVM``); of the largest sigma the field alone. The
distance to the data, sliced Wasserstein, is of use without guidance: what is guided has another law.

Writes benchmarks/results/reflected.json (--out).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from box import BOARD, COUNT, NULL, SCALE, SETTINGS, SIDE, Halves, Of, judged, spread
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.evaluation.points import sliced_wasserstein
from fewstep.flows.sources import starting_points
from fewstep.networks import MLP

KINDS: dict[str, tuple[Any, str, type[Any]]] = {
    "straight path, data": (fewstep.Interpolant(), "data", fewstep.FlowMatching),
    "straight path, velocity": (fewstep.Interpolant(), "velocity", fewstep.FlowMatching),
    "reflected, sigma to 1.5": (fewstep.Reflected(), "noise", fewstep.ReflectedDiffusion),
    "reflected, sigma to 5": (fewstep.Reflected(sigma_max=5.0), "noise", fewstep.ReflectedDiffusion),
}


def drawn(model: Any, steps: int, seed: int, **options: Any) -> Tensor:
    start = starting_points(model, (COUNT, 2), generator(seed, 1))
    return fewstep.sample(
        model, start, steps, generator=generator(seed, 2), class_labels=torch.arange(COUNT) % 2, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=FOLDER / "reflected.json")
    arguments = parser.parse_args()
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for name in arguments.kinds:
        path, prediction, objective = KINDS[name]
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            field = fewstep.NetworkField(MLP(2, width=128, classes=3), path, prediction, space=fewstep.Box())
            fewstep.fit(field, objective(), Halves(), arguments.steps, seed=seed, **SETTINGS)
            guided = fewstep.Guided(field, SCALE, null={"class_labels": NULL})
            asked: list[tuple[str, Any, int, dict[str, Any]]] = [
                ("field", field, 50, {}), ("guided field", guided, 4, {}), ("guided field", guided, 50, {}),
            ]  # fmt: skip
            if isinstance(path, fewstep.Reflected):
                asked += [("guided field, reflected SDE", guided, 50, {"eps": "kappa"})]
            if name != "reflected, sigma to 5":
                student = fewstep.FlowMap.from_field(field)
                fewstep.fit(student, fewstep.ITVM(guided), Of(), arguments.steps, seed=seed, **SETTINGS)
                asked += [("map", student, 1, {}), ("map", student, 4, {})]
            for who, model, calls, options in asked:
                x = drawn(model, calls, seed, **options)
                row = judged(x)
                row["distance"] = sliced_wasserstein(x, BOARD.draw(COUNT, generator(seed, 3)) / SIDE)
                found.setdefault((name, who, calls), []).append(row)
                print(name, seed, who, calls, row, flush=True)
    columns = ("outside the square", "outside the cells", "distance")
    rows = [[*key, *(spread([one[column] for one in values]) for column in columns)] for key, values in found.items()]
    write(
        arguments.out,
        title="The checkerboard in its square by reflected diffusion, guided by 3",
        group="kind",
        formats=dict.fromkeys(columns, "{mean} ± {std}"),
        columns=["kind", "model", "calls", *columns],
        rows=rows,
        **here(arguments.seeds),
    )


if __name__ == "__main__":
    main()
