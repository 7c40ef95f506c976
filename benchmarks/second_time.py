"""How the second time goes into a student: t, span or late, on a small transformer and a small U-Net.

    python benchmarks/second_time.py FOLDER --network dit unet --methods ITVM LMD --seeds 0 1

Trains class-conditional teachers of the 8 x 8 digits that scikit-learn brings (flow matching; kept in FOLDER), then a
student of each for every option and seed, by the same recipe, and writes a results file (--out): the error to the
end points of the teacher's trajectories (rmse) and the Frechet distance in the features of a small classifier (fd) at
1, 2 and 4 network calls, means over the seeds and how far the seeds lie apart.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from record import here, write

from fewstep import ITVM, LMD, DiffusionField, FlowMap, FlowMatching, evaluate, fit, load_data
from fewstep.evaluation.extractor import trained_classifier
from fewstep.networks import FAMILIES, SECOND_TIMES

STEPS, TEACHER_STEPS, BATCH = 800, 3000, 64
METHODS: dict[str, Any] = {"ITVM": ITVM, "LMD": LMD}


def network(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dit":
        model: Any = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=6, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
    else:
        model = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=16, num_class_embeds=10,
        )  # fmt: skip
    return FAMILIES[type(model).__name__](model)


def teacher_of(name: str, data: Any, folder: Path) -> DiffusionField:
    field = DiffusionField(network(name), FlowMatchEulerDiscreteScheduler())
    objective = FlowMatching(times="logit-normal")
    result: Any = fit(field, objective, data, TEACHER_STEPS, batch=BATCH, lr=1e-3, warmup=200, out=folder / name)
    return result.ema.eval().requires_grad_(False)


def measure(model: Any, teacher: Any, data: Any, judge: Any) -> dict[str, float]:
    found = evaluate(
        model, teacher=teacher, data=data, extractor=judge, steps=(1, 2, 4), teacher_steps=(1, 2, 4, 100), count=1000,
        batch=250, metrics=["rmse", "fd"],
    )  # fmt: skip
    return {f"{row['model']} {m} {row['nfe']}": row[m] for row in found.rows for m in ("rmse", "fd")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", nargs="+", default=["dit", "unet"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("second-time.json"))
    args = parser.parse_args()
    data = load_data("digits")
    judge = trained_classifier(data)
    numbers = [f"{m} {n}" for m in ("rmse", "fd") for n in (1, 2, 4)]
    rows: list[list[Any]] = []
    for name in args.network:
        teacher = teacher_of(name, data, args.folder)
        shown: dict[str, float] = {}
        for method in args.methods:
            for how in SECOND_TIMES:
                found = []
                for seed in args.seeds:
                    file = args.folder / f"{name}-{method}-{how}-{seed}.json"
                    if not file.is_file():
                        student = FlowMap.from_field(teacher, second_time=how).requires_grad_(True)
                        done = fit(
                            student, METHODS[method](teacher), data, STEPS, batch=BATCH, lr=3e-4, warmup=100, seed=seed
                        )
                        file.write_text(json.dumps(measure(done.ema, teacher, data, judge)))
                    found.append(json.loads(file.read_text()))
                shown = found[0]
                cells = [[row[f"student {number}"] for row in found] for number in numbers]
                means = [{"mean": statistics.mean(c), "half": (max(c) - min(c)) / 2} for c in cells]
                rows.append([name, method, how, *means])
                print(*rows[-1], flush=True)
        rows.append([name, "teacher, Euler", None, *(shown[f"teacher {n}"] for n in numbers)])
    note = f"{STEPS} steps of {BATCH} rows. Means over the seeds, and half of how far they lie apart; by calls."
    write(
        args.out, title="The second time of a student", rows=rows,
        columns=["network", "method", "second time", *numbers],
        formats=dict.fromkeys(numbers, "{mean:.3f} ± {half:.3f}"), **here(args.seeds, [note]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
