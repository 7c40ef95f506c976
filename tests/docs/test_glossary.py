"""Where the glossary says a word is, it is."""

import re
from functools import reduce

from toys.places import ROOT

import fewstep
from fewstep.commands.train import DEFAULTS
from fewstep.runs.recipe import Recipe

PAGE = (ROOT / "docs" / "guides" / "glossary.md").read_text()
ROWS = [re.split(r"(?<!\\)\|", row) for row in PAGE.splitlines() if row.startswith("| **")]


def test_every_name_of_the_api_is_there() -> None:
    names = re.findall(r"`fewstep\.([\w.]+)`", PAGE)
    assert len(names) > 50
    for name in names:
        if name != "Batch.cond":  # a field of a dataclass, which is no attribute of the class
            reduce(getattr, name.split("."), fewstep)


def test_every_section_of_a_recipe_is_there() -> None:
    keys = re.findall(r"`(teacher|student|training|drop)\.(\w+)", PAGE)
    assert len(keys) > 8
    for section, key in keys:
        annotation = Recipe.model_fields[section].annotation
        parts = [annotation, *getattr(annotation, "__args__", ())]
        (model,) = [part for part in parts if hasattr(part, "model_fields")]
        assert key in model.model_fields, f"{section}.{key}"


def test_every_command_is_there() -> None:
    commands = set(re.findall(r"`fewstep ([a-z]+)", PAGE))
    assert commands <= {*DEFAULTS, "recipes", "sample", "reflow"}


def test_words_are_in_order_and_once() -> None:
    words = [re.sub(r"[*]", "", row[1]).strip().lower().replace("_", "") for row in ROWS]
    assert all(len(row) == 6 for row in ROWS)
    assert len(words) == len(set(words)) > 60
    letters = [word[0] for word in words]
    assert letters == sorted(letters)
