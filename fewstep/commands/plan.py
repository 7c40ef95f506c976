"""`plan`: what a training will need, before it is started."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.commands.parser import Commands, RecipeKey, add_command
from fewstep.common.console import print_table, say_next

if TYPE_CHECKING:
    from fewstep.planning.plan import Plan


Table = tuple[list[str], list[list[Any]]]

# The recipes of what `distill` and `train` are given.
_USUAL = {"teacher": "distill", "data": "photos-teacher"}
CARDS = (24, 48, 80)  # GB
CALLS = (1, 2, 4, 8)
SHARED_BY = (1, 2, 4, 8, 16)
_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (0.0, "us"))


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "plan",
        run,
        "say what a training will need: memory, time and what fits",
        examples=[
            "plan checkerboard-itvm",
            "plan --teacher ./stable-diffusion --data photos --training.batch 64 --gpu H100",
        ],
        may_run_code=True,
        takes_recipe_keys=True,
    )
    p.add_argument("recipe", nargs="?", help="a recipe by path or name, with any of its keys as flags")
    text = "its configurations are enough: no weights are read or fetched"
    p.add_argument("--teacher", action=RecipeKey, metavar="FOLDER", help=text)
    text = "need not be there where the teacher says what its samples are"
    p.add_argument("--data", action=RecipeKey, metavar="FOLDER", help=text)
    p.add_argument("--gpu", metavar="NAME", help="the one to say times for, such as H100 (default: four of them)")
    text = "share of its peak that a GPU reaches (default: 0.4)"
    p.add_argument("--utilization", type=float, default=0.4, metavar="U", help=text)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.errors import unknown
    from fewstep.planning.gpus import GPUS
    from fewstep.runs.recipes import load_recipe

    if not 0 < args.utilization <= 1:
        raise ValueError(f"--utilization {args.utilization:g}: the share of its peak that a GPU reaches lies in (0, 1]")
    if args.gpu is not None and args.gpu not in GPUS:
        raise unknown("GPU", args.gpu, GPUS)
    overrides = args.overrides
    source = args.recipe or next((name for key, name in _USUAL.items() if key in overrides), None)
    if source is None:
        raise ValueError("fewstep plan needs a recipe, --teacher or --data: `fewstep recipes` lists recipes")
    recipe = load_recipe(source, overrides)
    from fewstep.planning.plan import plan  # and torch, once there is something to plan

    found = plan(recipe)
    print(title(found))
    print_table(*memory_table(found))
    columns, fits = fit_table(found)
    print_table(columns, fits)
    training, is_large = found.recipe.training, found.total(found.step.rows) > CARDS[0] * 2**30
    if training.shard is not None or (is_large and training.optimizer is None):  # the others are not sharded
        print_table(*shard_table(found))
    print_table(*time_table(found, [args.gpu] if args.gpu else list(GPUS), args.utilization))
    print(notes(found, args.utilization))
    flags = next((row[3] for row in fits if row[1] is not None), "")
    given = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    verb = "train" if recipe.teacher is None else "distill"
    start = shlex.join(["fewstep", verb, *([args.recipe] if args.recipe else []), *given])
    say_next([f"{start} {flags}".strip()])
    return 0


def title(plan: "Plan") -> str:
    some = f", {plan.trained:,} of which train" if plan.trained < plan.parameters else ""
    return (
        f"{plan.recipe.name}: a {plan.student} of {plan.parameters:,} parameters{some}; "
        f"samples of {' x '.join(map(str, plan.shape))}, {plan.recipe.training.batch} an update"
    )


def memory_table(plan: "Plan") -> Table:
    """What lies in memory with the recipe's own micro-batch."""
    rows = plan.step.rows
    total = plan.total(rows)
    held = f"{size(plan.step.held)} kept for the backward pass"
    lines: list[list[Any]] = [[part.name, f"{part.numbers:,}", part.bytes] for part in plan.parts]
    lines.append([f"a step of {rows} rows ({held})", None, plan.passing(rows)])
    lines.append(["CUDA, and lost between blocks (estimated)", None, total - plan.fixed - plan.passing(rows)])
    lines.append(["all", None, total])
    lines.append(["a checkpoint on disk", None, plan.checkpoint])
    lines.append(["10,000 rows of data in float16, on disk", None, 10_000 * plan.row])
    return ["part", "numbers", "bytes"], [[*words, size(value)] for *words, value in lines]


def fit_table(plan: "Plan") -> Table:
    """The largest micro-batch for each card, and what the recipe has to say for it or to change."""
    from fewstep.planning.plan import GIB, changes, fit_on

    rows: list[list[Any]] = []
    others = [({}, plan)]
    pending = changes(plan.recipe)
    for card in CARDS:
        fit, keys = None, {}
        while fit is None:
            fit, keys = next(((f, keys) for keys, p in others if (f := fit_on(p, card * GIB))), (None, {}))
            if fit is None:
                more = next(pending, None)
                if more is None:
                    break
                others.append(more)
        if fit is None:
            least = min((p.total(p.least.rows) for _, p in others)) / GIB
            rows.append([f"{card} GB", None, None, f"does not fit: {least:.1f} GiB at the very least"])
        else:
            rows.append([f"{card} GB", fit.micro, f"{fit.bytes / GIB:.1f}", flags_of({**keys, **fit.keys})])
    return ["GPU", "rows at once", "GiB", "with"], rows


def shard_table(plan: "Plan") -> Table:
    """What each of some GPUs holds and sends where they share the weights (``--training.shard fsdp2``)."""
    rows: list[list[Any]] = []
    for gpus in SHARED_BY:
        kept, at_once = plan.shards.fixed(gpus), plan.rows_of(gpus)
        if at_once is None:
            rows.append([gpus, None, size(kept), None, None, None])
        else:
            all_of_it = plan.sharded_total(gpus, at_once)
            rows.append([gpus, at_once, size(kept), size(plan.shards.gathered), f"{all_of_it / 2**30:.1f}"])
            rows[-1].append(size(plan.sent(gpus, at_once)))
    return ["GPUs, sharded", "rows at once", "kept by each", "whole at once", "GiB of each", "sent an update"], rows


def size(value: float) -> str:
    """Bytes in their unit: 3 * 2**29 are ``1.50 GiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 0.1 * 2**power:
            return f"{value / 2**power:.2f} {unit}"
    return f"{value:.0f} B"


def flags_of(keys: dict[str, Any]) -> str:
    """Keys of a recipe as they are typed."""
    return " ".join(f"--{key} {str(value).lower() if value is True else value}" for key, value in keys.items())


def time_table(plan: "Plan", gpus: Sequence[str], utilization: float) -> Table:
    """An update, the training, and a sample at some numbers of calls."""
    steps = plan.recipe.training.steps
    columns = ["GPU", "an update", f"{steps or 'all'} updates", *(f"{n} call{'s' * (n > 1)}" for n in CALLS)]
    columns += ["teacher, 50 steps"] if plan.teacher_call else []
    rows: list[list[Any]] = []
    for gpu in gpus:
        one = plan.seconds(plan.flops, gpu, utilization)
        calls = [plan.seconds(n * plan.call, gpu, utilization) for n in CALLS]
        calls += [plan.seconds(50 * plan.teacher_call, gpu, utilization)] if plan.teacher_call else []
        whole = duration(steps * one) if steps else duration(plan.recipe.training.max_seconds or 0)
        rows.append([gpu, duration(one), whole, *map(duration, calls)])
    return columns, rows


def notes(plan: "Plan", utilization: float) -> str:
    """What of all this is counted, and what estimated."""
    row = plan.flops / plan.recipe.training.batch
    return (
        f"Counted: parameters and their copies; the bytes of a step, in the types that "
        f"{plan.recipe.training.precision} gives it on a GPU; {number(row)}FLOP a row of an update and "
        f"{number(plan.call)}FLOP a call of the student.\n"
        f"Estimated: times, at {utilization:.0%} of a GPU's peak (--utilization), nothing waited for; 5 % of memory "
        "lost between blocks, 1 GiB for CUDA.\n"
        "Not counted: VAE and text encoders, which are on the GPU while data are encoded and samples drawn."
    )


def number(value: float) -> str:
    """With the prefix of a unit: 1.2e12 is ``1.2 T``."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.0f} "


def duration(seconds: float) -> str:
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    return f"{seconds / (size or 1e-6):.3g} {unit}"
