"""`push`: an export on the Hugging Face hub."""

import argparse
from pathlib import Path

from fewstep.commands.parser import Commands, add_command
from fewstep.common.console import say_next


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "push",
        run,
        "upload an export to the Hugging Face hub",
        examples=["push checkerboard-export me/checkerboard-few-steps --private"],
    )
    p.add_argument("folder", type=Path, help="what `fewstep export` wrote")
    p.add_argument("name", metavar="OWNER/NAME", help="the repository; made where there is none")
    p.add_argument("--private", action="store_true", help="only for you (default: as your account has it)")
    p.add_argument("--message", metavar="TEXT", help="of the commit")


def run(args: argparse.Namespace) -> int:
    from fewstep.models.hub import how_to_load, kind_of, push

    print(push(args.folder, args.name, private=args.private or None, message=args.message))
    say_next([how_to_load(args.name, kind_of(args.folder))])
    return 0
