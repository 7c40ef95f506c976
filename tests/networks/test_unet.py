"""diffusers' UNet2DModel as a student: it starts as its teacher to the last bit, and learns its second time."""

import pytest
import torch
from toys.unet import LABELS, conditions, tiny_field, tiny_student, tiny_unet

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.networks import UNet, with_second_time
from fewstep.objectives import ITVM, LMD, FlowMatching, Objective

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
CLASSES = (None, 5)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three states and their times s < t."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 1, 8, 8, generator=generator),
        torch.tensor([0.0, 0.31, 0.7]),
        torch.tensor([0.2, 0.5, 1.0]),
    )


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_student_starts_as_its_teacher_to_the_last_bit(prediction: str, classes: int | None) -> None:
    field = tiny_field(prediction, classes)
    student = FlowMap.from_field(field)
    x, s, t = batch()
    with torch.no_grad():
        assert torch.equal(student.velocity(x, s, **conditions(classes)), field(x, s, **conditions(classes)))
        assert torch.equal(
            student.average_velocity(x, s, t, **conditions(classes)), student.velocity(x, s, **conditions(classes))
        )
        assert torch.equal(student(x, s, s, **conditions(classes)), x)


def test_the_student_is_a_copy_in_the_mode_of_its_teacher() -> None:
    """Dropout that is on in one and off in the other would part them."""
    field = tiny_field("v_prediction", dropout=0.5)
    student = FlowMap.from_field(field)
    assert not student.network.training
    x, s, _ = batch()
    with torch.no_grad():
        before = field(x, s)
        assert torch.equal(student.velocity(x, s), before)
        for weight in student.parameters():
            weight.zero_()
        assert torch.equal(field(x, s), before)


@pytest.mark.parametrize("classes", CLASSES)
def test_gradients_reach_the_second_time(classes: int | None) -> None:
    student = FlowMap.from_field(tiny_field("v_prediction", classes))
    x, s, t = batch()
    student(x, s, t, **conditions(classes)).square().sum().backward()
    embedding = student.network.model.class_embedding
    second = embedding.second if classes else embedding
    # Its last layer is zero, so at the start the gradient stops there.
    assert second.linear_2.weight.grad.abs().max() > 0
    if classes:
        assert (embedding.label.weight.grad[LABELS].abs().amax(1) > 0).all()


@pytest.mark.parametrize("classes", CLASSES)
def test_both_times_and_the_label_matter_once_trained(classes: int | None) -> None:
    student = tiny_student("v_prediction", classes)
    x, s, t = batch()
    labels = conditions(classes)
    with torch.no_grad():
        u = student.average_velocity(x, s, t, **labels)
        assert (u - student.average_velocity(x, s, t - 0.1, **labels)).abs().flatten(1).amax(1).min() > 1e-5
        assert (u - student.average_velocity(x, s + 0.1, t, **labels)).abs().flatten(1).amax(1).min() > 1e-5
        if classes:
            other = student.average_velocity(x, s, t, class_labels=LABELS.flip(0))
            assert (u - other).abs().flatten(1).amax(1)[[0, 2]].min() > 1e-5
        # Each row has its own times: alone it comes out the same.
        alone = student.average_velocity(x[1:2], s[1:2], t[1:2], **{k: v[1:2] for k, v in labels.items()})
        torch.testing.assert_close(alone, u[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", CLASSES)
def test_checkpointing_with_two_forwards_before_one_backward(classes: int | None) -> None:
    """The times travel as arguments: a recomputation must not see those of the last call."""
    x, s, t = batch()
    gradients = []
    for checkpointing in (False, True):
        student = tiny_student("v_prediction", classes).train()
        if checkpointing:
            student.network.model.enable_gradient_checkpointing()
        middle = student(x, s, t - 0.05, **conditions(classes))
        end = student(x, t - 0.05, t, **conditions(classes))
        (middle * end).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("classes", CLASSES)
def test_bf16_autocast(classes: int | None) -> None:
    student = tiny_student("v_prediction", classes)
    x, s, t = batch()
    exact = student(x, s, t, **conditions(classes)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = student(x, s, t, **conditions(classes))
        out.square().mean().backward()
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", ["FlowMatching", "ITVM", "ITVM derivative", "LMD"])
def test_every_objective_trains_it(name: str, classes: int | None) -> None:
    """Forward derivatives too, whose group norms and attention need care on the CPU."""
    field = tiny_field("flow", classes)
    student, target = FlowMap.from_field(field), FlowMap.from_field(field)
    objectives: dict[str, Objective] = {
        "FlowMatching": FlowMatching(),
        "ITVM": ITVM(field),
        "ITVM derivative": ITVM(field, "derivative"),
        "LMD": LMD(field),
    }
    data = torch.randn(8, 1, 8, 8, generator=generator(1))
    labels = {} if classes is None else {"class_labels": torch.arange(8) % classes}
    loss = objectives[name](student, Batch(data, labels), target=target, progress=0.5, generator=generator(0)).total
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    assert sum(float(g.square().sum()) for g in gradients) > 0


@pytest.mark.takes_seconds
def test_the_mean_of_a_model_that_predicts_a_variance_too() -> None:
    from diffusers import DDPMScheduler

    model = tiny_unet(out_channels=2)
    field = DiffusionField(UNet(model), DDPMScheduler(variance_type="learned_range"))
    x, s, t = batch()
    with torch.no_grad():
        whole = model(x, torch.tensor([10.0, 20.0, 30.0])).sample
        assert torch.equal(UNet(model)(x, torch.tensor([10.0, 20.0, 30.0])), whole[:, :1])
        assert FlowMap.from_field(field)(x, s, t).shape == x.shape


def test_what_cannot_be_is_refused() -> None:
    x, s, t = batch()
    with pytest.raises(ValueError, match="class_labels"):
        FlowMap.from_field(tiny_field("v_prediction", 5))(x, s, t)
    with pytest.raises(ValueError, match="class_embed_type='timestep' has no room for a second time"):
        with_second_time(UNet(tiny_unet(class_embed_type="timestep")))


# Told the strength of guidance


def guided(classes: int | None) -> FlowMap:
    return FlowMap.from_field(tiny_field("v_prediction", classes), guidance=True)


@pytest.mark.parametrize("classes", CLASSES)
def test_the_strength_of_guidance_is_silent_at_first_and_heard_once_trained(classes: int | None) -> None:
    field, student = tiny_field("v_prediction", classes), guided(classes)
    x, s, t = batch()
    strength = torch.tensor([1.0, 2.0, 7.5])
    with torch.no_grad():
        assert torch.equal(student.velocity(x, s, **conditions(classes)), field(x, s, **conditions(classes)))
        told = student.average_velocity(x, s, t, guidance=strength, **conditions(classes))
        assert torch.equal(told, field(x, s, **conditions(classes)))
    student.average_velocity(x, s, t, guidance=strength, **conditions(classes)).square().sum().backward()
    embedding = student.network.model.class_embedding.strength
    assert embedding.linear_2.weight.grad.abs().max() > 0
    with torch.no_grad():
        embedding.linear_2.weight.normal_()
        changed = student.average_velocity(x, s, t, guidance=strength, **conditions(classes))
        none = student.average_velocity(x, s, t, **conditions(classes))
    assert (changed - none).abs().flatten(1).amax(1)[1:].min() > 1e-4
    torch.testing.assert_close(changed[0], none[0])  # 1 is what it is where nothing is said


def test_a_student_that_is_told_none_says_so() -> None:
    x, s, t = batch()
    with pytest.raises(ValueError, match=r"told no strength of guidance: FlowMap.from_field\(..., guidance=True\)"):
        FlowMap.from_field(tiny_field())(x, s, t, guidance=torch.ones(3))
