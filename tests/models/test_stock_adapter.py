"""A consistency student as an adapter for stock pipelines: the same images, with no code of fewstep's."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from toys.adapters import base_of

from fewstep.cli import main
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_map
from fewstep.models.adapter_files import load_adapter, save_adapter
from fewstep.models.lora import add_lora, merge_lora
from fewstep.objectives import ITVM, ConsistencyDistillation
from fewstep.runs.loading import load

TEXTS = ["a cat", "a dog"]
NAMES = ["sd", "sdxl", "sd3", "flux"]


def adapted(model: Any, seed: int) -> Any:
    """With an adapter that says something, as after training."""
    torch.manual_seed(seed)
    add_lora(model, rank=2)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def stock(source: Path, adapter: Path, name: str) -> Any:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(source)
    pipe.load_lora_weights(adapter, adapter_name="fast")
    kind = "LCMScheduler" if name.startswith("sd") and name != "sd3" else "FlowMatchLCMScheduler"
    assert f"diffusers.{kind}.from_pretrained" in (adapter / "README.md").read_text()
    pipe.scheduler = getattr(diffusers, kind).from_pretrained(adapter, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, name: str, noise: torch.Tensor, steps: int) -> torch.Tensor:
    options: dict[str, Any] = {"height": 16, "width": 16, "output_type": "pt", "guidance_scale": 1.0}
    if name in ("sd3", "flux"):
        options["sigmas"] = [1 - k / steps for k in range(steps)]
    torch.manual_seed(3)  # the flow pipelines hand no generator to their scheduler
    latents = FluxPipeline._pack_latents(noise, *noise.shape) if name == "flux" else noise
    return pipe(
        TEXTS, latents=latents.clone(), num_inference_steps=steps, generator=torch.Generator().manual_seed(3), **options
    ).images


def expected(student: FlowMap, pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    """What fewstep draws at the times of the pipeline's scheduler, from the same noise."""
    if hasattr(pipe.scheduler, "alphas_cumprod"):
        power = pipe.scheduler.alphas_cumprod.double()[pipe.scheduler.timesteps]
        scale = power.sqrt() + (1 - power).sqrt()  # x_t is x_k / (a + s), t = a / (a + s)
        times, first = power.sqrt() / scale, noise / float(scale[0])
    else:
        times, first = 1 - pipe.scheduler.sigmas[:-1].double(), noise
    assert student.text is not None
    assert student.latents is not None
    grid = torch.cat([times, torch.ones(1)]).float()
    cond, draws = student.text.encode(TEXTS), torch.Generator().manual_seed(3)
    x = sample_map(student, first, grid, gamma=student.gamma, generator=draws, **cond)
    return student.latents.decode(x) / 2 + 0.5


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_a_stock_pipeline_with_the_adapter_draws_what_fewstep_does(name: str, tmp_path: Path) -> None:
    field = base_of(name, tmp_path / "base")
    student = adapted(FlowMap.from_field(field, second_time="none", share=True), 1)
    assert (student.gamma, student.ends_alone) == (1.0, True)
    save_adapter(student, tmp_path / "fast")
    pipe = stock(tmp_path / "base", tmp_path / "fast", name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = drawn(pipe, name, noise, 1)
    torch.testing.assert_close(found, expected(student, pipe, noise), atol=1e-4, rtol=0)
    plain = FlowMap.from_field(base_of(name, tmp_path / "again"), second_time="none")
    assert (expected(plain, pipe, noise) - found).abs().max() > 1e-3  # the adapter is heard
    # Back: on a fresh student of the same base.
    other = FlowMap.from_field(field, second_time="none", share=True)
    load_adapter(other, tmp_path / "fast")
    assert torch.equal(expected(other, pipe, noise), expected(student, pipe, noise))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_in_several_steps_with_the_noise_of_the_scheduler(name: str, tmp_path: Path) -> None:
    if name == "flux":
        pytest.skip("its pipeline draws the noise of packed latents in another order")
    field = base_of(name, tmp_path / "base")
    student = adapted(FlowMap.from_field(field, second_time="none"), 1)
    save_adapter(student, tmp_path / "fast")
    pipe = stock(tmp_path / "base", tmp_path / "fast", name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = drawn(pipe, name, noise, 4)
    torch.testing.assert_close(found, expected(student, pipe, noise), atol=1e-4, rtol=0)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_stacks_with_a_style(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    style = adapted(NetworkField(base.network, base.native, base.prediction, path=base.path), 2)
    save_adapter(style, tmp_path / "style")
    field = base_of(name, tmp_path / "same")
    student = adapted(FlowMap.from_field(field, second_time="none"), 1)
    save_adapter(student, tmp_path / "fast")
    pipe = stock(tmp_path / "base", tmp_path / "fast", name)
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipe.set_adapters(["fast", "style"], [1.0, 1.0])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = drawn(pipe, name, noise, 1)

    load_adapter(field, tmp_path / "style")
    both = FlowMap.from_field(merge_lora(field), second_time="none")
    load_adapter(both, tmp_path / "fast")
    torch.testing.assert_close(found, expected(both, pipe, noise), atol=1e-4, rtol=0)
    assert (found - expected(student, pipe, noise)).abs().max() > 1e-3


def test_what_such_a_student_cannot(tmp_path: Path) -> None:
    field = base_of("sd", tmp_path / "base")
    student = FlowMap.from_field(field, second_time="none")
    with pytest.raises(ValueError, match=r"ITVM trains ends before t = 1 too, .* take ConsistencyDistillation"):
        ITVM(field).check_student(student)
    ConsistencyDistillation(field).check_student(student)
    assert field.text is not None
    with pytest.raises(ValueError, match=r"gamma=0\.5 asks for times before t = 1"):
        sample(student, torch.randn(2, 4, 8, 8), 2, gamma=0.5, **field.text.encode(TEXTS))
    with pytest.raises(ValueError, match="no input for guidance: leave guidance out"):
        FlowMap.from_field(field, second_time="none", guidance=True)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_from_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained as LoRA, exported as an adapter and as a whole: both draw in a stock pipeline what the run draws."""
    base_of(name, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    recipe = {
        "teacher": "base", "objective": "ConsistencyDistillation",
        "data": {"name": "teacher", "prompts": "prompts.txt", "count": 8, "steps": 2},
        "student": {"second_time": "none", "lora": {"rank": 2}},
        "training": {"steps": 3, "batch": 4, "lr": 1e-2}, "evaluation": {"metrics": []},
    }  # fmt: skip
    (tmp_path / "fast.yaml").write_text(json.dumps(recipe))
    assert main(["distill", "fast.yaml", "--out", "run"]) == 0
    assert main(["export", "run", "adapter", "--adapter"]) == 0
    assert main(["export", "run", "whole"]) == 0
    student: Any = load("run")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    pipe = stock(tmp_path / "base", tmp_path / "adapter", name)
    found = drawn(pipe, name, noise, 2)
    torch.testing.assert_close(found, expected(student, pipe, noise), atol=1e-4, rtol=0)
    whole: Any = diffusers.DiffusionPipeline.from_pretrained("whole")
    whole.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(whole, name, noise, 2), found, atol=1e-4, rtol=0)
    assert ("sigmas=" if name == "sd3" else "num_inference_steps=4") in Path("whole/README.md").read_text()
    assert load("whole").distilled.startswith("a latent consistency model")  # and is no teacher of a velocity


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_by_the_names_of_kohya(name: str, tmp_path: Path) -> None:
    """diffusers reads both, and so does fewstep; with a scale that is not 1."""
    field = base_of(name, tmp_path / "base")
    student = FlowMap.from_field(field, second_time="none")
    torch.manual_seed(1)
    add_lora(student, rank=2, alpha=3.0)
    for key, weight in student.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(weight, std=0.3)
    save_adapter(student, tmp_path / "fast", keys="kohya")
    keys = set(load_file(tmp_path / "fast" / "pytorch_lora_weights.safetensors"))
    assert all(key.startswith("lora_unet_") for key in keys)
    assert {key.rpartition(".")[2] for key in keys} == {"weight", "alpha"}
    pipe = stock(tmp_path / "base", tmp_path / "fast", name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = drawn(pipe, name, noise, 1)
    torch.testing.assert_close(found, expected(student, pipe, noise), atol=1e-4, rtol=0)
    other = FlowMap.from_field(field, second_time="none")
    load_adapter(other, tmp_path / "fast")
    torch.testing.assert_close(expected(other, pipe, noise), expected(student, pipe, noise), atol=1e-6, rtol=0)


def test_names_that_are_not_for_it(tmp_path: Path) -> None:
    student = adapted(FlowMap.from_field(base_of("sd3", tmp_path / "base"), second_time="none"), 1)
    with pytest.raises(ValueError, match=r"keys: kohya are for the U-Nets .* SD3Transformer2DModel: leave keys out"):
        save_adapter(student, tmp_path / "fast", keys="kohya")
    with pytest.raises(ValueError, match="unknown keys of an adapter 'koya': did you mean 'kohya'"):
        save_adapter(student, tmp_path / "fast", keys="koya")
    assert main(["export", str(tmp_path / "base"), "--keys", "kohya"]) == 2
