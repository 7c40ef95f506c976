"""`cite`: by whom the methods, models and data are."""

import argparse
import shlex

from fewstep.commands.parser import Commands, add_command
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "cite",
        run,
        "print BibTeX for what a run, recipe or method uses",
        examples=["cite runs/checkerboard > papers.bib", "cite ITVM MeanFlow"],
    )
    p.add_argument("what", nargs="+", metavar="WHAT", help="run folders, recipes, methods by name or FILE.py:CLASS")


def run(args: argparse.Namespace) -> int:
    from fewstep.runs.cite import cite

    print(cite(*args.what), end="")
    say_next([shlex.join(["fewstep", *args.argv]) + " > papers.bib"])
    return 0
