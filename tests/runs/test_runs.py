"""Whole runs: what is built from a recipe, that it fits together, and that a folder gives back what was trained."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys import families as family_toys

import fewstep
from fewstep.evaluation import evaluate as evaluation
from fewstep.evaluation.extractor import SmallClassifier
from fewstep.evaluation.results import Evaluation
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, VariancePreserving
from fewstep.flows.signature import classes_of, shape_of
from fewstep.generation.drawing import draw
from fewstep.generation.teacher_samples import TeacherSamples
from fewstep.networks import MLP, TwoTimeUNet, UNet
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.loading import load_run, open_run
from fewstep.runs.recipes import known_recipes, load_recipe
from fewstep.runs.run import evaluate_run, run

POINTS: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 16, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 6, "batch": 32, "quiet": True},
    "evaluation": {"steps": [1, 2], "teacher_steps": [2], "count": 20},
}
IMAGES: dict[str, Any] = {
    "name": "images",
    "data": "digits",
    "objective": "FlowMatching",
    "student": {
        "network": "unet",
        "options": {
            "block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2, "num_class_embeds": 10,
            "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "attention_head_dim": 4,
        },
    },
    "training": {"steps": 3, "batch": 8, "quiet": True},
    "evaluation": {"steps": [1, 2], "teacher_steps": [2], "count": 8, "extractor": "none"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MEASURED", 8)
    monkeypatch.setattr(watch, "_POINTS", 64)
    monkeypatch.setattr(judge, "_POINTS", 64)
    monkeypatch.setattr(watch, "teacher_states", partial(watch.teacher_states, steps=2))
    monkeypatch.setattr(evaluation, "_SOLVE", 2)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image teacher, trained."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    run(load_recipe(IMAGES), out)
    return out


@pytest.mark.takes_seconds
def test_a_run_leaves_a_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(load_recipe(POINTS, {"evaluation.every": "2"}), out)
    assert done.result.stopped == "done"
    assert sorted(f.name for f in out.iterdir()) == [
        "checkpoints", "metrics.jsonl", "quality.json", "quality.png", "recipe.yaml", "report.html", "run.json",
        "samples",
    ]  # fmt: skip
    assert [f.name for f in sorted((out / "samples").iterdir())] == [f"step-0000000{n}.png" for n in (2, 4, 6)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("rmse@1", "error_median@1", "error_99@1"):
        assert [line["step"] for line in lines if name in line] == [2, 4, 6]
    assert load_recipe(out).student.options == {"width": 16, "depth": 2}
    assert done.evaluation is not None
    kept = Evaluation.from_json((out / "quality.json").read_text())
    assert kept.rows == done.evaluation.rows
    assert [(r["model"], r["steps"]) for r in kept.rows] == [("student", 1), ("student", 2), ("teacher", 2)]
    assert "fewstep sample" in (out / "report.html").read_text()


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("share", "count"), [(1e9, 8), (0.0, 1)])
def test_a_grid_at_each_eighth_as_far_as_the_time_of_the_training_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, count: int
) -> None:
    monkeypatch.setattr(watch, "_SHARE", share)
    run(load_recipe(POINTS, {"steps": "16", "evaluation.count": "0"}), tmp_path / "run")
    drawn = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert len(drawn) == count
    assert drawn[-1] == "step-00000016.png"  # the last is always drawn


def test_the_folder_gives_back_the_averaged_weights(tmp_path: Path) -> None:
    done = run(load_recipe(POINTS, {"evaluation.count": "0"}), tmp_path / "run")
    for load in (load_run, fewstep.load):
        model = load(tmp_path / "run")
        assert isinstance(model, FlowMap)
        for name, value in done.result.ema.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    trained = open_run(tmp_path / "run")
    assert (trained.step, trained.shape, trained.recipe.name) == (6, (2,), "points")


@pytest.mark.takes_seconds
def test_a_run_goes_on_and_refuses_another_recipe(tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = {"evaluation.count": "0"}
    run(load_recipe(POINTS, few), out)
    longer = run(load_recipe(POINTS, {**few, "steps": "9"}), out)
    assert longer.result.step == 9
    assert load_recipe(out).training.steps == 9
    with pytest.raises(ValueError, match=r"belongs to another recipe: objective\.ema is 0\.5 there and 0\.7 here"):
        run(load_recipe(POINTS, {**few, "objective.ema": "0.7"}), out)
    assert load_recipe(out).objective.options["ema"] == 0.5  # the folder still says what it holds
    assert run(load_recipe(POINTS, {**few, "objective.ema": "0.7"}), out, fresh=True).result.step == 6
    assert load_recipe(out).objective.options["ema"] == 0.7


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no fewstep run"):
        run(load_recipe(POINTS), tmp_path, fresh=True)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_run_and_no_checkpoint_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        open_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(load_recipe(POINTS).as_yaml())
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        open_run(tmp_path)


def test_first_weights_come_from_the_seed_alone() -> None:
    def weights(seed: str) -> torch.Tensor:
        return next(build(load_recipe(POINTS, {"seed": seed})).student.parameters())

    before = torch.get_rng_state()
    first = weights("1")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(weights("1"), first)
    assert not torch.equal(weights("2"), first)


def test_a_student_from_scratch_is_a_stock_flow_match_model() -> None:
    built = build(load_recipe(IMAGES))
    student = built.student
    assert isinstance(student, NetworkField)
    assert isinstance(student.network, UNet)
    assert student.prediction == "flow"
    assert student.native.network_time(torch.tensor([0.0, 0.75])).tolist() == [1000.0, 250.0]
    assert (shape_of(student), classes_of(student)) == ((1, 8, 8), 10)


def test_a_student_starts_as_its_teacher(teacher_run: Path) -> None:
    recipe = load_recipe({**IMAGES, "teacher": str(teacher_run), "student": "auto", "objective": "ITVM"})
    built = build(recipe)
    assert isinstance(built.student, FlowMap)
    assert isinstance(built.student.network, TwoTimeUNet)
    assert built.teacher is not None
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        expected = load_run(teacher_run).velocity(x, t, class_labels=labels)
        torch.testing.assert_close(built.student.velocity(x, t, class_labels=labels), expected, rtol=0, atol=2e-6)
    assert all(p.requires_grad for p in built.student.parameters())
    assert not any(p.requires_grad for p in built.teacher.parameters())


def test_fine_tuning_starts_from_a_copy_of_the_teacher(teacher_run: Path) -> None:
    built = build(load_recipe({**IMAGES, "teacher": str(teacher_run), "student": "auto"}))
    assert isinstance(built.student, NetworkField)
    assert all(p.requires_grad for p in built.student.parameters())
    ours, theirs = next(built.student.parameters()), next(load_run(teacher_run).parameters())
    assert torch.equal(ours, theirs)


def test_a_named_network_takes_the_teachers_weights_or_says_how_not_to(teacher_run: Path) -> None:
    tree = {**IMAGES, "teacher": str(teacher_run), "objective": "ITVM"}
    same = build(load_recipe(tree)).student
    assert torch.equal(next(same.parameters()), next(load_run(teacher_run).parameters()))
    wider = {"student.options.block_out_channels": "[8, 8]"}
    with pytest.raises(ValueError, match=r"student\.weights: random"):
        build(load_recipe(tree, wider))
    other = build(load_recipe(tree, {**wider, "student.weights": "random"})).student
    assert isinstance(other.network, TwoTimeUNet)


def test_paths_of_teacher_and_student_are_brought_together() -> None:
    built = build(load_recipe(POINTS, {"student.path": "vp"}))
    assert built.teacher is not None
    assert built.student.path == built.teacher.path == VariancePreserving()
    assert build(load_recipe(POINTS)).student.path == Linear()


def test_guidance_is_around_the_teacher(teacher_run: Path) -> None:
    guided = {"source": str(teacher_run), "guidance": {"scale": 2.0, "null": {"class_labels": 0}}}
    built = build(load_recipe({**IMAGES, "teacher": guided, "student": "auto", "objective": "ITVM"}))
    assert isinstance(built.teacher, Guided)
    assert built.teacher.scale == 2.0
    assert isinstance(built.student, FlowMap)


def test_networks_teachers_and_methods_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fewstep.flows.exact import eight_gaussians\nfrom fewstep.networks import MLP\n"
        "from fewstep.objectives import LMD\n\n\n"
        "class Own(MLP):\n    with_second_time = None\n\n\n"
        "def net(width: int = 8):\n    return Own(2, width=width, depth=2, times=2)\n\n\n"
        "def teacher(shift: float = 0.0):\n    return eight_gaussians()\n\n\n"
        "class Loss(LMD):\n    pass\n"
    )
    mine = tmp_path / "mine.py"
    tree = {
        **POINTS,
        "teacher": {"source": f"{mine}:teacher", "options": {"shift": 1.0}},
        "student": {"network": f"{mine}:net", "options": {"width": 4}},
        "objective": f"{mine}:Loss",
    }
    run(load_recipe(tree, {"evaluation.count": "0"}), tmp_path / "run")
    model = load_run(tmp_path / "run")
    assert isinstance(model, FlowMap)
    assert isinstance(model.network, MLP)
    assert model.network.config["width"] == 4
    with pytest.raises(ValueError, match=r"unknown recipe key 'student.options.wdth': did you mean"):
        build(load_recipe({**tree, "student": {"network": f"{mine}:net", "options": {"wdth": 4}}}))
    with pytest.raises(ValueError, match=r"unknown name in .*'techer': did you mean 'teacher'"):
        build(load_recipe({**tree, "teacher": f"{mine}:techer"}))
    with pytest.raises(ValueError, match="gave a Own, not a VelocityField"):
        build(load_recipe({**tree, "teacher": f"{mine}:net"}))


@pytest.mark.parametrize(
    ("tree", "overrides", "said"),
    [
        (POINTS, {"data": "digits"}, "mlp takes points"),
        (IMAGES, {"data": "checkerboard"}, "unet takes images"),
        (POINTS, {"data": "digts"}, "unknown data set 'digts': did you mean 'digits'"),
        (POINTS, {"data": "photos"}, "vorticity; and nothing is at that path here"),
        (POINTS, {"teacher": "my-ddpm"}, "spiral; and nothing is at that path here"),
        (POINTS, {"teacher": "chekerboard"}, "unknown teacher 'chekerboard': did you mean 'checkerboard'"),
        (POINTS, {"teacher": "fewstep:nothing"}, "unknown packaged model 'nothing'"),
        (POINTS, {"student": "auto"}, "MixtureField has none"),
        (POINTS, {"student.weights": "teacher"}, "the teacher has no network"),
        (POINTS, {"student.prediction": "dta"}, "unknown prediction kind 'dta': did you mean 'data'"),
        (POINTS, {"student.kind": "field"}, "ITVM trains a FlowMap, not a NetworkField"),
        (IMAGES, {"teacher": "checkerboard"}, "the teacher does not take the data 'digits' of shape (1, 8, 8) and "
            "conditions class_labels: it is for samples of shape (2,)"),
        (IMAGES, {"student.options.in_channels": "3"}, "this UNet2DModel takes 3 channels, the state has 1"),
        (IMAGES, {"student.options.out_channels": "3"}, "the network UNet returned (2, 3, 8, 8) for x (2, 1, 8, 8)"),
        (IMAGES, {"student.options.num_class_embeds": "5"}, "has class_labels up to 9, the student only 0 to 4"),
        (IMAGES, {"student.options.num_class_embeds": "null"}, "the student does not take the data 'digits'"),
        (IMAGES, {"data.labels": "false"}, "has 10 classes, and the data 'digits' has no class_labels"),
        (IMAGES, {"data": "teacher"}, "data: teacher is what a teacher says, and there is none: name a data set"),
        (POINTS, {"student.options.classes": "3"}, "the student has 3 classes"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_before_anything_runs(
    tree: dict[str, Any], overrides: dict[str, str], said: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build(load_recipe(tree, overrides))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_the_evaluation_is_said_before_the_training(tmp_path: Path) -> None:
    wrong = [
        ({"evaluation.data": "digits"}, ValueError, "differ in the shape"),
        ({"evaluation.data": "digts"}, ValueError, "unknown data set 'digts'"),
        ({"evaluation.extractor": "./inception.pth"}, FileNotFoundError, "no file ./inception.pth"),
    ]
    for overrides, kind, said in wrong:
        with pytest.raises(kind, match=said):
            run(load_recipe(POINTS, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_flow_map_is_no_teacher(tmp_path: Path) -> None:
    run(load_recipe(POINTS, {"evaluation.count": "0"}), tmp_path / "map")
    with pytest.raises(ValueError, match="is a flow map"):
        build(load_recipe({**POINTS, "teacher": str(tmp_path / "map")}))


@pytest.mark.takes_seconds
def test_samples_of_the_teacher_stand_in_for_data(teacher_run: Path, tmp_path: Path) -> None:
    data = {"name": "teacher", "count": 12, "steps": 2}
    tree = {**IMAGES, "teacher": str(teacher_run), "student": "auto", "objective": "ITVM", "data": data}
    run(load_recipe(tree, {"evaluation.count": "0"}), tmp_path / "run")
    with np.load(tmp_path / "run" / "teacher-samples.npz") as kept:
        samples, labels = kept["data"], kept["class_labels"]
    assert samples.shape == (12, 1, 8, 8)
    expected, _, calls = draw(load_run(teacher_run), 12, 2, solver="heun", labels=labels.tolist())
    assert calls == 4
    np.testing.assert_allclose(samples, expected.numpy(), atol=1e-5)
    # A second start reads them: what is in the file is what is used.
    np.savez(tmp_path / "run" / "teacher-samples.npz", data=0 * samples, class_labels=labels)
    again = build(load_recipe(tree), tmp_path / "run").data
    assert not again.rows(torch.arange(12), torch.Generator()).data.any()


def test_samples_of_an_exact_teacher_are_its_data() -> None:
    data = TeacherSamples(CheckerboardField(), count=400, steps=40)
    points = data.rows(torch.arange(400), torch.Generator()).data
    assert data.shape == (2,)
    boxes = CheckerboardField().boxes
    inside = ((points[:, None] > boxes[..., 0] - 0.1) & (points[:, None] < boxes[..., 1] + 0.1)).all(-1).any(-1)
    assert inside.float().mean() > 0.95


def test_a_sample_does_not_depend_on_count_or_batch(teacher_run: Path) -> None:
    model = FlowMap.from_field(load_run(teacher_run))  # pyright: ignore[reportArgumentType]
    many, cond, calls = draw(model, 12, 2, seed=3, gamma=0.5)
    few, *_ = draw(model, 7, 2, seed=3, gamma=0.5, batch=2)
    torch.testing.assert_close(few, many[:7], rtol=0, atol=1e-5)
    assert calls == 2
    assert cond["class_labels"].tolist() == [*range(10), 0, 1]
    other, *_ = draw(model, 7, 2, seed=4, gamma=0.5)
    assert not torch.allclose(other, few, atol=1e-2)
    for wrong, said in (({"labels": [10]}, "0 to 9"), ({"steps": 0}, "steps is 0"), ({"count": 0}, "count is 0")):
        with pytest.raises(ValueError, match=said):
            draw(model, **{"count": 2, "steps": 1, **wrong})


@pytest.mark.takes_seconds
def test_evaluate_run_measures_what_is_asked(tmp_path: Path) -> None:
    run(load_recipe(POINTS, {"evaluation.count": "0"}), tmp_path / "run")
    found = evaluate_run(tmp_path / "run", device="cpu", steps=[3], teacher_steps=[1], count=10)
    assert found is not None
    assert [(row["model"], row["steps"]) for row in found.rows] == [("student", 3), ("teacher", 1)]
    assert found.facts["count"] == 10
    assert (tmp_path / "run" / "quality.png").is_file()


@pytest.mark.takes_seconds
def test_images_are_judged_by_a_classifier_of_their_labels(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def untrained(data: Any, **_: Any) -> SmallClassifier:
        asked.append(data)
        return SmallClassifier(data.shape, 10).eval()

    monkeypatch.setattr(judge, "trained_classifier", untrained)
    tree = {**IMAGES, "teacher": str(teacher_run), "student": "auto", "objective": "ITVM"}
    done = run(load_recipe(tree, {"evaluation.extractor": "auto"}), tmp_path / "run")
    assert done.evaluation is not None
    assert {"fd", "accuracy", "rmse"} <= set(done.evaluation.rows[0])
    assert len(asked) == 1


@pytest.mark.takes_seconds
def test_a_run_that_is_judged_by_other_rows_hands_over_those_it_was_trained_on(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, rows in (("own", 300), ("other", 200)):
        np.save(tmp_path / f"{name}.npy", draw.normal(size=(rows, 3)).astype(np.float32))
    tree = {
        "data": str(tmp_path / "own.npy"), "objective": "FlowMatching", "name": "x",
        "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
        "training": {"steps": 2, "batch": 8, "quiet": True},
        "evaluation": {"data": str(tmp_path / "other.npy"), "count": 100, "steps": [1]},
    }  # fmt: skip
    done = run(load_recipe(tree), tmp_path / "run")
    assert done.evaluation is not None
    assert list(done.evaluation.rows[0])[3:] == ["sliced_w2", "energy", "memorisation"]
    assert done.evaluation.facts["training"] == 300
    assert "memorisation" in done.evaluation.floor
    assert "memorisation" in (tmp_path / "run" / "report.html").read_text()
    again = evaluate_run(tmp_path / "run", device="cpu", metrics=["memorisation"])
    assert again is not None
    assert again.rows == [{k: done.evaluation.rows[0][k] for k in ("model", "steps", "nfe", "memorisation")}]
    same = evaluate_run(tmp_path / "run", device="cpu", data=str(tmp_path / "other.npy"))
    assert same is not None
    assert "memorisation" not in same.rows[0]  # what it is judged by is what it is said to be trained on


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


# The recipes of published models, and their tiny twins.
TWINS = {"sd15-itvm": "sd", "sdxl-itvm": "sdxl", "sd3-itvm-lora": "sd3", "flux-itvm-lora": "flux"}


def _twin(name: str, folder: Path) -> dict[str, str]:
    """A tiny pipeline in the place of the model of a recipe, and latents with conditions in that of images."""
    pipeline = family_toys.tiny_pipeline(name)
    if name == "flux":  # Flux.1-dev is told the strength of guidance
        pipeline.transformer = family_toys.tiny_model("flux", guidance_embeds=True)
    pipeline.save_pretrained(folder / "model")
    text: Any = fewstep.load(folder / "model").text
    cond = {key: value.numpy() for key, value in text.encode(["cat", "dog"] * 4).items()}
    np.savez(folder / "latents.npz", data=np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype(np.float32), **cond)
    data = {"name": str(folder / "latents.npz"), "key": "data", "conditions": list(cond)}
    return {"teacher.source": str(folder / "model"), "data": json.dumps(data)}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", [name for name in known_recipes() if not name.startswith("plans-")])  # test_maze.py
def test_every_recipe_runs_shortened(
    name: str, teacher_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each recipe as it is, with a network that is small and few steps."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    needed = {
        "distill": {"teacher": str(teacher_run), "student": "mlp"},
        "finetune": {"teacher": str(teacher_run), "data": "digits"},
        "diff-tuning": {
            "teacher": str(teacher_run),
            "data": "digits",
            "objective.samples": "4",
            "objective.steps": "1",
            "objective.null.class_labels": "9",
        },
    }.get(name, {})
    if name in TWINS:
        needed = _twin(TWINS[name], tmp_path)
    recipe = load_recipe(name, needed)
    overrides = {
        "steps": "2", "training.batch": "8", "training.chunk": "8", "training.quiet": "true", "evaluation.count": "8",
        "evaluation.steps": "[1, 2]", "evaluation.extractor": "none", "evaluation.metrics": "null",
    }  # fmt: skip
    if recipe.student.network == "unet":
        blocks = len(recipe.student.options["block_out_channels"])
        overrides |= {"student.options.block_out_channels": str([8] * blocks), "student.options.norm_num_groups": "4"}
        overrides |= {"student.options.attention_head_dim": "4", "student.options.layers_per_block": "1"}
    if name == "photos-teacher":
        overrides |= {"data": str(photos), "data.size": "16"}
    if recipe.teacher is not None:
        overrides |= {"evaluation.teacher_steps": "[2]"}
        if recipe.teacher.source.startswith("runs/") or name == "distill":
            overrides |= {"teacher": str(teacher_run)}
        if name == "text-itvm":
            small = {"student.options": "{width: 16, depth: 1, heads: 2}", "steps": "1", "evaluation.count": "0"}
            run(
                load_recipe("text-teacher", {**small, "training.batch": "8", "training.quiet": "true"}),
                tmp_path / "text",
            )
            overrides |= {"teacher": str(tmp_path / "text")}
        if recipe.teacher.guidance is not None and recipe.teacher.guidance.weak is not None:
            overrides |= {"teacher.guidance.weak": str(teacher_run)}
    overrides |= needed if name in ("finetune", "diff-tuning", *TWINS) else {}
    if name in TWINS:  # no evaluation: images are drawn of prompts, by encoders of six letters
        overrides |= {"evaluation.count": "0", "training.accumulate": "1", "training.precision": "float32"}
    if recipe.data.name == "teacher":
        overrides |= {"data.count": "8", "data.steps": "8" if "states" in recipe.data.options else "1"}
    try:
        done = run(load_recipe(name, overrides), tmp_path / "run")
    except FileNotFoundError as error:
        if "mnist" not in name:  # only those need what may not be here: data, or weights of others
            raise
        pytest.skip(str(error))
    assert done.result.step == 2
    shutil.rmtree(tmp_path / "run")


def test_a_report_draws_no_loss_of_one_point(tmp_path: Path) -> None:
    for every, is_drawn in ((6, False), (3, True)):  # six steps
        out = tmp_path / str(every)
        run(load_recipe(POINTS, {"training.log_every": str(every)}), out)
        assert ("<figcaption>Loss</figcaption>" in (out / "report.html").read_text()) is is_drawn
