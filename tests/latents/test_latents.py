"""Latents: the VAE of a pipeline, in the units of its model."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, VQModel
from torch import Tensor
from toys.families import made, tiny_pipeline, tiny_vae

from fewstep.common.model_files import WEIGHTS
from fewstep.latents.vae import Latents

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
Z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae(shift_factor=0.3)


@torch.no_grad()
def decoded(vae: Any, z: Tensor) -> Tensor:
    return torch.cat([vae.decode(part).sample for part in z.split(4)]).clamp(-1, 1)


def test_images_and_latents(vae: AutoencoderKL) -> None:
    """SD3's pipeline writes z / scale + shift; what is encoded is its inverse."""
    latents = Latents(vae)
    with torch.no_grad():
        mean = vae.encode(IMAGES).latent_dist.mean
        drawn = vae.encode(IMAGES).latent_dist.sample(torch.Generator().manual_seed(2))
    assert torch.equal(latents.encode(IMAGES), (mean - 0.3) * 0.7)
    assert torch.equal(latents.encode(IMAGES, torch.Generator().manual_seed(2)), (drawn - 0.3) * 0.7)
    assert torch.equal(latents.decode(Z), decoded(vae, Z / 0.7 + 0.3))
    assert latents.decode(1000 * Z).abs().max() == 1
    assert latents.encode(IMAGES.double()).dtype == latents.decode(Z.double()).dtype == torch.float64


def test_the_shapes(vae: AutoencoderKL) -> None:
    latents = Latents(vae)
    assert latents.shape_of((3, 16, 32)) == (4, 8, 16)
    assert latents.image_shape_of((4, 8, 16)) == (3, 16, 32)
    assert latents.encode(IMAGES[:1, :, :8]).shape == (1, 4, 4, 8)
    with pytest.raises(ValueError, match="takes images of 3 channels, these have 1"):
        latents.encode(IMAGES[:, :1])
    with pytest.raises(ValueError, match=r"images of 15 x 16.*multiples of 2"):
        latents.shape_of((3, 15, 16))
    with pytest.raises(ValueError, match=r"latents of shape \(5, 3, 16, 16\): this VAE decodes \(B, 4, h, w\)"):
        latents.decode(IMAGES)


def test_a_mean_and_deviation_of_each_channel() -> None:
    """As SDXL's pipeline writes it: z * std / scale + mean."""
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    vae = tiny_vae(latents_mean=mean, latents_std=deviation)
    latents = Latents(vae)
    m, d = (torch.tensor(value).reshape(1, 4, 1, 1) for value in (mean, deviation))
    assert torch.allclose(latents.decode(Z), decoded(vae, Z * d / 0.7 + m), atol=1e-6)
    with torch.no_grad():
        z = vae.encode(IMAGES).latent_dist.mean
    assert torch.allclose(latents.encode(IMAGES) * d / 0.7 + m, z, atol=1e-6)


def test_the_vaes_that_are_no_kl() -> None:
    tiny = made(
        AutoencoderTiny, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4, scaling_factor=1.5,
    )  # fmt: skip
    codes = made(VQModel, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, num_vq_embeddings=5,
                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    for vae, scale in ((tiny, 1.5), (codes, 0.18215)):
        latents = Latents(vae)
        assert latents.factor == 2
        with torch.no_grad():
            assert torch.equal(latents.encode(IMAGES), vae.encode(IMAGES).latents * scale)
        assert torch.equal(latents.decode(Z), decoded(vae, Z / scale))


def test_it_is_loaded_when_first_needed_and_shared_by_copies(tmp_path: Path, vae: AutoencoderKL) -> None:
    vae.save_pretrained(tmp_path / "vae")
    expected = Latents(vae).decode(Z)
    for source in (tmp_path / "vae", str(tmp_path)):
        latents = Latents(source)
        assert "vae" not in vars(latents)
        assert latents.shape_of((3, 16, 16)) == (4, 8, 8)
        assert deepcopy({"field": latents})["field"] is latents
        assert torch.equal(latents.decode(Z), expected)
        assert not latents.vae.training
        assert not any(weight.requires_grad for weight in latents.vae.parameters())
    (tmp_path / "vae" / f"{WEIGHTS}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        Latents(tmp_path).check()


def test_what_a_pipeline_decodes() -> None:
    pipeline: StableDiffusionXLPipeline = tiny_pipeline("sdxl")
    size: Any = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0}
    given = {**size, "prompt": "a cat", "latents": Z[:1]}
    pipeline.set_progress_bar_config(disable=True)
    latents: Any = pipeline(**given, output_type="latent").images
    images: Any = pipeline(**given, output_type="pt").images
    assert torch.equal(Latents(pipeline.vae).decode(latents) / 2 + 0.5, images)


def test_folders_without_a_vae(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no VAE in .*vae/config\.json"):
        Latents(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "in_channels": 3}))
    with pytest.raises(FileNotFoundError, match="no VAE in"):
        Latents(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLMochi", "latent_channels": 12}))
    with pytest.raises(ValueError, match=r"unknown VAE 'AutoencoderKLMochi'.*AutoencoderKL"):
        Latents(tmp_path)
