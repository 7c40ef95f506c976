"""`recipes` and `cite`: what comes along, and by whom."""

import argparse
import shlex

from fewstep.common.console import say_next


def run_cite(args: argparse.Namespace, _: dict[str, str]) -> int:
    from fewstep.runs.cite import cite

    print(cite(*args.what), end="")
    say_next([shlex.join(["fewstep", *args.argv]) + " > papers.bib"])
    return 0


def run_recipes(args: argparse.Namespace, _: dict[str, str]) -> int:
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
