"""Students of one teacher before and after finishing, by every metric of images.

    python benchmarks/finishing_images.py "ITVM, 2,200 steps=runs/fashion-mnist-itvm" "finished=runs/fast"

Each argument is a label and the run of a student of ``fewstep:fashion-mnist``, the last the one that the teacher stands
beside in 1 to 100 steps. Diversity is against the teacher's 100 steps for all of them. Writes
benchmarks/results/finishing-fashion-mnist-all.json. The teacher's 100 steps take half an hour of a core.
"""

import argparse
import os
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.evaluation.extractor import trained_classifier

METRICS = ("fd", "feature_w2", "kid", "precision", "recall", "diversity", "memorisation", "accuracy")
FEW = 16  # steps of the teacher beside the other students


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--commands", nargs="*", default=[], help="that made the runs, to be kept with the results")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    teacher: Any = fewstep.load("fewstep:fashion-mnist")
    train, test = fewstep.load_data("fashion-mnist"), fewstep.load_data("fashion-mnist", split="test")
    facts: dict[str, Any] = {
        "teacher": teacher, "data": test, "training": train, "count": args.count, "batch": 500, "metrics": METRICS,
        "extractor": trained_classifier(train),
    }  # fmt: skip

    def measured(run: str, teacher_steps: tuple[int, ...]) -> Any:
        student: Any = fewstep.load(run)
        return fewstep.evaluate(student.eval(), steps=(1, 2, 4, 8), teacher_steps=teacher_steps, **facts)

    *others, (label, run) = [text.split("=", 1) for text in args.runs]
    last = measured(run, (1, 2, 4, 8, FEW, 100))
    scale = next(row["diversity"] for row in last.rows if (row["model"], row["steps"]) == ("teacher", FEW))
    rows = []
    for name, folder in others:
        for row in measured(folder, (FEW,)).rows[:4]:
            rows.append([name, row["steps"], *({**row, "diversity": row["diversity"] * scale}[m] for m in METRICS)])
    for row in last.rows:
        rows.append(["teacher" if row["model"] == "teacher" else label, row["steps"], *(row[m] for m in METRICS)])
    rows.append(["real images", None, *(last.floor.get(m) for m in METRICS)])
    notes = [
        f"{args.count:,} samples against the 10,000 test images, in the features of a small classifier (not FID).",
        "diversity: the mean distance of samples of one class over the same of the teacher's 100 steps. memorisation: "
        ".05 is chance, 1 is copies.",
    ]
    facts = here(seeds=[0], notes=notes)
    facts["commands"] = [*args.commands, *facts["commands"]]
    formats = {"fd": "{:.2f}", **dict.fromkeys(METRICS[1:], "{:.3f}")}
    write(FOLDER / "finishing-fashion-mnist-all.json", title="Fashion-MNIST, before and after finishing", rows=rows,
          columns=["model", "NFE", *METRICS], formats=formats, **facts)  # fmt: skip


if __name__ == "__main__":
    main()
