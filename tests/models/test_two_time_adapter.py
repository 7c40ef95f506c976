"""The adapter of a student of two times, and its small file of the second: in the pipeline that an export carries,
beside a style for the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys.adapters import base_of

from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.models.adapter_files import DIFFUSERS_FILE, PEFT_FILE, load_adapter, save_adapter
from fewstep.models.lora import add_lora, merge_lora
from fewstep.pipelines.adapters import SECOND_TIME
from fewstep.runs.export import export

TEXTS = ["a cat", "a dog"]
KEYS = [("sd", "diffusers"), ("sd", "kohya"), ("flux", "diffusers")]


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))


def trained(model: Any, seed: int) -> Any:
    """With an adapter, and a second time, that say something, as after training."""
    torch.manual_seed(seed)
    add_lora(model, rank=2, alpha=3.0)
    for weight in (p for p in model.parameters() if p.requires_grad and not p.any()):
        torch.nn.init.normal_(weight, std=0.3)
    return model


def carried(field: Any, folder: Path) -> Any:
    """The pipeline of the base as a map whose second time is silent, where fewstep's classes are not."""
    export(FlowMap.from_field(field), folder)
    pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, steps: int = 3) -> Tensor:
    return pipe(prompt=TEXTS, num_inference_steps=steps, latents=noise(), output_type="latent").images


def drawn(model: Any, steps: int = 3) -> Tensor:
    return sample(model, noise(), steps, **model.text.encode(TEXTS))


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("name", "keys"), KEYS)
def test_it_loads_and_stacks_in_the_carried_pipeline(name: str, keys: str, tmp_path: Path) -> None:
    field = base_of(name, tmp_path / "base")
    student = trained(FlowMap.from_field(field, share=True), 1)
    save_adapter(student, tmp_path / "fast", keys)
    assert {file.name for file in (tmp_path / "fast").iterdir()} == {DIFFUSERS_FILE, SECOND_TIME}
    assert all(".second." in key for key in load_file(tmp_path / "fast" / SECOND_TIME))
    style = base_of(name, tmp_path / "base")
    style = trained(NetworkField(style.network, style.native, style.prediction, path=style.path), 2)
    save_adapter(style, tmp_path / "style")

    pipe = carried(base_of(name, tmp_path / "base"), tmp_path / "map")
    plain = images(pipe)
    pipe.load_lora_weights(tmp_path / "fast", adapter_name="fast")
    fast = images(pipe)
    torch.testing.assert_close(fast, drawn(student), atol=1e-4, rtol=0)
    assert (fast - plain).abs().max() > 1e-2

    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipe.set_adapters(["fast", "style"], [1.0, 1.0])
    styled = base_of(name, tmp_path / "base")
    load_adapter(styled, tmp_path / "style")
    both = FlowMap.from_field(merge_lora(styled))
    load_adapter(both, tmp_path / "fast")
    torch.testing.assert_close(images(pipe), drawn(both), atol=1e-4, rtol=0)
    assert (images(pipe) - fast).abs().max() > 1e-2
    pipe.set_adapters("fast")
    torch.testing.assert_close(images(pipe), fast)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), plain)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("name", "keys"), [*KEYS, ("sd", "peft"), ("flux", "peft"), ("flux", None)])
def test_it_is_read_back_whatever_its_keys(name: str, keys: str | None, tmp_path: Path) -> None:
    field = base_of(name, tmp_path / "base")
    student = trained(FlowMap.from_field(field, share=True), 1)
    save_adapter(student, tmp_path / "fast", keys)
    assert (tmp_path / "fast" / PEFT_FILE).is_file() == (keys in (None, "peft"))
    other = FlowMap.from_field(base_of(name, tmp_path / "base"), share=True)
    load_adapter(other, tmp_path / "fast")
    torch.testing.assert_close(drawn(other), drawn(student), atol=1e-5 if keys == "kohya" else 0, rtol=0)


@pytest.mark.takes_seconds
def test_what_belongs_to_another_network_is_refused(tmp_path: Path) -> None:
    field = base_of("sd", tmp_path / "base")
    student = trained(FlowMap.from_field(field, share=True), 1)
    save_adapter(student, tmp_path / "fast", "diffusers")
    pipe = carried(base_of("sd", tmp_path / "base"), tmp_path / "map")
    second = load_file(tmp_path / "fast" / SECOND_TIME)
    save_file({key: value[:1].clone() for key, value in second.items()}, tmp_path / "fast" / SECOND_TIME)
    with pytest.raises(ValueError, match=r"second_time\.safetensors is of another network: this one has no such"):
        pipe.load_lora_weights(tmp_path / "fast")
    with pytest.raises(ValueError, match="which has no weight class_embedding"):
        load_adapter(FlowMap.from_field(field, share=True), tmp_path / "fast")
    assert torch.equal(images(pipe), images(carried(base_of("sd", tmp_path / "base"), tmp_path / "other")))
    with pytest.raises(ValueError, match="keys: kohya are for the U-Nets of Stable Diffusion"):
        save_adapter(trained(FlowMap.from_field(base_of("flux", tmp_path / "flux")), 1), tmp_path / "no", "kohya")
