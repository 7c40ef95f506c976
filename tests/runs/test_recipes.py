"""The recipe: what it takes, what it refuses and how, and that it reads back as it was written."""

import inspect
import shutil
from pathlib import Path

import pytest
import yaml

from fewstep.runs import recipes as config
from fewstep.runs.recipe import Recipe, Training
from fewstep.runs.recipes import describe, find_recipe, known_recipes, load_recipe
from fewstep.training.fingerprint import check_recipe
from fewstep.training.fit import fit
from fewstep.training.folder import begin

SMALL = {
    "name": "small",
    "teacher": "checkerboard",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "checkerboard",
    "objective": "ITVM",
    "training": {"steps": 5},
}


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_that_comes_along_is_valid_and_reads_back_the_same(name: str) -> None:
    overrides = {
        "distill": {"teacher": "checkerboard", "student": "mlp"},
        "finetune": {"teacher": "checkerboard", "data": "checkerboard"},
        "diff-tuning": {"teacher": "checkerboard", "data": "checkerboard"},
    }.get(name, {})
    recipe = load_recipe(name, overrides)
    assert recipe.name == name
    assert load_recipe(yaml.safe_load(recipe.as_yaml())) == recipe
    assert describe(known_recipes()[name])


def test_training_has_the_options_of_fit_and_its_defaults() -> None:
    others = {"student", "objective", "data", "seed", "out", "callbacks", "fingerprint", "resume"}
    options = {n: p.default for n, p in inspect.signature(fit).parameters.items() if n not in others}
    fields = {name: field.default for name, field in Training.model_fields.items()}
    assert fields == options


def test_short_forms_are_the_long_ones() -> None:
    recipe = load_recipe(SMALL)
    assert recipe.teacher is not None
    assert (recipe.teacher.source, recipe.data.name, recipe.objective.name) == ("checkerboard", "checkerboard", "ITVM")
    long = {
        **SMALL,
        "teacher": {"source": "checkerboard"},
        "data": {"name": "checkerboard"},
        "objective": {"name": "ITVM"},
    }
    assert load_recipe(long) == recipe


def test_the_defaults_of_the_method_are_filled_in() -> None:
    options = load_recipe({**SMALL, "objective": {"name": "ITVM", "ema": 0.5}}).objective.options
    assert options["ema"] == 0.5
    assert "terminal_weight" in options
    assert "teacher" not in options


def test_overrides_are_yaml_and_open_short_forms() -> None:
    overrides = {
        "objective.ema": "0.5", "training.lr": "3e-4", "steps": "7", "teacher": "eight-gaussians", "seed": "3",
        "data": "eight-gaussians", "evaluation.steps": "[1, 3]", "student.options.width": "8", "training.clip": "null",
    }  # fmt: skip
    recipe = load_recipe(SMALL, overrides)
    assert recipe.objective.options["ema"] == 0.5
    assert (recipe.training.lr, recipe.training.steps, recipe.training.clip) == (3e-4, 7, None)
    assert recipe.teacher is not None
    assert (recipe.teacher.source, recipe.data.name, recipe.seed) == ("eight-gaussians", "eight-gaussians", 3)
    assert recipe.evaluation.steps == (1, 3)
    assert recipe.student.options == {"width": 8, "depth": 2}
    assert SMALL["student"] == {"network": "mlp", "options": {"width": 16, "depth": 2}}  # nothing given is changed


def test_another_method_or_network_starts_from_its_own_defaults() -> None:
    tree = {**SMALL, "objective": {"name": "ITVM", "target": "step"}, "student": {**SMALL["student"], "path": "vp"}}  # pyright: ignore
    recipe = load_recipe(tree, {"objective.diagonal": "0.75", "objective": "LMD", "student": "unet"})
    assert recipe.objective.name == "LMD"
    assert recipe.objective.options["diagonal"] == 0.75
    assert "target" not in recipe.objective.options
    assert (recipe.student.network, recipe.student.options, recipe.student.path) == ("unet", {}, "vp")
    assert load_recipe(tree, {"objective": "ITVM"}).objective.options["target"] == "step"


def test_teacher_none_is_no_teacher() -> None:
    for teacher in ("none", None, {"source": "none"}):
        assert load_recipe({**SMALL, "teacher": teacher, "objective": "FlowMatching"}).teacher is None
    assert load_recipe(SMALL, {"teacher": "none", "objective": "FlowMatching"}).teacher is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"training.stpes": "3"},
            "unknown recipe key 'training.stpes': did you mean 'training.steps'? Known: accumulate",
        ),
        ({"lr": "1"}, "unknown recipe key 'lr': did you mean 'training.lr'?"),
        ({"foo": "1"}, "unknown recipe key 'foo': Known: blocks, coupling, data, drop, evaluation, name, objective"),
        ({"objective": "ITMV"}, "unknown objective 'ITMV': did you mean 'ITVM'?"),
        ({"objective.emma": "0.9"}, "unknown recipe key 'objective.emma': did you mean 'objective.ema'?"),
        ({"objective.ema": "high"}, "objective.ema is 'high': input should be a valid number"),
        ({"student.network": "mpl"}, "unknown network 'mpl': did you mean 'mlp'? Known: auto, continuous, conv1d, mlp"),
        ({"student.path": "linaer"}, "unknown path 'linaer': did you mean 'linear'?"),
        ({"training.steps": "0"}, "training.steps is 0: input should be greater than 0"),
        ({"training.steps": "2.5"}, "training.steps is 2.5: input should be a valid integer"),
        ({"training.steps": "null"}, "training.steps or training.max_seconds is needed"),
        ({"training.steps": "true"}, "training.steps is True: input should be a number"),
        ({"training.lr": "on"}, "training.lr is True: input should be a number"),
        ({"objective.terminal_weight": ".nan"}, "objective.terminal_weight is nan: input should be a finite number"),
        ({"objective.ema": "false"}, "objective.ema is False: input should be a number"),
        ({"training.compile": "ja"}, "training.compile is 'ja': input should be true or false"),
        ({"training.ema": "1.0"}, "training.ema is 1.0: input should be less than 1"),
        ({"training": "3"}, "training is 3: input should be a valid dictionary"),
        ({"seed.x": "1"}, "seed is {'x': 1}: input should be a valid integer"),
        ({"name.x": "1"}, "unknown recipe key 'name.x': name is 'small', which has no keys inside"),
        ({"teacher.guidance.scale": "2"}, "teacher.guidance is {'scale': 2}: guidance needs null conditions, such as"),
        ({"evaluation.count": "3"}, "evaluation.count is 3: 4 samples at least"),
        ({"teacher": "none"}, "ITVM distills a teacher and there is none"),
        ({"teacher": "none", "objective": "FlowMatching", "student": "auto"}, "student.network is auto"),
        ({"objective": "json:Nothing"}, "unknown name in json 'Nothing'"),
        ({"objective": "no_such_module:Loss"}, "'no_such_module:Loss': no module 'no_such_module' is installed"),
        ({"seed": "[1"}, "seed: '[1' cannot be read as a YAML value"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(SMALL, overrides)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'checkerboard-itvm'"):
        find_recipe("checkerboard-itm")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_recipe(SMALL, {"objective": "./nowhere.py:Loss"})
    broken = tmp_path / "broken.yaml"
    broken.write_text("training: {steps: 3\n")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(broken)
    broken.write_text("- 1\n")
    with pytest.raises(ValueError, match="is no recipe"):
        load_recipe(broken)


def test_a_method_and_files_of_ones_own_are_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fewstep.objectives.itvm import ITVM\n\n\nclass Mine(ITVM):\n"
        "    def __init__(self, teacher, strength: float = 2.0):\n        super().__init__(teacher)\n"
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**SMALL, "objective": "mine.py:Mine"}))
    recipe = load_recipe(tmp_path / "mine.yaml", {"objective.strength": "3"})
    assert recipe.objective.name == f"{tmp_path}/mine.py:Mine"
    assert recipe.objective.options == {"strength": 3.0}
    with pytest.raises(ValueError, match=r"unknown recipe key 'objective\.weight'.*Known: strength"):
        load_recipe(tmp_path / "mine.yaml", {"objective.weight": "3"})


def test_the_fingerprint_leaves_out_what_changes_no_weight() -> None:
    first = load_recipe(SMALL)
    assert load_recipe(SMALL, {"name": "other", "evaluation.count": "7"}).fingerprint() == first.fingerprint()
    assert load_recipe(SMALL, {"objective.ema": "0.7"}).fingerprint() != first.fingerprint()


def test_every_key_says_what_it_is() -> None:
    sections = [Recipe, *(f.annotation for f in Recipe.model_fields.values() if isinstance(f.annotation, type))]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description or section.__name__ == "Named", f"{section.__name__}.{name}"


def test_runs_of_long_ago_have_null_options_that_are_no_more() -> None:
    recipe = load_recipe({**SMALL, "objective": {"name": "AYF", "strength": None, "ramp": 0.9}})
    assert "strength" not in recipe.objective.options
    assert recipe.objective.options["ramp"] == 0.9
    with pytest.raises(ValueError, match=r"unknown recipe key 'objective.strength'"):
        load_recipe({**SMALL, "objective": {"name": "AYF", "strength": [1, 3]}})


GUIDED = {"scale": 2.0, "null": {"class_labels": 10}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"student": {"network": "mlp", "image": 1}}, r"student.image changes the network of the teacher.* say auto"),
        ({"student": {"network": "mlp", "conversion": "none"}}, r"student.conversion changes .* is mlp: say auto"),
        ({"student": {"network": "mlp", "guidance": True}}, r"no strengths to learn: say teacher.guidance.range"),
        (
            {
                "teacher": {"source": "checkerboard", "guidance": {**GUIDED, "range": [1, 3]}},
                "student": {"network": "mlp", "guidance": True, "kind": "field"},
            },
            r"student.guidance is for flow maps, and student.kind is field",
        ),
        (
            {"teacher": {"source": "checkerboard", "guidance": {**GUIDED, "range": [3, 5]}}},
            r"the scale 2, at which the student is judged, is outside the range \[3.0, 5.0\]",
        ),
    ],
)
def test_what_would_come_to_nothing_is_refused(tree: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_recipe({**SMALL, **tree})


def test_a_recipe_whose_code_is_not_there_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout has examples beside its recipes, a wheel has none."""
    assert "mnist-vit-itvm" in known_recipes()
    monkeypatch.chdir(tmp_path)  # they are found from anywhere
    assert load_recipe("mnist-vit-itvm").student.network.endswith("examples/mnist_vit.py:student")
    shutil.copytree(Path(config.__file__).parents[2] / "recipes", tmp_path / "fewstep" / "recipes")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "fewstep" / "runs" / "recipes.py"))
    assert "checkerboard-itvm" in known_recipes()
    assert "mnist-vit-itvm" not in known_recipes()
    with pytest.raises(FileNotFoundError, match="there is no recipe 'mnist-vit-itvm'"):
        load_recipe("mnist-vit-itvm")


def test_a_key_that_had_another_name_is_taken_by_it_with_a_note() -> None:
    guidance = {"scale": 3.5, "told": True}
    tree = {"name": "x", "teacher": {"source": "checkerboard", "guidance": guidance}, "data": "checkerboard"}
    with pytest.warns(UserWarning, match="the key told of a recipe is now called embedded"):
        recipe = Recipe.model_validate({**tree, "objective": "ITVM"})
    assert recipe.teacher is not None
    assert recipe.teacher.guidance is not None
    assert recipe.teacher.guidance.embedded is True
    assert recipe.as_dict()["teacher"]["guidance"]["embedded"] is True
    assert "told" not in recipe.as_dict()["teacher"]["guidance"]


def test_a_run_of_before_a_key_was_renamed_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    begin(out, {"seed": 0, "teacher.guidance.told": True, "teacher.guidance.scale": 3.5})
    now = {"seed": 0, "teacher": {"guidance": {"embedded": True, "scale": 3.5}}}
    check_recipe(out, now)
    now["teacher"]["guidance"]["embedded"] = False  # pyright: ignore[reportIndexIssue, reportArgumentType]
    with pytest.raises(ValueError, match=r"teacher\.guidance\.embedded is True there and False here"):
        check_recipe(out, now)
