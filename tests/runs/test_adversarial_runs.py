"""The adversarial term in recipes and by the command line: its critic by name, around any method, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import fewstep
from fewstep import cli
from fewstep.networks import MLPCritic
from fewstep.objectives import AYF, CTM, ITVM, Adversarial, Corrected, Diffused, TeacherCritic
from fewstep.runs.build import build
from fewstep.runs.recipes import load_recipe

RECIPE: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "eight-gaussians",
    "objective": {"name": "Adversarial", "base": {"name": "ITVM", "ema": 0.9}, "begin": 0.0},
    "training": {"steps": 4, "batch": 64, "quiet": True, "log_every": 1},
    "evaluation": {"count": 0},
}
CRITICS = """
import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x)[:, 0]


def made(width: int = 4):
    return Mine(width)


def number():
    return 3
"""


def recipe(folder: Path, **objective: Any) -> Path:
    (folder / "critics.py").write_text(CRITICS)
    file = folder / "points.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "objective": {**RECIPE["objective"], **objective}}))
    return file


def objective_of(source: Any, **overrides: str) -> Adversarial:
    made = build(load_recipe(source, {key.replace("__", "."): value for key, value in overrides.items()})).objective
    assert isinstance(made, Adversarial)
    return made


def test_the_defaults_are_written_out_and_read_back(tmp_path: Path) -> None:
    first = load_recipe(recipe(tmp_path))
    options = first.objective.options
    assert (options["critic"], options["loss"], options["diffused"]) == ("auto", "relativistic", False)
    assert options["base"]["ema"] == 0.9
    (tmp_path / "again.yaml").write_text(first.as_yaml())
    assert load_recipe(tmp_path / "again.yaml").as_yaml() == first.as_yaml()


@pytest.mark.parametrize(
    ("critic", "kind"),
    [
        ("mlp", MLPCritic),
        ({"name": "mlp", "width": 6}, MLPCritic),
        ("critics.py:Mine", nn.Module),
        ({"name": "critics.py:made", "width": 6}, nn.Module),
    ],
    ids=str,
)
def test_a_critic_is_named_has_options_or_is_a_file_beside_the_recipe(critic: Any, kind: type, tmp_path: Path) -> None:
    made = objective_of(recipe(tmp_path, critic=critic)).critic
    assert isinstance(made, kind)
    if isinstance(critic, dict):
        assert next(made.parameters()).shape[0] == 6
    if "critics" in str(critic):
        assert type(made).__name__ == "Mine"


def test_noise_on_its_rows_is_a_word_or_has_options(tmp_path: Path) -> None:
    plain, own = (objective_of(recipe(tmp_path, diffused=said)).critic for said in (True, {"sd": 0.3}))
    assert isinstance(plain, Diffused)
    assert isinstance(own, Diffused)
    assert (plain.sd, own.sd) == (0.05, 0.3)
    assert "2206.02262" in fewstep.cite(recipe(tmp_path, diffused={"sd": 0.3}))
    assert "2206.02262" not in fewstep.cite(recipe(tmp_path))


def test_it_stands_around_any_method_also_around_another_that_does(tmp_path: Path) -> None:
    ctm = objective_of(recipe(tmp_path), objective__base="{name: CTM, ema: 0.9}")
    assert isinstance(ctm.base, CTM)
    around = objective_of(recipe(tmp_path), objective__base="{name: Corrected, base: AYF}")
    assert isinstance(around.base, Corrected)
    assert isinstance(around.base.base, AYF)
    student = build(load_recipe(recipe(tmp_path), {"objective.base": "Corrected"})).student
    around.adopt(student)
    assert list(around.parameter_groups(student)) == ["student", "fake", "critic"]
    word = objective_of({**RECIPE, "objective": {"name": "ITVM", "ema": 0.8, "finish": "adversarial"}})
    assert isinstance(word.base, ITVM)
    assert word.base.ema == 0.8


@pytest.mark.takes_seconds
def test_the_command_line_trains_it_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["distill", str(recipe(tmp_path)), "--objective.critic.name", "mlp", "--objective.critic.width", "6"]
    assert cli.main([*words, "--objective.diffused", "true", "--out", str(out)]) == 0
    lines = (out / "metrics.jsonl").read_text()
    for name in ("loss/critic", "loss/adversarial", "loss/critic_noise", "grad_norm/critic", "loss/interval"):
        assert f'"{name}"' in lines
    assert cli.main([*words, "--objective.diffused", "true", "--out", str(out), "--steps", "6"]) == 0
    assert "6" in (out / "metrics.jsonl").read_text()
    capsys.readouterr()


def test_a_teacher_with_a_network_is_a_critic(tmp_path: Path) -> None:
    tree = {**RECIPE, "teacher": "fewstep:fashion-mnist", "student": "auto", "data": "fashion-mnist"}
    critic = {"name": "teacher", "width": 8}
    made = objective_of({**tree, "objective": {**RECIPE["objective"], "critic": critic, "base": "ITVM"}}).critic
    assert isinstance(made, TeacherCritic)
    assert len(made.layers) == 3


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"critic": "konv"}, "unknown critic 'konv': did you mean 'conv'"),
        ({"critic": {"name": "mlp", "widht": 2}}, "did you mean 'objective.critic.width'"),
        ({"critic": "conv"}, "critic conv is for images"),
        ({"critic": "teacher"}, "needs a teacher with a network"),
        ({"critic": "critics.py:None"}, "unknown name in"),
        ({"critic": "critics.py:number"}, "gave a int, and a critic is a torch module"),
        ({"loss": "wasserstein"}, "unknown loss of Adversarial"),
        ({"weight": 0}, "weight is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(objective: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        objective_of(recipe(tmp_path, **objective))


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_where_the_teacher_makes_the_data_there_are_no_real_rows(inside: bool, tmp_path: Path) -> None:
    objective: Any = {"name": "Adversarial", "base": "ITVM"}
    objective = {"name": "Corrected", "base": objective} if inside else objective
    tree = {**RECIPE, "data": {"name": "teacher", "count": 64, "steps": 2}, "objective": objective}
    with pytest.raises(
        ValueError, match="Adversarial sets what the student makes against real rows, and data: teacher"
    ):
        load_recipe(tree)
    assert load_recipe({**tree, "objective": "Corrected"}).data.name == "teacher"
