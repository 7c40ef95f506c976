"""Prompts: what a pipeline's own encoders make of them, and samples of a whole text pipeline."""

import importlib.util
import inspect
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from torch import Tensor
from toys.families import tiny_pipeline

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.fields import DiffusionField
from fewstep.flows.guided import Guided
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.solvers import integrate
from fewstep.generation.drawing import draw
from fewstep.latents.prompts import Prompts, knows_prompts
from fewstep.runs.loading import load

TEXTS = ["a cat", "a dog"]
SANA_ASKS = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
NAMES = ["sd", "sdxl", "pixart", "sd3", "sd3 without", "flux"]
NAMES += ["flux2", "qwenimage", "z-image", "sana", "auraflow", "lumina2", "chroma", "hunyuanimage"]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {name: tiny_pipeline(name) for name in NAMES}


@pytest.fixture(scope="module")
def folders(pipelines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(place / name)
    return {name: place / name for name in pipelines}


@torch.no_grad()
def expected(name: str, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
    """By the pipeline's own encode_prompt, and its own sizes for 16 x 16 images."""
    rows = len(texts)
    match name:
        case "sd":
            text, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
            return {"encoder_hidden_states": text}
        case "sdxl":
            text, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
            size = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, pooled.shape[-1])
            return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": size.repeat(rows, 1)}
        case "pixart":
            text, mask, _, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
            size = {"resolution": torch.full((rows, 2), 16.0), "aspect_ratio": torch.ones(rows, 1)}
            return {"encoder_hidden_states": text, "encoder_attention_mask": mask, **size}
        case "flux2":
            return {"encoder_hidden_states": pipeline.encode_prompt(texts)[0]}
        case "qwenimage" | "z-image":
            found = pipeline.encode_prompt(list(texts), "cpu")[0]
            if name == "qwenimage":
                lengths = pipeline.encode_prompt(list(texts), "cpu")[1]
                lengths = [found.shape[1]] * rows if lengths is None else lengths.sum(1).tolist()
                found = [one[: int(k)] for one, k in zip(found, lengths, strict=False)]
            text = torch.zeros(rows, 512, 32)
            mask = torch.zeros(rows, 512, dtype=torch.long)
            for k, one in enumerate(found):
                text[k, : len(one)], mask[k, : len(one)] = one, 1
            key = "encoder_hidden_states_mask" if name == "qwenimage" else "encoder_attention_mask"
            return {"encoder_hidden_states": text, key: mask}
        case "sana" | "lumina2" | "chroma":
            options = {"complex_human_instruction": SANA_ASKS} if name == "sana" else {}
            made = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False, device="cpu", **options)
            return {"encoder_hidden_states": made[0], "encoder_attention_mask": made[2 if name == "chroma" else 1]}
        case "auraflow":
            text, *_ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": text}
        case "hunyuanimage":
            text, mask, glyphs, shown = pipeline.encode_prompt(texts, batch_size=rows)
            own = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
            return {**own, "encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": shown}
        case "flux":
            text, pooled, _ = pipeline.encode_prompt(texts, None)
        case _:
            text, _, pooled, _ = pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_encoded_as_the_pipeline_does(
    name: str, pipelines: dict[str, Any], folders: dict[str, Path]
) -> None:
    prompts = Prompts(folders[name])
    cond, wanted = prompts.encode(TEXTS), expected(name, pipelines[name], TEXTS)
    assert cond.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(cond[key], value), key
    assert not torch.equal(*cond["encoder_hidden_states"])
    assert not cond["encoder_hidden_states"].requires_grad
    assert deepcopy([prompts])[0] is prompts


@pytest.mark.parametrize("name", NAMES)
def test_a_field_takes_what_its_prompts_give(name: str, folders: dict[str, Path]) -> None:
    field = load(folders[name])
    assert field.text is not None
    cond, x = field.text.encode(TEXTS), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        plain = field(x, 0.4, **cond)
        guided = Guided(field, 3.0, null=field.text.null())
        assert plain.isfinite().all()
        assert not torch.equal(plain, field(x, 0.4, **field.text.encode(TEXTS[::-1])))
        assert not torch.allclose(guided(x, 0.4, **cond), plain)


def test_no_prompt_is_what_the_pipeline_takes_for_it(pipelines: dict[str, Any], folders: dict[str, Path]) -> None:
    with torch.no_grad():
        _, text = pipelines["sd"].encode_prompt(["a cat"], "cpu", 1, True)
        _, zeros, _, pooled = pipelines["sdxl"].encode_prompt(["a cat"])
        _, _, third, mask = pipelines["pixart"].encode_prompt(["a cat"])
    assert torch.equal(Prompts(folders["sd"]).null()["encoder_hidden_states"], text[0])
    xl, pixart = Prompts(folders["sdxl"]).null(), Prompts(folders["pixart"]).null()
    assert xl.keys() == {"encoder_hidden_states", "text_embeds"}
    assert torch.equal(xl["encoder_hidden_states"], zeros[0])
    assert torch.equal(xl["text_embeds"], pooled[0])
    assert pixart.keys() == {"encoder_hidden_states", "encoder_attention_mask"}
    assert torch.equal(pixart["encoder_hidden_states"], third[0])
    assert torch.equal(pixart["encoder_attention_mask"], mask[0])


def test_the_size_of_the_image_can_be_said(folders: dict[str, Path]) -> None:
    assert Prompts(folders["sdxl"]).encode(["a"], size=(32, 16))["time_ids"].tolist() == [[32, 16, 0, 0, 32, 16]]
    told = Prompts(folders["pixart"]).encode(["a"], size=(32, 16))
    assert told["resolution"].tolist() == [[32, 16]]
    assert told["aspect_ratio"].tolist() == [[2]]


def test_a_field_samples_the_images_of_the_pipeline(pipelines: dict[str, Any], folders: dict[str, Path]) -> None:
    """Euler on the linear path, begun at the schedule's first point, is DDIM: prompt to pixels."""
    field, pipeline = load(folders["sd"]), pipelines["sd"]
    assert isinstance(field, DiffusionField)
    assert field.text is not None
    assert field.latents is not None
    noise, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4)), 5
    size: Any = {"height": 16, "width": 16, "num_inference_steps": steps, "guidance_scale": 1.0}
    wanted = pipeline(TEXTS, latents=noise.clone(), output_type="pt", **size).images

    power = pipeline.scheduler.alphas_cumprod.double()[pipeline.scheduler.timesteps]
    times = power.sqrt() / (power.sqrt() + (1 - power).sqrt())  # t = a / (a + s)
    first = noise / float(power[0].sqrt() + (1 - power[0]).sqrt())  # x_t is x_k / (a + s)
    cond = field.text.encode(TEXTS)
    grid = torch.cat([times, torch.ones(1)])
    with torch.no_grad():
        samples = integrate(lambda x, t: field(x, t, **cond), first, grid.float(), "euler")
    images = field.latents.decode(samples)
    assert torch.allclose(images / 2 + 0.5, wanted, atol=2e-5)
    assert wanted.std() > 0.01


def test_prompts_are_given_to_the_samples_in_turn(folders: dict[str, Path]) -> None:
    field = load(folders["sd"])
    assert field.text is not None
    samples, cond, _ = draw(field, 3, 2, prompts=TEXTS, batch=2)
    assert cond == {}
    noise = sample_noise((3, 4, 8, 8), sample_generators(0, [0, 1, 2]))
    alone = sample(field, noise, 2, **field.text.encode([*TEXTS, TEXTS[0]]))
    assert torch.allclose(samples, alone, atol=1e-5)
    guided = sample(Guided(field, 3.0, null=field.text.null()), noise, 2, **field.text.encode([*TEXTS, TEXTS[0]]))
    samples, _, calls = draw(field, 3, 2, prompts=TEXTS, guidance=3.0)
    assert torch.allclose(samples, guided, atol=1e-5)
    assert calls == 4  # two a step
    with pytest.raises(ValueError, match=r'conditioned on text.*--prompt "a cat"'):
        draw(field, 3, 2)
    field.text = None
    with pytest.raises(ValueError, match=r"prompts \['a cat'\]: this model has no text encoders"):
        draw(field, 3, 2, prompts=["a cat"])


@pytest.mark.takes_seconds
def test_samples_of_a_text_model_from_the_command_line(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(folders["sd"]), "--steps", "1", "--count", "2", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "no.png")]) == 2
    assert "--prompt" in capsys.readouterr().err
    words += ["--prompt", *TEXTS]
    assert main([*words, "--out", str(tmp_path / "a.png")]) == 0
    assert main([*words, "--out", str(tmp_path / "images.npy")]) == 0
    assert main([*words, "--latents", "--out", str(tmp_path / "latents.npy")]) == 0
    assert (tmp_path / "a.png").is_file()
    images, latents = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("images", "latents"))
    assert images.shape == (2, 3, 16, 16)
    decoder = load(folders["sd"]).latents
    assert decoder is not None
    assert torch.allclose(decoder.decode(latents), images, atol=1e-5)
    capsys.readouterr()
    assert main([*words, "--latents", "--out", str(tmp_path / "latents.png")]) == 2
    assert "(4, 8, 8) are no images" in capsys.readouterr().err


# Refusals


def test_loading_encoders_draws_no_bars_where_there_is_no_terminal(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    Prompts(folders["sd"]).encode(TEXTS)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()  # as it was


def test_without_transformers(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    prompts = Prompts(folders["sd"])
    with pytest.raises(ImportError, match=r"transformers.*pip install 'fewstep\[text\]'"):
        prompts.encode(["a cat"])


@pytest.mark.takes_seconds
def test_bad_prompts_and_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts = Prompts(folders["sd"])
    for wrong in ("a cat", []):
        with pytest.raises(ValueError, match="prompts are a list of texts"):
            prompts.encode(wrong)
    with pytest.raises(ValueError, match="unknown pipeline with text encoders 'of no class'"):
        Prompts(tmp_path)
    assert not knows_prompts(tmp_path)
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    shutil.rmtree(folder / "text_encoder")
    field = load(folder)  # the field itself needs no encoder
    assert field.text is not None
    with pytest.raises(FileNotFoundError, match=r"no text_encoder in .*model_index\.json names"):
        field.text.encode(["a cat"])
