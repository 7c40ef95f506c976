"""The page on data names every option that each loader takes, and no other."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from toys.places import ROOT

from fewstep.data import NAMED, files
from fewstep.data import images as pictures

PAGE = ROOT / "docs" / "guides" / "data.md"
SECTION = PAGE.read_text().partition("## Every source\n")[2].partition("\n## ")[0]
ROWS = [row.split("|") for row in SECTION.splitlines() if row.startswith("| ")]
# What tells the row of a loader, and what it takes that is for fewstep alone.
LOADERS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "a folder": (pictures.image_folder, {"path"}),
    "`hf:NAME`": (pictures.hugging_face, {"name"}),
    "`FILE.npz`": (files.npy, {"path"}),
    "IDX files (MNIST": (files.idx, {"path", "classes"}),
    "CIFAR-10": (files.cifar_binary, {"path"}),
    "`fashion-mnist`": (files.fashion_mnist, set()),
    "`digits`": (files.digits, set()),
}


def _row(mark: str) -> list[str]:
    (row,) = [row for row in ROWS if (row[1].strip() == mark if mark == "a folder" else mark in row[1])]
    return row


@pytest.mark.parametrize("mark", LOADERS)
def test_a_source_is_listed_with_the_options_that_it_takes(mark: str) -> None:
    load, own = LOADERS[mark]
    known = {name for loader, _ in LOADERS.values() for name in inspect.signature(loader).parameters} - {"path", "name"}
    listed = {word for word in re.findall(r"[a-z_]+", _row(mark)[4]) if word in known}
    assert listed == set(inspect.signature(load).parameters) - own


def test_every_name_is_listed() -> None:
    assert set(NAMED) <= set(re.findall(r"`([a-z-]+)`", " ".join(row[1] for row in ROWS)))


def test_every_option_is_told() -> None:
    table = PAGE.read_text().partition("## Every option\n")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([a-z_]+)`", " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row)))
    for load, own in LOADERS.values():
        assert set(inspect.signature(load).parameters) - own <= told
