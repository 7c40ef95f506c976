"""The whole chain on a model that nobody here trained: the published MNIST transformer of examples/mnist_vit.py.

    FEWSTEP_DATA=... python benchmarks/published_model.py FOLDER [PICTURE]

It predicts the data on a path of its own; fewstep reads it as a flow on the linear path, guided. It is straightened
(reflow: 8,000 pairs, 2,000 steps of 128), and fine-tuned to Fashion-MNIST (1,000 steps of 128). Frechet distances of
2,000 samples are in the features of a small classifier of the set in question. Writes FOLDER/published-chain.json.
"""

import os
import runpy
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from record import here, write

from fewstep import FlowMatching, evaluate, fit, load_data, sample
from fewstep.common.randomness import sample_generators
from fewstep.data import Dropped, Pairs
from fewstep.evaluation.extractor import trained_classifier
from fewstep.flows.guided import Guided
from fewstep.flows.sampling import sample_noise
from fewstep.generation.reflow import make_pairs

STEPS = (1, 2, 4, 8, 50)


def quality(model: Any, name: str, steps: tuple[int, ...] = STEPS) -> dict[str, float]:
    test, judge = load_data(name, split="test"), trained_classifier(load_data(name))
    found = evaluate(model, data=test, extractor=judge, steps=steps, count=2000, batch=500, metrics=["fd"])
    return {str(row["steps"]): round(row["fd"], 2) for row in found.rows}


def strip(model: Any, steps: int, count: int = 14) -> torch.Tensor:
    noise = sample_noise((count, 1, 28, 28), sample_generators(3, range(count)))
    return sample(model, noise, steps, class_labels=torch.arange(count) % 10)


def picture(rows: dict[str, torch.Tensor], out: str) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.66 * len(rows)), layout="constrained")
    for axis, (name, samples) in zip(axes, rows.items(), strict=True):
        tiles = samples.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2).squeeze(-1)
        axis.imshow(tiles, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(out, dpi=110)


def main(folder: Path, out: str | None) -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "mnist_vit.py"))
    weights = os.environ.get("VIT_WEIGHTS")
    teacher: Guided = example["teacher"](weights)
    found: dict[str, Any] = {"teacher": quality(teacher, "mnist")}
    print(found, flush=True)

    make_pairs(teacher, folder / "pairs", 8000, steps=16, shape=(1, 28, 28), labels=list(range(10)), shard=2000)
    straight: Any = deepcopy(teacher.field).requires_grad_(True)
    result = fit(straight, FlowMatching(), Pairs(folder / "pairs"), steps=2000, batch=128, lr=5e-4, warmup=50,
                 ema=0.995, quiet=True)  # fmt: skip
    straight = result.ema
    found["straightened"] = quality(straight, "mnist")
    print(found, flush=True)

    clothes: Any = deepcopy(teacher.field).requires_grad_(True)
    data = Dropped(load_data("fashion-mnist"), 0.1, {"class_labels": 10})
    before = quality(teacher.field, "fashion-mnist", (50,))
    tuned = fit(clothes, FlowMatching(), data, steps=1000, batch=128, lr=1e-3, warmup=50, ema=0.99, quiet=True).ema
    found |= {"before fine-tuning": before, "fine-tuned, 1,000 steps": quality(tuned, "fashion-mnist", (50,))}
    names = [str(n) for n in STEPS]
    rows = [
        [name, "MNIST" if name in ("teacher", "straightened") else "Fashion-MNIST", *map(row.get, names)]
        for name, row in found.items()
    ]
    write(
        folder / "published-chain.json", title="The published MNIST transformer, straightened and fine-tuned",
        columns=["model", "judged on", *names], rows=rows, **here([0], ["Frechet distances, by steps."]),
    )  # fmt: skip
    if out is not None:
        strips = {f"published, {n} steps": strip(teacher, n) for n in (1, 2, 4, 50)}
        strips |= {f"straightened, {n}": strip(straight, n) for n in (1, 2, 4)}
        strips |= {"fine-tuned, 50": strip(tuned, 50)}
        picture(strips, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
