"""Objectives around objectives, in recipes and as flags."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.common.trust import code_in
from fewstep.flows.exact import CheckerboardField
from fewstep.objectives import ITVM, ConsistencyDistillation, Corrected
from fewstep.runs.cite import cite
from fewstep.runs.objective import follows_teacher, lora_rank, make_objective, trains_map
from fewstep.runs.recipes import load_recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": "checkerboard",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "checkerboard",
    "training": {"steps": 4, "batch": 64},
}


def test_a_nested_recipe_says_all_options_of_both():
    base = {"name": "ITVM", "ema": 0.5}
    recipe = load_recipe({**SMALL, "objective": {"name": "Corrected", "weight": 0.1, "base": base}})
    assert [section.name for section in recipe.objectives] == ["Corrected", "ITVM"]
    options = recipe.objective.options
    assert (options["weight"], options["fake"], options["base"]["ema"], options["base"]["diagonal"]) == (
        0.1, "copy", 0.5, None,
    )  # fmt: skip
    teacher = CheckerboardField()
    made = make_objective(recipe, teacher)
    assert isinstance(made, Corrected)
    assert isinstance(made.base, ITVM)
    assert (made.weight, made.base.ema, made.teacher) == (0.1, 0.5, teacher)
    assert trains_map(recipe)
    assert follows_teacher(recipe)
    # What is written is read back as the same.
    assert load_recipe(yaml.safe_load(recipe.as_yaml())).as_dict() == recipe.as_dict()


def test_one_word_finishes_the_recipes_own_method():
    plain = load_recipe({**SMALL, "objective": {"name": "ITVM", "ema": 0.5}}, {"objective.finish": "corrected"})
    nested = {"name": "Corrected", "base": {"name": "ITVM", "ema": 0.5}}
    assert plain == load_recipe({**SMALL, "objective": nested})
    told = load_recipe({**SMALL, "objective": "ITVM"}, {"objective.finish": "{name: corrected, weight: 0.7}"})
    assert told.objective.options["weight"] == 0.7
    beside = load_recipe({**SMALL, "objective": "ITVM"}, {"objective.finish": "corrected", "objective.begin": "0.3"})
    assert (beside.objective.options["begin"], "begin" in beside.objective.options["base"]) == (0.3, False)
    none = load_recipe({**SMALL, "objective": {"name": "ITVM", "finish": None}})
    assert none == load_recipe({**SMALL, "objective": "ITVM"})


def test_itvm_inside_a_finish_has_the_times_that_finish_best_unless_it_says_its_own():
    for objective in (
        "Corrected",
        {"name": "ITVM", "finish": "corrected"},
        {"name": "Adversarial", "base": "Corrected"},
    ):
        options = load_recipe({**SMALL, "objective": objective}).objectives[-1].options
        assert (options["ema"], options["times"], options["ends"]) == (0.9, "uniform", 0.25)
    own = load_recipe({**SMALL, "objective": {"name": "Corrected", "base": {"name": "ITVM", "ends": 0.1}}})
    assert [own.objectives[-1].options[name] for name in ("ema", "times", "ends")] == [0.9, "uniform", 0.1]
    for name in ("PSD", "ConsistencyDistillation"):
        inside = load_recipe({**SMALL, "objective": {"name": "Corrected", "base": name}}).objectives[-1]
        assert inside.options == load_recipe({**SMALL, "objective": name}).objective.options


def test_no_finish_is_said_in_any_way():
    plain = load_recipe({**SMALL, "objective": "ITVM"})
    for nothing in ("none", "[]", "null"):
        assert load_recipe({**SMALL, "objective": "ITVM"}, {"objective.finish": nothing}) == plain


def test_options_beside_two_finishes_reach_those_that_take_them():
    said = {"finish": ["corrected", "adversarial"], "begin": 0.3, "critic": "mlp", "fake": "same", "ema": 0.5}
    outer, inner, base = load_recipe({**SMALL, "objective": {"name": "ITVM", **said}}).objectives
    assert (outer.name, inner.name, base.name) == ("Adversarial", "Corrected", "ITVM")
    assert (outer.options["begin"], outer.options["critic"]) == (0.3, "mlp")
    assert (inner.options["begin"], inner.options["fake"], base.options["ema"]) == (0.3, "same", 0.5)
    # A weight of each own, in the entry of one, leaves the one beside for the other.
    said["finish"] = [{"name": "corrected", "weight": 2}, "adversarial"]
    outer, inner, _ = load_recipe({**SMALL, "objective": {"name": "ITVM", **said, "weight": 0.5}}).objectives
    assert (outer.options["weight"], inner.options["weight"]) == (0.5, 2)


def test_flags_reach_inside():
    tree = {**SMALL, "objective": {"name": "Corrected", "base": "ConsistencyDistillation"}}
    recipe = load_recipe(tree, {"objective.base.ema": "0.3", "objective.every": "2"})
    assert recipe.objectives[1].options["ema"] == 0.3
    assert recipe.objective.options["every"] == 2
    made: Any = make_objective(recipe, CheckerboardField())
    assert isinstance(made.base, ConsistencyDistillation)
    # Without a name it is ITVM, as `fewstep distill` has it.
    assert load_recipe({**SMALL, "objective": "Corrected"}).objectives[1].name == "ITVM"


def test_a_base_may_train_from_data_beside_a_corrector_with_the_teacher():
    base = {"name": "MeanFlow", "teacher": "none"}
    recipe = load_recipe({**SMALL, "objective": {"name": "Corrected", "base": base}})
    teacher = CheckerboardField()
    made: Any = make_objective(recipe, teacher)
    assert not made.base.has_teacher
    assert made.teacher is teacher
    assert recipe.student.weights == "random"


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "ITVM", "finish": "korrected"}, "objective.finish 'korrected': did you mean 'corrected'"),
        ({"name": "ITVM", "finish": {"weight": 1}}, "objective.finish is .*which has no name: say name: adversarial"),
        ({"name": "ITVM", "finish": {"name": "corrected", "base": "LMD"}}, "objective.finish has base: 'LMD'"),
        ({"name": "ITVM", "finish": ["corrected", "adversarial"], "weight": 1}, "name: corrected, weight: 1.0"),
        ({"name": "Corrected", "base": 3}, "objective.base is 3: input should be a name, or a mapping"),
        ({"name": "Corrected", "rollout": 2}, r"objective.rollout is 2: input should be a list, such as \[2\]"),
        ({"name": "Adversarial", "critic": 7}, "objective.critic is 7: input should be text or a mapping"),
        ({"name": "Adversarial", "diffused": "much"}, "objective.diffused is 'much': input should be true, false or a"),
        ({"name": "ITVM", "finish": 3}, "unknown objective.finish 3"),
        ({"name": "Corrected", "base": {"name": "ITMV"}}, "unknown objective 'ITMV': did you mean 'ITVM'"),
        ({"name": "Corrected", "base": {"name": "ITVM", "emma": 1}}, "unknown recipe key 'objective.base.emma'"),
        ({"name": "Corrected", "base": [1]}, "objective.base"),
        ({"name": "Corrected", "wait": 1}, "unknown recipe key 'objective.wait': did you mean 'objective.weight'"),
        ({"name": "Corrected", "rollout": "often"}, "objective.rollout is 'often'"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_key(objective: Any, said: str):
    with pytest.raises(ValueError, match=said) as raised:
        load_recipe({**SMALL, "objective": objective})
    assert "\n" not in str(raised.value)


def test_without_a_teacher_the_corrector_says_so():
    tree = {**SMALL, "teacher": "none", "objective": {"name": "Corrected", "base": "MeanFlow"}}
    with pytest.raises(ValueError, match="Corrected distills a teacher and there is none"):
        load_recipe(tree)


def test_the_papers_of_both_are_cited(tmp_path: Path):
    recipe = load_recipe({**SMALL, "objective": {"name": "Corrected", "base": "ITVM"}})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.as_yaml())
    said = cite(file)
    assert all(number in said for number in ("2311.18828", "2505.01169"))


def test_code_is_found_however_deep():
    objective = {"name": "Corrected", "base": {"name": "Adversarial", "critic": "evil.py:Critic", "base": "a.py:B"}}
    assert code_in({"objective": objective}) == {
        "objective.base.critic": "evil.py:Critic",
        "objective.base.base": "a.py:B",
    }
    listed = {"name": "ITVM", "finish": [{"name": "adversarial", "critic": {"name": "evil.py:Critic"}}]}
    assert code_in({"objective": listed}) == {"objective.finish.0.critic.name": "evil.py:Critic"}


def test_how_an_adapter_is_asked_for():
    assert [lora_rank(text) for text in ("lora", "lora(4)", "lora( 16 )", "copy", "lora(0)", "lora()", 3)] == [
        8, 4, 16, None, None, None, None,
    ]  # fmt: skip
