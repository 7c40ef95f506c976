"""The run folder: whose it is, what fewstep writes there, and whether the command at hand may go on in it."""

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewstep.common.disk import is_part, replace_file, sweep
from fewstep.common.locks import LOCK
from fewstep.common.options import as_yaml, read_yaml
from fewstep.common.reading import parse_json, read_text
from fewstep.common.received import own_folder
from fewstep.common.version import __version__
from fewstep.data import NAMED
from fewstep.training import checkpoints
from fewstep.training.trackers import read_metrics

# Written at the start: that the folder is a run, and of what.
MARK, RECIPE = "run.json", "recipe.yaml"
_FOLDERS = ("checkpoints", "samples", "teacher-samples", "tensorboard")
# What may differ between a run and its continuation: how long it is, and what only shows, keeps or places it.
MAY_DIFFER = frozenset({"data_classes", "data_moments"}) | frozenset(
    f"training.{name}"
    for name in (
        "steps", "max_seconds", "checkpoint_every", "checkpoint_minutes", "keep", "log_every", "track", "quiet", "out",
        "resume", "device", "accumulate", "gradient_checkpointing",
    )
)  # fmt: skip
# What ``fit`` sees of the parts themselves, and no recipe says.
_SEEN = frozenset(
    {"objective_class", "student_class", "student_parameters", "training.seed"}
    | {f"data_{name}" for name in ("shape", "size", "classes", "moments")}
)
# What a run leaves beside its checkpoints and its recipe: all that is taken away when it is thrown away.
_LEFT = re.compile(
    r"metrics\.jsonl|student\.json|quality\.(json|png)|report\.html|failed\.json|samples/step-\d{8,}\.png|teacher-samples\.npz"
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
    folder = out / "checkpoints"
    if not folder.exists() and (out / "metrics.jsonl").exists() and (lines := read_metrics(out / "metrics.jsonl")):
        raise FileNotFoundError(
            f"{folder} is missing, though {out / 'metrics.jsonl'} shows that the run had reached step "
            f"{lines[-1]['step']}: put it back, or start again with another output folder or resume=False (--fresh)"
        )
    path = checkpoints.latest(folder)
    if (saved := fingerprint_of(out)) is not None:
        _compare(out, saved, flat(fingerprint))
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


def check_recipe(out: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another recipe, as far as recipes say it: before the parts are made.

    Raises:
        ValueError: it is one; says what differs. TrainingError: the newest checkpoint is damaged.
    """
    if (saved := fingerprint_of(out)) is not None:
        _compare(out, {key: value for key, value in saved.items() if key not in _SEEN}, flat(fingerprint))


def fingerprint_of(out: Path) -> dict[str, Any] | None:
    """What makes the run in a folder this run and no other; None where nothing was trained yet."""
    steps = checkpoints.steps_in(out / "checkpoints")
    if steps and (path := checkpoints.latest(out / "checkpoints")):
        return checkpoints.read_state(path)["fingerprint"]
    return _mark_of(out).get("fingerprint")


def begin(out: Path, fingerprint: Mapping[str, Any] | None = None, threads: int | None = None) -> None:
    """Mark a folder as that of a run: its fingerprint, and with how many threads it computes, once they are known."""
    facts = {"_fewstep_run": __version__, "fingerprint": fingerprint, "threads": threads}
    replace_file(out / MARK, (json.dumps(facts, indent=1) + "\n").encode())


def prepare(out: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
    """Make the folder, and take away what a killed run left half done (all of it where it is not to be resumed)."""
    folder = out / "checkpoints"
    if not resume:
        throw_away(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(folder)
    for place in (out, out / "samples"):
        sweep(place)
    begin(out, fingerprint, threads_of(out))


def threads_of(out: Path) -> int | None:
    """With how many threads the run in a folder began, which counts until its first checkpoint; None of a new one."""
    found = _mark_of(out).get("threads")
    return found if isinstance(found, int) and found > 0 else None


def throw_away(out: Path) -> None:
    """Remove all that fewstep wrote of the run in a folder, and nothing else.

    Killed at any point, it leaves a run that can still be gone on with, or none: the mark forgets what the run is
    first, and the recipe, which says what checkpoints are of, stays until there are none.
    """
    if not out.is_dir():
        return
    begin(out)
    if (folder := out / "checkpoints").is_dir():
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
        if not _is_resolved(file):
            file.rename(next(f for n in range(1, 10**6) if not (f := out / f"recipe-{n}.yaml").exists()))
    replace_file(file, as_yaml(tree).encode())


def check_kept(out: Path, trained: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Refuse to read a run whose recipe is no longer the one that its checkpoint was trained by.

    Args:
        trained: the fingerprint of the checkpoint. resolved: that of the recipe in the folder, as it is read today.

    Raises:
        ValueError: the recipe is another; says what differs.
    """
    # As it was written: what a key that came later would be, or where a file is found today, is no difference.
    written = {key: value for key, value in read_yaml(out / RECIPE).items() if key in resolved}
    now, then = flat(written), {key: value for key, value in trained.items() if key not in _SEEN}
    today = flat(resolved)
    now |= {key: today.get(key) for key in then.keys() - now.keys()}
    if differing := _differing(then, now):
        raise ValueError(
            f"{out / RECIPE} is not what the checkpoint of the run was trained by: {_few(differing)}. Put it back as "
            "it was; another recipe is another run, in a folder of its own (--out), or in this one from its start "
            "(--fresh)"
        )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``, values as JSON would give them back."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.loads(json.dumps(value, default=str))
    return leaves


def is_ours(out: Path) -> bool:
    """Whether fewstep can prove that it wrote what is in a folder, or there is nothing."""
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    names = {name for name in os.listdir(out) if name != LOCK and not is_part(name)}
    if not names or "_fewstep_run" in _mark_of(out):
        return True
    # Runs of before there was a mark: by a checkpoint, by names that are fewstep's alone, or by their recipe.
    folder = out / "checkpoints"
    if any(checkpoints.is_sealed(folder / f"step-{step:08d}") for step in checkpoints.steps_in(folder)):
        return True
    if folder.is_dir() and checkpoints.is_ours(folder) and ((folder / "reached").is_file() or names <= _NAMES):
        return True
    return (out / RECIPE).is_file() and _is_resolved(out / RECIPE)


_NAMES = {"checkpoints", "metrics.jsonl", "samples", "teacher-samples", "teacher-samples.npz", "tensorboard"}


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


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two fingerprints; what was moved is at another place, and the same."""
    moved = {key for key in _PLACES if _is_moved(saved.get(key), now.get(key))}
    return differences(saved, now, MAY_DIFFER | moved)


# Where the parts of a run are from.
_PLACES = (
    "teacher.source", "teacher.guidance.weak", "student.start", "student.network", "data.name", "data.prompts",
    "objective.name",
)  # fmt: skip


def _is_moved(then: Any, now: Any) -> bool:
    """Whether a name leads to a place where nothing is any more, and now to one where something is."""
    (old, was), (new, inside) = _place_of(then), _place_of(now)
    return was == inside and bool(old and new) and then not in NAMED and not _is_there(old) and _is_there(new)


def _is_there(place: str) -> bool:
    return os.path.exists(os.path.expanduser(place))  # no path.exists(), which raises for a name that is too long


def _place_of(name: Any) -> tuple[str, str]:
    """The place that a name may be that of, and the name of the code in that file; nothing for what is no place."""
    file, colon, inside = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    return (inside, "") if not colon else (file, inside) if file.endswith(".py") else ("", "")


def _compare(out: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differing := _differing(saved, now):
        raise ValueError(
            f"the run in {out} belongs to another recipe: {_few(differing)}. Use another output folder "
            "(--out), or resume=False (--fresh) to throw that run away and start again"
        )


def _few(differing: list[str]) -> str:
    return "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _mark_of(out: Path) -> dict[str, Any]:
    """What the mark of a run says; nothing where there is none."""
    try:
        facts = parse_json(read_text(out / MARK), MARK)
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and "_fewstep_run" in facts else {}


def _is_resolved(file: Path) -> bool:
    """Whether a recipe is as fewstep writes it, with every key and without a comment."""
    try:
        tree = read_yaml(file)
        return {"name", "teacher", "student", "data", "objective", "training", "seed"} <= tree.keys() and as_yaml(
            tree
        ) == file.read_text()
    except (OSError, ValueError):
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()
