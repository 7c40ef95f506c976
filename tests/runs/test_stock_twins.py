"""Twins of the families of 2025 and 2026, whole: from prompt to pixels a field of a pipeline's folder draws what the
pipeline itself does, at its own steps."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ChromaPipeline, QwenImagePipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import Tensor
from toys.families import tiny_pipeline
from toys.videos import ltx, wan

from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import check_options
from fewstep.flows.solvers import integrate
from fewstep.runs.export import export
from fewstep.runs.loading import load

TEXTS = ["a cat", "a dog, seen from far away"]
# How each pipeline is told the noise, and that nothing is to guide it.
LATENTS: dict[str, Any] = {
    "qwenimage": lambda x: QwenImagePipeline._pack_latents(x[:, :, None], *x.shape),
    "chroma": lambda x: ChromaPipeline._pack_latents(x, *x.shape),
}
UNGUIDED = {"qwenimage": {"true_cfg_scale": 1.0}, "z-image": {"guidance_scale": 0.0}, "hunyuanimage": {}}


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "name", ["flux2", "qwenimage", "z-image", "auraflow", "lumina2", "chroma", "sana", "hunyuanimage"]
)
def test_a_field_of_a_folder_draws_the_images_of_its_pipeline(name: str, tmp_path: Path) -> None:
    pipeline, steps = tiny_pipeline(name), 3
    pipeline.set_progress_bar_config(disable=True)
    if name == "hunyuanimage":
        pipeline.register_modules(guider=AdaptiveProjectedMixGuidance(enabled=False))
    pipeline.save_pretrained(tmp_path)
    side = 32 if name == "sana" else 16  # the least that it takes
    noise = torch.randn(2, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt", "height": side, "width": side}
    options |= UNGUIDED.get(name, {"guidance_scale": 1.0})
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False
    wanted = pipeline(prompt=list(TEXTS), latents=LATENTS.get(name, Tensor.clone)(noise), **options).images

    field = load(tmp_path)
    assert field.text is not None
    assert field.latents is not None
    times = 1 - pipeline.scheduler.sigmas  # as the pipeline has set them
    cond = field.text.encode(TEXTS)
    with torch.no_grad():
        samples = integrate(lambda x, t: field(x, t, **cond), noise, times.float(), "euler")
        images = field.latents.decode(samples)
    torch.testing.assert_close(images / 2 + 0.5, wanted, atol=2e-4, rtol=0)
    assert wanted.std() > 0.01
    assert not torch.equal(wanted[0], wanted[1])
    assert field.latents.encode(images).shape == noise.shape
    assert field.latents.image_shape_of(field.latents.shape_of((3, side, side))) == (3, side, side)


# By the tokens of a sample, with more of them for some than for others; and one number for all.
SHIFTED: dict[str, Any] = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "name", ["flux", "flux2", "qwenimage", "z-image", "lumina2", "chroma", "sd3", "auraflow", "ltx", "sana", "wan"]
)
def test_native_steps_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    pipeline = VIDEOS[name][0]() if name in VIDEOS else tiny_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    how = {"shift": 3.0} if name == "auraflow" else {**SHIFTED, **({"shift_terminal": None} if name == "sd3" else {})}
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**how)
    if name in ("sana", "wan"):  # by flow_shift, as they are published
        kind = diffusers.DPMSolverMultistepScheduler if name == "sana" else diffusers.UniPCMultistepScheduler
        pipeline.scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline.save_pretrained(tmp_path)
    field: Any = load(tmp_path)
    height, width = {"ltx": (64, 96), "lumina2": (16, 32), "auraflow": (16, 16), "sana": (32, 32), "wan": (16, 16)}.get(
        name, (16, 24)
    )
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "height": height, "width": width}
    frames = {"ltx": (9,), "wan": (5,)}.get(name, ())
    options |= {"num_frames": frames[0]} if frames else {}
    options |= {"use_resolution_binning": False} if name == "sana" else {}
    pipeline(prompt=list(TEXTS), **options, **UNGUIDED.get(name, {"guidance_scale": 1.0}))
    shape = field.latents.shape_of((3, *frames, height, width))
    times = check_options(field, 3, grid="native", shape=shape)
    wanted = 1 - pipeline.scheduler.sigmas.double()
    if name in ("sana", "wan"):  # whose schedulers keep a little away from pure noise
        assert 0 < wanted[0] < 1e-3
        wanted[0] = 0
    torch.testing.assert_close(times, wanted, atol=5e-7, rtol=0)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "odd"),
    [
        # As the published folders have them: keys that the class has given up, and versions to come.
        ("qwenimage", {"pooled_projection_dim": 768, "guidance_embeds": False, "_diffusers_version": "0.34.0.dev0"}),
        ("z-image", {"siglip_feat_dim": None, "t_scale": 1000.0, "_diffusers_version": "0.36.0.dev0"}),
        ("hunyuanimage", {"use_meanflow": False, "image_condition_type": None, "pooled_projection_dim": 768}),
        ("sana", {"timestep_scale": 1.0, "qk_norm": None, "complex_key_of_later": [1, 2]}),
    ],
)
def test_the_odd_keys_of_published_configs(name: str, odd: dict[str, Any], tmp_path: Path) -> None:
    """Loaded, made a student and exported; HunyuanImage's folder has guiders beside."""
    pipeline = tiny_pipeline(name)
    if name == "hunyuanimage":
        guider = AdaptiveProjectedMixGuidance()
        pipeline.register_modules(guider=guider, ocr_guider=guider)
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
    field: Any = load(tmp_path / "model")
    if hasattr(field.network, "size"):
        field.network.size = 8
    cond, x = field.text.encode(TEXTS), torch.randn(2, *field.network.shape)
    student = FlowMap.from_field(field)
    back: Any = load(export(student, tmp_path / "fast"))
    stock: Any = load(export(field, tmp_path / "stock"))
    with torch.no_grad():
        velocity = field(x, 0.3, **cond)
        assert torch.equal(back(x, 0.3, 0.8, **cond), student(x, 0.3, 0.8, **cond))
        assert torch.equal(student.velocity(x, 0.3, **cond), velocity)
        torch.testing.assert_close(stock(x, 0.3, **stock.text.encode(TEXTS)), velocity, atol=1e-6, rtol=0)


# What makes the pipeline, how long its videos are and how large, and the shape of their latents.
VIDEOS: dict[str, Any] = {"wan": (wan, 5, 16, (4, 3, 8, 8)), "ltx": (ltx, 9, 64, (4, 2, 2, 2))}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", VIDEOS)
def test_a_field_of_videos_draws_those_of_its_pipeline(name: str, tmp_path: Path) -> None:
    make, frames, side, shape = VIDEOS[name]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    latents = diffusers.LTXPipeline._pack_latents(noise, 1, 1) if name == "ltx" else noise
    options: dict[str, Any] = {"num_frames": frames, "height": side, "width": side, "output_type": "pt"}
    wanted = pipeline(
        prompt=list(TEXTS), latents=latents.clone(), num_inference_steps=2, guidance_scale=1.0, **options
    ).frames

    field: Any = load(tmp_path / "model")
    assert field.latents.shape_of((3, frames, side, side)) == shape
    assert field.latents.image_shape_of(shape) == (3, frames, side, side)
    cond, times = field.text.encode(TEXTS), (1 - pipeline.scheduler.sigmas).float()
    with torch.no_grad():
        videos = field.latents.decode(integrate(lambda x, t: field(x, t, **cond), noise, times, "euler"))
    torch.testing.assert_close(videos.transpose(1, 2) / 2 + 0.5, wanted, atol=2e-4, rtol=0)
    assert wanted.std() > 0.01
    assert field.latents.encode(videos).shape == noise.shape
    student = FlowMap.from_field(field)
    student.network.size = shape[1:]  # pyright: ignore[reportAttributeAccessIssue]
    back: Any = load(export(student, tmp_path / "fast"))
    with torch.no_grad():
        assert torch.equal(back(noise, 0.3, 0.8, **cond), student(noise, 0.3, 0.8, **cond))
