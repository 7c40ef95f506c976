"""Students saved, adapted, in recipes, and told the guidance scale."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toys.students import HEARD_ONCE, NAMES, S, T, field_of, loud, network, rows

from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.data.batch import Batch
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.models.adapter_files import load_adapter, save_adapter
from fewstep.models.lora import add_lora, merge_lora
from fewstep.networks import MLP, SECOND_TIMES, with_second_time
from fewstep.objectives import (
    ITVM,
    LMD,
    MeanFlow,
)
from fewstep.runs.loading import open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.fit import fit


@pytest.mark.parametrize("how", SECOND_TIMES)
@pytest.mark.parametrize("name", ["unet of classes", "sdxl", "dit", "sd3", "flux told", "wan", "qwenimage", "z-image"])
def test_a_student_is_saved_and_read_by_its_own_class(name: str, how: str, tmp_path: Any) -> None:
    share = 0.6 if how == "late" else None
    told = False if name == "flux told" else "interval" if name in ("dit", "unet of classes") else True
    student = loud(with_second_time(network(name), told, how, late_share=share))
    student.model.save_pretrained(tmp_path)
    again = type(student)(type(student.model).from_pretrained(tmp_path))
    (x, cond), strength = rows(name), torch.tensor([2.0, 4.0])
    cond["guidance"] = strength
    with torch.no_grad():
        assert torch.equal(again(x, S, T, **cond), student(x, S, T, **cond))
    assert (again.second_time, again.takes_interval) == (how, told == "interval")


@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in NAMES for how in SECOND_TIMES if n != "pixart" and not (n in HEARD_ONCE and how == "late")],
)
def test_an_adapter_and_what_is_new_train_and_are_saved_small(name: str, how: str, tmp_path: Any) -> None:
    field = field_of(name)
    student = FlowMap.from_field(field, second_time=how)
    add_lora(student, rank=2)
    moving = {key for key, p in student.named_parameters() if p.requires_grad}
    new = [key for key in moving if ".lora_" not in key]
    assert bool(new) == (how != "late")
    assert all("second" in key or "class_embedding" in key for key in new)
    with torch.no_grad():
        for key, weight in student.named_parameters():
            if key in moving:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
    save_adapter(student, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 0.8 * 4 * sum(p.numel() for p in student.parameters())
    again = FlowMap.from_field(field, second_time=how)
    load_adapter(again, tmp_path)
    x, cond = rows(name)
    s, t = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.6])
    with torch.no_grad():
        told = student(x, s, t, **cond)
        assert torch.equal(again(x, s, t, **cond), told)
        torch.testing.assert_close(merge_lora(student)(x, s, t, **cond), told, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(told, FlowMap.from_field(field, second_time=how)(x, s, t, **cond))


@pytest.mark.parametrize("name", ["unet", "unet of classes", "sd", "dit", "sd3", "flux", "wan"])
def test_one_copy_of_the_weights_is_teacher_and_student(name: str) -> None:
    field = field_of(name)
    student = FlowMap.from_field(field, share=True)
    theirs = {id(p) for p in field.parameters()}
    alone = [p for p in student.parameters() if id(p) not in theirs]
    assert sum(p.numel() for p in alone) < 0.5 * sum(p.numel() for p in student.parameters())
    x, cond = rows(name)
    t = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        before = field(x, t, **cond)
        add_lora(student, rank=2)
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert torch.equal(field(x, t, **cond), before)  # the teacher hears nothing of the adapter
        assert not torch.equal(student.velocity(x, t, **cond), before)
    # Shared weights are frozen, with an adapter or without.
    bare = FlowMap.from_field(field.requires_grad_(True), share=True)
    assert not any(p.requires_grad for p in field.parameters())
    assert all(p.requires_grad for p in bare.parameters() if id(p) not in theirs)
    # Without sharing nothing is.
    assert theirs.isdisjoint(id(p) for p in FlowMap.from_field(field).parameters())


def test_a_student_told_the_strength_learns_each_strength_of_its_teacher() -> None:
    """Classifier-free guidance folded in as an input, on a text model: ITVM's terms at s = t say so at once."""
    field = field_of("sd")
    x, cond = rows("sd")
    null = {"encoder_hidden_states": torch.zeros_like(cond["encoder_hidden_states"][0])}
    teacher = Guided(field, 4.0, null=null)
    student = FlowMap.from_field(field, guidance=True)
    cond = {**cond, "guidance": torch.tensor([1.0, 5.0])}
    loss = ITVM(teacher)(student, Batch(x, cond), target=deepcopy(student), progress=0.0, generator=generator(0))
    loss.total.backward()
    strength = student.network.model.class_embedding.strength  # pyright: ignore
    assert strength.linear_2.weight.grad.abs().max() > 0


def write(name: str, folder: Any) -> None:
    """A diffusers folder of a family, without a pipeline around it."""
    network(name).model.save_pretrained(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder)


@pytest.mark.parametrize("how", SECOND_TIMES)
def test_a_recipe_says_how_the_second_time_goes_in(how: str, tmp_path: Any) -> None:
    write("dit", tmp_path / "teacher")
    np.savez(tmp_path / "latents.npz", data=np.zeros((8, 4, 8, 8), np.float32), labels=np.arange(8) % 5)
    recipe = {
        "name": "how", "teacher": str(tmp_path / "teacher"), "data": str(tmp_path / "latents.npz"),
        "student": {"network": "auto", "second_time": how, "late_share": 0.5 if how == "late" else None},
        "objective": "ITVM",
        "training": {"steps": 2, "batch": 8, "quiet": True, "gradient_checkpointing": True},
        "evaluation": {"count": 0},
    }  # fmt: skip
    run(load_recipe(recipe), tmp_path / "run")
    model = open_run(tmp_path / "run").model
    assert model.network.second_time == how  # pyright: ignore
    assert model.network.model.config["late_share"] == (0.5 if how == "late" else None)  # pyright: ignore
    # The same without checkpointing, to the last bit; and a run that goes on may turn it off.
    plain = {**recipe, "training": {**recipe["training"], "gradient_checkpointing": False}}
    run(load_recipe(plain), tmp_path / "plain")
    again = open_run(tmp_path / "plain").model
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    run(load_recipe({**plain, "training": {**plain["training"], "steps": 3}}), tmp_path / "run")
    assert open_run(tmp_path / "run").step == 3


def test_a_teacher_that_is_told_the_strength_makes_a_student_that_is(tmp_path: Any) -> None:
    """Flux.1-dev takes guidance as a condition: the data brings it, and samples are drawn at the recipe's."""
    write("flux told", tmp_path / "teacher")
    cond = {key: value.repeat(4, *[1] * (value.ndim - 1)).numpy() for key, value in rows("flux")[1].items()}
    np.savez(tmp_path / "latents.npz", data=np.zeros((8, 4, 8, 8), np.float32), **cond)
    recipe = {
        "name": "told", "data": {"name": str(tmp_path / "latents.npz"), "conditions": list(cond)}, "objective": "ITVM",
        "training": {"steps": 1, "batch": 8, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    teacher = {"source": str(tmp_path / "teacher"), "guidance": {"scale": 3.5, "embedded": True}}
    run(load_recipe({**recipe, "teacher": teacher}), tmp_path / "run")
    model = open_run(tmp_path / "run").model
    assert (model.guidance, model.network.takes_guidance) == (3.5, True)  # pyright: ignore
    x, text = rows("flux")
    with torch.no_grad():
        as_told = sample(model, x, 2, guidance=torch.full((2,), 3.5), **text)
        assert torch.equal(sample(model, x, 2, **text), as_told)
        assert not torch.equal(sample(model, x, 2, guidance=torch.full((2,), 9.0), **text), as_told)
    teacher["guidance"]["null"] = {"class_labels": 3}
    with pytest.raises(ValueError, match="told to the teacher needs no null conditions"):
        load_recipe({**recipe, "teacher": teacher})
    write("flux", tmp_path / "plain")
    teacher = {"source": str(tmp_path / "plain"), "guidance": {"scale": 3.5, "embedded": True}}
    with pytest.raises(ValueError, match="is told no strength of guidance: say null"):
        run(load_recipe({**recipe, "teacher": teacher}), tmp_path / "other")


@pytest.mark.parametrize("name", ["dit", "unet of classes"])
def test_objectives_that_checkpoints_cannot_follow_say_so(name: str) -> None:
    field, (x, cond) = field_of(name), rows(name)
    data = ArrayData(x.repeat(4, 1, 1, 1), {key: value.repeat(4) for key, value in cond.items()})
    given: Any = {"steps": 1, "batch": 8, "quiet": True, "gradient_checkpointing": True}
    with pytest.raises(ValueError, match=r"LMD differentiates the network forward and back.*jvp: difference"):
        fit(FlowMap.from_field(field), LMD(field), data, **given)
    fit(FlowMap.from_field(field), LMD(field, jvp="difference"), data, **given)
    fit(FlowMap.from_field(field), MeanFlow(), data, **given)  # whose derivative is without grad


def test_checkpointing_and_second_times_are_refused_where_they_mean_nothing() -> None:
    field = NetworkField(MLP(2))
    with pytest.raises(ValueError, match="gradient_checkpointing=True is for diffusers models"):
        fit(FlowMap.from_field(field), ITVM(field), torch.randn(64, 2), steps=1, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="second_time: span is for models of diffusers, a MLP is told t"):
        FlowMap.from_field(field, second_time="span")
    with pytest.raises(ValueError, match=r"student.second_time is for flow maps, and student.kind is field"):
        load_recipe("checkerboard-itvm", {"student.second_time": "late", "student.kind": "field"})
    with pytest.raises(ValueError, match=r"student.late_share is 0.5: it belongs to student.second_time: late"):
        load_recipe("checkerboard-itvm", {"student.late_share": "0.5"})
    with pytest.raises(ValueError, match=r"late_share is 0.5: it belongs to second_time: late, of models of diffusers"):
        FlowMap.from_field(field, late_share=0.5)
