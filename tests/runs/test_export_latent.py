"""Exports of latent maps and of maps that take an image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    LDMPipeline,
    PNDMScheduler,
    VQModel,
)
from safetensors.torch import load_file
from toys.exports import pipeline
from toys.families import made, tiny_vae
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample, sample_noise
from fewstep.latents.vae import Latents
from fewstep.networks import UNet
from fewstep.runs.export import export
from fewstep.runs.loading import load
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run


def tiny_vq(**options: Any) -> Any:
    """Images of 3 x 16 x 16 and latents of 1 x 8 x 8."""
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 1, "num_vq_embeddings": 8}
    return made(VQModel, **{**blocks, **sizes, "scaling_factor": 0.6, **options})


VAES: dict[str, Callable[[], Any]] = {
    "vq": tiny_vq,
    "kl": lambda: tiny_vae(latent_channels=1, shift_factor=0.2),
    "normed": lambda: tiny_vae(latent_channels=1, latents_mean=[0.3], latents_std=[1.7]),
}


def latent_field(prediction: str, vae: Any) -> NetworkField:
    field = tiny_field(prediction)
    field.latents = Latents(vae)
    return field


@pytest.mark.takes_seconds
@pytest.mark.parametrize("vae", VAES)
def test_a_latent_map_gives_the_images_of_its_vae(
    vae: str, tmp_path: Path, elsewhere: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny_student("v_prediction")
    student.latents = Latents(VAES[vae]())
    folder = export(student, tmp_path / "latent")
    generators = sample_generators(7, range(2))
    latents = sample(student, sample_noise((2, 1, 8, 8), generators), 2)
    expected = student.latents.decode(latents) / 2 + 0.5
    assert expected.std() > 0.01
    back = load(folder)
    assert back.latents is not None
    assert torch.equal(back.latents.decode(latents), student.latents.decode(latents))
    again = export(back, tmp_path / "again")  # from the folder of its VAE
    asked = {"num_inference_steps": 2, "generator": generators, "output_type": "pt"}
    for place in (folder, again):
        generators = sample_generators(7, range(2))
        found = pipeline(place)(**{**asked, "generator": generators}).images
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    command = ["sample", str(folder), "--count", "2", "--seed", "7", "--steps", "2", "--out", str(tmp_path / "x.npy")]
    assert main(command) == 0
    np.testing.assert_allclose(np.load(tmp_path / "x.npy") / 2 + 0.5, expected.numpy(), atol=1e-6)
    if vae == "vq":
        start = sample_generators(7, range(1))[0].initial_seed()
        elsewhere(
            """
            import sys
            import torch
            from diffusers import DiffusionPipeline
            from safetensors.torch import save_file

            pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
            generators = [torch.Generator().manual_seed((int(sys.argv[2]) + i) & 0xFFFFFFFF) for i in range(2)]
            images = pipe(num_inference_steps=2, generator=generators, output_type="pt").images
            save_file({"images": images.contiguous()}, sys.argv[3])
            """,
            again, start, tmp_path / "images.safetensors",
        )  # fmt: skip
        images = load_file(tmp_path / "images.safetensors")["images"]
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


@pytest.mark.takes_seconds
def test_a_latent_pipeline_stays_one(tmp_path: Path) -> None:
    LDMPipeline(tiny_vq(), tiny_unet(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ldm")
    field = load(tmp_path / "ldm")
    back = load(export(field, tmp_path / "field"))
    z = torch.randn(2, 1, 8, 8)
    assert field.latents is not None
    assert back.latents is not None
    assert torch.equal(back.latents.decode(z), field.latents.decode(z))
    pipe, original = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("field", "ldm"))
    assert isinstance(pipe, LDMPipeline)
    images = []
    for one in (pipe, original):
        one.set_progress_bar_config(disable=True)
        made = one(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")  # pyright: ignore
        images.append(made.images)
    np.testing.assert_array_equal(images[0], images[1])
    student = FlowMap.from_field(field)
    images = pipeline(export(student, tmp_path / "map"))(output_type="pt", num_inference_steps=1).images
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (lambda: latent_field("epsilon", VAES["kl"]()), "LDMPipeline does not bring latents into the units of its VAE"),
        (lambda: latent_field("flow", tiny_vq()), "LDMPipeline does not go with its FlowMatchEulerDiscreteScheduler"),
        (lambda: tiny_field("epsilon", 5), "none tells it its class"),
        (lambda: tiny_field("epsilon", in_channels=3), "none gives it the image"),
        (lambda: tiny_field("flow", sample_size=None), "none knows the size"),
        (
            lambda: DiffusionField(UNet(tiny_unet()), EDMEulerScheduler()),
            "DDPMPipeline does not go with its EDMEulerScheduler",
        ),
        (lambda: DiffusionField(UNet(tiny_unet()), PNDMScheduler()), "DDPMPipeline does not go with its PNDMScheduler"),
    ],
)
def test_no_pipeline_is_named_that_cannot_run(
    field: Callable[[], Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = field()
    folder = export(first, tmp_path / "field")
    assert not (folder / "model_index.json").exists()
    card = (folder / "README.md").read_text()
    assert f"No pipeline of diffusers samples it: {reason}" in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("50", "2"), names)
    assert names["samples"].isfinite().all()
    assert ("images" in names) == (first.latents is not None)
    assert (load(export(first, folder, overwrite=True)).latents is None) == (first.latents is None)


def test_a_vae_that_is_gone(tmp_path: Path) -> None:
    LDMPipeline(tiny_vq(), tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "ldm")
    field = load(tmp_path / "ldm")
    (tmp_path / "ldm" / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*vqvae"):
        export(field, tmp_path / "field")
    assert [p.name for p in tmp_path.iterdir()] == ["ldm"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("classes", [None, 5])
def test_a_map_that_takes_an_image(
    classes: int | None, tmp_path: Path, elsewhere: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_student("v_prediction", classes, in_channels=3)
    folder = export(student, tmp_path / "beside")
    image = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    generators = sample_generators(7, range(3))
    noise = sample_noise((3, 1, 8, 8), generators)
    x = sample(student, noise, 3, gamma=1.0, generator=generators, image=image, **conditions(classes))
    expected = (x / 2 + 0.5).clamp(0, 1)
    pipe = pipeline(folder)
    asked: dict[str, Any] = {"num_inference_steps": 3, "gamma": 1.0, "output_type": "pt", **conditions(classes)}
    found = pipe(image=image, generator=sample_generators(7, range(3)), **asked).images
    assert torch.equal(found, expected)
    assert (pipe(image=-image, generator=sample_generators(7, range(3)), **asked).images - found).abs().max() > 1e-3
    assert torch.equal(sample(load(folder), noise, 1, image=image, **conditions(classes)),
                       sample(student, noise, 1, image=image, **conditions(classes)))  # fmt: skip
    for wrong, message in (
        (None, r"takes an image beside the state: image of shape \(3, 2, 8, 8\) is needed"),
        (image[:, :1], r"image has shape \(3, 1, 8, 8\), this model needs \(3, 2, 8, 8\)"),
        (image[:2], r"3 images, but"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(image=wrong, latents=noise, batch_size=3, **asked)
    monkeypatch.chdir(tmp_path)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert elsewhere(f"import os; os.chdir({str(tmp_path)!r})\n{code}\nprint(len(images))").split()[-1] == "4"


def test_a_run_is_sampled_with_the_images_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(tiny_unet(5), DDPMScheduler(prediction_type="v_prediction")).save_pretrained("ddpm")
    draw = np.random.default_rng(0)
    pictures, beside = draw.integers(0, 255, (4, 1, 8, 8), dtype=np.uint8), draw.normal(size=(4, 2, 8, 8))
    np.savez("edges.npz", data=pictures, image=beside.astype(np.float32), labels=np.array([0, 1, 2, 3]))
    recipe: dict[str, Any] = {
        "name": "edges", "data": {"name": "edges.npz", "conditions": ["image"], "label": "labels"},
        "training": {"steps": 1, "batch": 4, "quiet": True}, "evaluation": {"count": 0},
    }  # fmt: skip
    student = {"network": "auto", "kind": "field", "image": 2}
    tuned = {**recipe, "teacher": "ddpm", "objective": "FlowMatching", "student": student}
    run(load_recipe(tuned), tmp_path / "field")
    run(load_recipe({**recipe, "teacher": "field", "objective": "LMD"}), tmp_path / "map")

    options = ["--steps", "2", "--count", "6", "--seed", "7", "--batch", "4"]
    image = torch.tensor(beside, dtype=torch.float32)[torch.arange(6) % 4]
    noise = sample_noise((6, 1, 8, 8), sample_generators(7, range(6)))
    for name, asked in (("field", []), ("map", []), ("field", ["--teacher"]), ("map", ["--teacher"])):
        model: Any = load(tmp_path / ("field" if name == "map" else "ddpm") if asked else tmp_path / name)
        cond = {"class_labels": torch.arange(6) % 5}
        if model.network.model.config["in_channels"] == 3:  # all but the teacher of the first
            cond["image"] = image
        assert main(["sample", name, *asked, *options, "--out", "x.npz"]) == 0
        found, expected = np.load("x.npz"), sample(model, noise, 2, **cond)
        np.testing.assert_allclose(found["data"], expected.numpy(), rtol=1e-4, atol=1e-4)
        assert ("image" in found) == ("image" in cond)
    np.testing.assert_array_equal(found["image"], image.numpy())

    # An export has no data.
    for name in ("field", "map"):
        assert main(["export", name, f"{name}-export"]) == 0
        for command in (["sample"], ["reflow", "--count", "2", "--steps", "1"]):
            assert main([*command, f"{name}-export", "--out", "never"]) == 2
            said = capsys.readouterr().err
            assert "an image" in said
            assert "fewstep.sample(model, noise, image=" in said
    assert not list(tmp_path.glob("never*"))
