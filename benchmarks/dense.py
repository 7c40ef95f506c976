"""An image beside the state: the depth of drawn scenes, in 1, 2 and 10 calls; another size; pictures that are black.

    python benchmarks/dense.py FOLDER depth --seeds 0 1 2      # the field trained in four ways, then its map
    python benchmarks/dense.py FOLDER black --seeds 0 1 2      # a set with 20 % black pictures
    python benchmarks/dense.py FOLDER                          # the tables and the picture, of what FOLDER has

The shape of the experiments of Diff2Flow (arXiv 2506.02221), small enough for a CPU. A DDPM of grey pictures of scenes
(``shapes.py``, 16 x 16) is widened by the three channels of a colour picture (``fewstep.with_image``) and trained to
draw the depth: by flow matching through the exact velocity, by going on with diffusion, by flow matching of the raw
network, and without the DDPM's weights. ITVM makes a map of the first. All are judged as depth is: AbsRel and the
share within a factor of 1.25, after a scale and a shift that fit each picture best.

Writes benchmarks/results/dense-depth.json and dense-black.json, and docs/images/dense-depth.png.
"""

import argparse
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from record import FOLDER, here, write
from shapes import FAR, NEAR, scenes
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.evaluation.grids import image_grid
from fewstep.flows.paths import Reversed
from fewstep.networks import UNet

SIZE, TRAIN, TEST = 16, 4000, 200
SETTINGS: dict[str, Any] = {"batch": 16, "lr": 2e-3, "warmup": 20, "ema": 0.98, "quiet": True}
BLACK = 0.2
Row = dict[str, Any]


def unet(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(
        UNet2DModel(
            sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=16,
        )
    )  # fmt: skip


def scheduler() -> DDPMScheduler:
    """Stable Diffusion's: at its last step the picture is still there with a weight of 0.07."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDPMScheduler(prediction_type="v_prediction", **betas)


def grey(count: int, draw: torch.Generator) -> Tensor:
    return scenes(count, SIZE, draw)[0].mean(1, keepdim=True)


def pretrained(seed: int, steps: int) -> Any:
    field = fewstep.DiffusionField(unet(seed), scheduler())
    data = ArrayData(grey(TRAIN, generator(seed, 1)))
    return fewstep.fit(field, fewstep.Denoising(), data, steps, seed=seed, **SETTINGS).ema


def pairs(count: int, size: int, draw: torch.Generator) -> ArrayData:
    """Depths in [-1, 1], beside the pictures that they are of."""
    pictures, depth = scenes(count, size, draw)
    return ArrayData(2 * (depth - NEAR) / (FAR - NEAR) - 1, {"image": pictures})


def judged(model: Any, calls: int, seed: int, size: int = SIZE) -> dict[str, float]:
    """AbsRel and the share within 1.25 of the test scenes."""
    pictures, depth = scenes(TEST, size, generator(99))
    noise = torch.randn(TEST, 1, size, size, generator=generator(seed, 7))
    drawn = fewstep.sample(model, noise, calls, image=pictures)
    fitted = aligned((drawn + 1) / 2 * (FAR - NEAR) + NEAR, depth)
    ratio = torch.maximum(fitted / depth, depth / fitted)
    return {
        "abs_rel": float(((fitted - depth).abs() / depth).mean()),
        "delta1": float((ratio < 1.25).double().mean()),
    }


def aligned(drawn: Tensor, depth: Tensor) -> Tensor:
    """Depths with the scale and the shift of each that fit best, by least squares; at least a tenth of NEAR."""
    x, y = drawn.double().flatten(1), depth.double().flatten(1)
    moved = x - x.mean(1, keepdim=True)
    scale = (moved * y).sum(1, keepdim=True) / moved.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (scale * moved + y.mean(1, keepdim=True)).clamp(min=NEAR / 10).view_as(depth)


def depth(folder: Path, seed: int, before: int, steps: int, distilling: int) -> None:
    start, rows = pretrained(seed, before), []
    data, tuned = pairs(TRAIN, SIZE, generator(seed, 2)), {}
    marks = [steps // 8, steps // 2, steps]
    for way in ("exact velocity", "diffusion, gone on with", "raw network", "no weights"):
        field = deepcopy(start) if way != "no weights" else fewstep.DiffusionField(unet(seed + 10), scheduler())
        if way == "raw network":
            field = fewstep.NetworkField(field.network, Reversed(1000.0), "flow", path=fewstep.Linear())
        field = fewstep.with_image(field, 3).requires_grad_(True)
        objective = fewstep.Denoising() if way.startswith("diffusion") else fewstep.FlowMatching()
        seen: list[Row] = []

        def look(run: Any, way: str = way, seen: list[Row] = seen) -> None:
            if run.step in marks:
                seen.append({"way": way, "step": run.step, "nfe": 10, **judged(run.ema, 10, seed)})

        tuned[way] = fewstep.fit(field, objective, data, steps, seed=seed, callbacks=[look], **SETTINGS).ema
        rows += [*seen, *({"way": way, "step": steps, "nfe": n, **judged(tuned[way], n, seed)} for n in (1, 2))]
    teacher = tuned["exact velocity"]
    student = fewstep.FlowMap.from_field(teacher)
    student = fewstep.fit(student, fewstep.ITVM(teacher), data, distilling, seed=seed, **SETTINGS).ema
    rows += [{"way": "its map, ITVM", "step": distilling, "nfe": n, **judged(student, n, seed)} for n in (1, 2, 4, 10)]
    rows += [{"way": "exact velocity at 32 x 32, as it is", "step": 0, "nfe": 10, **judged(teacher, 10, seed, 32)}]
    larger = deepcopy(teacher).requires_grad_(True)
    larger = fewstep.fit(
        larger, fewstep.FlowMatching(), pairs(TRAIN, 32, generator(seed, 3)), steps // 8, seed=seed, **SETTINGS
    ).ema
    way = "exact velocity at 32 x 32, trained on there"
    rows += [{"way": way, "step": steps // 8, "nfe": 10, **judged(larger, 10, seed, 32)}]
    (folder / f"depth-{seed}.json").write_text(json.dumps([{**row, "seed": seed} for row in rows]))
    if seed == 0:
        picture(teacher, student)


def picture(teacher: Any, student: Any, count: int = 10) -> None:
    """Pictures, their depths, and what the field and its map draw."""
    pictures, true = scenes(TEST, SIZE, generator(99))
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator(5))
    rows = {"scene": pictures[:count], "depth": (2 * (true[:count] - NEAR) / (FAR - NEAR) - 1).expand(-1, 3, -1, -1)}
    for name, model, calls in (("field, 10", teacher, 10), ("field, 1", teacher, 1), ("map, 1", student, 1)):
        rows[name] = fewstep.sample(model, noise, calls, image=pictures[:count]).clamp(-1, 1).expand(-1, 3, -1, -1)
    larger = torch.cat(list(rows.values())).repeat_interleave(3, 2).repeat_interleave(3, 3)
    image_grid(larger, Path("docs/images/dense-depth.png"), columns=count, labels=list(rows))


def black(folder: Path, seed: int, before: int, steps: int) -> None:
    """Fine-tuned to a set of which a fifth is black, by diffusion and by flow matching through the exact velocity."""
    start, rows = pretrained(seed, before), []
    data = grey(TRAIN, generator(seed, 4))
    data[: int(BLACK * TRAIN)] = -1
    noise = torch.randn(400, 1, SIZE, SIZE, generator=generator(seed, 8))
    for way, objective in (("diffusion", fewstep.Denoising()), ("exact velocity", fewstep.FlowMatching())):
        field = deepcopy(start).requires_grad_(True)
        field = fewstep.fit(field, objective, ArrayData(data), steps, seed=seed, **SETTINGS).ema
        for calls in (10, 30):
            drawn = fewstep.sample(field, noise, calls).clamp(-1, 1).flatten(1)
            is_black = (drawn.mean(1) < -0.95).double()
            cells = {"black": float(is_black.mean()), "mean": float(drawn.mean()), "of the data": float(data.mean())}
            rows.append({"way": way, "step": steps, "nfe": calls, "seed": seed, **cells})
    (folder / f"black-{seed}.json").write_text(json.dumps(rows))


def tables(folder: Path, out: Path) -> None:
    about = {
        "depth": ("Depth of drawn scenes, from a picture beside the state", ("abs_rel", "delta1")),
        "black": ("A set of which a fifth is black", ("black", "mean", "of the data")),
    }
    for name, (title, metrics) in about.items():
        found = [row for file in sorted(folder.glob(f"{name}-*.json")) for row in json.loads(file.read_text())]
        if not found:
            continue
        kinds = list(dict.fromkeys((row["way"], row["step"], row["nfe"]) for row in found))
        rows: list[Any] = []
        seeds = sorted({row["seed"] for row in found})
        for kind in kinds:
            same = [row for row in found if (row["way"], row["step"], row["nfe"]) == kind]
            rows.append([*kind, *(spread([row[metric] for row in same]) for metric in metrics)])
        write(
            out / f"dense-{name}.json", title=title, columns=["way", "steps", "calls", *metrics], rows=rows,
            formats=dict.fromkeys(metrics, "{mean} ± {std}" if len(seeds) > 1 else "{:.3f}"), group="way",
            **{**here(seeds=seeds, notes=NOTES[name]), "commands": [COMMANDS[name]]},
        )  # fmt: skip


def spread(values: list[float]) -> dict[str, float] | float:
    """Of several seeds the mean and the standard deviation."""
    return (
        round(values[0], 4)
        if len(values) == 1
        else {"mean": round(statistics.fmean(values), 4), "std": round(statistics.pstdev(values), 4)}
    )


COMMANDS = {name: f"python benchmarks/dense.py FOLDER {name}" for name in ("depth", "black")}
NOTES = {
    "depth": [
        "Scenes of 16 x 16, 200 of them judged, those of no training. A U-Net of 164,000 weights, 500 steps of DDPM, "
        "320 of each way and of the map, 40 at 32 x 32, batch 16.",
        "AbsRel and the share within 1.25 after a scale and a shift for each scene.",
    ],
    "black": [
        "A DDPM of grey scenes, fine-tuned for 160 steps to a set of which a fifth is black; 400 samples by Euler from "
        "noise. Black: a mean below -0.95, of pixels from -1 to 1.",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", help="depth, black")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--before", type=int, default=500, help="steps of the DDPM")
    parser.add_argument("--steps", type=int, default=320, help="of fine-tuning")
    parser.add_argument("--distilling", type=int, default=320)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for part in args.parts:
            begun = time.process_time()
            if part == "depth":
                depth(args.folder, seed, args.before, args.steps, args.distilling)
            else:
                black(args.folder, seed, args.before, args.steps // 2)
            print(f"{part}, seed {seed}: {time.process_time() - begun:.0f} s of CPU", flush=True)
    if not args.parts:
        tables(args.folder, args.out)


if __name__ == "__main__":
    main()
