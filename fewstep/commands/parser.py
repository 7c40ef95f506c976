"""What argparse lacks for these commands: keys of a recipe as flags, arguments after lists, errors that are raised."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn

from fewstep.common.console import say

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["CommandParser"]
else:
    Commands = Any

_KEYS = """any key of the recipe is a flag, with its value as YAML:
  --objective.ema 0.99   --training.lr 3e-4   --evaluation.steps "[1, 2]"
`fewstep recipes` lists the recipes that come along, `--dry-run` prints every key with its value."""


class Parser(argparse.ArgumentParser):
    """One whose complaints are errors like all others: a line that says what is meant."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class CommandParser(Parser):
    """The parser of one command.

    Args:
        examples: command lines to copy, without ``fewstep``; shown under the help.
        takes_recipe_keys: each flag that it does not know is a key of the recipe, with one value.
    """

    def __init__(self, *, examples: Sequence[str] = (), takes_recipe_keys: bool = False, **options: Any) -> None:
        self.examples = tuple(f"fewstep {line}" for line in examples)
        self.takes_recipe_keys = takes_recipe_keys
        shown = "\n".join(["examples:", *(f"  {line}" for line in self.examples)]) if examples else ""
        super().__init__(
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n\n".join(part for part in (_KEYS if takes_recipe_keys else "", shown) if part) or None,
            **options,
        )
        if takes_recipe_keys:
            self.set_defaults(overrides={})

    # typeshed has overloads, for namespaces of other types.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if self.takes_recipe_keys:
            words = self._with_keys(words)
        try:
            return super().parse_known_args(positionals_first(self, words), namespace)
        except argparse.ArgumentError as error:
            flag = error.argument_name or ""
            if isinstance(flags_of(self).get(flag), RecipeKey):
                raise ValueError(f"{flag} needs a value, as in `{flag} 1` (true and false too)") from None
            self.error(str(error))

    def _with_keys(self, words: Sequence[str]) -> list[str]:
        """The words, once each flag among them is known. A value such as -1e-3 is joined to its flag, because argparse
        takes what begins with a dash for a flag."""
        ready: list[str] = []
        for word in words:
            flag = word.partition("=")[0]
            if word.startswith("-") and not word.startswith("--") and word != "-h" and ready:
                if isinstance(flags_of(self).get(ready[-1]), RecipeKey):
                    ready[-1] += f"={word}"
                    continue
            elif flag.startswith("--") and flag != "--" and flag not in flags_of(self):
                self.add_argument(flag, action=RecipeKey, help=argparse.SUPPRESS)
            ready.append(word)
        return ready


class RecipeKey(argparse.Action):
    """Puts the value of a flag into ``overrides``, as it is typed: ``load_recipe`` reads it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, "overrides", default=argparse.SUPPRESS, **options)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        key = (option_string or "").removeprefix("--").replace("-", "_")
        namespace.overrides = {**namespace.overrides, key: values}


class OldSpelling(argparse.Action):
    """A flag under the name that it had before: it works, is hidden from the help, and says its new name.

    Args:
        now: the new name, such as ``--guidance-scale``.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, now: str, **options: Any) -> None:
        self.now = now
        dest = now.removeprefix("--").replace("-", "_")
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        say(f"note: {option_string} is called {self.now} now; the old name still works")
        setattr(namespace, self.dest, values)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *,
    examples: Sequence[str],
    may_run_code: bool = False,
    takes_recipe_keys: bool = False,
) -> CommandParser:
    """A command of the command line.

    Args:
        run: what it does, given the parsed arguments; returns the exit code.
        text: what it does, in a phrase that begins with a small letter.
        may_run_code: it may run code that a run or a recipe names, so it takes ``--trust``.
    """
    made = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        examples=examples,
        takes_recipe_keys=takes_recipe_keys,
    )
    made.set_defaults(function=run)
    if may_run_code:
        made.add_argument("--trust", action="store_true", help="run code that a run of somebody else's names")
    return made


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags that a parser knows, with what each does; argparse has no public name for them."""
    return parser._option_string_actions


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags and other arguments in their order, as the help lists them: without --help and what is hidden."""
    hidden = argparse.SUPPRESS
    return [a for a in parser._actions if a.help is not hidden and not isinstance(a, argparse._HelpAction)]


def positionals_first(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words with those of flags last, so that ``evaluate --steps 1 2 RUN`` is understood: a list of numbers ends
    where a word is no number. argparse itself gives RUN to ``--steps``, with ``parse_intermixed_args`` too."""
    first, options, rest = [], [], list(words)
    while rest:
        word, *rest = rest
        action = flags_of(parser).get(word)
        if action is None:
            (options if word.startswith("-") else first).append(word)
            continue
        count = 0 if action.nargs == 0 else len(rest) if action.nargs == "+" else 1
        taken = list(takewhile(partial(_is_value, action), rest[:count]))
        options += [word, *taken]
        rest = rest[len(taken) :]
    return [*first, *options]


def _is_value(action: argparse.Action, word: str) -> bool:
    """Whether a word is one of a flag's values, as far as it can be told."""
    if action.nargs != "+" or action.type is not int:
        return not word.startswith("--")
    return word.lstrip("-").isdigit()
