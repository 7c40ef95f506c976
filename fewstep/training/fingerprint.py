"""What makes a run this run and no other, and what may differ between a run and its continuation."""

import inspect
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fewstep.common.options import read_yaml
from fewstep.data import NAMED
from fewstep.objectives import OBJECTIVES
from fewstep.training import checkpoints
from fewstep.training.run_files import CHECKPOINTS, RECIPE, read_mark

# What may differ between a run and its continuation: how long it is, and what only shows, keeps or places it.
MAY_DIFFER = frozenset({"data_classes", "data_moments"}) | frozenset(
    f"training.{name}"
    for name in (
        "steps", "max_seconds", "checkpoint_every", "checkpoint_minutes", "keep", "log_every", "track", "quiet", "out",
        "resume", "device", "accumulate", "gradient_checkpointing", "shard", "offload",
    )
)  # fmt: skip
# Keys that had another name before.
_NOW_CALLED = {"teacher.guidance.told": "teacher.guidance.embedded"}
# What ``fit`` sees of the parts themselves, and no recipe says.
_SEEN = frozenset(
    {"objective_class", "student_class", "student_parameters", "training.seed", "source_size"}
    | {f"data_{name}" for name in ("shape", "size", "buckets", "classes", "moments")}
)


def check_recipe(out: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of another recipe, as far as recipes say it: before the parts are made.

    Raises:
        ValueError: it is one; says what differs. TrainingError: the newest checkpoint is damaged.
    """
    if (saved := fingerprint_of(out)) is not None:
        check_same(out, {key: value for key, value in saved.items() if key not in _SEEN}, flat(fingerprint))


def fingerprint_of(out: Path) -> dict[str, Any] | None:
    """What makes the run in a folder this run and no other; None where nothing was trained yet."""
    steps = checkpoints.steps_in(out / CHECKPOINTS)
    if steps and (path := checkpoints.latest(out / CHECKPOINTS)):
        return flat(checkpoints.read_state(path)["fingerprint"])
    found = read_mark(out).get("fingerprint")
    return None if found is None else flat(found)


def check_kept(out: Path, trained: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Refuse to read a run whose recipe is no longer the one that its checkpoint was trained by.

    Args:
        trained: the fingerprint of the checkpoint. resolved: that of the recipe in the folder, as it is read today.

    Raises:
        ValueError: the recipe is another; says what differs.
    """
    # As it was written: what a key that came later would be, or where a file is found today, is no difference.
    written = {key: value for key, value in read_yaml(out / RECIPE).items() if key in resolved}
    now, then = flat(written), {key: value for key, value in flat(trained).items() if key not in _SEEN}
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
            leaves[_NOW_CALLED.get(f"{prefix}{key}", f"{prefix}{key}")] = json.loads(json.dumps(value, default=str))
    return leaves


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
    """The differences of two fingerprints; what was moved is at another place, and the same. An option that a method
    got after the run began is what it is by default."""
    saved = {**_came_later(saved, now), **saved}
    moved = {key for key in _PLACES if _is_moved(saved.get(key), now.get(key))}
    return differences(saved, now, MAY_DIFFER | moved)


def _came_later(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of those options of a method that are said today, and that the run does not know."""
    defaults: dict[str, Any] = {}
    for key, name in now.items():
        above, _, last = key.rpartition(".")
        if last == "name" and isinstance(name, str) and name in OBJECTIVES and saved.get(key) == name:
            options = inspect.signature(OBJECTIVES[name]).parameters.values()
            defaults |= flat({p.name: p.default for p in options if p.default is not p.empty}, f"{above}.")
    return {key: defaults[key] for key in defaults.keys() & (now.keys() - saved.keys())}


# Where the parts of a run are from.
_PLACES = (
    "teacher.source", "teacher.guidance.weak", "student.start", "student.network", "source.name", "data.name",
    "data.prompts",
    "objective.name", "objective.base.name", "objective.critic", "objective.critic.name",
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


def check_same(out: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differing := _differing(saved, now):
        raise ValueError(
            f"the run in {out} belongs to another recipe: {_few(differing)}. Use another output folder "
            "(--out), or resume=False (--fresh) to throw that run away and start again"
        )


def _few(differing: list[str]) -> str:
    return "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
