"""A page for each public name: its signature and docstring, the papers it is from, and the file it stands in."""

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import fewstep

# The packages that public names come from, and what a reader looks there for, in the order of a reader's way; a package
# that is not here comes last, under its own name.
GROUPS = {
    "runs": "Runs, and what a name or folder stands for",
    "models": "Models in and out",
    "flows": "Fields, paths, maps and samples",
    "training": "Training",
    "evaluation": "Evaluation",
    "data": "Data",
    "latents": "Latents and texts",
    "networks": "Networks and adapters",
    "objectives": "Methods",
}
METHODS = Path(__file__).resolve().parents[1] / "methods"


def index() -> str:
    """A table of every public name, by the part of the package it stands in, and the tree of their pages."""
    parts = []
    groups: dict[str, list[str]] = {}
    for name in sorted(fewstep.__all__, key=str.lower):
        groups.setdefault(package_of(getattr(fewstep, name)), []).append(name)
    for group in sorted(groups, key=lambda group: [*GROUPS, group].index(group)):
        names = groups[group]
        lines = ["```{list-table}", ":class: names", ""]
        for name in names:
            lines += [f"* - [`{name}`](names/{name}.rst)", f"  - {_what(name)}"]
        parts.append("\n".join([f"## {GROUPS.get(group, group.capitalize())}", "", *lines, "```"]))
        parts.append("\n".join(["```{toctree}", ":hidden:", "", *(f"names/{name}" for name in names), "```"]))
    return "\n\n".join(parts)


def package_of(made: Any) -> str:
    """The package a name stands in: ``objectives``."""
    return made.__module__.split(".")[1]


def _what(name: str) -> str:
    """A method by the title of its page, anything else by the first sentence of its docstring."""
    page = method_page(name)
    title = "" if page is None else page.read_text().partition("\n")[0].removeprefix("# ")
    return title.removeprefix(f"{name}: ") or _first_sentence(getattr(fewstep, name))


@cache
def _pages() -> dict[str, Path]:
    texts = {path: path.read_text() for path in sorted(METHODS.glob("*.md"))}
    return {
        name: path for path, text in texts.items() for name in re.findall(r"\*\*Cite\.\*\* `fewstep cite (\w+)`", text)
    }


def method_page(name: str) -> Path | None:
    """The page of a method: the one that ends with its citation."""
    return _pages().get(name)


def _first_sentence(made: Any) -> str:
    text = " ".join((inspect.getdoc(made) or "").split("\n\n")[0].split())
    text = re.sub(r":(?:class|func|meth):`~?([\w.]+)`", r"`\1`", text.replace("``", "`"))
    outside, sentence = True, ""
    for mark in text:
        outside ^= mark == "`"
        sentence += mark
        if outside and re.search(r"(?<!e\.g|i\.e)[.:] $", sentence):
            break
    return sentence.strip().rstrip(":") or "?"


def write(folder: Path) -> None:
    """The pages, as files that Sphinx reads; those that are right already stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in fewstep.__all__:
        path, text = folder / f"{name}.rst", page(name)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
    for old in set(folder.glob("*.rst")) - {folder / f"{name}.rst" for name in fewstep.__all__}:
        old.unlink()


def page(name: str) -> str:
    """The text of the page of a public name, as reStructuredText."""
    made = getattr(fewstep, name)
    kind = "autoclass" if inspect.isclass(made) else "autofunction"
    file = made.__module__.replace(".", "/")
    file += "/__init__.py" if (Path(fewstep.__file__).parents[1] / file).is_dir() else ".py"
    lines = [name, "=" * len(name), "", f".. currentmodule:: fewstep\n\n.. {kind}:: {name}"]
    if kind == "autoclass":
        lines += ["   :members:", "   :show-inheritance:"]
    lines += ["", f"Source: `{file} <../../_modules/{made.__module__.replace('.', '/')}.html>`__"]
    if found := method_page(name):
        lines += ["", f"Page: :doc:`/methods/{found.stem}`"]
    if papers := papers_of(made):
        links = ", ".join(f"`arXiv {number} <https://arxiv.org/abs/{number}>`__" for number in papers)
        lines += ["", f"Papers: {links}. BibTeX: ``fewstep cite {name}``" if found else f"Papers: {links}"]
    return "\n".join([*lines, ""])


def papers_of(made: Any) -> list[str]:
    """The arXiv numbers a method says it is of, or that a docstring names."""
    named = getattr(made, "sources", None)
    found = list(named) if isinstance(named, tuple) else []
    return list(dict.fromkeys([*found, *re.findall(r"\b\d{4}\.\d{5}\b", inspect.getdoc(made) or "")]))
