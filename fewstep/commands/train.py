"""`train` and `distill`: a run from its recipe. The same work: `distill` needs a teacher, `train` data."""

import argparse
import shlex
from pathlib import Path

from fewstep.commands.parser import Commands, RecipeKey, add_command
from fewstep.commands.shared import print_evaluation
from fewstep.common.console import say, say_next

# The recipes of `fewstep train --data DIR` and `fewstep distill --teacher DIR`, and of `train` with both.
DEFAULTS = {"train": ("data", "photos-teacher"), "distill": ("teacher", "distill")}
_OF_TEXT = "text-teacher"
_FROM_A_MODEL = "finetune"


def add(commands: Commands) -> None:
    train = add_command(
        commands,
        "train",
        run,
        "train a model from data",
        examples=["train --data photos --steps 50000", "train digits-teacher --training.lr 3e-4 --dry-run"],
        may_run_code=True,
        takes_recipe_keys=True,
    )
    distill = add_command(
        commands,
        "distill",
        run,
        "distill a teacher into a few-step model",
        examples=["distill checkerboard-itvm", "distill --teacher ./ddpm-cifar10-32 --data photos --objective LMD"],
        may_run_code=True,
        takes_recipe_keys=True,
    )
    teacher = "a diffusers folder, a run, an exact field"
    for p, text in ((train, f"what to start from: {teacher}"), (distill, teacher)):
        p.add_argument("recipe", nargs="?", help="a recipe by path or name, or a run folder to go on with")
        p.add_argument("--teacher", action=RecipeKey, metavar="FOLDER", help=text)
        p.add_argument("--data", action=RecipeKey, metavar="FOLDER", help="a data set by name or path")
        p.add_argument("--steps", action=RecipeKey, metavar="N", help="updates")
        p.add_argument("--seed", action=RecipeKey, metavar="N", help="decides every random number")
        p.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default: runs/NAME)")
        p.add_argument("--fresh", action="store_true", help="throw away the run in that folder and start again")
        p.add_argument("--dry-run", action="store_true", help="check everything, print the whole recipe and stop")


def run(args: argparse.Namespace) -> int:
    from fewstep.common.reading import TEXTS
    from fewstep.runs.recipes import load_recipe

    overrides = dict(args.overrides)
    source, needed = args.recipe, DEFAULTS[args.command][0]
    if source is None:
        if needed not in overrides:
            raise ValueError(f"fewstep {args.command} needs a recipe or --{needed}: `fewstep recipes` lists recipes")
        is_finetuning = args.command == "train" and "teacher" in overrides
        source = _FROM_A_MODEL if is_finetuning else DEFAULTS[args.command][1]
        if args.command == "train" and not is_finetuning and Path(overrides["data"]).suffix in TEXTS:
            source = _OF_TEXT
        overrides.setdefault("name", f"{Path(overrides[needed].split(':')[-1]).name}-{args.command}")
    if Path(source).is_dir() and not args.fresh:
        from fewstep.training.leaving import check_from_recipe

        check_from_recipe(Path(source))  # before its recipe, which says only what is known of its parts
    recipe = load_recipe(source, overrides)
    if args.command == "distill" and recipe.teacher is None:
        raise ValueError(f"{recipe.name} has no teacher to distill: fewstep train {source}, or --teacher FOLDER")
    # And torch, once there is something to train.
    from fewstep.common.distributed import environment
    from fewstep.runs.build import build, parts_of_blocks
    from fewstep.runs.judge import next_commands
    from fewstep.runs.run import run as run_recipe
    from fewstep.training.run_files import REPORT

    out = args.out or (Path(source) if Path(source).is_dir() else Path("runs") / recipe.name)
    if args.dry_run:
        built = parts_of_blocks(recipe) if recipe.blocks is not None else build(recipe)
        student = built.student
        print(built.recipe.as_yaml(), end="")
        size = sum(p.numel() for p in student.parameters())
        moving = sum(p.numel() for p in student.parameters() if p.requires_grad)
        some = f", {moving:,} of which train" if moving < size else ""
        say(f"# everything fits: a {type(student).__name__} of {size:,} parameters{some}, into {out}")
        start = [word for word in args.argv if word != "--dry-run"]
        keys = [word for key, value in overrides.items() if key != "name" for word in (f"--{key}", value)]
        planned = ["fewstep", "plan", *([args.recipe] if args.recipe else []), *keys]  # memory and time
        say_next([shlex.join(["fewstep", *start]), shlex.join(planned)])
        return 0

    done = run_recipe(recipe, out, fresh=args.fresh)
    if done.result.stopped == "interrupted":
        say_next([shlex.join(["fewstep", *(word for word in args.argv if word != "--fresh")])])
        return 130
    if not environment().is_main:
        return 0
    print_evaluation(done.evaluation)
    if recipe.blocks is not None:
        print(f"{out} is a chain of {len(recipe.blocks) + 1} blocks, which fewstep.load takes")
    elif (out / REPORT).is_file():
        print(f"{out / REPORT} shows it all")
    else:
        print(f"{out} has its checkpoints and samples; fewstep evaluate {shlex.quote(str(out))} measures it")
    say_next(next_commands(out, recipe, done.result.student))
    return 0
