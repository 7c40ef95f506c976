"""A molecule on a product of spaces: pentane as distances (R^3), torsions (a torus) and rotamers (tokens), at once.

    python benchmarks/pentane.py            # three seeds, some minutes on one core

Two torsions of the carbon chain follow Boltzmann's law of a threefold potential, trans at the cut of the circle, and of
the repulsion of its ends, so that they depend on each other (the pentane effect). The distances C1-C4, C2-C5 and C1-C5
follow from them by geometry, and the rotamers t, g+, g- by thirds of the circle. So every part, and what holds between
them, is known: the law by quadrature, the rest exactly.

Of each kind of product a velocity (``FlowMatching``) and the map of it (``ITVM``), of one MLP, in the same steps:
torsions on a torus or as plain numbers, rotamers as tokens or as plain one-hot numbers.

Writes benchmarks/results/pentane.json (--out).
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.flows.sources import starting_points
from fewstep.networks import MLP

BOND, ANGLE, GRID = 1.53, math.radians(112), 180  # Angstrom; of C-C-C; cells of the quadrature on each circle
MEAN, SCALE = torch.tensor([3.6, 3.6, 4.6]), torch.tensor([0.4, 0.4, 0.6])  # of the distances
COUNT = 10_000
CIRCLE = fewstep.Torus()


def carbons(torsions: Tensor) -> Tensor:
    """The five carbons (N, 5, 3) of two torsions (N, 2), each placed by its bond, angle and torsion; pi is trans."""
    n, zero = len(torsions), torsions.new_zeros(len(torsions))
    at = [zero.new_zeros(n, 3), zero.new_tensor([BOND, 0, 0]).expand(n, 3)]
    at.append(at[1] + BOND * zero.new_tensor([-math.cos(ANGLE), math.sin(ANGLE), 0]))
    for torsion in torsions.unbind(1):
        along = torch.nn.functional.normalize(at[-1] - at[-2], dim=1)
        normal = torch.nn.functional.normalize(torch.linalg.cross(at[-2] - at[-3], along), dim=1)
        side = torch.linalg.cross(normal, along)
        turn = [-math.cos(ANGLE) + zero, math.sin(ANGLE) * torsion.cos(), math.sin(ANGLE) * torsion.sin()]
        at.append(at[-1] + BOND * sum(c[:, None] * e for c, e in zip(turn, (along, side, normal), strict=True)))
    return torch.stack(at, 1)


def distances(torsions: Tensor) -> Tensor:
    """C1-C4, C2-C5, C1-C5 (N, 3), in Angstrom."""
    at = carbons(torsions)
    return torch.stack([(at[:, i] - at[:, j]).norm(dim=1) for i, j in ((0, 3), (1, 4), (0, 4))], 1)


def rotamers(torsions: Tensor) -> Tensor:
    """0 trans, 1 gauche+, 2 gauche-: the third of the circle, (N, 2)."""
    return torch.where(torsions.abs() > 2 * math.pi / 3, 0, torch.where(torsions > 0, 1, 2))


def energy(torsions: Tensor) -> Tensor:
    """In kT (N,): threefold, trans below gauche, and the ends repel each other."""
    own = 1.5 * (1 + torch.cos(3 * torsions)) + 0.4 * (1 + torch.cos(torsions))
    return own.sum(1) + (2.9 / distances(torsions)[:, 2]).pow(12).clamp(max=20)


def law() -> tuple[Tensor, Tensor]:
    """The cells of the torus (K, 2), by their middles, and the share of each (K,)."""
    middles = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (2 * math.pi / GRID) - math.pi
    cells = torch.cartesian_prod(middles, middles)
    return cells, torch.softmax(-energy(cells), 0)


CELLS, SHARES = law()


def drawn(count: int, draw: torch.Generator) -> Tensor:
    """Torsions (N, 2) of that law."""
    picked = CELLS[torch.multinomial(SHARES, count, replacement=True, generator=draw)]
    return (picked + (torch.rand(count, 2, generator=draw) - 0.5) * (2 * math.pi / GRID)).float()


def binned(torsions: Tensor, weights: Tensor, bins: int = 18) -> Tensor:
    cell = ((torsions + math.pi) / (2 * math.pi) * bins).long().clamp(0, bins - 1)
    return torch.bincount(cell[:, 0] * bins + cell[:, 1], weights.double(), minlength=bins * bins)


def judged(places: Tensor, torsions: Tensor, kinds: Tensor) -> list[float]:
    """Of samples: how far the law of the torsions and that of the rotamers are off (total variation), how much of the
    share near the cut is there, how far distances are from those of the torsions (root mean square, Angstrom), and the
    share of rotamers that are not those of the torsions."""
    torsions, one = CIRCLE.wrap(torsions), torch.ones(len(torsions)) / len(torsions)
    pairs = lambda kinds, weights: torch.bincount(kinds[:, 0] * 3 + kinds[:, 1], weights.double(), minlength=9)  # noqa: E731
    near = lambda x: (x.abs() > math.radians(170)).double().mean(1)  # noqa: E731
    apart = places * SCALE + MEAN - distances(torsions)
    return [
        float((binned(torsions, one) - binned(CELLS, SHARES)).abs().sum() / 2),
        float(near(torsions).mean() / (near(CELLS) * SHARES).sum()),
        float(apart.square().mean().sqrt()),
        float((pairs(kinds, one) - pairs(rotamers(CELLS), SHARES)).abs().sum() / 2),
        float((kinds != rotamers(torsions)).double().mean()),
    ]


COLUMNS = ("torsions, TV", "near the cut", "distances", "rotamers, TV", "rotamers off")
NOTES = [
    "torsions, TV and rotamers, TV: total variation of 18 x 18 bins, and of the nine pairs; near the cut: the share of "
    "torsions within 10 degrees of pi, over that of the law; distances: root mean square of their difference from "
    "those of the sampled torsions, in Angstrom; rotamers off: the share that is not that of the torsion.",
    "10,000 samples. An MLP of 4 x 128, batches of 256; the map has half the steps of the velocity.",
]
KINDS = {
    "torus and tokens": (fewstep.Torus(), (fewstep.Tokens(3), (2, 3))),
    "torsions in R^n": (fewstep.Euclid(), (fewstep.Tokens(3), (2, 3))),
    "tokens in R^n": (fewstep.Torus(), (fewstep.Euclid(), (2, 3))),
}


def product(kind: str) -> fewstep.Product:
    angles, tokens = KINDS[kind]
    return fewstep.Product(((fewstep.Euclid(), (3,)), (angles, (2,)), tokens))


def made(kind: str, seed: int, steps: int) -> tuple[Any, Any]:
    space, draw = product(kind), generator(seed)
    torsions = drawn(50_000, draw)
    kinds = rotamers(torsions)
    one_hot = kinds if isinstance(space.parts[2][0], fewstep.Tokens) else torch.nn.functional.one_hot(kinds, 3).float()
    data = ArrayData(space.encode([(distances(torsions) - MEAN) / SCALE, torsions, one_hot]))
    torch.manual_seed(seed)
    field = fewstep.NetworkField(MLP(11, width=128, depth=4), fewstep.Interpolant(), space=space)
    options: dict[str, Any] = {"batch": 256, "warmup": 50, "ema": 0.995, "quiet": True, "seed": seed}
    field = fewstep.fit(field, fewstep.FlowMatching(), data, steps, lr=3e-3, **options).ema
    student = fewstep.FlowMap.from_field(field)
    return field, fewstep.fit(student, fewstep.ITVM(field), data, steps // 2, lr=2e-3, **options).ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of the velocity; its map has half")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--out", type=Path, default=FOLDER / "pentane.json")
    args = parser.parse_args()
    found: dict[tuple[str, str, int | None], list[list[float]]] = {}

    def judge(key: tuple[str, str, int | None], places: Tensor, torsions: Tensor, kinds: Tensor) -> None:
        values = judged(places, torsions, kinds if kinds.ndim == 2 else kinds.argmax(-1))
        found.setdefault(key, []).append(values)
        print(key, [round(value, 4) for value in values], flush=True)

    for seed in args.seeds:
        exact = drawn(COUNT, generator(seed, 1))
        judge(("the law itself", "draws", None), (distances(exact) - MEAN) / SCALE, exact, rotamers(exact))
        for kind in args.kinds:
            begun = time.process_time()
            field, student = made(kind, seed, args.steps)
            print(f"{kind}, seed {seed}: {time.process_time() - begun:.0f} s of CPU", flush=True)
            for name, model, counts in (("velocity, Euler", field, (1, 2, 4, 50)), ("map", student, (1, 2, 4))):
                start = starting_points(model, (COUNT, 11), generator(seed, 2))
                for calls in counts:
                    judge((kind, name, calls), *product(kind).decode(fewstep.sample(model, start, calls)))
    rows = [[*key, *map(spread, zip(*values, strict=True))] for key, values in found.items()]
    write(
        args.out,
        title="Pentane on a product of spaces",
        group="space",
        formats=dict.fromkeys(COLUMNS, "{mean} ± {std}"),
        columns=["space", "model", "calls", *COLUMNS],
        rows=rows,
        **here(args.seeds, NOTES),
    )


def spread(values: Sequence[float]) -> Any:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return {"mean": f"{statistics.mean(values):.3f}", "std": f"{statistics.stdev(values):.3f}"}


if __name__ == "__main__":
    main()
