"""From one data set to another in one call: eight Gaussians to the checkerboard, and threes to eights.

    python benchmarks/data_to_data.py FOLDER plane                  # three seeds, four latents
    python benchmarks/data_to_data.py FOLDER digits mnist           # threes to eights, of 8 x 8 or 28 x 28 pixels
    python benchmarks/data_to_data.py FOLDER                        # the table and the picture, of what FOLDER has

``plane``: of each latent a velocity and its denoiser (``StochasticInterpolant``; ``FlowMatching`` where there is no
latent), a flow map from the same data with no teacher (``PSD``), and one distilled from the velocity (``ITVM``), all in
the same number of steps. ``digits`` and ``mnist``: a flow map with no teacher (``PSD``) and a velocity
(``FlowMatching``), judged by a classifier: the share of samples that it takes for an eight.

Writes benchmarks/results/data-to-data.json (--out).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, spread, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.evaluation.extractor import accuracy, trained_classifier
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.points import histogram_kl, sliced_wasserstein
from fewstep.flows.exact import CheckerboardField
from fewstep.networks import MLP, UNet

COUNT, BOARD = 10_000, CheckerboardField()
LATENTS = ("none", "quadratic", "sine", "brownian")
SETTINGS: dict[str, Any] = {"batch": 256, "chunk": 256, "lr": 3e-3, "warmup": 50, "ema": 0.99, "quiet": True}
Row = dict[str, Any]


def network(times: int = 1) -> MLP:
    return MLP(2, times=times, width=128, depth=4)


def plane(seed: int, latent: str, steps: int) -> list[Row]:
    data = fewstep.Between(fewstep.load_data("checkerboard"), fewstep.load_data("eight-gaussians"))
    path = fewstep.Interpolant(latent=latent)
    torch.manual_seed(seed)
    if latent == "none":
        field: Any = fewstep.NetworkField(network(), path)
        fewstep.fit(field, fewstep.FlowMatching(), data, steps, seed=seed, **SETTINGS)
    else:
        field = fewstep.DenoisedField(network(), network(), path)
        fewstep.fit(field, fewstep.StochasticInterpolant(), data, steps, seed=seed, **SETTINGS)
    rows = [judged(field, n, seed, latent, "ODE, Euler") for n in (1, 2, 4, 8, 50)]
    if latent != "none":
        for eps in (0.1, 0.5, 1.0):
            rows += [judged(field, n, seed, latent, f"SDE, eps {eps:g}", eps=eps) for n in (50,)]
    direct = fewstep.FlowMap(network(2), path)
    fewstep.fit(direct, fewstep.PSD(ends=0.25), data, steps, seed=seed, **SETTINGS)
    rows += [judged(direct, n, seed, latent, "map, PSD from data") for n in (1, 2, 4, 8)]
    distilled = fewstep.FlowMap(network(2), path)
    fewstep.fit(distilled, fewstep.ITVM(field), data, steps, seed=seed, **SETTINGS)
    rows += [judged(distilled, n, seed, latent, "map, ITVM from the velocity") for n in (1, 2, 4, 8)]
    return rows


def judged(model: Any, n: int, seed: int, latent: str, way: str, **options: Any) -> Row:
    start = fewstep.RowsOf(fewstep.load_data("eight-gaussians")).sample((COUNT, 2), generator(seed, 1))
    x = fewstep.sample(model, start, n, generator=generator(seed, 2), **options)
    data = BOARD.data(COUNT, generator(seed, 3))
    values = {
        "histogram_kl": histogram_kl(x, data),
        "sliced_w2": sliced_wasserstein(x, data),
        "outside": float((~BOARD.inside(x)).double().mean()),
    }
    return {"set": "plane", "latent": latent, "way": way, "steps": n, "seed": seed, **values}


def images(name: str, digit: int) -> Tensor:
    """All images of a digit, without their labels."""
    data = fewstep.load_data(name, only=digit)
    return data.rows(torch.arange(data.size or 0), generator(0)).data


def pictures(name: str, seed: int, steps: int) -> tuple[list[Row], Tensor]:
    """Threes to eights: rows of the table, and a few threes above what each becomes."""
    threes, eights = (images(name, digit) for digit in (3, 8))
    data, shape = fewstep.Between(eights, threes), eights.shape[1:]
    options = {"sample_size": shape[1], "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 32]}
    options |= {"layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ["DownBlock2D"] * 2}
    options |= {"up_block_types": ["UpBlock2D"] * 2}
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    path = fewstep.Interpolant(time_scale=1000.0)
    settings = {"batch": 64, "lr": 1e-3, "warmup": 50, "ema": 0.99, "quiet": True, "seed": seed}
    field = fewstep.NetworkField(UNet(UNet2DModel(**options)), path)
    student = fewstep.FlowMap.from_field(fewstep.NetworkField(UNet(UNet2DModel(**options)), path))
    fewstep.fit(field, fewstep.FlowMatching(), data, steps, **settings)
    fewstep.fit(student, fewstep.PSD(ends=0.25), data, steps, **settings)
    classifier = trained_classifier(fewstep.load_data(name))
    start = threes[:500]
    count = len(start)
    rows, shown = [], [start[:12]]
    for way, model, calls in (("ODE, Euler", field, (1, 2, 4, 8, 50)), ("map, PSD from data", student, (1, 2, 4, 8))):
        for n in calls:
            x = torch.cat([fewstep.sample(model, some, n) for some in start.split(250)])
            right = accuracy(classifier, x, torch.full((count,), 8))
            moved = float((x - start).square().flatten(1).mean(1).sqrt().mean())
            cells = {"asked class": right, "distance": moved}
            rows.append({"set": name, "latent": "none", "way": way, "steps": n, "seed": seed, **cells})
            if way != "ODE, Euler" and n in (1, 4):
                shown.append(x[:12])
    return rows, torch.cat(shown)


METRICS = ("histogram_kl", "sliced_w2", "outside", "asked class", "distance")


def table(folder: Path, out: Path, seeds: list[int]) -> None:
    rows: list[Row] = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    keys = dict.fromkeys(
        (row["set"], metric, row["way"], row["steps"]) for metric in METRICS for row in rows if metric in row
    )
    cells: list[list[Any]] = []
    for name, metric, way, calls in keys:
        same = [row for row in rows if (row["set"], row["way"], row["steps"]) == (name, way, calls)]
        of = [[row[metric] for row in same if row["latent"] == latent] for latent in LATENTS]
        cells.append([name, metric, way, calls, *map(spread, of)])
    write(
        out,
        title="From one data set to another",
        group="set",
        formats=dict.fromkeys(LATENTS, "{mean} ± {std}"),
        columns=["set", "metric", "way", "calls", *LATENTS],
        rows=cells,
        **here(sorted({row["seed"] for row in rows})),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help="plane, digits, mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="updates of each model (plane: 3000, images: 800)")
    parser.add_argument("--out", type=Path, default=FOLDER / "data-to-data.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        for seed in args.seeds:
            file = args.folder / f"{name}-{seed}.json"
            if file.is_file():
                continue
            if name == "plane":
                rows = [row for latent in LATENTS for row in plane(seed, latent, args.steps or 3000)]
            else:
                rows, shown = pictures(name, seed, args.steps or 800)
                image_grid(shown, args.folder / f"{name}-{seed}.png", columns=12, labels=["3", "1 call", "4 calls"])
            file.write_text(json.dumps(rows))
            print(name, seed, "done", flush=True)
    table(args.folder, args.out, args.seeds)


if __name__ == "__main__":
    main()
