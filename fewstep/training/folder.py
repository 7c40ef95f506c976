"""The run folder: whose it is, and whether the command at hand may go on in it."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fewstep.training import checkpoints
from fewstep.training.trackers import read_metrics

# What may change between a run and its continuation: how long it is, and what only shows, keeps or places it.
MAY_DIFFER = frozenset({"data_classes", "data_moments"}) | frozenset(
    f"training.{name}"
    for name in (
        "steps", "max_seconds", "checkpoint_every", "keep", "log_every", "track", "quiet", "out", "resume", "device",
        "accumulate", "gradient_checkpointing",
    )
)  # fmt: skip


def open_run(out: Path, fingerprint: Mapping[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from, None where the run starts. Changes nothing on the disk.

    Raises:
        ValueError: the folder belongs to something else, or to another recipe.
        FileNotFoundError: the run had checkpoints and they are gone.
        TrainingError: the newest checkpoint is damaged.
    """
    if not _is_run(out):
        raise ValueError(
            f"the output folder {out} is not empty and holds no fewstep run: nothing in it is overwritten, use another"
        )
    if not resume:
        return None
    folder = out / "checkpoints"
    if not folder.exists() and (out / "metrics.jsonl").exists() and (lines := read_metrics(out / "metrics.jsonl")):
        raise FileNotFoundError(
            f"{folder} is missing, though {out / 'metrics.jsonl'} shows that the run had reached step "
            f"{lines[-1]['step']}: put it back, or start again with another output folder or resume=False (--fresh)"
        )
    if (path := checkpoints.latest(folder)) is not None:
        _compare(out, checkpoints.read_state(path)["fingerprint"], flat(fingerprint))
    return path


def prepare(out: Path, resume: bool) -> None:
    """Make the folder, and take away what a killed run left half done (all of it where it is not to be resumed)."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(folder)
    if not resume:
        checkpoints.clear(folder)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(out / "tensorboard", ignore_errors=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``, values as JSON would give them back."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.loads(json.dumps(value, default=str))
    return leaves


def _is_run(out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return True
    folder = out / "checkpoints"
    return (out / "recipe.yaml").exists() or (folder.is_dir() and checkpoints.is_ours(folder))


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = MAY_DIFFER
) -> list[str]:
    """What is one thing in a folder and another in the call that would go on with it, in words, by key. A key that is
    absent is as good as one that is null: options that came later are null where nobody asked for them."""
    absent = "absent"
    return [
        f"{key} is {saved.get(key, absent)} there and {now.get(key, absent)} here"
        for key in sorted(saved.keys() | now.keys())
        if key not in may_differ and saved.get(key) != now.get(key)
    ]


def _compare(out: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := differences(saved, now):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the run in {out} belongs to another recipe: {'; '.join(differing[:3])}{more}. Use another output folder "
            "(--out), or resume=False (--fresh) to throw that run away and start again"
        )
