"""The 8 x 8 digits, a small teacher of them that takes guidance, and their judge: for symptoms.py and tuning.py.

The teacher is trained by the command line once (a minute and a half of one CPU thread) and kept in a folder.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fewstep
from fewstep.evaluation.extractor import SmallClassifier, trained_classifier

TRAIN = (
    "train digits-teacher --student.options.block_out_channels [16,32] --student.options.num_class_embeds 11 "
    "--drop.null.class_labels 10 --steps 3000 --training.batch 64 --training.lr 2e-3 --evaluation.count 0"
)
FIT: dict[str, Any] = {"batch": 64, "warmup": 20, "ema": 0.98, "log_every": 25, "quiet": True}


def teacher_in(folder: Path) -> Path:
    """The run of the teacher, trained where it is not there yet."""
    run = folder / "teacher"
    if not (run / "checkpoints" / "step-00003000").is_dir():
        subprocess.run([sys.executable, "-m", "fewstep", *TRAIN.split(), "--out", str(run)], check=True)
    return run


def digits() -> tuple[Tensor, Tensor]:
    """All rows (1797, 1, 8, 8) in [-1, 1], and their labels."""
    rows = fewstep.load_data("digits").rows(torch.arange(1797), torch.Generator())
    return rows.data, rows.cond["class_labels"]


def judge_of(rows: Tensor, labels: Tensor) -> SmallClassifier:
    """The classifier that measures how near samples are to these rows."""
    from fewstep.data.given import as_data

    return trained_classifier(as_data(TensorDataset(rows, labels)))


def quality(model: Any, rows: Tensor, labels: Tensor, judge: SmallClassifier, steps: tuple[int, ...]) -> dict[str, Any]:
    """Frechet distance and accuracy at each number of steps, of 1000 samples."""
    found = fewstep.evaluate(
        model, data=TensorDataset(rows, labels), steps=steps, count=1000, batch=250, extractor=judge,
        metrics=["fd", "accuracy"],
    )  # fmt: skip
    return {str(row["steps"]): {"fd": row["fd"], "accuracy": row["accuracy"]} for row in found.rows}


def noise_for(labels: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
