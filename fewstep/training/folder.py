"""The run folder: whose it is, what fewstep writes there, and whether the command at hand may go on in it."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewstep.common.disk import replace_file, sweep
from fewstep.common.locks import LOCK
from fewstep.common.options import as_yaml, read_yaml
from fewstep.common.received import own_folder
from fewstep.common.version import __version__
from fewstep.training import checkpoints
from fewstep.training.fingerprint import check_same, fingerprint_of, flat
from fewstep.training.run_files import (
    CHECKPOINTS,
    MARK,
    METRICS,
    RECIPE,
    SAMPLES,
    STUDENT,
    TEACHER_SAMPLES,
    TENSORBOARD,
    is_ours,
    is_resolved,
    read_mark,
)
from fewstep.training.trackers import read_metrics

_FOLDERS = (CHECKPOINTS, SAMPLES, TEACHER_SAMPLES, TENSORBOARD)
# What a run leaves beside its checkpoints and its recipe: all that is taken away when it is thrown away.
_LEFT = re.compile(
    r"metrics\.jsonl|student\.json|quality\.(json|png)|report\.html|failed\.json|step-grids\.json|diagnosis\.png"
    r"|samples/step-\d{8,}\.png|teacher-samples\.npz"
    r"|teacher-samples/(pairs|texts?|null|captions)[\w-]*\.(jsonl?|safetensors)|tensorboard/events\.out\.tfevents\..*"
)


def open_run(out: Path, fingerprint: Mapping[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from, None where the run starts. Changes nothing on the disk.

    Raises:
        ValueError: the folder belongs to something else, or to another recipe.
        FileNotFoundError: the run had checkpoints and they are gone.
        TrainingError: the newest checkpoint is damaged.
    """
    check_ours(out)
    if not resume:
        return None
    folder = out / CHECKPOINTS
    if not folder.exists() and (out / METRICS).exists() and (lines := read_metrics(out / METRICS)):
        raise FileNotFoundError(
            f"{folder} is missing, though {out / 'metrics.jsonl'} shows that the run had reached step "
            f"{lines[-1]['step']}: put it back, or start again with another output folder or resume=False (--fresh)"
        )
    path = checkpoints.latest(folder)
    if (saved := fingerprint_of(out)) is not None:
        check_same(out, saved, flat(fingerprint))
    return path


def check_ours(out: Path) -> None:
    """Refuse a folder that holds anything and that fewstep cannot prove to be a run of its own.

    Raises:
        ValueError: it is not.
    """
    for name in _FOLDERS:
        own_folder(out / name, out)
    if is_ours(out):
        return
    if (out / RECIPE).is_file():
        raise ValueError(
            f"{out / RECIPE} was not written by fewstep, and a run there would write its own over it: nothing is "
            f"overwritten, say another folder for the run (--out runs/{out.resolve().name})"
        )
    raise ValueError(
        f"the output folder {out} is not empty and holds no fewstep run: nothing in it is overwritten, use another"
    )


def begin(out: Path, fingerprint: Mapping[str, Any] | None = None, threads: int | None = None) -> None:
    """Mark a folder as that of a run: its fingerprint, and with how many threads it computes, once they are known."""
    facts = {"_fewstep_run": __version__, "fingerprint": fingerprint, "threads": threads}
    replace_file(out / MARK, (json.dumps(facts, indent=1) + "\n").encode())


def prepare(out: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
    """Make the folder, and take away what a killed run left half done (all of it where it is not to be resumed)."""
    folder = out / CHECKPOINTS
    if not resume:
        throw_away(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(folder)
    for place in (out, out / SAMPLES):
        sweep(place)
    begin(out, fingerprint, threads_of(out))


@contextmanager
def unless_refused(out: Path | None) -> Iterator[None]:
    """A run that is refused within, before it had anything to keep, leaves no folder behind that looks like one that
    can be gone on with: of a folder that was empty, or not there, what was written is taken away again."""
    is_new = out is not None and _is_empty(out)
    try:
        yield
    except ValueError:
        if is_new and out is not None:
            _take_back(out)
        raise


def _is_empty(out: Path) -> bool:
    return not out.exists() or (out.is_dir() and set(os.listdir(out)) <= {LOCK})


def _take_back(out: Path) -> None:
    """Remove what :func:`prepare` and :func:`write_recipe` have made, where that is all there is."""
    files, folders = (METRICS, STUDENT, RECIPE, MARK), (CHECKPOINTS, SAMPLES)
    if not out.is_dir() or set(os.listdir(out)) - {*files, *folders, LOCK}:  # samples of the teacher, ...
        return
    if (out / METRICS).is_file() and (out / METRICS).stat().st_size:
        return
    for name in folders:
        with suppress(OSError):
            (out / name).rmdir()
    for name in files if not any((out / name).exists() for name in folders) else ():
        (out / name).unlink(missing_ok=True)


def threads_of(out: Path) -> int | None:
    """With how many threads the run in a folder began, which counts until its first checkpoint; None of a new one."""
    found = read_mark(out).get("threads")
    return found if isinstance(found, int) and found > 0 else None


def throw_away(out: Path) -> None:
    """Remove all that fewstep wrote of the run in a folder, and nothing else.

    Killed at any point, it leaves a run that can still be gone on with, or none: the mark forgets what the run is
    first, and the recipe, which says what checkpoints are of, stays until there are none.
    """
    if not out.is_dir():
        return
    begin(out)
    if (folder := out / CHECKPOINTS).is_dir():
        checkpoints.clean(folder)
        checkpoints.clear(folder)
    for place in (out, *(out / name for name in _FOLDERS[1:])):
        for name in os.listdir(place) if place.is_dir() else []:
            file = place / name
            if file.is_file() and _LEFT.fullmatch(file.relative_to(out).as_posix()):
                file.unlink()
        if place != out and place.is_dir() and not place.is_symlink() and not os.listdir(place):
            place.rmdir()


def write_recipe(out: Path, tree: Mapping[str, Any]) -> None:
    """Write the recipe of a run. A file that says the same stays as it is, and one that somebody wrote is set aside."""
    file = out / RECIPE
    if file.is_file():
        with suppress(ValueError):
            if read_yaml(file) == tree:
                return
        if not is_resolved(file):
            file.rename(next(f for n in range(1, 10**6) if not (f := out / f"recipe-{n}.yaml").exists()))
    replace_file(file, as_yaml(tree).encode())
