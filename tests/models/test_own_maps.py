"""Models of diffusers that are flow maps by themselves: AnyFlow's Wan, and HunyuanImage as it was distilled."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import Tensor
from toys.families import made, tiny_model, tiny_pipeline
from toys.students import network, rows
from toys.videos import anyflow

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.models.adapter_files import load_adapter, save_adapter
from fewstep.models.lora import add_lora
from fewstep.networks import AnyFlow, HunyuanImage, with_second_time
from fewstep.networks.configs import public_config
from fewstep.objectives import ITVM, LMD, PSD, MeanFlow
from fewstep.runs.export import export
from fewstep.runs.loading import load, load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

TEXTS = ["a cat", "a dog"]
STATES = {"anyflow": (4, 3, 8, 8), "hunyuanimage": (4, 8, 8)}


def write(name: str, folder: Path) -> Any:
    """The pipeline, which is also in the folder."""
    if name == "anyflow":
        pipe = anyflow()
    else:
        pipe = tiny_pipeline(name)
        model = tiny_model(name, use_meanflow=True, guidance_embeds=True)
        pipe.register_modules(transformer=model, guider=AdaptiveProjectedMixGuidance(enabled=False))
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(name: str) -> Tensor:
    return torch.randn(2, *STATES[name], generator=torch.Generator().manual_seed(4))


def loaded(name: str, folder: Path) -> Any:
    model: Any = load(folder)
    assert isinstance(model, FlowMap)
    model.network.size = STATES[name][1:]  # pyright: ignore[reportAttributeAccessIssue]
    return model


def asked(pipe: Any, name: str, steps: int, **options: Any) -> Tensor:
    size: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "pt"}
    if name == "anyflow":
        return pipe(prompt=list(TEXTS), num_frames=5, latents=noise(name), **size, **options).frames
    return pipe(prompt=list(TEXTS), latents=noise(name), **size, **options).images


def drawn(model: Any, pipe: Any, name: str, **cond: Any) -> Tensor:
    """What a map draws at the steps that the pipeline has just taken."""
    cond |= model.text.encode(TEXTS)
    x = sample(model, noise(name), grid=(1 - pipe.scheduler.sigmas).float(), **cond)
    images = model.latents.decode(x) / 2 + 0.5
    return images.transpose(1, 2) if name == "anyflow" else images


def conditions(model: Any) -> dict[str, Tensor]:
    cond = model.text.encode(TEXTS)
    return cond | ({"guidance": torch.tensor([3.25, 2.0])} if model.network.takes_guidance else {})


@pytest.mark.takes_seconds
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", STATES)
def test_the_map_draws_as_its_pipeline_at_any_number_of_steps(name: str, steps: int, tmp_path: Path) -> None:
    pipe = write(name, tmp_path)
    wanted, model = asked(pipe, name, steps), loaded(name, tmp_path)
    told = {"guidance": torch.full((2,), 3.25)} if name == "hunyuanimage" else {}
    torch.testing.assert_close(drawn(model, pipe, name, **told), wanted, atol=2e-4, rtol=0)
    assert wanted.std() > 0.01
    if name == "hunyuanimage":  # as its pipeline has it where nothing is said
        assert model.guidance == 3.25
        torch.testing.assert_close(drawn(model, pipe, name), wanted, atol=2e-4, rtol=0)
    # The second time is heard: to the end of each step, not to where it begins.
    cond = conditions(model)
    with torch.no_grad():
        end, start = (model.average_velocity(noise(name), 0.2, t, **cond) for t in (0.9, 0.2))
    assert (end - start).abs().max() > 1e-3


@pytest.mark.takes_seconds
def test_anyflow_as_its_makers_wrote_it(tmp_path: Path) -> None:
    """The names of NVlabs/AnyFlow, which diffusers has as others, and the keys that its config has more."""
    pipe = write("anyflow", tmp_path)
    config = tmp_path / "transformer" / "config.json"
    odd = {
        "_class_name": "FAR_Wan_Transformer3DModel", "_diffusers_version": "0.35.1", "added_kv_proj_dim": None,
        "chunk_partition": None, "compressed_patch_size": [1, 4, 4], "full_chunk_limit": 3, "init_far_model": False,
        "init_flowmap_model": True, "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    config.write_text(json.dumps({**json.loads(config.read_text()), **odd}))
    index = tmp_path / "model_index.json"
    far = {
        "_class_name": "WanAnyFlowPipeline",
        "scheduler": ["far.schedulers.scheduling_flowmap_euler_discrete", "FlowMapDiscreteScheduler"],
        "transformer": ["far.models.transformer_far_wan_model", "FAR_Wan_Transformer3DModel"],
    }
    index.write_text(json.dumps({**json.loads(index.read_text()), **far}))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "FlowMapDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": 5.0,
                "weight_type": "beta08",
            }
        )
    )
    wanted = asked(pipe, "anyflow", 2)
    torch.testing.assert_close(drawn(loaded("anyflow", tmp_path), pipe, "anyflow"), wanted, atol=2e-4, rtol=0)
    export(load(tmp_path), tmp_path / "stock")
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(asked(stock, "anyflow", 2), wanted)
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_far_model": True}))
    with pytest.raises(ValueError, match=r"is a FAR_Wan_Transformer3DModel, and fewstep\.load knows"):
        load(tmp_path)


def test_the_weights_of_a_wan_with_both_embeddings_alike_are_that_wan() -> None:
    """AnyFlow's start: at s = t, with the second embedding a copy, the gate mixes one with itself."""
    wan, (x, cond) = network("wan"), rows("wan")
    wider = ("qk_norm", "added_kv_proj_dim", "pos_embed_seq_len")
    config = {key: value for key, value in public_config(wan.model).items() if key not in wider}
    model, state = made(diffusers.AnyFlowTransformer3DModel, **config), wan.model.state_dict()
    own = {key: value for key, value in state.items() if "condition_embedder.time_embedder" in key}
    model.load_state_dict({**state, **{key.replace("time_embedder", "delta_embedder"): own[key] for key in own}})
    timesteps = torch.tensor([100.0, 730.0])
    with torch.no_grad():
        found = AnyFlow(model)(x, timesteps, **cond)
        torch.testing.assert_close(found, wan(x, timesteps, **cond), atol=1e-5, rtol=1e-5)


def field_in(name: str, model: Any) -> DiffusionField:
    """The velocity that a map has where both times are one."""
    kind: Any = AnyFlow if name == "anyflow" else HunyuanImage
    return DiffusionField(kind(model.network.model), diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", STATES)
def test_its_field_and_a_student_of_it_are_the_map_itself(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    model = loaded(name, tmp_path)
    field = field_in(name, model)
    cond, x, t = conditions(model), noise(name), torch.tensor([0.3, 0.8])
    student = FlowMap.from_field(field)
    with torch.no_grad():
        assert torch.equal(field(x, t, **cond), model.velocity(x, t, **cond))
        assert torch.equal(student.velocity(x, t, **cond), field(x, t, **cond))
        assert torch.equal(student(x, 0.1, t, **cond), model(x, 0.1, t, **cond))
    assert student.network.model is not model.network.model  # pyright: ignore[reportAttributeAccessIssue]
    for how in ("span", "late"):
        with pytest.raises(ValueError, match="has a second time of its own, as it was distilled: leave"):
            with_second_time(field.network, second_time=how)
    with pytest.raises(ValueError, match="leave guidance out"):
        with_second_time(field.network, guidance=True)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", STATES)
def test_it_trains_on(name: str, tmp_path: Path) -> None:
    """A step with each group of objectives reaches the embedding of the second time; checkpoints change no gradient."""
    write(name, tmp_path)
    model = loaded(name, tmp_path)
    teacher = field_in(name, model)
    doubled = {key: value.repeat_interleave(2, 0) for key, value in conditions(model).items()}
    batch = Batch(noise(name).repeat_interleave(2, 0), doubled)
    second = "delta_embedder" if name == "anyflow" else "timestep_embedder_r"
    for objective in (ITVM(teacher), LMD(teacher), PSD(), MeanFlow()):
        student, target = FlowMap.from_field(teacher).train(), FlowMap.from_field(teacher)
        objective.adopt(student)
        objective(student, batch, target=target, progress=0.5, step=0, generator=generator(0)).total.backward()
        new = [p.grad for key, p in student.named_parameters() if second in key and p.grad is not None]
        assert any(grad.abs().max() > 0 for grad in new), objective
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)

    gradients = []
    for is_on in (False, True):
        student, x, s = FlowMap.from_field(teacher).train(), noise(name), torch.tensor([0.1, 0.3])
        if is_on:
            student.network.enable_gradient_checkpointing()  # pyright: ignore
        middle = student(x, s, s + 0.3, **conditions(model))
        (middle * student(x, s + 0.3, s + 0.6, **conditions(model))).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", STATES)
def test_in_other_types_of_numbers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write(name, tmp_path)
    model = loaded(name, tmp_path)
    cond, x = conditions(model), noise(name)
    with torch.no_grad():
        exact = model(x, 0.1, 0.9, **cond)
        cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
        found = model.to(dtype)(x.to(dtype), 0.1, 0.9, **cond)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.1)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", STATES)
def test_its_export_and_its_adapter_are_for_its_own_pipeline(name: str, tmp_path: Path) -> None:
    pipe = write(name, tmp_path / "model")
    model = loaded(name, tmp_path / "model")
    torch.manual_seed(1)
    add_lora(model, rank=2)
    for key, weight in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.3)
    assert all(".lora_" in key for key, weight in model.named_parameters() if weight.requires_grad)
    plain = asked(pipe, name, 2)
    export(model, tmp_path / "tuned")
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "tuned")
    stock.set_progress_bar_config(disable=True)
    if name == "hunyuanimage":
        stock.register_modules(guider=AdaptiveProjectedMixGuidance(enabled=False))
    wanted = asked(stock, name, 2)
    assert (wanted - plain).abs().max() > 1e-3
    assert type(stock.transformer).__module__.startswith("diffusers.")
    torch.testing.assert_close(drawn(model, pipe, name), wanted, atol=2e-4, rtol=0)
    torch.testing.assert_close(drawn(loaded(name, tmp_path / "tuned"), pipe, name), wanted, atol=2e-4, rtol=0)

    save_adapter(model, tmp_path / "lora")
    other = loaded(name, tmp_path / "model")
    load_adapter(other, tmp_path / "lora")
    cond = conditions(model)
    with torch.no_grad():
        assert torch.equal(other(noise(name), 0.1, 0.9, **cond), model(noise(name), 0.1, 0.9, **cond))
    if name == "anyflow":
        pipe.load_lora_weights(tmp_path / "lora")
        torch.testing.assert_close(asked(pipe, name, 2), wanted, atol=2e-4, rtol=0)


@pytest.mark.takes_seconds
def test_a_run_goes_on_from_it(tmp_path: Path) -> None:
    write("anyflow", tmp_path / "model")
    asked = {"name": "x", "data": {"name": "./data.npz"}, "student": {"start": str(tmp_path / "model")}}
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(8, 8, 32, generator=draw)
    rows = torch.randn(8, 4, 3, 8, 8, generator=draw)
    np.savez(tmp_path / "data.npz", data=rows.numpy(), encoder_hidden_states=text.numpy())
    asked["data"] = {"name": str(tmp_path / "data.npz"), "key": "data", "conditions": ["encoder_hidden_states"]}
    training = {"steps": 2, "batch": 8, "lr": 1e-3}
    recipe = load_recipe({**asked, "objective": "MeanFlow", "training": training, "evaluation": {"count": 0}})
    run(recipe, tmp_path / "run")
    model: Any = load_run(tmp_path / "run")
    first: Any = load(tmp_path / "model")
    assert type(model.network.model) is diffusers.AnyFlowTransformer3DModel
    state = first.network.model.state_dict()
    assert any(not torch.equal(value, state[key]) for key, value in model.network.model.state_dict().items())
    of_it = {**asked, "teacher": str(tmp_path / "model"), "objective": "ITVM", "training": training}
    with pytest.raises(ValueError, match=r"is a flow map, and what is distilled is .* name it as student\.start"):
        run(load_recipe(of_it), tmp_path / "no")
