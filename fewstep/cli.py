"""The command line: parse, call, print. Nothing heavy is imported before a command is known."""

import argparse
import sys
from collections.abc import Sequence

from fewstep.commands import (
    cite,
    cluster,
    compare,
    convert,
    diagnose,
    edit,
    encode,
    evaluate,
    export,
    plan,
    push,
    recipes,
    reflow,
    sample,
    train,
    ui,
)
from fewstep.commands.messages import one_line, short_messages, tell_torchrun
from fewstep.commands.parser import CommandParser, Parser, arguments_of
from fewstep.common.errors import OUT_OF_MEMORY, TrainingError, briefly, is_out_of_memory, shown, unknown
from fewstep.common.trust import trusting
from fewstep.common.version import __version__
from fewstep.common.write_errors import NEVER_OF_READING, WriteError, write_error

# In the order of the help; train adds distill too.
COMMANDS = (
    train, plan, sample, edit, ui, evaluate, diagnose, compare, reflow, encode, cluster, export, push, convert, cite,
    recipes,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a training or a disk that failed, 2 for bad input, 130 if
    interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        with short_messages():
            args = parsed(argv)
            args.argv = argv
            with trusting(getattr(args, "trust", False)):  # the commands that only look have no --trust
                return args.function(args)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if is_debug:
            raise
        if isinstance(error, OSError) and error.errno in NEVER_OF_READING:
            error = write_error(error) or error
        elif isinstance(error, OSError) and error.errno and error.filename:
            error = OSError(f"{shown(error.filename)} cannot be used as a file or folder: {error.strerror}")
        print(f"error: {one_line(error)}", file=sys.stderr)
        tell_torchrun(error)
        return 1 if isinstance(error, TrainingError | WriteError) else 2
    except (MemoryError, RuntimeError) as error:
        if is_debug or not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY} ({briefly(error)})", file=sys.stderr)
        tell_torchrun(error)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def make_parser() -> tuple[Parser, dict[str, CommandParser]]:
    """The parser, and those of the commands by name. For one use: it learns the keys of a recipe that it meets."""
    made = Parser(
        prog="fewstep",
        description="Turn a diffusion or flow model into a generator that needs 1 to 8 network calls.",
        epilog="--debug, anywhere, shows the traceback of an error. Start: fewstep distill checkerboard-itvm",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"fewstep {__version__}")
    known = made.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in COMMANDS:
        command.add(known)
    return made, dict(known.choices)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The words of the command line as its command takes them; ``overrides`` has the keys of a recipe among them.

    Raises:
        ValueError: in a line; a slip of a command or a flag names what is meant.
    """
    if empty := next((word for word in argv if word.startswith("--") and word.endswith("=--")), None):
        raise ValueError(f"{shown(empty)}: -- is no value (a text that begins with a dash is --flag=-text)")
    if odd := next((word for word in argv if "\0" in word), None):  # from Python: no shell has it
        raise ValueError(f"{shown(odd)} has a byte of zero in it")
    made, known = make_parser()
    if argv and argv[0] not in known and not argv[0].startswith("-"):
        raise unknown("command", argv[0], known)
    args, rest = made.parse_known_args(argv)
    for word in rest:
        flags = ["--help", *(flag for action in arguments_of(known[args.command]) for flag in action.option_strings)]
        if word.startswith("--") and word not in flags:
            raise unknown(f"option of {args.command}", word.partition("=")[0], flags)
    if rest:
        said = f"{args.command} does not know what {shown(rest[0])} is for"
        raise ValueError(f"{said} (see fewstep {args.command} --help)")
    return args
