"""The pages that are made of the code hold all that the code has: keys, methods, options, commands, flags, names."""

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from toys.places import ROOT

import fewstep

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import api  # noqa: E402
import commands  # noqa: E402
import drawing  # noqa: E402
import keys  # noqa: E402
import offline  # noqa: E402

from fewstep.cli import make_parser  # noqa: E402
from fewstep.commands.parser import arguments_of  # noqa: E402
from fewstep.objectives import OBJECTIVES  # noqa: E402
from fewstep.runs.recipes import known_recipes, load_recipe  # noqa: E402


@pytest.fixture(scope="module")
def page_of_keys() -> str:
    return keys.keys()


def _rows(page: str) -> list[list[str]]:
    """The cells of the rows of the tables of a page, headings aside."""
    rows = [re.split(r"\n  - ", row) for row in re.findall(r"^\* - (.*(?:\n  - .*)*)", page, re.M)]
    return [row for row in rows if row[0] not in ("key", "argument")]


def test_every_key_that_a_resolved_recipe_has_is_on_the_page(page_of_keys: str) -> None:
    tree = load_recipe("mnist-vit-datafree", look=True).as_dict()
    tree["drop"], tree["student"]["lora"] = {"share": 0.1, "null": {}}, {"rank": 8}
    for key, value in tree.items():
        names = [key] if not isinstance(value, dict) else [f"{key}.{inner}" for inner in value]
        if key in ("objective", "data"):  # their options are in tables of their own
            names = [key]
        for name in names:
            assert f"{{#{keys.anchor(name)}}}" in page_of_keys, name
    assert "{#key-teacher-guidance-scale}" in page_of_keys
    assert len(keys.dotted()) > 70


def test_every_row_of_the_keys_says_type_default_and_meaning(page_of_keys: str) -> None:
    for row in _rows(page_of_keys):
        section = row[2] == "" and row[1] == "section"  # its keys have defaults
        assert len(row) == 4, row
        assert row[1], row
        assert row[2] or section, row
        assert row[3], row
        assert "typing." not in row[1], row


def test_types_and_defaults_are_those_of_the_code(page_of_keys: str) -> None:
    rows = {re.findall(r"\{#key-(.*)\}", row[0])[0]: row[1:3] for row in _rows(page_of_keys)}
    assert rows["training-lr"] == ["number, above 0", "`0.001`"]
    assert rows["training-steps"] == ["whole number, above 0", "`null`"]
    assert rows["evaluation-steps"] == ["list of whole numbers, above 0", "`[1, 2, 4, 8]`"]
    assert rows["student-kind"] == ["`map` or `field` or `denoised`", "`null`"]
    assert rows["objective-itvm-ema"] == ["number", "`0.5`"]
    assert rows["name"] == ["text", "needed"]


def test_every_option_of_every_method_is_explained(page_of_keys: str) -> None:
    for name, method in OBJECTIVES.items():
        assert f"### {name}\n" in page_of_keys
        unexplained = [row.shown for row in keys.arguments_of(method, "x", skip=("teacher",)) if not row.meaning]
        assert not unexplained, name


def test_every_recipe_is_shown_whole() -> None:
    page = keys.recipes()
    for name, path in known_recipes().items():
        assert f"## `{name}`\n" in page
        assert path.read_text().rstrip() in page


def test_every_command_and_flag_is_on_the_page_of_commands() -> None:
    page, known = commands.commands(), make_parser()[1]
    parts = dict(re.findall(r"^## `fewstep (\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(parts) == set(known)
    for name, parser in known.items():
        for action in arguments_of(parser):
            assert all(f"`{flag}" in parts[name] for flag in action.option_strings), (name, action)
        assert all(cell for row in _rows(parts[name]) for cell in row), name


def test_every_public_name_has_a_page() -> None:
    index = api.index()
    for name in fewstep.__all__:
        assert f"[`{name}`](names/{name}.rst)" in index
        text = api.page(name)
        file = re.findall(r"^Source: `(\S+) <", text, re.M)[0]
        assert (DOCS.parent / file).is_file()
        what = "class" if isinstance(getattr(fewstep, name), type) else "def"
        assert f"{what} {name}(" in (DOCS.parent / file).read_text().replace(f"{name}:", f"{name}(")
    assert all(api.method_page(name) is not None for name in OBJECTIVES)
    assert " ?" not in index.splitlines()


def test_papers_of_a_name_are_linked() -> None:
    assert "https://arxiv.org/abs/2505.01169" in api.page("ITVM")
    assert "Papers:" not in api.page("load_data")


def test_pages_of_names_are_written_once_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / "Gone.rst").write_text("Gone")
    api.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(fewstep.__all__)
    before = (tmp_path / "ITVM.rst").stat().st_mtime_ns
    api.write(tmp_path)
    assert (tmp_path / "ITVM.rst").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example.org/mathjax.js"></script>',
        '<link href="https://fonts.example.org/css?family=x" rel="stylesheet">',
        "<img alt='x' src=//example.org/x.png>",
        "@import 'https://example.org/x.css';",
        "@font-face { src: url(https://example.org/x.woff2) }",
    ],
)
def test_what_a_page_would_fetch_is_found(text: str) -> None:
    assert len(offline.fetched(text)) == 1


def test_links_and_carried_files_are_not_fetched() -> None:
    text = '<a href="https://arxiv.org/abs/2505.01169">x</a><img src="_images/x.png"><link rel="canonical" href="https://x.org">'
    assert offline.fetched(text + "a { background: url(data:image/svg+xml;base64,AA) }") == []


def test_floors_go_down_and_circles_share_one() -> None:
    found = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"c"}, "e": set()}
    assert drawing.floors(found) == {"a": 3, "b": 2, "c": 1, "d": 1, "e": 1}
    packages = drawing.imports()
    floors = drawing.floors(packages)
    assert floors["common"] == 1
    assert max(floors, key=lambda name: floors[name]) == "cli"
    assert {folder.parent.name for folder in drawing.PACKAGE.glob("*/__init__.py")} == floors.keys() - {"cli"}


def test_imports_are_those_of_the_files(tmp_path: Path) -> None:
    for name, text in {
        "cli.py": "from pkg import top",
        "top/__init__.py": '"""What is above. More."""\nfrom pkg.low.part import thing\n',
        "low/__init__.py": "import pkg.low.part\ndef later():\n    from pkg import top\n",
    }.items():
        (tmp_path / "pkg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pkg" / name).write_text(text)
    assert drawing.imports(tmp_path / "pkg") == {"cli": {"top"}, "top": {"low"}, "low": set()}
    assert drawing.first_line("top", tmp_path / "pkg") == "What is above"


@pytest.mark.parametrize("stop", drawing.BATCH + drawing.SAMPLE, ids=lambda stop: stop.at)
def test_what_the_drawn_paths_name_is_there(stop: drawing.Stop) -> None:
    module, _, name = stop.at.partition(":")
    assert (drawing.PACKAGE / stop.file).is_file()
    found = importlib.import_module(f"fewstep.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_drawings_are_whole_and_the_same_again() -> None:
    first, second = drawing.drawings(), drawing.drawings()
    assert first == second
    for svg in first.values():
        ElementTree.fromstring(svg)
    assert all(f">{name}<" in first["house"] for name in drawing.imports())
    assert "…" not in first["house"], "the first sentence of a package does not fit its box: shorten its docstring"


def test_every_guide_is_listed_once_with_what_it_is_for() -> None:
    guides = ROOT / "docs" / "guides"
    index = (guides / "index.md").read_text()
    listed = re.findall(r"^\* \[[^\]]+\]\(([\w-]+)\.md\)[:,] \S", index, re.MULTILINE)
    pages = sorted({page.stem for page in guides.glob("*.md")} - {"index"})
    assert sorted(listed) == pages
    menu = index.partition("```{toctree}")[2].partition("```")[0]
    assert sorted(re.findall(r"^[\w-]+$", menu, re.MULTILINE)) == pages  # or the site is not built
