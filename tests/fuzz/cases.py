"""The cases: a command as somebody may type it, and what was done to the files that it reads."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, get_args

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fewstep import cli
from fewstep.runs.recipe import Recipe
from fuzz.edits import Edit, kinds_for

# Cheap, whatever the recipes say: a step of training, four samples judged.
_SHORT = "--steps 3 --evaluation.count 4 --evaluation.steps [1] --evaluation.teacher_steps [1] --training.quiet true"
_DRAW = "--count 2 --steps 1 --device cpu --out drawn"
# What is damaged, and the commands that read it.
READERS: dict[str, list[str]] = {
    "runs/points": [
        f"sample runs/points {_DRAW}.png",
        f"sample runs/points {_DRAW}",
        f"sample runs/points --teacher {_DRAW}.npy",
        "evaluate runs/points --count 4 --steps 1 --teacher-steps 1 --device cpu",
        f"train runs/points {_SHORT}",
        "distill runs/points --dry-run",
        "plan runs/points",
        "cite runs/points",
        "compare runs/points runs/flow --out compared",
        "export runs/points made",
        "reflow runs/points --count 4 --steps 1 --device cpu --out made",
        "train recipes/flow.yaml --student.start runs/points --objective ITVM --teacher eight-gaussians --dry-run",
    ],
    "runs/flow": [
        f"train runs/own {_SHORT}",
        "distill recipes/own.yaml --dry-run",
        "plan recipes/own.yaml",
        f"sample runs/own {_DRAW}.png",
        "convert runs/flow --count 2 --steps 2 --device cpu --out made",
        f"train recipes/flow.yaml --out runs/flow {_SHORT}",
    ],
    "runs/own": [
        f"train runs/own {_SHORT}",
        "evaluate runs/own --count 4 --steps 1 --teacher-steps 1 --device cpu",
        f"sample runs/own {_DRAW}.png",
        "export runs/own made",
    ],
    "runs/images": [
        f"sample runs/images {_DRAW}.png",
        "evaluate runs/images --count 4 --steps 1 --teacher-steps 1 --device cpu",
        f"train runs/images {_SHORT}",
        "export runs/images made",
        "plan runs/images",
        "convert runs/images --count 2 --steps 2 --device cpu --out made",
        "distill --teacher runs/images --data data/photos --data.size 8 --dry-run",
    ],
    "runs/map": [
        f"sample runs/map {_DRAW}.png",
        f"train runs/map {_SHORT}",
        "export runs/map made",
        "plan runs/map",
        f"sample runs/map --size 16 {_DRAW}",
    ],
    "models/ddpm": [
        f"sample models/ddpm {_DRAW}.png",
        "distill --teacher models/ddpm --data data/photos --data.size 8 --data.labels false --dry-run",
        "plan --teacher models/ddpm",
        "convert models/ddpm --count 2 --steps 2 --device cpu --out made",
        "reflow models/ddpm --count 4 --steps 1 --device cpu --out made",
        f"sample runs/map {_DRAW}.png",
    ],
    "models/dit": [
        f"sample models/dit {_DRAW}.png",
        "plan --teacher models/dit --data data/encoded",
        "distill --teacher models/dit --data data/encoded --dry-run",
        "encode --teacher models/dit --data data/photos --size 16 --device cpu --out made",
        "convert models/dit --count 2 --steps 2 --device cpu --out made",
    ],
    "models/sd": [
        f"sample models/sd --prompt cat {_DRAW}.png",
        f"sample models/sd --prompts data/prompts.txt --size 32 {_DRAW}.png",
        "plan --teacher models/sd --data data/photos",
        "convert models/sd --prompt cat --count 2 --steps 2 --device cpu --out made",
        "encode --teacher models/sd --data data/photos --size 16 --device cpu --out made",
    ],
    "models/flux": [
        f"sample models/flux --prompt cat --size 32 {_DRAW}.png",
        "plan --teacher models/flux --data data/photos",
    ],
    "exports/points": [
        f"sample exports/points {_DRAW}.png",
        "export runs/points exports/points --overwrite",
        "plan --teacher exports/points",
        "train recipes/points.yaml --student.start exports/points --student.network auto --dry-run",
    ],
    "exports/map": [
        f"sample exports/map {_DRAW}.png",
        "export runs/map exports/map --overwrite",
        "train recipes/map.yaml --student.start exports/map --dry-run",
    ],
    "exports/ddpm-flow": [
        f"sample exports/ddpm-flow {_DRAW}.png",
        "distill --teacher exports/ddpm-flow --data data/photos --data.size 8 --data.labels false --dry-run",
        "plan --teacher exports/ddpm-flow",
    ],
    "data/points.npz": ["train recipes/flow.yaml --data data/points.npz --dry-run"],
    "data/points.npy": [
        "train recipes/flow.yaml --data data/points.npy --dry-run",
        f"train recipes/flow.yaml --data data/points.npy --data.normalize true --out made {_SHORT}",
    ],
    "data/images.npy": [
        "train recipes/images.yaml --data data/images.npy --student.options.num_class_embeds null --dry-run"
    ],
    "data/idx": ["train recipes/images.yaml --data data/idx --dry-run"],
    "data/photos": [
        "train recipes/images.yaml --dry-run",
        "distill --teacher models/dit --data data/photos --data.size 16 --dry-run",
        "encode --teacher models/sd --data data/photos --size 16 --device cpu --out made",
    ],
    "data/pairs": [
        "train recipes/flow.yaml --data data/pairs --dry-run",
        f"train recipes/flow.yaml --data data/pairs --out made {_SHORT}",
        "reflow runs/flow --count 8 --steps 1 --out data/pairs",
    ],
    "data/encoded": [
        "distill --teacher models/dit --data data/encoded --dry-run",
        "plan --teacher models/dit --data data/encoded",
        "encode --teacher models/dit --data data/photos --size 16 --device cpu --out data/encoded",
    ],
    "data/shards": [
        "encode --teacher models/dit --data data/shards --size 16 --device cpu --out made",
        "encode --teacher models/dit --data data/shards/train-{0000..0000}.tar --size 16 --device cpu --out made",
    ],
    "data/prompts.txt": [f"sample models/sd --prompts data/prompts.txt {_DRAW}.png"],
    "data/prompts.jsonl": [f"sample models/sd --prompts data/prompts.jsonl {_DRAW}.png"],
}  # fmt: skip
for _name in ("points", "flow", "own", "images", "map"):
    _file = f"recipes/{_name}.yaml"
    READERS[_file] = [f"train {_file} --dry-run", f"distill {_file} --dry-run", f"plan {_file}", f"cite {_file}"]
# Commands that wait, write to the hub or compile for minutes are not for here.
_NOT_HERE = ("ui", "push")
_NOT_SO = ("--compile", "--format", "--methods", "--help", "-h", "--version", "--seconds", "--train-steps")
# More of these is more work, which is what was asked for: too little and what is no number is odd enough.
_WORK = ("steps", "teacher_steps", "count", "max_seconds", "first", "batch", "shard")


@dataclass(frozen=True)
class Case:
    argv: tuple[str, ...]
    edits: tuple[Edit, ...] = ()


_NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, -1e308, 5e-324, float("nan")]
_NUMBERS += [float("inf"), float("-inf"), 1e-3, 1000]
_TEXTS = [
    "", " ", "x", "none", "auto", "text", "true", "1", "a b", "../x", "/", "/etc/hostname", "~", ".", "a/b",
    "x" * 50_000,
    "é" * 300, "\u202e\u0000\ud7ff", "名前", "a\nb", "{}", "[1", "1e400", "FILE.py:F", "math:pi", "math:nothing",
    "nothing:here", "data/photos", "models/ddpm", "runs/points", "runs/own", "exports/map", "UNet2DModel",
    "DDPMScheduler", "FlowMap", "epsilon", "v_prediction", "linear", "cat.png", "hf:", "hf:x/y", "owner/name",
    "fewstep:x", "{0000..9}.tar", "x{0..9999999}.tar", "{0..99}{0..99}{0..99}.tar", "cuda:99", "float64", "teacher",
]  # fmt: skip
_scalars = st.one_of(
    st.sampled_from(_NUMBERS), st.sampled_from(_NUMBERS), st.sampled_from(_TEXTS), st.integers(-5, 20),
    st.sampled_from([None, True, False, [], {}]), st.text(max_size=12),
)  # fmt: skip
_keys_of_trees = st.text(max_size=6) | st.just("name")
values = _scalars | st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys_of_trees, inner, max_size=3),
    max_leaves=6,
)
_words = st.one_of(
    st.sampled_from(_TEXTS),
    st.sampled_from([str(n) for n in _NUMBERS]),
    st.text(max_size=8),
    st.integers(-5, 20).map(str),
)
_little = st.sampled_from(
    ["0", "-1", "1", "2", "1.5", "nan", "inf", "", "x", "[]", "[1]", "null", "-0", "1e0", "9" * 40]
)


@st.composite
def damaged(draw: st.DrawFn, files: dict[str, list[str]]) -> Case:
    """One or two files of a folder changed, and a command that reads it."""
    folder = draw(st.sampled_from(sorted(READERS)))
    edits = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        file = draw(st.sampled_from(files[folder]))
        kind = draw(st.sampled_from(draw(st.sampled_from(kinds_for(file)))))
        value = draw(values) if kind in ("set", "add", "rename", "text") else None
        edits.append(Edit(file, kind, value=value))
    # What stands for a billion values is not for the other edit to read.
    edits.sort(key=lambda edit: edit.kind in ("nest", "bomb"))
    return Case(tuple(draw(st.sampled_from(READERS[folder])).split()), tuple(edits))


@st.composite
def mistyped(draw: st.DrawFn) -> Case:
    """A command with flags of its own, or nearly, and odd values."""
    words = draw(st.sampled_from(sorted(line for lines in READERS.values() for line in lines))).split()
    flags = _flags_of(words[0])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        flag = draw(st.sampled_from(flags))
        is_work = flag.rpartition(".")[2].removeprefix("--").replace("-", "_") in _WORK
        value = draw(_little if is_work else _words)
        match draw(st.sampled_from(["value", "value", "value", "value", "equals", "typo", "alone", "dashes", "word"])):
            case "value":
                words += [flag, value]
            case "equals":
                words.append(f"{flag}={value}")
            case "typo":
                at = draw(st.integers(2, len(flag)))
                words += [flag[:at] + flag[at + 1 :], value]
            case "alone":
                words.append(flag)
            case "dashes":
                words.append(f"{flag}=--")
            case _:
                words.insert(draw(st.integers(0, len(words))), value)
    return Case(tuple(words))


@cache
def _flags_of(command: str) -> list[str]:
    """The flags of a command, from the parser itself, and for those that take them, the keys of a recipe."""
    _, commands = cli.make_parser()
    flags = [flag for action in commands[command]._actions for flag in action.option_strings]
    if command in ("train", "distill", "plan"):
        flags += [f"--{key}" for key in _keys(Recipe)]
    return sorted({flag for flag in ("--nothing", *flags) if flag not in _NOT_SO})


def _keys(model: type[BaseModel], before: str = "") -> list[str]:
    keys = ["objective.ema", "student.options.width", "data.size", "data.split", "data.x"] if not before else []
    for name, field in model.model_fields.items():
        keys.append(before + name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _keys(inner, f"{before}{name}.")
    return keys


def files_in(world: Path) -> dict[str, list[str]]:
    """The files of each folder that is damaged, from the world's own; images and cards of it left out."""
    left_out = (".html", ".md", ".py", ".bib")
    return {
        folder: sorted(
            str(file.relative_to(world))
            for file in ((world / folder).rglob("*") if (world / folder).is_dir() else [world / folder])
            if file.is_file() and file.suffix not in left_out and (folder.startswith("data") or file.suffix != ".png")
        )
        for folder in READERS
    }


def cases(world: Path, count: int, number: int) -> list[Case]:
    """``count`` cases, the same for the same seed."""
    found: list[Case] = []
    files, places = files_in(world), Random(number)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(damaged(files), damaged(files), mistyped()))
    def collect(case: Case) -> None:
        # Not drawn by hypothesis, which likes small numbers: any place of a file is as good as the next.
        edits = [replace(edit, where=places.getrandbits(30)) for edit in case.edits]
        found.append(replace(case, edits=tuple(edits)))

    collect()
    return found


def shown(case: Case) -> str:
    """A case in a few lines."""

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) < 120 else f"{text[:100]}... ({len(text)} characters)"

    edits = [f"  {edit.kind} {edit.file} at {edit.where}: {short(edit.value)}" for edit in case.edits]
    return "\n".join([f"fewstep {' '.join(short(word)[1:-1] for word in case.argv)}", *edits])
