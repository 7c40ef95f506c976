"""A method of one's own, as the docs show it: the page's own code trains, is checked, and is cited."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.places import ROOT

import fewstep
from fewstep.flows.exact import CheckerboardField
from fewstep.runs.build import build
from fewstep.runs.recipes import load_recipe

PAGE = ROOT / "docs" / "guides" / "own-objective.md"
TINY = {
    "training.steps": "700", "training.batch": "256", "training.quiet": "true", "student.options.width": "64",
    "student.options.depth": "2", "evaluation.count": "0",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The page's recipe, with the page's method in a file beside it."""
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    (tmp_path / "my_method.py").write_text(blocks["python"])
    (tmp_path / "my-recipe.yaml").write_text(blocks["yaml"])
    return tmp_path / "my-recipe.yaml"


def test_the_method_is_twenty_lines(recipe: Path) -> None:
    assert len(recipe.with_name("my_method.py").read_text().splitlines()) <= 20


@pytest.mark.takes_seconds
def test_it_learns(recipe: Path) -> None:
    loaded = load_recipe(recipe, TINY)
    built = build(loaded)
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    ends = fewstep.sample(CheckerboardField(), noise, steps=50, solver="heun")

    def error(student: Any) -> float:
        return float((fewstep.sample(student, noise, steps=1) - ends).square().mean().sqrt())

    before = error(built.student)
    result = fewstep.fit(built.student, built.objective, built.data, **loaded.training.model_dump())
    assert error(result.ema) < 0.6 * before


def test_its_options_are_those_of_its_signature(recipe: Path) -> None:
    options = load_recipe(recipe).objective.options
    assert options == {"ema": 0.97, "diagonal": 0.25, "ends": 0.25}
    with pytest.raises(ValueError, match=r"unknown recipe key 'objective\.emma': did you mean 'objective\.ema'\?"):
        load_recipe(recipe, {"objective.emma": "0.9"})
    with pytest.raises(ValueError, match=r"objective\.ema is 'fast'"):
        load_recipe(recipe, {"objective.ema": "fast"})
    with pytest.raises(ValueError, match="diagonal is 2"):
        build(load_recipe(recipe, {"objective.diagonal": "2"}))


def test_it_needs_its_teacher(recipe: Path) -> None:
    with pytest.raises(ValueError, match="Picard distills a teacher and there is none"):
        load_recipe(recipe, {"teacher": "none"})


def test_it_is_named_where_it_names_no_papers(recipe: Path) -> None:
    assert "my_method.py:Picard names no papers" in fewstep.cite(recipe)
    method = recipe.with_name("my_method.py")
    # Another file: a module is read once.
    other = method.with_name("other_method.py")
    other.write_text(method.read_text() + '\n    sources = ("2505.01169", "2601.00001")\n')
    cited = fewstep.cite(f"{other}:Picard")
    assert "names no papers" not in cited
    assert "Khungurn" in cited
    assert "eprint = {2601.00001}" in cited
