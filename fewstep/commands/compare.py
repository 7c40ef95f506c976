"""`compare`: runs side by side, or methods that are trained for it."""

import argparse
import shlex
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.common.console import print_table, say, say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "compare",
        run,
        "put runs side by side, or train methods and put those side by side",
        examples=[
            "compare runs/checkerboard runs/mine --out side-by-side",
            "compare checkerboard-itvm --methods ITVM LMD --train-steps 2000 --seeds 0 1",
        ],
        may_run_code=True,
    )
    text = "evaluated run folders; with --methods, one recipe"
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=text)
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="(default: compare)")
    text = "train these on the recipe: NAME, or NAME:key=value,key=value"
    p.add_argument("--methods", nargs="+", metavar="NAME", help=text)
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="with --methods (default: 0)")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--train-steps", type=int, metavar="N", help="updates of each method (default: the recipe's)")
    text = (
        "the same time for each: all methods' steps are timed in turn first, and S seconds over that time is how "
        "many updates a method gets; so a run can be repeated and goes on, however busy the machine is"
    )
    budget.add_argument("--seconds", type=float, metavar="S", help=text)
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe")


def run(args: argparse.Namespace) -> int:
    from fewstep.evaluation.results import Evaluation
    from fewstep.runs.judge import compare_runs
    from fewstep.training.run_files import QUALITY

    if args.methods:
        return _compare_methods(args)
    found, others = {}, []
    for run in args.runs:
        if (run / QUALITY).is_file():
            name = run.name if run.name not in found else str(run)
            found[name] = Evaluation.read(run / QUALITY)
        else:
            others.append(run)
    if not found:
        raise FileNotFoundError(f"{others[0]} has not been evaluated: fewstep evaluate {shlex.quote(str(others[0]))}")
    for run in others:
        say(f"note: {run} has not been evaluated, and is left out: fewstep evaluate {shlex.quote(str(run))}")
    for caption, columns, rows in (tables := compare_runs(found, args.out)):
        if len(tables) > 1:
            print(caption)
        print_table(columns, rows)
    if len(tables) > 1:
        say("note: what was not measured alike is in tables of its own")
    print(f"{args.out / 'compare.html'} shows it with plots")
    best = next(run for run in args.runs if run not in others)
    say_next([shlex.join(["fewstep", "export", str(best), f"{best.name}-export"])])
    return 0


def _compare_methods(args: argparse.Namespace) -> int:
    from fewstep.runs.compare import compare_methods
    from fewstep.runs.judge import next_commands
    from fewstep.runs.loading import open_run

    if len(args.runs) != 1:
        raise ValueError(f"--methods are trained on one recipe, not on {len(args.runs)}")
    overrides = {}
    for word in args.set:
        key, has_value, value = word.partition("=")
        if not has_value:
            raise ValueError(f"--set {word}: KEY=VALUE is needed, as in --set training.lr=1e-3")
        overrides[key] = value
    found = compare_methods(
        args.runs[0],
        args.methods,
        seeds=args.seeds,
        steps=args.train_steps,
        seconds=args.seconds,
        out=args.out,
        overrides=overrides,
        say=say,
    )
    for metric in found.metrics[:1]:
        print(found.caption(metric))
        print_table(*found.table(metric))
    print(f"{args.out / 'compare.html'} shows it with plots, {args.out / 'compare.md'} is the same as text")
    done = next((run for run in found.runs if run.evaluation), None)
    if done is not None:
        opened = open_run(done.folder)
        say_next(next_commands(done.folder, opened.recipe, opened.model)[:1])
    return 0
