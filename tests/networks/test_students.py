"""Every family of diffusers as a student: how it starts, what its second time reaches, and that it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from toys.families import ddim, tiny_model
from toys.sounds import dance_model
from toys.students import HEARD_ONCE, NAMES, S, T, field_of, loud, network, rows
from toys.unet import tiny_unet

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.networks import FAMILIES, SECOND_TIMES, gains_second_time, with_second_time
from fewstep.objectives import (
    AYF,
    CTM,
    EMD,
    FMM,
    ITVM,
    LMD,
    LSD,
    PFMM,
    SCM,
    AlphaFlow,
    ConsistencyDistillation,
    ImprovedMeanFlow,
    MeanFlow,
    Objective,
    Shortcut,
)

# They count the tokens of each prompt by itself, which breaks a graph.
BY_PROMPT = ("z-image", "lumina2", "hunyuanimage")
CALLS = [(name, how, told) for name in NAMES for how in SECOND_TIMES for told in (False, True)]


def refused(name: str, how: str, told: bool) -> bool:
    return (name in HEARD_ONCE and how == "late") or (name.endswith(" told") and told)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("name", "how", "told"), [call for call in CALLS if not refused(*call)])
def test_a_student_starts_as_its_teacher_to_the_last_bit(name: str, how: str, told: bool) -> None:
    teacher = network(name)
    student = with_second_time(teacher, told, how)
    (x, cond), state = rows(name), teacher.state_dict()
    told_more = {**cond, "guidance": torch.tensor([2.0, 3.0])} if told else cond
    with torch.no_grad():
        start = teacher(x, S, **cond)
        assert torch.equal(student(x, S, S, **cond), start)
        assert torch.equal(student(x, S, S, **told_more), start)
        later = student(x, S, T, **told_more)
    # A new embedding is silent wherever the map ends; told late, the last blocks are told another time.
    assert torch.equal(later, start) == (how != "late")
    assert student.second_time == how
    assert student.takes_guidance == (told or name.endswith(" told"))
    # The weights are the teacher's by name; only a class embedding has moved in with the second time.
    own = student.state_dict()
    same = [key for key in state if "class_embedding." not in key or "unet" not in name]
    assert all(torch.equal(own[key], state[key]) for key in same)
    assert not any(value.is_meta for value in [*student.parameters(), *student.buffers()])
    assert (student.shape, student.classes) == (teacher.shape, teacher.classes)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_told_no_second_time_is_its_teacher(name: str) -> None:
    teacher, (x, cond) = network(name), rows(name)
    student = with_second_time(teacher, second_time="none")
    assert type(student.model) is type(teacher.model)
    assert student.model is not teacher.model
    with torch.no_grad():
        start = teacher(x, S, **cond)
        assert torch.equal(student(x, S, T, **cond), start)
    of_frozen = with_second_time(deepcopy(teacher).requires_grad_(False), second_time="none")
    assert all(p.requires_grad for p in of_frozen.parameters())
    shared = with_second_time(teacher, second_time="none", share=True)
    assert {*map(id, shared.parameters())} == {*map(id, teacher.parameters())}
    assert not any(p.requires_grad for p in shared.parameters())


SCHEDULES = {
    "flow": FlowMatchEulerDiscreteScheduler(),
    "noise": ddim(),
    "v": DDPMScheduler(prediction_type="v_prediction"),
    "EDM": EDMEulerScheduler(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0),
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", ["unet of classes", "sd", "dit", "sd3"])
def test_a_map_starts_as_its_field_whatever_that_was_trained_as(name: str, schedule: str) -> None:
    """Told late or by its span, the second time is in the timesteps that the first is in, of whatever schedule."""
    field, (x, cond) = DiffusionField(network(name), SCHEDULES[schedule]), rows(name)
    x, cond = (
        x[:1].repeat(5, 1, 1, 1),
        {key: value[:1].repeat(5, *[1] * (value.ndim - 1)) for key, value in cond.items()},
    )
    t = torch.tensor([0.0, 0.01, 0.3, 0.7, 0.995])
    with torch.no_grad():
        expected = field(x, t, **cond)
        for how in SECOND_TIMES:
            student = FlowMap.from_field(field, second_time=how)
            assert torch.equal(student.velocity(x, t, **cond), expected)
            told: dict[str, Tensor] = {}
            student.network.model.predict = lambda x, s, t, *_, told=told, **__: told.update(s=s, t=t) or x
            student.velocity(x, t, **cond)
            assert how == "t" or torch.equal(told["s"], told["t"])


def test_what_a_model_has_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="PixArt is told the size of the image with its time: say t"):
        with_second_time(network("pixart"), second_time="late")
    with pytest.raises(ValueError, match="Stable Audio hears its time once, before its first block: say t"):
        with_second_time(network("stable audio"), second_time="late")
    with pytest.raises(ValueError, match="a U-Net of signals hears its time in its first block alone: say t"):
        with_second_time(network("dance"), second_time="late")
    deaf = FAMILIES["UNet1DModel"](dance_model(extra_in_channels=0, down_block_types=("DownBlock1D",) * 2))
    with pytest.raises(ValueError, match="none of the blocks of this UNet1DModel hears its time"):
        with_second_time(deaf)
    with pytest.raises(ValueError, match="told the strength of guidance as it is: leave guidance out"):
        with_second_time(network("flux told"), guidance=True)
    told = FAMILIES["UNet2DConditionModel"](tiny_model("sd", time_cond_proj_dim=8))
    with pytest.raises(ValueError, match="takes a timestep_cond with its time: say t"):
        with_second_time(told, second_time="late")
    with pytest.raises(ValueError, match="class_embed_type='timestep' has no room for a second time"):
        with_second_time(FAMILIES["UNet2DModel"](tiny_unet(class_embed_type="timestep")))
    with pytest.raises(ValueError, match=r"late_share is 0.5 and second_time 't': it is a share .* belongs to 'late'"):
        with_second_time(network("dit"), late_share=0.5)
    with pytest.raises(ValueError, match=r"late_share is 1.0 and second_time 'late': it is a share .* between 0 and 1"):
        with_second_time(network("dit"), second_time="late", late_share=1.0)
    with pytest.raises(ValueError, match="told_guidance is 'always': it is true, false or 'interval'"):
        with_second_time(network("dit"), guidance="always")
    with pytest.raises(ValueError, match=r"guidance with an interval, for a .* that is told the strength alone"):
        with_second_time(network("unet"), guidance=True)(rows("unet")[0], S, T, guidance=torch.ones(2, 3))
    with pytest.raises(ValueError, match="unknown second_time 'spam': did you mean 'span'"):
        with_second_time(network("dit"), second_time="spam")
    with pytest.raises(ValueError, match="is told no strength of guidance"):
        with_second_time(network("unet"))(rows("unet")[0], S, T, guidance=S)
    with pytest.raises(ValueError, match="needs the condition encoder_hidden_states"):
        with_second_time(network("sd3"))(rows("sd3")[0], S, T)
    assert not gains_second_time(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_conditions_of_a_time_stay_those_of_the_model(name: str) -> None:
    """A guidance-distilled U-Net takes its strength as timestep_cond, and its student goes on doing so."""
    teacher = FAMILIES["UNet2DConditionModel"](tiny_model(name, time_cond_proj_dim=8))
    student, (x, cond) = with_second_time(teacher), rows(name)
    with torch.no_grad():
        plain = student(x, S, T, **cond)
        told = student(x, S, T, timestep_cond=torch.ones(2, 8), **cond)
        assert torch.equal(told, teacher(x, S, timestep_cond=torch.ones(2, 8), **cond))
    assert not torch.equal(told, plain)


def test_labels_that_are_vectors_stay_conditions() -> None:
    """Stable Diffusion 2.1 unCLIP tells its U-Net a noisy image's embedding as a class label."""
    teacher = FAMILIES["UNet2DConditionModel"](
        tiny_model("sd", class_embed_type="projection", projection_class_embeddings_input_dim=6)
    )
    (x, cond), vector = rows("sd"), torch.randn(2, 6)
    with torch.no_grad():
        for how in SECOND_TIMES:
            student = with_second_time(teacher, second_time=how)
            assert torch.equal(
                student(x, S, S, class_labels=vector, **cond), teacher(x, S, class_labels=vector, **cond)
            )
    with pytest.raises(ValueError, match="needs the condition class_labels"):
        student(x, S, T, **cond)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_student_hears_what_it_is_told(name: str) -> None:
    x, cond = rows(name)
    with torch.no_grad():
        by_end, by_span = (loud(with_second_time(network(name), second_time=how)) for how in ("t", "span"))
        assert not torch.equal(by_end(x, S, T, **cond), by_end(x, S, T + 9, **cond))
        assert not torch.equal(by_span(x, S, T, **cond), by_span(x, S, T + 9, **cond))
        if name != "unet":  # The same weights, told t - s where the other, of another class there, is told t.
            by_span.load_state_dict(by_end.state_dict())
            torch.testing.assert_close(by_span(x, S, T + S, **cond), by_end(x, S, T, **cond), rtol=1e-4, atol=1e-5)
        if not name.endswith(" told"):
            told = loud(with_second_time(network(name), guidance=True))
            one, two = (told(x, S, T, guidance=torch.tensor([g, g]), **cond) for g in (1.0, 2.0))
            assert not torch.equal(one, two)
            assert torch.equal(one, told(x, S, T, **cond))  # 1, which is none, where it is not given


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("name", "how"), [(n, h) for n in NAMES for h in ("t", "late") if not refused(n, h, True)])
def test_a_student_told_the_interval_of_guidance_hears_both_its_ends(name: str, how: str) -> None:
    """arXiv 2512.02012: silent at first, and all of time where the strength alone is said."""
    (x, cond), teacher = rows(name), network(name)
    student = with_second_time(teacher, "interval", how)
    assert student.takes_guidance
    assert student.takes_interval
    told = torch.tensor([[3.0, 0.2, 0.8], [2.0, 0.0, 0.5]])
    with torch.no_grad():
        assert torch.equal(student(x, S, S, guidance=told, **cond), teacher(x, S, **cond))
        loud(student)
        at = lambda *one: student(x, S, T, guidance=torch.tensor([one, one]), **cond)  # noqa: E731
        first, *others = at(3.0, 0.2, 0.8), at(2.0, 0.2, 0.8), at(3.0, 0.3, 0.8), at(3.0, 0.2, 0.7)
        assert not any(torch.equal(first, other) for other in others)
        assert torch.equal(at(3.0, 0.0, 1.0), student(x, S, T, guidance=torch.tensor([3.0, 3.0]), **cond))
        assert torch.equal(at(1.0, 0.0, 1.0), student(x, S, T, **cond))


@contextmanager
def heard(blocks: list[Any], find: Any) -> Iterator[list[Any]]:
    """What each block is passed, in the order of the calls."""
    told: list[Any] = [None] * len(blocks)

    def keep(k: int) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            told[k] = find([*args, *kwargs.values()])

        return hook

    handles = [block.register_forward_pre_hook(keep(k), with_kwargs=True) for k, block in enumerate(blocks)]
    try:
        yield told
    finally:
        for handle in handles:
            handle.remove()


BLOCKS: dict[str, Any] = {
    "unet": lambda m: [*m.down_blocks, m.mid_block, *m.up_blocks],
    "unet of classes": lambda m: [*m.down_blocks, m.mid_block, *m.up_blocks],
    "sdxl": lambda m: [*m.down_blocks, m.mid_block, *m.up_blocks],
    "dit": lambda m: list(m.transformer_blocks),
    "pixart of one size": lambda m: list(m.transformer_blocks),
    "sd3": lambda m: [*m.transformer_blocks, m.norm_out],
    "flux": lambda m: [*m.transformer_blocks, *m.single_transformer_blocks, m.norm_out],
    "flux2": lambda m: [*m.transformer_blocks, *m.single_transformer_blocks, m.norm_out],
    "qwenimage": lambda m: [*m.transformer_blocks, m.norm_out],
    "z-image": lambda m: [*m.noise_refiner, *m.layers, *m.all_final_layer.values()],
    "sana": lambda m: list(m.transformer_blocks),
    "auraflow": lambda m: [*m.joint_transformer_blocks, *m.single_transformer_blocks, m.norm_out],
    "lumina2": lambda m: [*m.noise_refiner, *m.layers, m.norm_out],
    "hunyuanimage": lambda m: [*m.transformer_blocks, *m.single_transformer_blocks, m.norm_out],
    "ltx": lambda m: list(m.transformer_blocks),
    "wan": lambda m: list(m.blocks),
    "cogvideox": lambda m: [*m.transformer_blocks, m.norm_out],
}
HEADLESS = ("dit", "pixart of one size", "sana", "ltx", "wan")


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_told_late_the_first_blocks_hear_s_and_the_last_hear_t_as_the_teacher_would(
    name: str, share: float | None
) -> None:
    """arXiv 2510.24474: no block hears both, and each hears what a model at that time alone is told."""
    teacher = network(name)
    student = with_second_time(network(name), second_time="late", late_share=share)
    x, cond = rows(name)
    ndim = {"wan": 4, "ltx": 3}.get(name, 2)

    def find(values: list[Any]) -> Tensor:
        times = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        if name == "ltx":
            return next(v for v in times if v.ndim == 3 and v.shape[1] <= 2).flatten()
        if name == "dit":
            return next(v for v in times if v.ndim < 3)[:2].flatten()
        return next(v for v in reversed(times) if v.ndim == ndim or (name == "wan" and v.shape[1:2] == (6,))).flatten()

    told = {}
    with torch.no_grad():
        for time in (S, T):
            with heard(BLOCKS[name](teacher.model), find) as alone:
                teacher(x, time, **cond)
            told[id(time)] = list(alone)
        with heard(BLOCKS[name](student.model), find) as both:
            student(x, S, T, **cond)
    hears_s = [torch.equal(a, b) for a, b in zip(both, told[id(S)], strict=True)]
    hears_t = [torch.equal(a, b) for a, b in zip(both, told[id(T)], strict=True)]
    assert [not s for s in hears_s] == hears_t
    first = hears_t.index(True)
    assert 0 < first < len(hears_t)
    assert all(hears_t[first:])
    blocks = len(hears_t) - (name not in HEADLESS and "unet" not in name and name != "sdxl")  # without the head
    if share is not None:
        assert blocks - first == min(round(0.6 * blocks), blocks - 1)
        assert student.model.config["late_share"] == 0.6
    elif "unet" not in name and name != "sdxl":
        assert blocks - first == max(1, round(blocks / 3))


OBJECTIVES: dict[str, Any] = {
    "ITVM": ITVM, "LMD": LMD, "EMD": EMD, "AYF": AYF, "PFMM": PFMM, "ConsistencyDistillation": ConsistencyDistillation,
    "CTM": CTM, "SCM": SCM, "MeanFlow": lambda _: MeanFlow(), "ImprovedMeanFlow": lambda _: ImprovedMeanFlow(),
    "AlphaFlow": lambda _: AlphaFlow(), "FMM": lambda _: FMM(), "LSD": lambda _: LSD(),
    "Shortcut": lambda _: Shortcut(),
}  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("pixart of one size", "flux told", "flux2 told")]
)
def test_a_step_of_every_family_of_objectives_reaches_the_second_time(name: str) -> None:
    field = field_of(name)
    x, cond = rows(name)
    batch = Batch(x.repeat_interleave(2, 0), {key: value.repeat_interleave(2, 0) for key, value in cond.items()})
    start = FlowMap.from_field(field)
    for method, make in OBJECTIVES.items():
        student, target = deepcopy(start), deepcopy(start)
        objective: Objective = make(field)
        objective.adopt(student)
        loud(student)  # else what the second time says would not depend on its first layer
        loss = objective(student, batch, target=target, progress=0.5, step=0, generator=generator(0)).total
        loss.backward()
        assert loss.isfinite(), method
        new = {key for key in student.state_dict() if key not in field.state_dict()}
        reached = [p.grad for key, p in student.named_parameters() if key in new and p.grad is not None]
        assert any(grad.abs().max() > 0 for grad in reached), method
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None), method


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "how"),
    [(n, h) for n in NAMES for h in ("t", "late") if n not in ("unet", "flux told") and not refused(n, h, False)],
)
def test_gradient_checkpointing_changes_no_gradient(name: str, how: str) -> None:
    """With two calls at other times before one backward pass, of which a side channel would mix the times."""
    x, cond = rows(name)
    gradients = []
    for is_on in (False, True):
        student = FlowMap.from_field(field_of(name), second_time=how).train()
        loud(student)
        if is_on:
            student.network.model.enable_gradient_checkpointing()
        middle = student(x, torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.6]), **cond)
        end = student(x, torch.tensor([0.5, 0.6]), torch.tensor([0.9, 0.8]), **cond)
        (middle * end).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "name",
    [
        "unet of classes",
        "sdxl",
        "dit",
        "pixart of one size",
        "sd3",
        "flux",
        "wan",
        "flux2",
        "qwenimage",
        "stable audio",
        "dance",
        "cogvideox",
    ],
)
def test_a_student_is_traced_as_one_graph(name: str) -> None:
    """What torch.compile needs; the code that it makes is tried in the slow test."""
    x, cond = rows(name)
    for how in ("t",) if refused(name, "late", False) else ("t", "late"):
        student = loud(with_second_time(network(name), second_time=how))
        torch._dynamo.reset()
        compiled = torch.compile(student, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, S, T, **cond), student(x, S, T, **cond))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet of classes", "sd", "dit", "sd3", "flux", "wan"])
def test_a_student_compiles(name: str) -> None:
    x, cond = rows(name)
    student = loud(with_second_time(network(name)))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(student)(x, S, T, **cond), student(x, S, T, **cond), atol=1e-4, rtol=1e-4
        )


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_student_in_every_type_of_numbers(name: str, dtype: torch.dtype) -> None:
    """Cast before and after the second time is added, each way that it goes in: at s = t its field, to the last bit."""
    x, cond = rows(name)
    x, cond = x.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
    t = torch.tensor([0.3, 0.7])
    for how in SECOND_TIMES:
        for told in (False, True):
            if refused(name, how, told):
                continue
            field = field_of(name).to(dtype)
            cast_after = FlowMap.from_field(field_of(name), guidance=told, second_time=how).to(dtype)
            for student in (FlowMap.from_field(field, guidance=told, second_time=how), cast_after):
                with torch.no_grad():
                    assert torch.equal(student.velocity(x, t, **cond), field(x, t, **cond))
                end = student(x, 0.0, 1.0, **cond)
                assert end.dtype == dtype
                assert end.isfinite().all()
                end.float().square().mean().backward()
                gradients = [p.grad for p in student.parameters() if p.grad is not None]
                assert gradients
                assert all(grad.dtype == dtype for grad in gradients)


def test_a_time_that_no_student_can_be_told_is_refused() -> None:
    for kind, options in (("fourier", {}), ("learned", {"num_train_timesteps": 1000})):
        field = DiffusionField(
            FAMILIES["UNet2DModel"](tiny_unet(time_embedding_type=kind, **options)), FlowMatchEulerDiscreteScheduler()
        )
        for how in SECOND_TIMES:
            with pytest.raises(ValueError, match=f"a UNet2DModel with time_embedding_type: {kind} .* positional"):
                FlowMap.from_field(field, second_time=how)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_in_half_precision(name: str) -> None:
    x, cond = rows(name)
    student = FlowMap.from_field(field_of(name))
    s, t = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.6])
    exact = student(x, s, t, **cond).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = student(x, s, t, **cond)
        out.square().mean().backward()
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
