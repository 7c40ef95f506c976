"""Wan 2.2: two experts and the boundary between them, as a field, a student, an adapter and an export."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from toys.students import field_of, network
from toys.videos import wan, wan_model, wan_vae

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.solvers import integrate
from fewstep.models.adapter_files import DIFFUSERS_FILE, load_adapter, save_adapter
from fewstep.models.lora import add_lora, merge_lora
from fewstep.planning.plan import plan
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.training.sharding import check_alike

TEXTS = ["a cat", "a dog"]
STEPS = 6


def noise() -> Tensor:
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def experts(folder: Path, boundary: float = 0.875) -> Any:
    """The pipeline of two experts, which is also in the folder."""
    pipe = wan(transformer_2=wan_model(1), boundary_ratio=boundary)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(folder: Path) -> Any:
    field: Any = load(folder)
    field.network.size = (3, 8, 8)
    return field


def frames(pipe: Any, steps: int = STEPS, guidance: float = 1.0, **options: Any) -> Tensor:
    asked: dict[str, Any] = {"num_frames": 5, "height": 16, "width": 16, "output_type": "pt", **options}
    asked |= {"num_inference_steps": steps, "guidance_scale": guidance, "latents": noise()}
    return pipe(prompt=list(TEXTS), **asked).frames


def drawn(field: Any, pipe: Any) -> Tensor:
    """What a field draws at the steps that the pipeline has just taken."""
    model: Any = field.field if isinstance(field, Guided) else field
    cond, times = model.text.encode(TEXTS), (1 - pipe.scheduler.sigmas).float()
    with torch.no_grad():
        x = integrate(lambda x, t: field(x, t, **cond), noise(), times, "euler")
        return (model.latents.decode(x) / 2 + 0.5).transpose(1, 2)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.6])
def test_the_field_draws_as_its_pipeline_with_both_experts_and_both_strengths(boundary: float, tmp_path: Path) -> None:
    pipe = experts(tmp_path, boundary)
    field = loaded(tmp_path)
    wanted = frames(pipe)
    noisy = pipe.scheduler.timesteps >= 1000 * boundary
    assert noisy.any()
    assert not noisy.all()
    times = (1 - pipe.scheduler.sigmas[:-1]).float()
    assert torch.equal(field.is_second(times), ~noisy)
    torch.testing.assert_close(drawn(field, pipe), wanted, atol=2e-4, rtol=0)
    assert (wanted - frames(wan())).abs().max() > 0.01  # of the first expert alone

    null = field.text.null()
    wanted = frames(pipe, guidance=4.0, guidance_scale_2=2.0)
    guided = Guided(field, 4.0, null=null, scale_2=2.0)
    torch.testing.assert_close(drawn(guided, pipe), wanted, atol=2e-4, rtol=0)
    torch.testing.assert_close(
        drawn(Guided(field, 4.0, null=null), pipe), frames(pipe, guidance=4.0), atol=2e-4, rtol=0
    )
    assert (wanted - frames(pipe, guidance=4.0)).abs().max() > 1e-3


def test_at_the_boundary_itself_the_first_expert_answers(tmp_path: Path) -> None:
    """As ``t >= boundary_timestep`` has it, to the last bit of both sides, on whatever path the field is."""
    experts(tmp_path, 0.9)
    field = loaded(tmp_path)
    at, later = torch.tensor(0.1), torch.tensor(0.10001)
    cond = {name: value[:1] for name, value in field.text.encode(TEXTS).items()}
    for t, expert in ((at, "transformer"), (later, "transformer_2"), (0 * at, "transformer")):
        model, x = getattr(field.network.model, expert), noise()[:1]
        with torch.no_grad():
            wanted = -model(x, 1000 * (1 - t[None]), **cond).sample
            assert torch.equal(field(x, t[None], **cond), wanted)


@pytest.mark.takes_seconds
def test_one_expert_whose_timesteps_are_told_to_each_token(tmp_path: Path) -> None:
    """TI2V-5B: ``expand_timesteps``, and a VAE that sees 2 x 2 patches."""
    pipe = wan(vae=wan_vae(patch_size=2, in_channels=12, out_channels=12), expand_timesteps=True)
    pipe.vae.register_to_config(scale_factor_spatial=4)
    pipe.vae_scale_factor_spatial = 4
    pipe.save_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    wanted = frames(pipe, height=32, width=32)
    field = loaded(tmp_path / "model")
    torch.testing.assert_close(drawn(field, pipe), wanted, atol=2e-4, rtol=0)
    assert field.latents.shape_of((3, 5, 32, 32)) == (4, 3, 8, 8)
    export(field, tmp_path / "stock")
    back: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    assert back.config["expand_timesteps"] is True
    back.set_progress_bar_config(disable=True)
    assert torch.equal(frames(back, height=32, width=32), wanted)


@pytest.mark.takes_seconds
def test_its_exports_run_where_fewstep_is_not(tmp_path: Path) -> None:
    pipe = experts(tmp_path / "model")
    field = loaded(tmp_path / "model")
    export(field, tmp_path / "stock")
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    assert (index["boundary_ratio"], index["transformer_2"]) == (0.875, ["diffusers", "WanTransformer3DModel"])
    assert "pipe(" in (card := (tmp_path / "stock" / "README.md").read_text())
    assert ".frames" in card
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(
        frames(stock, guidance=3.0, guidance_scale_2=2.0), frames(pipe, guidance=3.0, guidance_scale_2=2.0)
    )

    student = FlowMap.from_field(field)
    for name, weight in student.network.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(2))
    export(student, tmp_path / "fast")
    carried: Any = DiffusionPipeline.from_pretrained(tmp_path / "fast", trust_remote_code=True)
    carried.set_progress_bar_config(disable=True)
    assert type(carried.transformer).__module__.startswith("diffusers_modules")
    back, cond = loaded(tmp_path / "fast"), field.text.encode(TEXTS)
    found = carried(num_inference_steps=4, latents=noise(), output_type="latent", **cond).images
    assert torch.equal(found, sample(back, noise(), 4, **cond))
    assert torch.equal(found, sample(student, noise(), 4, **cond))
    by_prompt = carried(prompt=list(TEXTS), num_inference_steps=4, latents=noise(), output_type="latent").images
    torch.testing.assert_close(by_prompt, found)
    assert (found - sample(FlowMap.from_field(field), noise(), 4, **cond)).abs().max() > 1e-3


def adapted(model: Any, seed: int) -> Any:
    """With an adapter on both experts that says something."""
    torch.manual_seed(seed)
    add_lora(model, rank=2, alpha=3.0)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.takes_seconds
def test_adapters_of_both_experts(tmp_path: Path) -> None:
    pipe = experts(tmp_path / "model")
    field = loaded(tmp_path / "model")
    cond = field.text.encode(TEXTS)
    plain, tuned = frames(pipe), adapted(loaded(tmp_path / "model"), 1)
    save_adapter(tuned, tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="first")
    wanted = drawn(tuned, pipe)
    assert (frames(pipe) - wanted).abs().max() > 1e-3  # the second expert is as it was
    pipe.load_lora_weights(tmp_path / "lora" / "transformer_2", adapter_name="second", load_into_transformer_2=True)
    torch.testing.assert_close(frames(pipe), wanted, atol=2e-4, rtol=0)
    assert (wanted - plain).abs().max() > 1e-3
    again = loaded(tmp_path / "model")
    load_adapter(again, tmp_path / "lora")
    times = torch.tensor([0.05, 0.6])
    with torch.no_grad():
        assert torch.equal(again(noise(), times, **cond), tuned(noise(), times, **cond))
        torch.testing.assert_close(merge_lora(tuned)(noise(), times, **cond), tuned(noise(), times, **cond))
    # That of one expert, as published ones are.
    one = loaded(tmp_path / "model")
    (tmp_path / "lora" / DIFFUSERS_FILE).unlink()
    load_adapter(one, tmp_path / "lora")
    with torch.no_grad():
        velocity = one(noise(), times, **cond)
        assert torch.equal(velocity[0], field(noise(), times, **cond)[0])
        assert torch.equal(velocity[1], tuned(noise(), times, **cond)[1])

    student = adapted(FlowMap.from_field(field, share=True), 2)
    save_adapter(student, tmp_path / "two-time")
    other = FlowMap.from_field(field, share=True)
    load_adapter(other, tmp_path / "two-time")
    assert torch.equal(sample(other, noise(), 3, **cond), sample(student, noise(), 3, **cond))
    own = {name.partition(".")[0] for name, weight in student.network.model.named_parameters() if weight.requires_grad}
    assert own == {"transformer", "transformer_2"}


@pytest.mark.takes_seconds
def test_a_consistency_student_of_both_runs_in_the_stock_pipeline(tmp_path: Path) -> None:
    pipe = experts(tmp_path / "model")
    field = loaded(tmp_path / "model")
    student = adapted(FlowMap.from_field(field, second_time="none", share=True), 1)
    save_adapter(student, tmp_path / "fast")
    pipe.load_lora_weights(tmp_path / "fast", adapter_name="fast")
    pipe.load_lora_weights(tmp_path / "fast" / "transformer_2", adapter_name="fast", load_into_transformer_2=True)
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_pretrained(tmp_path / "fast", subfolder="scheduler")
    found = frames(pipe, 1)
    assert float(pipe.scheduler.sigmas[0]) == 1
    cond = field.text.encode(TEXTS)
    videos = student.latents.decode(sample(student, noise(), 1, **cond)).transpose(1, 2) / 2 + 0.5  # pyright: ignore
    torch.testing.assert_close(found, videos.clamp(0, 1), atol=1e-4, rtol=0)
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "load_into_transformer_2=True" in card
    assert "sigmas=" not in card  # which its pipeline does not take


@pytest.mark.takes_seconds
def test_the_command_takes_a_strength_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts(tmp_path / "two")
    field, words = loaded(tmp_path / "two"), ["sample", str(tmp_path / "two"), "--prompt", *TEXTS, "--latents"]
    words += ["--steps", "4", "--size", "16x16", "--count", "2", "--out", str(tmp_path / "x.npy")]
    assert main([*words, "--guidance-scale", "4", "--guidance-scale-2", "2"]) == 0
    found = torch.from_numpy(np.load(tmp_path / "x.npy"))
    guided = Guided(field, 4.0, null=field.text.null(), scale_2=2.0)
    start = sample_noise(tuple(found.shape), sample_generators(0, range(2)))
    torch.testing.assert_close(found, sample(guided, start, 4, **field.text.encode(TEXTS)), atol=1e-4, rtol=0)
    plain = sample(Guided(field, 4.0, null=field.text.null()), start, 4, **field.text.encode(TEXTS))
    assert (plain - found).abs().max() > 1e-3
    capsys.readouterr()
    assert main([*words, "--guidance-scale-2", "2"]) == 2
    assert "say --guidance-scale too" in capsys.readouterr().err
    wan().save_pretrained(tmp_path / "one")
    words[1] = str(tmp_path / "one")
    assert main([*words, "--guidance-scale", "4", "--guidance-scale-2", "2"]) == 2
    assert "it is for a field of two experts" in capsys.readouterr().err


def test_a_plan_counts_both(tmp_path: Path) -> None:
    experts(tmp_path / "two")
    wan().save_pretrained(tmp_path / "one")
    found = []
    for name in ("one", "two"):
        recipe = load_recipe(
            {
                "name": name,
                "teacher": str(tmp_path / name),
                "data": {"name": "teacher", "options": {"shape": [4, 3, 8, 8]}},
                "objective": "ITVM",
                "student": "auto",
                "training": {"steps": 2, "batch": 2},
            }
        )
        found.append(plan(recipe))
    one, two = found
    assert two.parameters == two.trained == 2 * one.parameters
    assert two.fixed == 2 * one.fixed
    assert two.call == one.call  # a call is one expert's


def test_experts_are_not_sharded() -> None:
    """As each process would wait for the blocks of an expert that the rows of another do not ask."""
    check_alike(network("wan"))
    for of in (network("wan experts"), FlowMap.from_field(field_of("wan experts")).network):
        with pytest.raises(ValueError, match=r"which of its two experts .* leave shard out, or train one expert alone"):
            check_alike(of)


def test_what_has_no_experts_takes_no_second_strength(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path)
    field = load(tmp_path)
    with pytest.raises(ValueError, match="scale_2 is 3: it is for a field of two experts"):
        Guided(field, 4.0, null={"encoder_hidden_states": 0.0}, scale_2=3.0)  # pyright: ignore[reportArgumentType]
