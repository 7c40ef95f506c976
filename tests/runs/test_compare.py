"""Methods trained alike and put side by side: budgets, resuming, failures, and the table."""

import json
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.evaluation import evaluate as evaluation
from fewstep.evaluation.plots import quality_figure
from fewstep.evaluation.results import Evaluation
from fewstep.objectives import MeanFlow
from fewstep.runs import budget, judge
from fewstep.runs import compare as comparing
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.compare import compare_methods, parse_method
from fewstep.runs.objective import make_objective
from fewstep.runs.recipes import load_recipe
from fewstep.runs.side_by_side import Comparison, MethodCost, Training

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "eight-gaussians",
    "objective": {"name": "ITVM", "ema": 0.7},
    "training": {"steps": 4, "batch": 64, "checkpoint_every": 2},
    "evaluation": {"steps": [1, 2], "teacher_steps": [1, 2, 5], "count": 40},
}
# The first step is fine; what then comes is not a number.
NAN = """
from fewstep.objectives import FlowMatching, Loss


class Spoilt(FlowMatching):
    def forward(self, student, batch, *, step=0, **options):
        loss = super().forward(student, batch, step=step, **options)
        return Loss(loss.total * (float("nan") if step == 3 else 1.0), loss.terms, loss.times)


class Broken(FlowMatching):
    def forward(self, student, batch, **options):
        raise RuntimeError("no kernel for this")
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MEASURED", 8)
    monkeypatch.setattr(watch, "_POINTS", 64)
    monkeypatch.setattr(judge, "_report", lambda *_: None)  # of each run, with its images
    monkeypatch.setattr(watch, "teacher_states", partial(watch.teacher_states, steps=2))
    monkeypatch.setattr(evaluation, "_SOLVE", 2)
    monkeypatch.setattr(budget, "_ROUNDS", 1)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(NAN)
    (tmp_path / "tiny.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    return tmp_path / "tiny.yaml"


def compare(recipe: Path, *methods: str, **options: Any) -> tuple[Comparison, list[str]]:
    lines: list[str] = []
    options = {"out": recipe.parent / "side", "say": lines.append, **options}
    few = {"evaluation.steps": "[1, 2]", **options.pop("overrides", {})}
    return compare_methods(recipe, methods, overrides=few, **options), lines


def test_methods_are_read_with_their_options() -> None:
    assert parse_method("LMD").options == {}
    method = parse_method("ITVM:target={interval: 1, step: 2},ema=1e-1")
    assert (method.name, method.options) == ("ITVM", {"target": {"interval": 1, "step": 2}, "ema": 0.1})
    own = parse_method("some/mine.py:Loss:a=none")
    assert (own.name, own.options, own.folder(3)) == ("some/mine.py:Loss", {"a": "none"}, "mine.py-Loss-a=none-seed3")
    assert parse_method("some/mine.py:Loss").name == "some/mine.py:Loss"
    with pytest.raises(ValueError, match="NAME:key=value,key=value is how options are given"):
        parse_method("ITVM:ema,target=step")


@pytest.mark.takes_seconds
def test_two_methods_two_seeds_side_by_side_and_never_trained_twice(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, lines = compare(recipe, "ITVM", "LMD:ends=0.1", seeds=(0, 1), steps=3)
    out = recipe.parent / "side"
    folders = ["ITVM-seed0", "ITVM-seed1", "LMD-ends=0.1-seed0", "LMD-ends=0.1-seed1"]
    files = ["budget.json", "compare.html", "compare.json", "compare.md"]
    pictures = ["energy.png", "histogram_kl.png", "rmse.png", "sliced_w2.png", "error_99.png", "error_median.png"]
    assert sorted(f.name for f in out.iterdir()) == sorted([*folders, *files, *pictures])
    assert len(lines) == 5
    assert lines[1].startswith("ITVM          seed 0  3 steps  loss ")
    kept = load_recipe(out / "LMD-ends=0.1-seed1")
    assert (kept.seed, kept.training.steps, kept.objective.options["ends"]) == (1, 3, 0.1)
    assert load_recipe(out / "ITVM-seed0").objective.options["ema"] != 0.7  # the method's own, not the recipe's

    columns, rows = found.table("rmse")
    assert columns == ["method", "steps", "runs", "time / FM", "memory / FM", "1", "2", "5"]
    assert [row[:3] for row in rows] == [["ITVM", 3, "2"], ["LMD:ends=0.1", 3, "2"], ["teacher", None, None]]
    values = {
        (name, seed, nfe): next(r["rmse"] for r in rows if (r["model"], r["nfe"]) == ("student", nfe))
        for name in ("ITVM", "LMD-ends=0.1")
        for seed in (0, 1)
        for rows in [Evaluation.from_json((out / f"{name}-seed{seed}" / "quality.json").read_text()).rows]
        for nfe in (1, 2)
    }
    pair = [values["LMD-ends=0.1", seed, 2] for seed in (0, 1)]
    assert rows[1][6] == f"{statistics.mean(pair):.4g} ± {statistics.stdev(pair):.2g}"
    assert rows[0][7] is None
    assert "±" in rows[2][7]
    assert f"| {rows[1][6]} |" in (out / "compare.md").read_text()
    assert rows[1][6] in (out / "compare.html").read_text()
    tree = json.loads((out / "compare.json").read_text())
    assert len(tree["rows"]) == 2 * 2 * 2 + 2 * 3
    assert tree["costs"]["ITVM"]["counts"]["trained"] == 1

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done")

    monkeypatch.setattr(comparing, "run", never)
    monkeypatch.setattr(budget, "compare_costs", never)
    again, _ = compare(recipe, "ITVM", "LMD:ends=0.1", seeds=(0, 1), steps=3)
    assert again.rows == found.rows
    assert again.costs == found.costs
    with pytest.raises(ValueError, match="ITVM-seed0 is one of 3 steps, and here it would have 4: use another --out"):
        compare(recipe, "ITVM", steps=4)
    with pytest.raises(ValueError, match=r"ITVM-seed0 belongs to another recipe: training.lr is 0.001 there and 0.01"):
        compare(recipe, "ITVM", steps=3, overrides={"training.lr": "0.01"})


@pytest.mark.takes_seconds
def test_a_method_that_fails_does_not_stop_the_others(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = recipe.parent / "mine.py"
    methods = (f"{mine}:Spoilt", f"{mine}:Broken", "ITVM")
    found, lines = compare(recipe, *methods)
    spoilt, broken, fine = found.runs
    assert (spoilt.outcome, spoilt.evaluation) == ("diverged at step 4", None)
    assert (broken.outcome, broken.failed) == ("failed", "no kernel for this")
    assert fine.evaluation is not None
    assert "diverged at step 4: step 4: loss = nan" in lines[1]
    _, rows = found.table("rmse")
    assert rows[0][2] == "0 of 1: diverged at step 4"
    assert rows[1][2:5] == ["0 of 1: failed", None, None]
    assert "loss = nan" in (recipe.parent / "side" / "compare.md").read_text()

    ran: list[str] = []
    monkeypatch.setattr(comparing, "run", lambda recipe, out: ran.append(recipe.name))
    again, _ = compare(recipe, *methods)
    assert ran == []
    assert again.runs[0].failed == spoilt.failed


def test_a_learning_rate_that_ruins_the_weights_is_said(recipe: Path) -> None:
    found, _ = compare(recipe, "ITVM", steps=3, overrides={"training.lr": "1e38", "training.clip": "null"})
    assert found.runs[0].failed is not None
    assert found.metrics == []
    assert "0 of 1" in (recipe.parent / "side" / "compare.md").read_text()


@pytest.mark.takes_seconds
def test_the_same_time_for_each_is_kept_and_read_back(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = compare(recipe, "ITVM", "LMD", steps=1)
    for name in ("ITVM", "LMD"):  # a run of another length would be refused
        shutil.rmtree(recipe.parent / "side" / f"{name}-seed0")
    file = recipe.parent / "side" / "budget.json"
    budget = json.loads(file.read_text())
    assert found.costs["ITVM"].seconds == budget["base_seconds"] * budget["methods"]["ITVM"]["time"]
    budget["base_seconds"] = 0.01
    budget["methods"]["ITVM"]["time"], budget["methods"]["LMD"]["time"] = 2.0, 4.0
    file.write_text(json.dumps(budget))
    found, _ = compare(recipe, "ITVM", "LMD", seconds=0.12)
    assert [run.steps for run in found.runs] == [6, 3]
    # One that joins is timed in multiples of the same base.
    found, lines = compare(recipe, "LMD", "FlowMatching", seconds=0.12)
    budget = json.loads(file.read_text())
    assert (budget["base_seconds"], budget["methods"]["LMD"]["time"]) == (0.01, 4.0)
    assert lines[0] == "timing a step of FlowMatching"
    assert found.runs[1].steps == round(12 / budget["methods"]["FlowMatching"]["time"])
    with pytest.raises(ValueError, match=r"another recipe \(training.batch differ\)"):
        compare(recipe, "EMD", steps=1, overrides={"training.batch": "32"})


def test_a_method_that_can_trains_without_the_teacher(recipe: Path) -> None:
    found = load_recipe(recipe, {"objective": "{name: MeanFlow, teacher: none}"})
    assert load_recipe(found.as_dict()) == found
    assert found.student.weights == "random"
    built = build(found)
    assert isinstance(built.objective, MeanFlow)
    assert built.teacher is not None
    assert not built.objective.has_teacher
    assert make_objective(load_recipe(recipe, {"objective": "MeanFlow"}), built.teacher).has_teacher
    for objective, said in {
        "{name: ITVM, teacher: none}": "ITVM needs its teacher",
        "{name: MeanFlow, teacher: checkerboard}": "objective.teacher is 'checkerboard': none is all",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_recipe(recipe, {"objective": objective})
    with pytest.raises(ValueError, match=r"student\.network is auto, which starts from the teacher's weights"):
        load_recipe(recipe, {"objective": "{name: MeanFlow, teacher: none}", "student": "auto"})


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (["ITMV"], {}, "did you mean 'ITVM'"),
        (["ITVM:emma=0.5"], {}, "unknown recipe key 'objective.emma'"),
        (["ITVM", "ITVM"], {}, "each once"),
        (["ITVM"], {"seeds": ()}, "at least one is needed"),
        (["ITVM"], {"steps": 3, "seconds": 1.0}, "two budgets"),
        (["ITVM"], {"seconds": 0.0}, "seconds is 0.0"),
        (["ITVM"], {"overrides": {"lr": "1"}}, "did you mean 'training.lr'"),
        (["ITVM"], {"overrides": {"data": "digits"}}, "mlp takes points"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    methods: list[str], options: dict[str, Any], said: str, recipe: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        compare(recipe, *methods, **options)
    assert not (recipe.parent / "side").exists()


@pytest.mark.takes_seconds
def test_the_command(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(recipe.parent)
    words = ["compare", "tiny.yaml", "--methods", "ITVM", "FlowMatching", "--train-steps", "2", "--out", "both"]
    assert main([*words, "--set", "evaluation.count=20", "training.batch=32", "evaluation.teacher_steps=[1]"]) == 0
    out, err = capsys.readouterr()
    assert all(
        word in out for word in ("RMSE to the end points", "ITVM", "FlowMatching", "teacher", "both/compare.html")
    )
    assert "FlowMatching  seed 0  2 steps" in err
    assert "fewstep sample both/ITVM-seed0" in err
    judged = load_recipe("both/ITVM-seed0").evaluation
    assert (judged.count, judged.steps) == (20, (1, 2, 4, 8, 16))
    assert main(["compare", "both/ITVM-seed0", "both/FlowMatching-seed0", "--out", "runs"]) == 0  # the old way
    assert main(["compare", "tiny.yaml", "other.yaml", "--methods", "ITVM"]) == 2
    assert main([*words, "--set", "training.lr"]) == 2
    assert "KEY=VALUE is needed" in capsys.readouterr().err


def test_the_figure_of_many_methods_and_of_a_value_that_is_not_finite() -> None:
    rows = [{"model": f"m{i}", "nfe": n, "rmse": float(i + n)} for i in range(9) for n in (1, 2)]
    figure = quality_figure([*rows, {"model": "bad", "nfe": 1, "rmse": float("inf")}], "rmse")
    lines = figure.axes[0].get_lines()
    assert len(lines) == 9
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 9
    assert figure.legends


def test_a_table_says_how_many_runs_are_behind_it() -> None:
    def run(seed: int, value: float | None) -> Training:
        rows = [{"model": "student", "steps": 1, "nfe": 1, "rmse": value}]
        failed = (
            None if value is not None else "5 of 9 samples of the student in 1 steps are not finite: it has diverged"
        )
        return Training("A", seed, Path(), 7, failed=failed, evaluation=Evaluation(rows) if value is not None else None)

    found = Comparison([run(0, 1.0), run(1, None), run(2, 3.0)], {"A": MethodCost(0.1, 1.5, 1.25)})
    assert found.table("rmse")[1] == [["A", 7, "2 of 3: diverged in 7 steps", "1.50", "1.25", "2 ± 1.4"]]
    one = Comparison([run(0, 0.12345)], {"A": MethodCost(0.1, 1.5, 1.25)})
    assert one.table("rmse")[1][0][5] == "0.1235"
