"""The pages for those who carry on name what is there: files, commands of make, public names, one version."""

import re
import tomllib

import pytest
import yaml
from toys.places import ROOT

import fewstep
from fewstep.common.version import __version__

GUIDES = ["CONTRIBUTING.md", "AGENTS.md"]
FOLDERS = "fewstep|tests|docs|benchmarks|recipes|examples"


@pytest.mark.parametrize("page", GUIDES)
def test_files_that_a_guide_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]*\w", text)) - {
        "docs/methods/NAME.md",
        "recipes/NAME.yaml",
    }
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_is_one_page_and_its_targets_of_make_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) < 90
    targets = set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE))
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test-fast", "test", "lint"} <= targets <= rules


def test_packages_of_the_guides_are_those_of_fewstep() -> None:
    packages = {place.parent.name for place in (ROOT / "fewstep").glob("*/__init__.py")}
    for page in GUIDES:
        named = set(re.findall(r"`(?:fewstep/)?(\w+)/?`", (ROOT / page).read_text()))
        assert packages - named == set(), page


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert fewstep.__version__ == __version__
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = set(re.findall(r"^### (\w+)", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Tested"}


def test_the_citation_has_what_its_schema_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert all("name" in author or "family-names" in author for author in citation["authors"])


def test_what_is_called_experimental_is_public() -> None:
    page = (ROOT / "docs" / "inside" / "stability.md").read_text().split("## What is experimental")[1]
    names = set(re.findall(r"`fewstep\.(\w+)`", page))
    assert names
    assert names <= set(fewstep.__all__)


def test_everybody_who_gets_all_gets_every_extra_that_runs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [everything] = extras.pop("all")
    assert set(re.findall(r"\w+", everything.split("[")[1])) == extras.keys() - {"dev", "docs"}


def test_files_are_of_about_300_lines() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (ROOT / "fewstep").rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 350} == {}
