"""`evaluate`: the quality of a run at each number of steps."""

import argparse
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import add_device, print_evaluation
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run,
        "measure quality against network calls",
        examples=["evaluate runs/checkerboard", "evaluate runs/checkerboard --steps 1 2 4 --teacher-steps 50"],
        may_run_code=True,
    )
    p.add_argument("run", type=Path, help="a run folder")
    text = "a list of step counts, each measured (default: the recipe's)"
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help=text)
    p.add_argument("--teacher-steps", type=int, nargs="+", metavar="N", help="those of the teacher")
    p.add_argument("--count", type=int, metavar="N", help="samples at each (default: the recipe's)")
    text = "which metrics, nll and bits_per_dim among them (default: the recipe's, or all but these two)"
    p.add_argument("--metrics", nargs="+", metavar="NAME", help=text)
    p.add_argument("--seed", type=int, metavar="N", help="of the samples (default: the recipe's)")
    text = "where it is now, or for a run without one (default: the recipe's)"
    p.add_argument("--teacher", metavar="MODEL", help=text)
    p.add_argument("--data", metavar="DATA", help="what it is held against (default: the recipe's)")
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.distributed import environment
    from fewstep.runs.judge import next_commands
    from fewstep.runs.loading import open_run
    from fewstep.runs.run import evaluate_run

    asked = {"steps": args.steps, "teacher_steps": args.teacher_steps, "count": args.count, "seed": args.seed}
    asked |= {"metrics": args.metrics}
    asked |= {"teacher": args.teacher, "data": args.data}
    asked = {name: value for name, value in asked.items() if value is not None}
    done = open_run(args.run)
    found = evaluate_run(args.run, args.device, opened=done, **asked)
    if found is None:
        raise ValueError(f"{args.run} has nothing to be measured by: images without labels, and no teacher")
    if not environment().is_main:
        return 0
    print_evaluation(found)
    print(f"{args.run / 'quality.png'}, {args.run / 'quality.json'} and {args.run / 'report.html'} have it too")
    sample, *_, export = next_commands(args.run, done.recipe, done.model)
    say_next([sample, export])
    return 0
