"""Fields of physics: what is not known of a flow, in two calls and in fifty (after FLEX, arXiv 2505.17351).

    python benchmarks/physics.py FOLDER vorticity --seeds 0 1       # super-resolution and forecast
    python benchmarks/physics.py FOLDER operators --files DATA      # Darcy flow and Burgers' equation
    python benchmarks/physics.py FOLDER                             # the tables and the picture, of what FOLDER has

``vorticity``: the data set of that name (32 x 32): four times the points of a coarse field, and the field a time of
0.25 ahead. A field is trained by flow matching, with what is known beside the state, in residual space and (for the
first task) on the fields themselves; ITVM makes a map of it. Judged on flows of the test split, with ensembles of four:
the relative error of one sample and of the ensemble's mean, CRPS, and the root mean square of ln E(k) / E_true(k).
``operators``: darcy_train_16.pt, darcy_test_16.pt and burgers_lowres.pt of neuraloperator 0.3.0 (MIT), in DATA: the
pressure for a permeability, and how a wave goes on from its start.

Writes benchmarks/results/physics.json, and docs/images/physics.png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from record import FOLDER, here, write
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, load_data
from fewstep.evaluation import crps, relative_error, spectrum_error
from fewstep.evaluation.grids import image_grid
from fewstep.flows.paths import Reversed
from fewstep.networks import UNet

MEMBERS, COUNT = 4, 24
SETTINGS: dict[str, Any] = {"batch": 8, "lr": 2e-3, "warmup": 20, "ema": 0.98, "quiet": True}
METRICS = ("error", "of the mean", "crps", "spectrum")
Row = dict[str, Any]


def student(size: int, seed: int) -> fewstep.NetworkField:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=size, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
        attention_head_dim=16,
    )  # fmt: skip
    field = fewstep.NetworkField(UNet(unet), Reversed(1000.0), "flow", path=fewstep.Linear())
    return fewstep.with_image(field, 1)


def two_models(data: Any, size: int, seed: int, steps: int) -> tuple[Any, Any]:
    """A field, and a map of it in two thirds of the steps."""
    field = fewstep.fit(student(size, seed), fewstep.FlowMatching(), data, steps, seed=seed, **SETTINGS).ema
    fast = fewstep.FlowMap.from_field(field)
    return field, fewstep.fit(fast, fewstep.ITVM(field), data, 2 * steps // 3, seed=seed, **SETTINGS).ema


def judged(task: str, way: str, models: tuple[Any, Any], data: Any, test: Any, seed: int, is_square: bool) -> list[Row]:
    """Rows of the table; ``test`` has the fields themselves."""
    batch = test.rows(torch.arange(COUNT), generator(0))
    truth, known = batch.data, batch.cond["image"]
    undo = getattr(data, "denormalize", None) if isinstance(data, fewstep.Residual) else None
    rows: list[Row] = []
    calls = [("field", models[0], n) for n in (1, 2, 50)] + [("map", models[1], n) for n in (1, 2, 4)]
    for name, model, n in calls:
        members = []
        for k in range(MEMBERS):
            noise = torch.randn(truth.shape, generator=generator(seed, 10 + k))
            drawn = fewstep.sample(model, noise, n, image=known)
            members.append(drawn if undo is None else undo(drawn, known))
        cells = scores(torch.stack(members), truth, is_square)
        rows.append({"task": task, "way": f"{way}: {name}", "nfe": n, "seed": seed, **cells})
    if task in ("super-resolution", "forecast") and way == "residual":
        rows.append({"task": task, "way": "what is known", "nfe": 0, "seed": seed, **scores(known[None], truth, True)})
    return rows


def scores(members: Tensor, truth: Tensor, is_square: bool) -> dict[str, float | None]:
    values = (relative_error(members[0], truth), relative_error(members.mean(0), truth), crps(members, truth))
    return dict(zip(METRICS, (*values, spectrum_error(members[0], truth) if is_square else None), strict=True))


def vorticity(folder: Path, seed: int, steps: int) -> None:
    rows: list[Row] = []
    for task, residual in (("super-resolution", True), ("super-resolution", False), ("forecast", True)):
        options = {"task": task, "count": 2048}
        data = load_data("vorticity", residual=residual, **options)
        test = load_data("vorticity", residual=False, split="test", task=task, count=64)
        models = two_models(data, 32, seed, steps)
        way = "residual" if residual else "the field itself"
        rows += judged(task, way, models, data, test, seed, is_square=True)
        if seed == 0 and residual:
            picture(folder / f"{task}.pt", models, data, test)
    (folder / f"vorticity-{seed}.json").write_text(json.dumps(rows))


def picture(file: Path, models: tuple[Any, Any], data: Any, test: Any, count: int = 7) -> None:
    batch = test.rows(8 * torch.arange(count) % 64, generator(0))
    known, noise = batch.cond["image"], torch.randn(count, 1, 32, 32, generator=generator(3))
    shown = {"known": known, "true": batch.data}
    for name, model, n in (("field, 50", models[0], 50), ("field, 2", models[0], 2), ("map, 2", models[1], 2)):
        shown[name] = data.denormalize(fewstep.sample(model, noise, n, image=known), known)
    torch.save(shown, file)


def operators(folder: Path, seed: int, steps: int, files: Path) -> None:
    def read(name: str) -> dict[str, Tensor]:
        return torch.load(files / name, weights_only=True)

    train, held_out = read("darcy_train_16.pt"), read("darcy_test_16.pt")
    mean, std = train["y"].mean(), train["y"].std()

    def darcy(some: dict[str, Tensor]) -> ArrayData:
        return ArrayData((some["y"][:, None] - mean) / std, {"image": 2 * some["x"][:, None].float() - 1})

    waves = read("burgers_lowres.pt")["output"].float()[:, None] / read("burgers_lowres.pt")["output"].float().std()
    goes_on = [
        ArrayData(part[:, :, 1:], {"image": part[:, :, :1].expand(-1, -1, 16, -1)}) for part in waves.split(1100)
    ]
    rows: list[Row] = []
    for task, data, test in (
        ("Darcy flow", darcy(train), darcy(held_out)),
        ("Burgers' equation", fewstep.Residual(goes_on[0]), goes_on[1]),
    ):
        models = two_models(data, 16, seed, steps)
        way = "residual" if isinstance(data, fewstep.Residual) else "the field itself"
        rows += judged(task, way, models, data, test, seed, is_square=False)
    (folder / f"operators-{seed}.json").write_text(json.dumps(rows))


def table(folder: Path, out: Path) -> None:
    found = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())]
    kinds = list(dict.fromkeys((row["task"], row["way"], row["nfe"]) for row in found))
    order = ("super-resolution", "forecast", "Darcy flow", "Burgers' equation")
    kinds.sort(key=lambda kind: order.index(kind[0]))
    rows: list[Any] = []
    for kind in kinds:
        same = [row for row in found if (row["task"], row["way"], row["nfe"]) == kind]
        rows.append([*kind, *(spread([row[metric] for row in same]) for metric in METRICS)])
    seeds = sorted({row["seed"] for row in found})
    form = "{mean} ± {std}" if len(seeds) > 1 else "{:.3f}"
    facts = here(seeds=seeds, notes=NOTES)
    facts["commands"] = COMMANDS
    write(
        out / "physics.json", title="Fields of physics, by calls", columns=["task", "way", "calls", *METRICS],
        rows=rows, group="task", formats=dict.fromkeys(METRICS, form), **facts,
    )  # fmt: skip
    parts = [torch.load(folder / f"{task}.pt", weights_only=True) for task in order[:2]]
    both = [{name: image.clamp(-3, 3) / 3 for name, image in part.items()} for part in parts]
    shown = torch.cat([torch.cat([part[name] for part in both]) for name in both[0]])
    image_grid(shown, Path("docs/images/physics.png"), columns=14, labels=list(both[0]))


def spread(values: list[float | None]) -> dict[str, float] | float | None:
    """Of several seeds the mean and the standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return (
        round(known[0], 4)
        if len(known) == 1
        else {"mean": round(statistics.fmean(known), 4), "std": round(statistics.pstdev(known), 4)}
    )


NOTES = [
    "Flows of 32 x 32, 2,048 snapshots; 24 of the test split judged, four samples each. A U-Net of 164,000 weights: "
    "240 steps of batch 8, its map 160. Darcy and Burgers at 16 x 16, 1,000 and 1,100 rows.",
    "error: of one sample, |x - y| / |y|; of the mean: that of the mean of four; spectrum: root mean square of ln E.",
]
COMMANDS = [
    "python benchmarks/physics.py FOLDER vorticity --seeds 0",
    "python benchmarks/physics.py FOLDER operators --files DATA --seeds 0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", help="vorticity, operators")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=240, help="of the field; its map has two thirds")
    parser.add_argument("--files", type=Path, help="the folder of neuraloperator's .pt files")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for part in args.parts:
            begun = time.process_time()
            if part == "vorticity":
                vorticity(args.folder, seed, args.steps)
            else:
                operators(args.folder, seed, args.steps, args.files)
            print(f"{part}, seed {seed}: {time.process_time() - begun:.0f} s of CPU", flush=True)
    if not args.parts:
        table(args.folder, args.out)


if __name__ == "__main__":
    main()
