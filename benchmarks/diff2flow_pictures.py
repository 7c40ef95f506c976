"""The pictures of docs/guides/diff2flow.md, and a results file for each target, from what diff2flow.py left in FOLDER.

python benchmarks/diff2flow_pictures.py FOLDER docs/images
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
from record import here, write
from record import read as results

from fewstep import load
from fewstep.evaluation.style import COLOURS
from fewstep.generation.drawing import draw

NAMES = {"diff2flow": "exact velocity", "naive": "raw network", "diffusion": "diffusion, gone on with"}
PREDICTIONS = {"v_prediction": "v", "epsilon": "noise"}


def read(folder: Path) -> dict[tuple[str, str, bool], dict[str, dict[int, float]]]:
    """FD by (target, prediction, LoRA), way and step."""
    found: dict[tuple[str, str, bool], dict[str, dict[int, float]]] = {}
    for file in sorted(folder.glob("adapt-*-seed0.json")):
        for target, prediction, trained, way, step, fd in results(file).rows:
            ways: Any = found.setdefault((str(target), str(prediction), trained == "LoRA"), {})
            ways.setdefault(way, {})[step] = float(fd)  # pyright: ignore[reportArgumentType]
    return found


def record(folder: Path, found: dict[tuple[str, str, bool], dict[str, dict[int, float]]], target: str) -> None:
    """A results file of one target; its commit and command are those of the trainings."""
    parts = [results(file) for file in sorted(folder.glob(f"adapt-*-{target}-*-seed0.json"))]
    commits = dict.fromkeys(part.commit for part in parts if part.commit)
    steps = sorted({step for key, ways in found.items() if key[0] == target for row in ways.values() for step in row})
    rows = [
        [PREDICTIONS[prediction], "LoRA" if lora else "full", NAMES[way], *map(row.get, steps)]
        for (aim, prediction, lora), ways in found.items()
        if aim == target
        for way, row in ways.items()
    ]
    names = [str(step) for step in steps]
    facts = here([0], ["Frechet distances of 1,000 samples of 10 Euler steps, by steps of fine-tuning."])
    facts["commands"] = [*dict.fromkeys(command for part in parts for command in part.commands), *facts["commands"]]
    facts["commit"] = ", ".join(commits) or facts["commit"]
    write(
        folder / f"diff2flow-{target}.json", title=f"A diffusion model of digits fine-tuned: {target}", rows=rows,
        columns=["predicts", "trained", "by", *names], formats=dict.fromkeys(names, "{:.1f}"), **facts,
    )  # fmt: skip


def curves(found: dict[tuple[str, str, bool], dict[str, dict[int, float]]], out: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels = sorted(found, key=lambda key: (key[1] != "v_prediction", key[0], key[2]))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.9 * columns, 2.8 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, panels, strict=False):
        target, prediction, lora = key
        for colour, (way, label) in zip(COLOURS, NAMES.items(), strict=False):
            if row := found[key].get(way):
                axis.plot([max(step, 5) for step in row], list(row.values()), "o-", ms=3.5, color=colour, label=label)
        axis.set(xscale="log", yscale="log", xlabel="steps (leftmost: none)")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(NullFormatter())
        axis.set_xticks([10, 25, 50, 100, 200, *([400] if target == "clothes" else [])])
        axis.set_yticks([2, 5, 10, 20, 50])
        axis.set_title(f"{target}, {PREDICTIONS[prediction]}, {'LoRA' if lora else 'full'}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("Frechet distance, 10 calls")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


def strips(folder: Path, prediction: str, out: Path) -> None:
    """The same noise through the teacher, the straightened model and the distilled one."""
    from matplotlib import pyplot as plt

    models: dict[str, Any] = {
        name: load(folder / f"{where}-{prediction}")
        for name, where in (("diffusion model", "teacher"), ("straightened", "straight"), ("distilled", "fast"))
    }
    rows = [("diffusion model", 50)] + [(name, steps) for steps in (1, 2, 4) for name in models]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.6 * len(rows)), layout="constrained")
    for axis, (name, steps) in zip(axes, rows, strict=True):
        samples, _, _ = draw(models[name], 15, steps, seed=3, labels=list(range(10)))
        strip = samples.clamp(-1, 1).permute(2, 0, 3, 1).flatten(1, 2)
        axis.imshow(strip.squeeze(-1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(f"{name}, {steps} call{'s' * (steps > 1)}", rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(out, dpi=110)


def main(folder: Path, out: Path) -> None:
    matplotlib.use("Agg")
    found = read(folder)
    for target in sorted({key[0] for key in found}):
        record(folder, found, target)
    curves(found, out / "diff2flow-finetune.png")
    for prediction in PREDICTIONS:
        if (folder / f"fast-{prediction}").is_dir() and (folder / f"straight-{prediction}").is_dir():
            strips(folder, prediction, out / f"diff2flow-{prediction}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
