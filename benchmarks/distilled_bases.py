"""What can be done with a model that was distilled already: drawn from, taught by it, gone on from, tuned, finished.

    python benchmarks/distilled_bases.py FOLDER                # all, then the table; what is kept in FOLDER stays

Writes benchmarks/results/distilled-bases.json for docs/guides/tune-a-distilled-model.md. Three bases are distilled from
one teacher of the 8 x 8 digits of scikit-learn, as the published models were:

* ``consistency``, told no second time, whose output is where the trajectory ends: LCM, Turbo, schnell;
* ``four steps``, told no second time, whose output is the way to the next of four fixed times: Lightning, Hyper-SD;
* ``flow map``, told a second time: AnyFlow, HunyuanImage with ``use_meanflow``, what fewstep makes.
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write
from small_digits import FIT, digits, judge_of, quality, teacher_in
from torch.utils.data import TensorDataset
from tuning import FEW, STYLES, kept

import fewstep
from fewstep.common.randomness import uniform
from fewstep.data.batch import Batch
from fewstep.flows.broadcasting import as_times
from fewstep.flows.solvers import heun_step
from fewstep.networks import FAMILIES
from fewstep.objectives.base import Loss, Objective, noise_of, squared_error

COUNTS = (1, 2, 4)
MADE, TAUGHT, ON, TUNED, BATCH = 250, 120, 60, 60, 32
TEACHER = "the teacher"
Scores = dict[str, float]


class FixedSteps(Objective):
    """A field of four steps: at the times k / 4 the way to the next of them, as the teacher goes it."""

    trains_field = True
    steps, inner = 4, 4

    def forward(self, student: Any, batch: Batch, *, generator: Any, **_: Any) -> Loss:
        noise = noise_of(batch, generator)
        s = as_times((uniform(len(batch), generator) * self.steps).floor() / self.steps, noise)
        x, _ = student.path.sample(noise, batch.data, s)
        with torch.no_grad():
            end, h = x, 1 / (self.steps * self.inner)
            for k in range(self.inner):
                end = heun_step(lambda x, t: self.teacher(x, t, **batch.cond), end, s + k * h, s + (k + 1) * h)
        return Loss(squared_error(student(x, s, **batch.cond), (end - x) * self.steps).mean())

    def check_student(self, student: Any) -> None:
        pass


class Diagonal(fewstep.VelocityField):
    """A flow map on s = t, as a velocity field."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.path = model, model.path

    def forward(self, x: Any, t: Any, **cond: Any) -> Any:
        return self.model.velocity(x, t, **cond)


def as_field(model: Any) -> Any:
    """A base without a second time as ``fewstep.load`` reads its folder: as if its output were a velocity."""
    stock = model.network.model
    network = FAMILIES[type(stock).__name__](deepcopy(stock))
    return fewstep.NetworkField(network, model.native, model.prediction, path=model.path)


class Twin:
    """The teacher, the bases of a seed and what judges them."""

    def __init__(self, folder: Path, seed: int) -> None:
        rows, self.labels = digits()
        self.rows, self.seed, self.folder = rows, seed, folder
        self.judge = judge_of(rows, self.labels)
        self.bold = STYLES["bold"](rows)
        self.bold_judge = judge_of(self.bold, self.labels)
        self.all, self.few = TensorDataset(rows, self.labels), TensorDataset(self.bold[:FEW], self.labels[:FEW])
        made: dict[str, tuple[Callable[[], Any], Any]] = {
            "consistency": (self.end_map, fewstep.ConsistencyDistillation(self.teacher)),
            "four steps": (self.a_teacher, FixedSteps(self.teacher)),
            "flow map": (lambda: fewstep.FlowMap.from_field(self.teacher), fewstep.ITVM(self.teacher)),
        }
        self.bases = {name: self.base(name, *made[name]) for name in made}

    @property
    def teacher(self) -> Any:
        return fewstep.load(teacher_in(self.folder))

    def a_teacher(self) -> Any:
        return deepcopy(self.teacher)

    def end_map(self) -> Any:
        return fewstep.FlowMap.from_field(self.teacher, second_time="none")

    def base(self, name: str, make: Callable[[], Any], objective: Any) -> Any:
        file, model = self.folder / f"base-{name.replace(' ', '-')}-{self.seed}.pt", make()
        if not file.is_file():
            torch.save(self.trained(model, objective, self.all, MADE).state_dict(), file)
        model.load_state_dict(torch.load(file))
        model.gamma = getattr(objective, "gamma", 0.0)
        return model.eval()

    def trained(self, model: Any, objective: Any, data: Any, steps: int, lr: float = 1e-3) -> Any:
        has_adapter = any(".lora_" in name for name, _ in model.named_parameters())
        model = model if has_adapter else model.requires_grad_(True)
        return fewstep.fit(model, objective, data, steps, seed=self.seed, lr=lr, **{**FIT, "batch": BATCH}).ema.eval()

    def scores(self, model: Any, is_bold: bool = False) -> Scores:
        rows, judge = (self.bold, self.bold_judge) if is_bold else (self.rows, self.judge)
        found = quality(model.eval(), rows, self.labels, judge, COUNTS)
        return {steps: some["fd"] for steps, some in found.items()}

    def as_it_is(self, name: str) -> Any:
        return deepcopy(self.bases[name]) if name in self.bases else self.teacher

    def field(self, name: str) -> Any:
        """What a base is as a velocity field."""
        base = self.as_it_is(name)
        return as_field(base) if name == "consistency" else Diagonal(base) if name == "flow map" else base

    def student(self, name: str) -> Any:
        """A student with a second time that starts from a base."""
        return self.as_it_is(name) if name == "flow map" else fewstep.FlowMap.from_field(self.field(name))

    def taught_by(self, name: str) -> Any:
        return self.trained(self.student(name), fewstep.ITVM(self.field(name)), self.all, TAUGHT)

    def started_from(self, name: str) -> Any:
        return self.trained(self.student(name), fewstep.ITVM(self.teacher), self.all, ON)

    def tuned(self, name: str, objective: Any) -> Any:
        """By an adapter on the new data."""
        model = self.as_it_is(name)
        torch.manual_seed(self.seed)
        fewstep.add_lora(model, rank=8)
        return fewstep.merge_lora(self.trained(model, objective, self.few, TUNED, lr=3e-3))

    def gone_on(self, name: str, objective: Any) -> Any:
        return self.trained(self.as_it_is(name), objective, self.all, ON)

    def measured(self) -> dict[str, Scores]:
        """Every use of every base, by ``use | base``."""
        bases, ends, bold = [*self.bases], fewstep.ConsistencyDistillation, "tuned to bold digits"
        uses: list[tuple[str, str, Callable[[], Any]]] = [
            *(("drawn from", name, partial(self.as_it_is, name)) for name in (TEACHER, *bases)),
            *(("taken for a velocity, by Euler", name, partial(self.field, name)) for name in (bases[0], bases[2])),
            *(("the teacher of ITVM", name, partial(self.taught_by, name)) for name in (TEACHER, *bases)),
            *((f"where a student starts: {ON} steps of ITVM by the teacher", name, partial(self.started_from, name))
              for name in (TEACHER, *bases)),
            *((f"{bold}: before", name, partial(self.as_it_is, name)) for name in bases),
            *((f"{bold}: LoRA by flow matching", name, partial(self.tuned, name, fewstep.FlowMatching()))
              for name in bases),
            (f"{bold}: LoRA by consistency training", bases[0],
             partial(self.tuned, bases[0], fewstep.ConsistencyTraining())),
            (f"{bold}: LoRA by PSD", bases[2], partial(self.tuned, bases[2], fewstep.PSD(ends=0.25))),
            *((f"{ON} steps more of its objective", name, partial(self.gone_on, name, kind(self.teacher)))
              for name, kind in ((bases[0], ends), (bases[2], fewstep.ITVM))),
            *(("the same with a corrector", name,
               partial(self.gone_on, name, fewstep.Corrected(kind(self.teacher), begin=0.0)))
              for name, kind in ((bases[0], ends), (bases[2], fewstep.ITVM))),
        ]  # fmt: skip
        found: dict[str, Scores] = {}
        for use, base, make in uses:
            name, is_bold = f"{use} | {base}", use.startswith(bold)
            file = self.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{self.seed}.json"
            found[name] = kept(file, lambda make=make, is_bold=is_bold: self.scores(make(), is_bold))
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = [Twin(args.folder, seed).measured() for seed in args.seeds]
    rows: list[list[Any]] = []
    for name in found[0]:
        cells = [[some[name][str(n)] for some in found] for n in COUNTS]
        spread = [{"mean": statistics.mean(c), "half_range": (max(c) - min(c)) / 2} for c in cells]
        rows.append([*name.split(" | "), *spread])
    note = (
        "The 8 x 8 digits. Frechet distance of 1000 samples to all digits (to all of the bold style, where they are "
        "tuned to 300 of them) in the features of a small classifier of these: mean of the seeds, and half the range "
        f"between them. The teacher is that of one seed. The bases have {MADE} steps, a teacher {TAUGHT}, a tuning "
        f"{TUNED}, each of {BATCH} rows. A consistency model is drawn from with fresh noise between its steps, four "
        "steps by Euler."
    )
    facts = {"formats": dict.fromkeys(map(str, COUNTS), "{mean:.2f} ± {half_range:.2f}")}
    write(FOLDER / "distilled-bases.json", title="What can be done with a distilled base", group="use",
          columns=["use", "base", *map(str, COUNTS)], rows=rows, **facts, **here(args.seeds, [note]))  # fmt: skip


if __name__ == "__main__":
    main()
