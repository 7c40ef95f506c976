"""`recipes`: what comes along to start from."""

import argparse

from fewstep.commands.parser import Commands, add_command
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "recipes",
        run,
        "list the recipes that come along",
        examples=["recipes", "recipes checkerboard-itvm > mine.yaml"],
    )
    p.add_argument("recipe", nargs="?", help="print this one, to start your own from")


def run(args: argparse.Namespace) -> int:
    from fewstep.runs.recipes import describe, find_recipe, known_recipes

    if args.recipe is not None:
        print(find_recipe(args.recipe).read_text(), end="")
        return 0
    known = known_recipes()
    width = max(map(len, known))
    for name, path in known.items():
        print(f"{name:<{width}}  {describe(path)}")
    say_next(["fewstep distill checkerboard-itvm", "fewstep recipes checkerboard-itvm > mine.yaml"])
    return 0
