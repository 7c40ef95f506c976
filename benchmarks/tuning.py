"""A few-step student and data of a new style: by which way it learns them, and stays a student of few steps.

    python benchmarks/tuning.py FOLDER                   # all, then the two tables and the pictures
    python benchmarks/tuning.py FOLDER --only tune       # or style; what is kept in FOLDER is not trained again

Writes benchmarks/results/tuning.json and style-lora.json, and docs/images/tuning-*.png and style-lora-*.png, for
docs/guides/tune-a-distilled-model.md and style-lora.md. The model: the 8 x 8 digits of scikit-learn, a teacher that is
trained first, and its student by ITVM. The new data: 300 of the digits, black on white (``inverted``), or in thicker
strokes (``bold``).
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import FIT, digits, judge_of, noise_for, quality, teacher_in
from torch import Tensor
from torch.utils.data import TensorDataset

import fewstep
from fewstep.evaluation.grids import image_grid

IMAGES = FOLDER.parent.parent / "docs" / "images"
COUNTS = (1, 2, 4)
STEPS, FIRST, FEW = 200, 500, 300
STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: -x,
    "bold": lambda x: torch.nn.functional.max_pool2d(torch.nn.functional.pad(x, (0, 1, 0, 1), value=-1), 2, 1),
}


class Style:
    """New data, and what measures how near samples are to them."""

    def __init__(self, name: str) -> None:
        rows, self.labels = digits()
        self.rows = STYLES[name](rows)
        self.judge = judge_of(self.rows, self.labels)
        self.few = TensorDataset(self.rows[:FEW], self.labels[:FEW])

    def measured(self, model: Any) -> dict[str, float]:
        found = quality(model.eval(), self.rows, self.labels, self.judge, COUNTS)
        return {steps: some["fd"] for steps, some in found.items()}


def trained(model: Any, objective: Any, data: Any, steps: int, seed: int = 0, lr: float = 1e-3) -> Any:
    model.requires_grad_(True) if not any(".lora_" in name for name, _ in model.named_parameters()) else None
    return fewstep.fit(model, objective, data, steps, seed=seed, lr=lr, **FIT).ema.eval()


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def student_in(folder: Path) -> Path:
    """The run of the student that is tuned."""
    run = folder / "base-student"
    if not (run / "checkpoints").is_dir():
        teacher: Any = fewstep.load(teacher_in(folder))
        student = fewstep.FlowMap.from_field(teacher).requires_grad_(True)
        fewstep.fit(student, fewstep.ITVM(teacher), fewstep.load_data("digits"), FIRST, out=run, lr=1e-3, **FIT)
    return run


def tuned_ways(folder: Path, seed: int, name: str, pictures: bool) -> dict[str, dict[str, float]]:
    """Each way from the same student and the same new data: FD to the new data by steps."""
    style = Style(name)
    load, data = lambda: fewstep.load(student_in(folder)), style.few
    teacher = trained(fewstep.load(teacher_in(folder)), fewstep.FlowMatching(), data, STEPS, seed)
    ways: dict[str, Callable[[], Any]] = {
        "teacher, tuned": lambda: teacher,
        "student, before": load,
        "flow matching on the student": lambda: trained(load(), fewstep.FlowMatching(), data, STEPS, seed),
        "PSD from the new data": lambda: trained(load(), fewstep.PSD(ends=0.25), data, STEPS, seed),
        "ITVM, tuned teacher, its weights": lambda: trained(
            fewstep.FlowMap.from_field(teacher), fewstep.ITVM(teacher), data, STEPS, seed
        ),
        "ITVM, tuned teacher, from the student": lambda: trained(load(), fewstep.ITVM(teacher), data, STEPS, seed),
        "the same, by LoRA of rank 8": lambda: by_lora(load(), teacher, data, seed),
    }
    models = {way: make() for way, make in ways.items()}
    if pictures:
        shown = ("student, before", "flow matching on the student", "ITVM, tuned teacher, from the student")
        labels = ("before", "flow matching", "teacher tuned, then ITVM")
        strip([(f"{label}, {n}", models[way], n) for way, label in zip(shown, labels, strict=True) for n in (1, 4)],
              IMAGES / f"tuning-{name}.png")  # fmt: skip
    return {way: style.measured(model) for way, model in models.items()}


def by_lora(student: Any, teacher: Any, data: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    fewstep.add_lora(student, rank=8)
    return fewstep.merge_lora(trained(student, fewstep.ITVM(teacher), data, STEPS, seed, lr=3e-3))


def stacks(folder: Path, seed: int, name: str, pictures: bool) -> dict[str, dict[str, float]]:
    """A style adapter of the base and a few-step adapter of the base, alone and together."""
    style, run = Style(name), teacher_in(folder)
    load: Callable[[], Any] = lambda: fewstep.load(run)  # noqa: E731
    few, look = folder / f"few-lora-{seed}", folder / f"{name}-lora-{seed}"
    if not few.is_dir():
        torch.manual_seed(seed)
        base = load()
        student = fewstep.FlowMap.from_field(base, share=True)
        fewstep.add_lora(student, rank=16)
        data = fewstep.load_data("digits")
        fewstep.save_adapter(trained(student, fewstep.ITVM(base), data, 2 * STEPS, seed, lr=3e-3), few)
    if not look.is_dir():
        torch.manual_seed(seed)
        field = load()
        fewstep.add_lora(field, rank=8)
        fewstep.save_adapter(trained(field, fewstep.FlowMatching(), style.few, STEPS, seed, lr=3e-3), look)

    def styled(scale: float) -> Any:
        field = load()
        fewstep.load_adapter(field, look)
        for layer in field.modules():
            if hasattr(layer, "lora_A"):
                layer.set_scale("default", scale)
        return fewstep.merge_lora(field)

    def stacked(scale: float) -> Any:
        student = fewstep.FlowMap.from_field(styled(scale))
        fewstep.load_adapter(student, few)
        return fewstep.merge_lora(student)

    models: dict[str, Any] = {
        "style alone, Euler": styled(1.0),
        "few-step alone": stacked(0.0),
        **{f"both, style at {scale:g}": stacked(scale) for scale in (0.5, 1.0, 1.5)},
        "both, then 100 steps of ITVM": trained(stacked(1.0), fewstep.ITVM(styled(1.0)), style.few, 100, seed),
        "no few-step adapter, 100 steps of ITVM": trained(
            fewstep.FlowMap.from_field(styled(1.0)), fewstep.ITVM(styled(1.0)), style.few, 100, seed
        ),
    }
    if pictures:
        strip([("style alone, 2", models["style alone, Euler"], 2), ("few-step alone, 2", models["few-step alone"], 2),
               ("both, 2", models["both, style at 1"], 2),
               ("then ITVM, 2", models["both, then 100 steps of ITVM"], 2)],
              IMAGES / f"style-lora-{name}.png")  # fmt: skip
    return {label: style.measured(model) for label, model in models.items()}


def strip(rows: list[tuple[str, Any, int]], out: Path) -> None:
    asked = torch.arange(10)
    shown = [fewstep.sample(model.eval(), noise_for(asked, 3), n, class_labels=asked) for _, model, n in rows]
    image_grid(torch.cat(shown), out, columns=10, labels=[label for label, _, _ in rows])


def table(found: list[dict[str, dict[str, float]]]) -> list[list[Any]]:
    """A row a way: mean over the seeds and half the range between them."""
    rows = []
    for name in found[0]:
        cells = [[some[name][str(n)] for some in found] for n in COUNTS]
        rows.append([name, *({"mean": statistics.mean(c), "half_range": (max(c) - min(c)) / 2} for c in cells)])
    return rows


def measured(
    folder: Path,
    kind: str,
    measure: Callable[[Path, int, str, bool], dict[str, Any]],
    styles: list[str],
    seeds: list[int],
) -> list[list[Any]]:
    """The rows of these styles."""
    rows: list[list[Any]] = []
    for name in styles:
        found = [
            kept(folder / f"{kind}-{name}-{seed}.json", lambda s=seed, n=name: measure(folder, s, n, s == seeds[0]))
            for seed in seeds
        ]
        rows += [[name, *row] for row in table(found)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=["tune", "style"], default=["tune", "style"])
    parser.add_argument("--styles", nargs="+", choices=list(STYLES), default=list(STYLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    note = (
        f"The 8 x 8 digits; the new data are {FEW} of them in the new style. Frechet distance to all digits of that "
        "style, 1000 samples, in the features of a small classifier of that style: mean of the seeds, and half the "
        "range between them. The base teacher and the base student are those of seed 0."
    )
    facts = {"formats": dict.fromkeys(map(str, COUNTS), "{mean:.2f} ± {half_range:.2f}")}
    if "tune" in args.only:
        rows = measured(args.folder, "tune", tuned_ways, args.styles, args.seeds)
        write(FOLDER / "tuning.json", title="A student tuned to a new style", group="style",
              columns=["style", "way", *map(str, COUNTS)], rows=rows, **facts, **here(args.seeds, [note]))  # fmt: skip
    if "style" in args.only:
        rows = measured(args.folder, "style", stacks, args.styles, args.seeds)
        write(FOLDER / "style-lora.json", title="A style LoRA and a few-step LoRA", group="style",
              columns=["style", "model", *map(str, COUNTS)], rows=rows, **facts,
              **here(args.seeds, [note]))  # fmt: skip


if __name__ == "__main__":
    main()
