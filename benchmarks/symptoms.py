"""What goes wrong in a training, made to happen on purpose, beside the run that is mended.

    python benchmarks/symptoms.py FOLDER                 # all, then the table and the pictures
    python benchmarks/symptoms.py FOLDER --only blur     # some, by name; what is kept in FOLDER is not trained again

Writes benchmarks/results/symptoms.json and docs/images/symptoms-*.png, for docs/guides/symptoms.md. Points are the
checkerboard (an MLP of 4 x 128, 800 steps of 256 rows); images are the 8 x 8 digits of scikit-learn, whose teacher
is trained first.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import FIT, digits, judge_of, noise_for, quality, teacher_in
from torch.utils.data import TensorDataset

import fewstep
from fewstep.common.errors import TrainingError
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.plots import points_figure
from fewstep.evaluation.points import sliced_wasserstein
from fewstep.evaluation.style import png
from fewstep.networks import MLP

IMAGES = FOLDER.parent.parent / "docs" / "images"
COUNTS = (1, 2, 4, 8)
STEPS = 800
EXACT = fewstep.CheckerboardField()


def itvm(ema: float = 0.97) -> Any:
    return fewstep.ITVM(EXACT, ema=ema, ends=0.02)


@dataclass(frozen=True)
class Run:
    """A training on the checkerboard, kept in the folder ``name-SEED``, and how its student is sampled."""

    name: str
    objective: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    gamma: float | None = None


GOOD = Run("itvm", itvm)
POINTS: dict[str, tuple[Run, Run]] = {
    "blur": (Run("ct-1", lambda: fewstep.ConsistencyTraining(stages=1)), GOOD),
    "noise stays": (Run("itvm-lr-0.1", itvm, {"lr": 0.1}), GOOD),
    "loss falls": (Run("psd-learned", lambda: fewstep.PSD(learned=True)), Run("psd", lambda: fewstep.PSD())),
    "not finite": (
        Run("psd-no-anchor", lambda: fewstep.PSD(diagonal=0.0), {"lr": 1e-3}),
        Run("psd-lr-1e-3", lambda: fewstep.PSD(), {"lr": 1e-3}),
    ),
    "steep end": (
        Run("lmd-no-clip", lambda: fewstep.LMD(EXACT), {"lr": 0.03, "clip": None}),
        Run("lmd", lambda: fewstep.LMD(EXACT)),
    ),
    "loss of zero": (
        Run("shortcut-no-anchor", lambda: fewstep.Shortcut(diagonal=0.0)),
        Run("shortcut", lambda: fewstep.Shortcut()),
    ),
    "slow average": (Run("itvm-slow-average", itvm, {"ema": 0.9999, "ema_warmup": False}), GOOD),
    "slow copy": (Run("itvm-slow-copy", lambda: itvm(0.9999)), GOOD),
    "more steps": (
        Run("cd", lambda: fewstep.ConsistencyDistillation(EXACT)),
        Run("cd", lambda: fewstep.ConsistencyDistillation(EXACT), gamma=0.0),
    ),
}


def points_run(run: Run, seed: int, out: Path) -> dict[str, Any]:
    """Train on the checkerboard and measure; of a training that stops with an error, its words."""
    torch.manual_seed(seed)
    student = fewstep.FlowMap.from_field(EXACT, MLP(2, times=2, width=128, depth=4))
    settings = {"batch": 256, "lr": 3e-3, "warmup": 100, "ema": 0.99, "log_every": 25, "quiet": True, **run.options}
    data = fewstep.load_data("checkerboard")
    try:
        done = fewstep.fit(student, run.objective(), data, STEPS, seed=seed, out=out, **settings)
    except TrainingError as error:
        return {"stopped": str(error)}
    if done.stopped != "done":
        raise SystemExit(f"{out} was interrupted at step {done.step}: the same command goes on")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    draw = torch.Generator().manual_seed(1)
    noise, real = torch.randn(4000, 2, generator=draw), data.rows(torch.arange(4000), draw).data
    model: Any = done.ema.eval()
    clouds = {
        n: fewstep.sample(model, noise, n, gamma=run.gamma, generator=torch.Generator().manual_seed(2)) for n in COUNTS
    }
    torch.save({**{str(n): cloud for n, cloud in clouds.items()}, "data": real}, out / f"samples-{run.gamma}.pt")
    diagnosis = fewstep.diagnose(model, EXACT, noise[:256], times=5).summary()
    return {
        **{str(n): sliced_wasserstein(cloud, real) for n, cloud in clouds.items()},
        "spread": float(clouds[1].std(dim=0).mean()),
        "loss": {name: [lines[0][name], lines[-1][name]] for name in lines[-1] if name.startswith("loss")},
        "grad_norm": lines[-1]["grad_norm"],
        "diagnose": {name: diagnosis[name] for name in ("tangent", "lagrangian", "composition")},
    }


def points(folder: Path, name: str, seeds: list[int]) -> list[list[Any]]:
    """The two rows of a case: means over the seeds, and half the range between them; its facts are of the first."""
    rows = []
    for way, run in zip(("wrong", "mended"), POINTS[name], strict=True):
        found = []
        for seed in seeds:
            out = folder / f"{run.name}-{seed}"
            file = out / f"facts-{run.gamma}.json"
            if not file.is_file():
                measured = points_run(run, seed, out)
                out.mkdir(exist_ok=True)
                file.write_text(json.dumps(measured))
            found.append(json.loads(file.read_text()))
        whole = [facts for facts in found if "stopped" not in facts]
        said = [facts["stopped"] for facts in found if "stopped" in facts]
        numbers = [_mean([facts[n] for facts in whole]) if whole else None for n in ("1", "2", "4", "8", "spread")]
        facts: dict[str, Any] = {"stopped": f"{len(said)} of {len(found)} seeds: {said[0]}"} if said else {}
        if whole:
            ends = whole[0]["loss"].items()
            facts |= {f"{term}, {when}": pair[i] for term, pair in ends for i, when in enumerate(("first", "last"))}
            facts |= {"grad_norm": whole[0]["grad_norm"], **whole[0]["diagnose"]}
        rows.append([name, way, "sliced W2", *numbers, _short(facts)])
        print(rows[-1], flush=True)
    _points_picture(folder, name)
    return rows


def _points_picture(folder: Path, name: str) -> None:
    slug = name.replace(" ", "-")
    runs = dict(zip(("wrong", "mended"), POINTS[name], strict=True))
    files = {way: folder / f"{run.name}-0" / f"samples-{run.gamma}.pt" for way, run in runs.items()}
    if not all(file.is_file() for file in files.values()):
        return
    found = {way: torch.load(file) for way, file in files.items()}
    steps = "8" if name == "more steps" else "1"
    clouds = {f"{way}, {steps} step{'s' * (steps != '1')}": found[way][steps] for way in files}
    _save(png(points_figure({**clouds, "data": found["mended"]["data"]})), slug)


# Images


class Digits:
    """The digits, their teacher and their judge, and what may be wrong with a run of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, teacher_in(folder)
        self.rows, self.labels = digits()
        self.judge = judge_of(self.rows, self.labels)
        self.teacher: Any = fewstep.load(self.run)
        self.asked = torch.arange(10).repeat(20)
        self.noise = noise_for(self.asked)

    def tuned(self, name: str, rows: Any, labels: Any) -> Any:
        """The teacher, trained on with these rows."""
        field: Any = fewstep.load(self.run)
        field.requires_grad_(True)
        data = TensorDataset(rows, labels)
        return fewstep.fit(field, fewstep.FlowMatching(), data, 200, out=self.folder / name, lr=1e-3, **FIT).ema.eval()

    def student(self, name: str, steps: int, lr: float) -> Any:
        student, data = fewstep.FlowMap.from_field(self.teacher), TensorDataset(self.rows, self.labels)
        student.requires_grad_(True)
        objective = fewstep.ITVM(self.teacher)
        return fewstep.fit(student, objective, data, steps, out=self.folder / name, lr=lr, **FIT).ema.eval()

    def row(self, name: str, way: str, model: Any, steps: tuple[int, ...]) -> list[Any]:
        found = quality(model, self.rows, self.labels, self.judge, steps)
        cells = [found.get(str(n), {}).get("fd") for n in COUNTS]
        x = fewstep.sample(model, self.noise, steps[-1], class_labels=self.asked)
        facts = {
            **{f"accuracy at {n}": found[str(n)]["accuracy"] for n in steps},
            "mean": float(x.mean()), "outside [-1, 1]": float((x.abs() > 1.05).float().mean()),
        }  # fmt: skip
        between = statistics.mean(float(x[self.asked == k].std(dim=0).mean()) for k in range(10))
        row = [name, way, "FD", *cells, between, _short(facts)]
        print(row, flush=True)
        return row

    def picture(self, name: str, models: dict[str, tuple[Any, int]]) -> None:
        asked = torch.arange(10).repeat_interleave(2)[:14] if "seeds" not in name else torch.full((14,), 3)
        strips = [fewstep.sample(m, noise_for(asked, 3), n, class_labels=asked) for m, n in models.values()]
        _save(image_grid(torch.cat(strips), columns=len(asked), labels=list(models)), name.replace(" ", "-"))

    def same_as_euler(self, student: Any, steps: int) -> float:
        """The largest difference between samples of a student and Euler steps of its teacher."""
        ours, theirs = (fewstep.sample(m, self.noise, steps, class_labels=self.asked) for m in (student, self.teacher))
        return float((ours - theirs).abs().max())

    def cases(self) -> list[list[Any]]:
        teacher, rows, labels = self.teacher, self.rows, self.labels
        good, idle = self.student("student", 400, 1e-3), self.student("idle", 50, 1e-7)
        table = [
            self.row("one step of a teacher", "wrong", teacher, COUNTS),
            self.row("one step of a teacher", "mended", good, COUNTS),
            self.row("not trained", "wrong", idle, COUNTS),
        ]
        for way, model, line in (("wrong", idle, table[2]), ("mended", good, table[1])):
            gaps = [self.same_as_euler(model, n) for n in (1, 2, 4)]
            table.append(["not trained", way, "largest difference to Euler", *_short(gaps), None, None, line[-1]])
        self.picture("one step", {"teacher, 1": (teacher, 1), "student, 1": (good, 1), "student, 2": (good, 2)})
        self.picture("not trained", {"teacher, 1": (teacher, 1), "idle, 1": (idle, 1), "student, 1": (good, 1)})

        strengths = {scale: fewstep.Guided(teacher, scale, null={"class_labels": 10}) for scale in (8.0, 2.0)}
        table += [self.row("strong guidance", f"scale {s:g}", strengths[s], (8,)) for s in strengths]
        late = fewstep.Guided(teacher, 8.0, (0.3, 0.8), null={"class_labels": 10})
        table += [self.row("strong guidance", "scale 8 in [0.3, 0.8]", late, (8,))]
        self.picture(
            "guidance", {f"scale {s:g}": (strengths[s], 20) for s in strengths} | {"8, some times": (late, 20)}
        )

        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        mixed, kept = self.tuned("labels-mixed", rows, labels[order]), self.tuned("labels-kept", rows, labels)
        table += [self.row("labels mixed up", "wrong", mixed, (8,)), self.row("labels mixed up", "mended", kept, (8,))]
        self.picture("labels", {"mixed up": (mixed, 20), "in order": (kept, 20)})

        few = torch.stack([torch.nonzero(labels == k)[0, 0] for k in range(10)])  # one picture of each class
        alike = self.tuned("few-pictures", rows[few].repeat(10, 1, 1, 1), labels[few].repeat(10))
        table += [self.row("ten pictures", "wrong", alike, (8,)), self.row("ten pictures", "mended", kept, (8,))]
        self.picture("seeds alike", {"10 pictures": (alike, 20), "1797 pictures": (kept, 20)})

        grey = self.tuned("range", (rows + 1) / 2, labels)
        table += [self.row("range 0 to 1", "wrong", grey, (8,)), self.row("range 0 to 1", "mended", kept, (8,))]
        self.picture("range", {"[0, 1]": (grey, 20), "[-1, 1]": (kept, 20)})
        return table


def _save(content: bytes, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / f"symptoms-{name}.png").write_bytes(content)


def _mean(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "half_range": (max(values) - min(values)) / 2}


def _short(value: Any) -> Any:
    """Three digits of each number."""
    match value:
        case float():
            return float(f"{value:.3g}")
        case dict():
            return {key: _short(some) for key, some in value.items()}
        case list():
            return [_short(some) for some in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*POINTS, "digits"], help="nothing is written but what is kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = [row for name in args.only or POINTS if name != "digits" for row in points(args.folder, name, args.seeds)]
    if "digits" in (args.only or ["digits"]):
        rows += Digits(args.folder).cases()
    if args.only:
        return
    notes = [
        "Points: the checkerboard, sliced W2 to 4,000 points of the data by steps; spread is the standard deviation "
        "of one-step samples (1.00 for the data). Images: the 8 x 8 digits, seed 0 alone, Frechet distance in the "
        "features of a small classifier; spread is the mean deviation of a pixel within a class."
    ]
    columns = ["symptom", "way", "measure", *map(str, COUNTS), "spread", "facts"]
    write(FOLDER / "symptoms.json", title="Symptoms, on purpose", columns=columns, rows=rows,
          **here(args.seeds, notes))  # fmt: skip


if __name__ == "__main__":
    main()
