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
from toys.videos import cogvideox, cogvideox_model, ltx, wan

from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import check_options, sample
from fewstep.flows.solvers import integrate
from fewstep.models.weightless import field_without_weights, text_conditions
from fewstep.networks import CogVideoX, with_second_time
from fewstep.runs.convert import convert
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


@pytest.mark.takes_seconds
@pytest.mark.parametrize("is_rotary", [False, True])
def test_a_field_of_cogvideox_draws_the_videos_of_its_pipeline(is_rotary: bool, tmp_path: Path) -> None:
    """A diffusion model, by v on a shifted schedule that begins without signal: DDIM on its steps is Euler."""
    pipeline = cogvideox(use_rotary_positional_embeddings=is_rotary)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    odd = {"_diffusers_version": "0.30.0.dev0", "use_learned_positional_embeddings": False, "key_of_later": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
    shape = (4, 3, 4, 4)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "latents": noise.transpose(1, 2)}
    wanted = pipeline(prompt=list(TEXTS), output_type="pt", **asked).frames

    field: Any = load(tmp_path / "model")
    assert field.network.shape == shape
    assert field.native.ends_in_noise
    assert field.latents.shape_of((3, 9, 32, 32)) == shape
    power = pipeline.scheduler.alphas_cumprod.double()[pipeline.scheduler.timesteps]
    times = torch.cat([power.sqrt() / (power.sqrt() + (1 - power).sqrt()), torch.ones(1, dtype=torch.float64)])
    cond = field.text.encode(TEXTS)
    with torch.no_grad():
        ours = integrate(lambda x, t: field(x, t, **cond), noise, times.float(), "euler")
        videos = field.latents.decode(ours)
    torch.testing.assert_close(videos.transpose(1, 2) / 2 + 0.5, wanted, atol=2e-4, rtol=0)
    assert wanted.std() > 0.01
    assert field.latents.encode(videos).shape == noise.shape

    report = convert(tmp_path / "model", tmp_path / "flow", count=2, steps=[5, 20], prompts=TEXTS)
    assert report.agreement is not None
    assert report.agreement.is_good, report.verdict
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(prompt=list(TEXTS), output_type="latent", **asked).frames.transpose(1, 2)
    with torch.no_grad():
        ours = integrate(lambda x, t: field(x, t, **cond), noise, (1 - pipe.scheduler.sigmas).float(), "euler")
    torch.testing.assert_close(ours, drawn, atol=1e-4, rtol=0)

    student = FlowMap.from_field(field)
    folder = export(student, tmp_path / "fast")
    back: Any = load(folder)
    with torch.no_grad():
        assert torch.equal(back(noise, 0.3, 0.8, **cond), student(noise, 0.3, 0.8, **cond))
    carried: Any = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    carried.set_progress_bar_config(disable=True)
    found = carried(list(TEXTS), latents=noise, num_inference_steps=2, output_type="latent").images
    with torch.no_grad():
        torch.testing.assert_close(found, sample(student, noise, 2, **cond), atol=1e-5, rtol=0)
    stock = diffusers.DiffusionPipeline.from_pretrained(export(field, tmp_path / "stock"))
    assert type(stock) is diffusers.CogVideoXPipeline


def test_cogvideox_of_version_1_5_sees_pairs_of_frames() -> None:
    """Its patches are of two frames, and one made for an image is told how far it stands off."""
    model = cogvideox_model(
        use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False, ofs_embed_dim=16, in_channels=8,
        sample_frames=9,
    )  # fmt: skip
    network = CogVideoX(model)
    assert network.shape == (4, 4, 4, 4)  # one frame more than the VAE makes of nine
    x, image = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 4, 2, 4, 4)
    text, times = torch.randn(2, 6, 32), torch.tensor([30.0, 700.0])
    pipeline = cogvideox()
    pipeline.transformer = model
    turns = pipeline._prepare_rotary_positional_embeddings(32, 32, 2, "cpu")
    with torch.no_grad():
        both = torch.cat([x, image], dim=1).transpose(1, 2)
        told = {"image_rotary_emb": turns, "ofs": torch.full((1,), 2.0)}
        wanted = model(both, text, times, **told).sample.transpose(1, 2)
        assert torch.equal(network(x, times, text, image=image), wanted)
        for how in ("t", "late"):
            student: Any = with_second_time(network, second_time=how)
            assert torch.equal(student(x, times, times, encoder_hidden_states=text, image=image), wanted)


def test_cogvideox_is_as_large_as_it_is_published(tmp_path: Path) -> None:
    """CogVideoX-2b has 1.69 billion parameters; its config says what its class does by default."""
    for part, config in (
        ("transformer", {"_class_name": "CogVideoXTransformer3DModel"}),
        ("vae", {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [128, 256, 256, 512]}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    field = field_without_weights(tmp_path)
    assert round(sum(p.numel() for p in field.parameters()) / 1e7) == 169
    assert field.network.shape == (16, 13, 60, 90)
    assert field.latents is not None
    assert field.latents.image_shape_of((16, 13, 60, 90)) == (3, 49, 480, 720)
    assert text_conditions(field, 1)["encoder_hidden_states"].shape == (1, 226, 4096)
