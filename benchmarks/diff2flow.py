"""Diff2Flow on real data: diffusion models of digits, adapted to other data, straightened and distilled.

    python benchmarks/diff2flow.py FOLDER teacher     --prediction epsilon v_prediction
    python benchmarks/diff2flow.py FOLDER adapt       --prediction v_prediction --target clothes handwriting [--lora]
    python benchmarks/diff2flow.py FOLDER grids       --prediction epsilon v_prediction
    python benchmarks/diff2flow.py FOLDER straighten  --prediction v_prediction
    python benchmarks/diff2flow.py FOLDER distill     --prediction v_prediction
    python benchmarks/diff2flow_pictures.py FOLDER docs/images

Every stage keeps what it made in FOLDER, its numbers as results files. MNIST is looked for in $FEWSTEP_DATA/mnist.

The teachers: class-conditional DDPMs (1,000 steps, linear betas) of MNIST at 16 x 16, one that predicts the noise and
one that predicts v. ``adapt`` brings them to Fashion-MNIST (clothes) or to the 1,797 digits of UCI (handwriting), by
flow matching through the exact velocity (diff2flow), by flow matching of the raw network (naive), and by going on with
diffusion (diffusion), in full or by LoRA, at the same learning rate. All are judged as flows: 10 Euler steps, and the
Frechet distance of 1,000 samples in the features of a small classifier of the target set.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from record import here, write
from torch import nn

from fewstep import (
    ITVM,
    Denoising,
    DiffusionField,
    FlowMap,
    FlowMatching,
    Linear,
    NetworkField,
    add_lora,
    evaluate,
    export,
    fit,
    load,
    load_data,
)
from fewstep.data import ArrayData, Dropped, Pairs
from fewstep.evaluation.extractor import extract, trained_classifier
from fewstep.evaluation.features import FeatureStatistics, frechet_distance
from fewstep.flows.paths import Reversed
from fewstep.generation.drawing import draw
from fewstep.generation.reflow import make_pairs
from fewstep.networks import UNet
from fewstep.training.run import Run, every

SIZE, NULL = 16, 10
WAYS = ("diff2flow", "naive", "diffusion")
# Steps of fine-tuning at which the quality is measured.
MARKS = {"clothes": (25, 50, 100, 200, 400), "handwriting": (10, 25, 50, 100, 200)}
RATES = {False: 3e-4, True: 1e-3}  # of full fine-tuning, of LoRA
RANK = 8


def pictures(name: str, split: str = "train") -> ArrayData:
    """A set at 16 x 16 in [-1, 1], with labels."""
    data: Any = load_data(name) if name == "digits" else load_data(name, split=split)
    pixels = torch.from_numpy(data.array.copy()).float()
    pixels = nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return ArrayData(pixels.round().byte(), {"class_labels": data.cond["class_labels"]}, classes=data.classes)


def target_sets(target: str) -> tuple[ArrayData, ArrayData]:
    """What is trained on, and what samples are held against."""
    if target == "clothes":
        return pictures("fashion-mnist"), pictures("fashion-mnist", "test")
    return pictures("digits"), pictures("digits")


def train_teacher(folder: Path, prediction: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=32, num_class_embeds=NULL + 1,
    )  # fmt: skip
    field = DiffusionField(UNet(unet), DDPMScheduler(prediction_type=prediction))
    data, out = Dropped(pictures("mnist"), 0.1, {"class_labels": NULL}), folder / f"teacher-{prediction}-run"
    result = fit(field, Denoising(), data, steps=4000, batch=64, lr=1e-3, warmup=200, ema=0.999, out=out)
    export(result.ema, folder / f"teacher-{prediction}", overwrite=True)  # pyright: ignore[reportArgumentType]
    digits = pictures("mnist", "test")
    print(prediction, quality(result.ema, digits, trained_classifier(pictures("mnist")), (1, 2, 4, 10, 50)))


def quality(model: Any, data: ArrayData, judge: nn.Module, steps: Sequence[int]) -> dict[str, float]:
    found = evaluate(model, data=data, extractor=judge, steps=steps, count=1000, batch=250, metrics=["fd"])
    return {str(row["nfe"]): round(row["fd"], 3) for row in found.rows}


def adapt(folder: Path, prediction: str, target: str, way: str, lora: bool, seed: int) -> None:
    """One way of fine-tuning, measured on the way."""
    data, held_out = target_sets(target)
    judge, marks, lr = trained_classifier(data), MARKS[target], RATES[lora]
    field: Any = load(folder / f"teacher-{prediction}")
    if way == "naive":  # what the network says at the step 1000 (1 - t) is taken for the flow
        field = NetworkField(field.network, Reversed(1000.0), "flow", path=Linear())
    field.requires_grad_(True)
    if lora:
        torch.manual_seed(seed)
        add_lora(field, rank=RANK)
    name = f"{prediction}-{target}-{way}-{'lora' if lora else 'full'}-seed{seed}"
    rows: list[dict[str, Any]] = [{"step": 0, **quality(deepcopy(field).eval(), held_out, judge, (10,))}]

    def measure(run: Run) -> None:
        if run.step in marks:
            rows.append({"step": run.step, **quality(run.ema, held_out, judge, (10,))})
            print(name, rows[-1], flush=True)

    objective = Denoising() if way == "diffusion" else FlowMatching()
    trained = sum(p.numel() for p in field.parameters() if p.requires_grad)
    data = Dropped(data, 0.1, {"class_labels": NULL})
    result = fit(field, objective, data, steps=marks[-1], batch=64, lr=lr, warmup=20, ema=0.99, seed=seed,
                 callbacks=[measure], quiet=True)  # fmt: skip
    write(
        folder / f"adapt-{name}.json", title=f"Fine-tuned to {target}",
        columns=["target", "predicts", "trained", "by", "step", "FD"],
        rows=[[target, prediction, "LoRA" if lora else "full", way, row["step"], row["10"]] for row in rows],
        **here([seed], [f"10 Euler steps, 1,000 samples; learning rate {lr}, {trained:,} weights trained."]),
    )  # fmt: skip
    torch.save(samples_of(result.ema), folder / f"adapt-{name}.pt")


def samples_of(model: Any, steps: int = 10) -> torch.Tensor:
    """A few samples, two of a class."""
    return draw(model, 20, steps, labels=list(range(NULL)), seed=1)[0]


def straighten(folder: Path, prediction: str) -> None:
    """Reflow: pairs of the converted teacher, and flow matching on them from its own weights; few steps of both."""
    teacher: Any = load(folder / f"teacher-{prediction}")
    digits, judge = pictures("mnist", "test"), trained_classifier(pictures("mnist"))
    pairs = folder / f"pairs-{prediction}"
    labels = list(range(NULL))
    make_pairs(teacher, pairs, 10_000, steps=16, labels=labels, shard=2500)
    field = deepcopy(teacher).requires_grad_(True)
    steps = (1, 2, 4, 8, 50)
    found: dict[str, Any] = {"teacher": quality(teacher, digits, judge, steps)}
    fit(field, FlowMatching(), Pairs(pairs), steps=2000, batch=64, lr=3e-4, warmup=50, ema=0.995, quiet=True,
        callbacks=[every(500, lambda run: print(run.step, quality(run.ema, digits, judge, (1, 2, 4)), flush=True)),
                   every(2000, lambda run: export(run.ema, folder / f"straight-{prediction}", overwrite=True))],
        )  # fmt: skip
    found["straight"] = quality(load(folder / f"straight-{prediction}"), digits, judge, steps)
    record(folder / f"straight-{prediction}.json", "A diffusion model straightened", found)


def distill(folder: Path, prediction: str) -> None:
    """ITVM straight from the diffusion model."""
    teacher: Any = load(folder / f"teacher-{prediction}")
    digits, judge = pictures("mnist", "test"), trained_classifier(pictures("mnist"))
    student = FlowMap.from_field(teacher)
    result = fit(
        student, ITVM(teacher), pictures("mnist"), steps=1500, batch=64, lr=5e-4, warmup=50, ema=0.995, quiet=True,
        callbacks=[every(500, lambda run: print(run.step, quality(run.ema, digits, judge, (1, 2, 4)), flush=True))],
    )  # fmt: skip
    export(result.ema, folder / f"fast-{prediction}", overwrite=True, method="ITVM")  # pyright: ignore
    found = quality(load(folder / f"fast-{prediction}"), digits, judge, (1, 2, 4, 8))
    record(folder / f"fast-{prediction}.json", "A diffusion model distilled by ITVM", {"distilled": found})


def grids(folder: Path, prediction: str) -> None:
    """The teacher in equal steps of t, and in equal steps of its own schedule, where DDIM takes them."""
    judge, teacher = trained_classifier(pictures("mnist")), load(folder / f"teacher-{prediction}")
    digits = pictures("mnist", "test").rows(torch.arange(2000), torch.Generator()).data
    real = FeatureStatistics.of(extract(judge, digits))
    rows: dict[str, dict[str, float]] = {}
    for grid in ("uniform", "native"):
        drawn = {n: draw(teacher, 1000, n, labels=range(NULL), grid=grid)[0] for n in (2, 4, 8)}
        found = {n: frechet_distance(real, FeatureStatistics.of(extract(judge, x))) for n, x in drawn.items()}
        rows[grid] = {str(n): fd for n, fd in found.items()}
        print(prediction, grid, rows[grid], flush=True)
    record(folder / f"grids-{prediction}.json", f"Where the teacher takes its steps: {prediction}", rows)


def record(path: Path, title: str, found: dict[str, dict[str, float]]) -> None:
    """Frechet distances by model and number of network calls, as a results file."""
    calls = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = [[model, *map(row.get, calls)] for model, row in found.items()]
    notes = ["Frechet distances of 1,000 samples in the features of a small classifier, by network calls."]
    write(path, title=title, columns=["model", *calls], rows=rows, **here([0], notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=["teacher", "adapt", "grids", "straighten", "distill"])
    parser.add_argument("--prediction", nargs="+", default=["v_prediction"], choices=["epsilon", "v_prediction"])
    parser.add_argument("--target", nargs="+", default=list(MARKS), choices=list(MARKS))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for prediction in args.prediction:
        if args.stage == "adapt":
            for target in args.target:
                for seed in args.seeds:
                    for way in args.ways:
                        adapt(args.folder, prediction, target, way, args.lora, seed)
        else:
            stages = {"teacher": train_teacher, "grids": grids, "straighten": straighten, "distill": distill}
            stages[args.stage](args.folder, prediction)


if __name__ == "__main__":
    main()
