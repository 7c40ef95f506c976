"""A run folder: what the files in it are called, and how such a folder is recognised. Nothing heavy is imported here,
so that a recipe is read before torch is."""

import os
from pathlib import Path
from typing import Any

from fewstep.common.disk import is_part
from fewstep.common.locks import LOCK
from fewstep.common.options import as_yaml, read_yaml
from fewstep.common.reading import parse_json, read_text

MARK = "run.json"  # written at the start: that the folder is a run, and of what
RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
STUDENT = "student.json"  # of a run that Python started
CHAIN = "chain.json"  # of blocks, each of which is a run beside it
SAMPLES = "samples"
TEACHER_SAMPLES, TEACHER_SAMPLES_FILE = "teacher-samples", "teacher-samples.npz"
TENSORBOARD = "tensorboard"
QUALITY, QUALITY_FIGURE, REPORT = "quality.json", "quality.png", "report.html"
STEP_GRIDS = "step-grids.json"  # the times of few steps, each with what it was found with
DIAGNOSIS_FIGURE = "diagnosis.png"
FAILED = "failed.json"  # of a run in a comparison
# Where an export of a run keeps what it has of the run. Not beside the model: a folder with a recipe.yaml is a run.
TRAINING = "training"

# What a run of before there was a mark may hold.
_UNMARKED = {CHECKPOINTS, METRICS, SAMPLES, TEACHER_SAMPLES, TEACHER_SAMPLES_FILE, TENSORBOARD}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / RECIPE).is_file() and (folder / CHECKPOINTS).is_dir()


def came_with(recipe: Path) -> Path | None:
    """The folder that a recipe file is a part of: a run, or an export of one; None for a file of its own."""
    for file in (recipe, recipe.resolve()):
        folder = file.parent
        if any((folder / name).exists() for name in (CHECKPOINTS, METRICS, MARK)):
            return folder
        export = folder.parent
        if folder.name == TRAINING and any((export / f).exists() for f in ("fewstep.json", "model_index.json")):
            return export
    return None


def is_ours(out: Path) -> bool:
    """Whether fewstep can prove that it wrote what is in a folder, or there is nothing."""
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    names = {name for name in os.listdir(out) if name != LOCK and not is_part(name)}
    if not names or "_fewstep_run" in read_mark(out):
        return True
    from fewstep.training import checkpoints  # imports torch

    # Runs of before there was a mark: by a checkpoint, by names that are fewstep's alone, or by their recipe.
    folder = out / CHECKPOINTS
    if any(checkpoints.is_sealed(folder / f"step-{step:08d}") for step in checkpoints.steps_in(folder)):
        return True
    if folder.is_dir() and checkpoints.is_ours(folder) and ((folder / "reached").is_file() or names <= _UNMARKED):
        return True
    return (out / RECIPE).is_file() and is_resolved(out / RECIPE)


def read_mark(out: Path) -> dict[str, Any]:
    """What the mark of a run says; nothing where there is none."""
    try:
        facts = parse_json(read_text(out / MARK), MARK)
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and "_fewstep_run" in facts else {}


def is_resolved(file: Path) -> bool:
    """Whether a recipe is as fewstep writes it, with every key and without a comment."""
    keys = {"name", "teacher", "student", "data", "objective", "training", "seed"}
    try:
        tree = read_yaml(file)
        return keys <= tree.keys() and as_yaml(tree) == file.read_text()
    except (OSError, ValueError):
        return False
