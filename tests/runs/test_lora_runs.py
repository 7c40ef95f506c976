"""LoRA in runs: recipes, checkpoints, exports and refusals of adapters that train."""

import json

import pytest
import torch
from toys.adapters import adapted, call, images, points, quick, trained
from toys.unet import tiny_unet

from fewstep.common.errors import TrainingError
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.models.adapter_files import load_adapter, save_adapter
from fewstep.models.lora import add_lora, has_lora
from fewstep.objectives import ITVM
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.loading import load, open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training import checkpoints
from fewstep.training.ema import Ema
from fewstep.training.fingerprint import differences, flat

MLP_SIZE = 2 * 16 + 16 + 64 * 16 + 16 + 16 * 16 + 16 + 16 * 2 + 2


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_average_shares_what_is_frozen():
    """One copy of the base in memory; the adapter's average is the formula's."""
    student = trained(adapted(points(dtype=torch.bfloat16)))
    ema = Ema(student, 0.75)
    mine = dict(ema.module.named_parameters())
    for name, weight in student.named_parameters():
        assert (mine[name] is weight) == (not weight.requires_grad)
        assert mine[name].dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    before = {name: p.detach().clone() for name, p in mine.items()}
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight += 1.0
    ema.update(0)
    for name, weight in mine.items():
        torch.testing.assert_close(weight, before[name] + (0.25 if ".lora_" in name else 0.0))


def test_a_checkpoint_holds_the_adapter_and_the_buffers_alone(tmp_path):
    student = adapted(points())
    student.register_buffer("calls", torch.tensor(5.0))
    quick(student, out=tmp_path, steps=2)
    tensors = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints")).tensors
    moving = {n for n, p in student.named_parameters() if p.requires_grad}
    assert set(tensors["model"]) == set(tensors["ema"]) == moving | {"calls"}
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "checkpoints" / "step-00000002").iterdir()}
    numbers = sum(p.numel() for p in student.parameters() if p.requires_grad) + 1
    assert numbers * 4 < sizes["model.safetensors"] < numbers * 4 + 2000  # the header


def test_with_nothing_frozen_a_checkpoint_holds_all(tmp_path):
    student = points()
    quick(student, out=tmp_path, steps=2)
    found = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints"))
    assert list(found.state["files"]) == [f"{n}.safetensors" for n in ("model", "ema", "optimizer-student")]
    assert sum(value.numel() for value in found.tensors["model"].values()) == MLP_SIZE
    assert "frozen" not in found.state


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    """Dropout, the average and the target among it: stopped after 2 of 5 steps, and not stopped."""
    teacher = points(5)

    def train(out, steps):
        student = adapted(FlowMap.from_field(points()), dropout=0.2)
        return quick(student, ITVM(teacher), out=tmp_path / out, steps=steps, schedule="constant")

    whole = train("whole", 5)
    train("parts", 2)
    parts = train("parts", 5)
    assert parts.step == 5
    for a, b in ((whole.student, parts.student), (whole.ema, parts.ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    last = [tmp_path / out / "checkpoints" / "step-00000005" for out in ("whole", "parts")]
    names = [p.name for p in last[0].iterdir() if p.suffix == ".safetensors"]
    assert {"model.safetensors", "ema.safetensors", "target.safetensors"} <= set(names)
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in names)


def test_another_base_or_a_missing_weight_is_refused(tmp_path):
    quick(adapted(points()), out=tmp_path, steps=2)
    with pytest.raises(ValueError, match="the frozen weights are not those that"):
        quick(adapted(points(seed=1)), out=tmp_path, steps=4)
    path = checkpoints.latest(tmp_path / "checkpoints")
    found = checkpoints.load(path)
    found.tensors["model"].pop("network.input.lora_A.default.weight")
    state = {key: value for key, value in found.state.items() if key not in ("files", "step")}
    checkpoints.save(path.parent, 3, found.tensors, state, keep=2)
    with pytest.raises(ValueError, match=r"are not those of the student.*Missing key.*network\.input\.lora_A"):
        quick(adapted(points()), out=tmp_path, steps=4)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("models") / "ddpm"
    DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "images.npy"
    import numpy as np

    np.save(data, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).numpy())
    return {
        "name": "tuned",
        "teacher": str(teacher_folder),
        "student": {"network": "auto", "kind": "field", "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
        "data": str(data),
        "objective": "FlowMatching",
        "training": {"steps": 3, "batch": 8, "checkpoint_every": 2, "quiet": True, "lr": 1e-2},
        "evaluation": {"count": 0, "steps": [1]},
    }


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return out, run(load_recipe(recipe), out).result


@pytest.mark.takes_seconds
def test_a_recipe_trains_an_adapter_and_the_run_loads_back(finished, teacher_folder):
    out, result = finished
    back = open_run(out)
    assert torch.equal(call(back.model), call(result.ema))
    assert (call(back.model) - call(load(teacher_folder))).abs().max() > 1e-4
    tensors = checkpoints.load(checkpoints.latest(out / "checkpoints")).tensors
    assert all(".lora_" in name for name in tensors["model"])
    merged = load(out)
    assert not has_lora(merged)
    torch.testing.assert_close(call(merged), call(result.ema), rtol=0, atol=1e-5)


def test_the_teacher_and_the_student_of_a_recipe_have_one_base(recipe):
    built = build(load_recipe(recipe))
    theirs = {id(p) for p in built.teacher.parameters()}
    assert theirs == {id(p) for p in built.student.parameters() if not p.requires_grad}


@pytest.mark.takes_seconds
def test_the_seed_of_a_recipe_decides_the_first_weights(recipe):
    first = lambda seed: [  # noqa: E731
        p.detach() for p in build(load_recipe({**recipe, "seed": seed})).student.parameters() if p.requires_grad
    ]
    assert all(torch.equal(a, b) for a, b in zip(first(1), first(1), strict=True))
    assert not torch.equal(first(1)[0], first(2)[0])


def test_a_recipe_without_lora_is_the_run_it_was():
    recipe = load_recipe({
        "name": "x", "data": "checkerboard", "student": "mlp", "objective": "FlowMatching", "training": {"steps": 1}
    })  # fmt: skip
    assert recipe.student.lora is None
    now = flat(recipe.fingerprint())
    before = {key: value for key, value in now.items() if key != "student.lora"}
    assert differences(before, now) == []


@pytest.mark.takes_seconds
def test_an_export_is_merged_and_an_adapter_is_the_adapter(finished, teacher_folder, tmp_path):
    out, result = finished
    merged = load(export(out, tmp_path / "model"))
    torch.testing.assert_close(call(merged), call(result.ema), rtol=0, atol=1e-5)
    assert sorted(dict(merged.named_parameters())) == sorted(dict(load(teacher_folder).named_parameters()))
    folder = export(out, tmp_path / "adapter", adapter=True)
    tuned = load(teacher_folder)
    load_adapter(tuned, folder)
    torch.testing.assert_close(call(tuned), call(result.ema), rtol=0, atol=2e-6)
    with pytest.raises(FileExistsError):
        export(out, tmp_path / "adapter", adapter=True)
    export(out, tmp_path / "adapter", adapter=True, overwrite=True)


@pytest.mark.takes_seconds
def test_flags_make_a_lora_run(teacher_folder, recipe, tmp_path, capsys):
    import yaml

    from fewstep.cli import main

    bare = {**recipe, "student": {"network": "auto", "kind": "field"}}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(bare))
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "tune.yaml"), "--student.lora.rank", "3", "--out", str(out)]) == 0
    assert open_run(out).recipe.student.lora.rank == 3
    assert main(["export", str(out), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert main(["train", str(tmp_path / "tune.yaml"), "--student.lora.rnk", "3"]) == 2
    assert "did you mean 'student.lora.rank'?" in capsys.readouterr().err


@pytest.mark.takes_seconds
def test_a_distilled_map_of_a_recipe_trains_by_lora(recipe, tmp_path):
    distil = {**recipe, "objective": "ITVM", "student": {"network": "auto", "lora": {"rank": 2}}}
    result = run(load_recipe(distil), tmp_path / "run").result
    back = open_run(tmp_path / "run").model
    assert isinstance(back, FlowMap)
    assert torch.equal(call(back), call(result.ema))


def test_what_cannot_be_is_refused_before_anything_changes(tmp_path, monkeypatch):
    field = points()
    for options, words in (
        ({"rank": 0}, "rank of an adapter is 0"),
        ({"alpha": 0.0}, "alpha of an adapter is 0"),
        ({"dropout": 1.0}, "dropout of an adapter is 1"),
        ({"dropout": -0.1}, "lies in"),
        ({"targets": ["to_q"]}, r"matches targets \['to_q'\]; there is: hidden\.0, input, output, time"),
        ({"targets": "("}, "no regular expression"),
    ):
        with pytest.raises(ValueError, match=words):
            add_lora(field, **options)
    with pytest.raises(ValueError, match="a Guided has no network to adapt"):
        add_lora(Guided(field, 2.0, null={"class_labels": 0}))
    with pytest.raises(ValueError, match="has no adapter to save"):
        save_adapter(field, tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        load_adapter(field, tmp_path)
    assert all(p.requires_grad for p in field.parameters())
    with monkeypatch.context() as context:
        context.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'fewstep\[lora\]'"):
            add_lora(field)
    save_adapter(adapted(field), tmp_path)
    with pytest.raises(ValueError, match="there is an adapter in the model already"):
        add_lora(field)
    with pytest.raises(ValueError, match="is not one of this UNet2DModel, which has no layer"):
        load_adapter(images(), tmp_path)
    with pytest.raises(ValueError, match="is not one of this MLP"):
        load_adapter(points(width=8), tmp_path)


def test_lora_on_random_weights_is_refused(recipe):
    tree = {**recipe, "teacher": None, "student": {"network": "unet", "lora": {"rank": 2}}}
    with pytest.raises(ValueError, match="the student starts from random ones"):
        build(load_recipe(tree))


def test_training_errors_are_still_ours(tmp_path):
    """A damaged checkpoint of an adapter is named as any other."""
    quick(adapted(points()), out=tmp_path, steps=2)
    (tmp_path / "checkpoints" / "step-00000002" / "ema.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"ema\.safetensors is missing"):
        quick(adapted(points()), out=tmp_path, steps=4)


def test_an_adapter_that_would_never_see_the_image_is_refused(recipe):
    student = {"network": "auto", "kind": "field", "image": 1, "lora": {"rank": 2, "targets": ["to_q"]}}
    with pytest.raises(ValueError, match=r"student.image adds channels to the layer conv_in.*name conv_in among"):
        build(load_recipe({**recipe, "student": student}))
