"""The text of the page on the command line, read off the parser itself."""

import argparse

from fewstep.cli import make_parser
from fewstep.commands.parser import CommandParser, arguments_of


def commands() -> str:
    """Each command: what it does, how it is called, and its flags."""
    _, known = make_parser()
    return "\n\n".join(_command(name, parser) for name, parser in known.items())


def _command(name: str, parser: CommandParser) -> str:
    actions = arguments_of(parser)
    usage = parser.format_usage().removeprefix("usage: ").strip()
    usage = "\n".join([usage.split("\n")[0], *(f"    {line.strip()}" for line in usage.split("\n")[1:])])
    parts = [f"## `fewstep {name}`", parser.description or "", f"```text\n{usage}\n```"]
    if actions:
        lines = ["```{list-table}", ":class: keys", ":header-rows: 1", "", "* - argument", "  - what it is"]
        lines += [f"* - {_name(action)}\n  - {_help(action, parser)}" for action in actions]
        parts.append("\n".join([*lines, "```"]))
    if parser.takes_recipe_keys:
        parts.append("Any key of a recipe is a flag too, with its value as YAML: [every key](../recipes/keys.md).")
    if parser.examples:
        parts.append("\n".join(["```bash", *parser.examples, "```"]))
    return "\n\n".join(part for part in parts if part)


def _name(action: argparse.Action) -> str:
    shown = action.metavar if isinstance(action.metavar, str) else None
    if not action.option_strings:
        return f"`{shown or action.dest.upper()}`"
    value = "" if action.nargs == 0 else f" {shown or '|'.join(map(str, action.choices or ['VALUE']))}"
    many = " ..." if action.nargs in ("+", "*") else ""
    return " or ".join(f"`{flag}{value}{many}`" for flag in action.option_strings)


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    text = text.replace("*", "\\*").replace("<", "\\<")
    return f"{text} (needed)" if action.required and action.option_strings else text
