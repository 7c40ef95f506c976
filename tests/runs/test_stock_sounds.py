"""Twins of the pipelines of sound, whole: what they tell their models, what these say of sound, and what is drawn."""

import json
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from toys.exports import pipeline, speak
from toys.sounds import LENGTH, RATE, dance, stable_audio

from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.flows.maps import FlowMap
from fewstep.flows.solvers import integrate
from fewstep.generation.drawing import draw
from fewstep.latents.vae import Latents
from fewstep.models.weightless import field_without_weights, text_conditions
from fewstep.runs.convert import convert
from fewstep.runs.export import export
from fewstep.runs.loading import load

TEXTS = ["a cat", "a dog, seen from far away"]
SHAPE = (4, LENGTH)
NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))


@contextmanager
def calls_of(model: Any) -> Iterator[list[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]]]:
    """What a model is given (state, time, conditions), and what it gives."""
    seen: list[Any] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        cond = {key: kwargs[key] for key in ("encoder_hidden_states", "global_hidden_states") if key in kwargs}
        seen.append((args[0].clone(), args[1].clone(), cond, output[0].clone()))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Audio, with the keys of the published configs that classes do not have, or have had."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    stable_audio().save_pretrained(folder)
    file = folder / "transformer" / "config.json"
    odd = {"_diffusers_version": "0.30.0.dev0", "key_of_later": [1, 2]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
    return folder


@pytest.mark.takes_seconds
def test_a_field_says_what_stable_audio_does_at_each_step(source: Path) -> None:
    stock = stable_audio()
    stock.set_progress_bar_config(disable=True)
    field: Any = load(source)
    asked = {"num_inference_steps": 3, "output_type": "latent", "audio_end_in_s": 1.5}
    with calls_of(stock.transformer) as seen, torch.no_grad():
        stock(list(TEXTS), guidance_scale=1.0, latents=NOISE.clone(), **asked)
    cond = field.text.encode(TEXTS, seconds=(0.0, 1.5))
    for (x, time, told, given), sigma in zip(seen, stock.scheduler.sigmas, strict=False):
        assert told.keys() == cond.keys()
        assert all(torch.equal(told[key], cond[key]) for key in cond)
        with torch.no_grad():
            asked_alone = field.network(x, time.expand(2), **cond)  # where the pipeline has one time for both
            torch.testing.assert_close(asked_alone, given, atol=1e-6, rtol=0)
            t = torch.full((2,), 1 / (1 + float(sigma)))
            z = x * (1 + sigma**2).sqrt() / (1 + sigma)
            data = z + (1 - t[:, None, None]) * field(z, t, **cond)
        wanted = stock.scheduler.precondition_outputs(x * (1 + sigma**2).sqrt(), given, sigma)
        torch.testing.assert_close(data, wanted, atol=1e-4, rtol=0)
    assert len(seen) == 3
    # For guidance it takes zeros in the place of text and seconds, and the seconds beside as they are.
    with calls_of(stock.transformer) as seen, torch.no_grad():
        stock(TEXTS[0], latents=NOISE[:1].clone(), **asked)
    null, unguided = field.text.null(), seen[0][2]
    assert null.keys() == {"encoder_hidden_states"}
    assert torch.equal(unguided["encoder_hidden_states"][0], null["encoder_hidden_states"])
    torch.testing.assert_close(unguided["global_hidden_states"][0], cond["global_hidden_states"][0], atol=1e-6, rtol=0)


@pytest.mark.takes_seconds
def test_the_ode_is_that_of_stable_audio_in_many_steps(source: Path) -> None:
    """By a deterministic sampler of second order, asked at angles as its own is, which draws noise on the way."""

    class Angles(diffusers.EDMDPMSolverMultistepScheduler):
        def precondition_noise(self, sigma: Any) -> Tensor:
            return torch.as_tensor(sigma).atan() / np.pi * 2

    stock = stable_audio()
    stock.set_progress_bar_config(disable=True)
    ends: Any = {"sigma_min": 1e-3, "sigma_max": 100.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}
    stock.scheduler = Angles(**ends, prediction_type="v_prediction")
    asked = {"num_inference_steps": 60, "output_type": "latent", "guidance_scale": 1.0}
    wanted = stock(list(TEXTS), latents=NOISE.clone(), **asked).audios
    field: Any = load(source)
    cond, grid = field.text.encode(TEXTS), (1 / (1 + stock.scheduler.sigmas)).float()
    with torch.no_grad():
        begun = NOISE * float((1 + 100.0**2) ** 0.5) * grid[0]
        euler = [
            integrate(lambda x, t: field(x, t, **cond), begun, torch.linspace(float(grid[0]), 1, steps + 1), "euler")
            for steps in (50, 200)
        ]
    errors = [float((found - wanted).square().mean().sqrt() / wanted.std()) for found in euler]
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] > 3  # of first order, as Euler is: both go to one solution
    assert wanted.std() > 0.1


def test_what_sound_is_told_is_planned_as_long_as_it_is(source: Path) -> None:
    field: Any = load(source)
    planned = text_conditions(field_without_weights(source), 2)
    encoded = field.text.encode(TEXTS)
    assert {key: value.shape for key, value in planned.items()} == {key: value.shape for key, value in encoded.items()}


def test_latents_of_sound(source: Path) -> None:
    field: Any = load(source)
    latents: Latents = field.latents
    assert (latents.rate, latents.factor, latents.channels) == (RATE, 4, 4)
    assert latents.shape_of((2, 32)) == SHAPE
    assert latents.image_shape_of(SHAPE) == (2, 32)
    vae = stable_audio().vae
    with torch.no_grad():
        sound = latents.decode(NOISE)
        torch.testing.assert_close(sound, vae.decode(NOISE).sample.clamp(-1, 1))
        torch.testing.assert_close(latents.encode(sound), vae.encode(sound).latent_dist.mode())
    with pytest.raises(ValueError, match="waveforms of 30 numbers: the VAE makes one latent of 4, so a multiple"):
        latents.shape_of((2, 30))
    with pytest.raises(ValueError, match="takes waveforms of 2 channels, these have 1"):
        latents.shape_of((1, 32))
    with pytest.raises(ValueError, match=r"the VAE takes waveforms \(C, L\), these have the shape \(3, 8, 8\)"):
        latents.shape_of((3, 8, 8))
    with pytest.raises(ValueError, match=r"this VAE decodes \(B, 4, l\)"):
        latents.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"seconds are \(2.0, 1.0\): for a model of sound, where it begins"):
        field.text.encode(TEXTS, seconds=(2.0, 1.0))


def test_a_projection_that_is_another_is_refused(source: Path, tmp_path: Path) -> None:
    stable_audio().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "projection_model": ["stable_audio", "Other"]}))
    field: Any = load(tmp_path)
    with pytest.raises(ValueError, match=r"class of projection_model in .* 'Other'.* StableAudioProjectionModel"):
        field.text.encode(TEXTS)


@pytest.mark.takes_seconds
def test_stable_audio_as_a_flow_is_drawn_by_its_own_pipeline(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "flow", count=2, steps=[5, 20])
    assert report.agreement is not None
    assert report.agreement.is_good, report.verdict
    assert (report.schedule, report.pipeline) == ("cosine", "StableAudioPipeline")
    assert (report.by_hand, report.missing) == ("", ())
    assert report.covered == (0.0, 1.0)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(list(TEXTS), num_inference_steps=4, guidance_scale=1.0, latents=NOISE.clone()).audios
    field: Any = load(tmp_path / "flow")
    cond, times = field.text.encode(TEXTS), (1 - pipe.scheduler.sigmas).float()
    with torch.no_grad():
        z = integrate(lambda x, t: field(x, t, **cond), NOISE, times, "euler")
        torch.testing.assert_close(field.latents.decode(z), wanted.clamp(-1, 1), atol=1e-5, rtol=0)
        stock: Any = load(source)
        assert torch.equal(stock(NOISE, 0.3, **cond), field(NOISE, 0.3, **cond))
    assert 'audios = pipe("rain on a tin roof"' in (tmp_path / "flow" / "README.md").read_text()


@pytest.mark.takes_seconds
def test_a_map_of_sound_is_drawn_by_its_export(source: Path, tmp_path: Path) -> None:
    student = speak(FlowMap.from_field(load(source)))  # pyright: ignore[reportArgumentType]
    expected = draw(student, 2, 2, seed=7, prompts=TEXTS, decode=True)[0]
    assert expected.shape == (2, 2, 32)
    assert expected.std() > 0.01
    folder = export(student, tmp_path / "fast")
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    pipe = pipeline(folder)
    found = pipe(TEXTS, generator=sample_generators(7, range(2)), **asked).audios
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    part = pipe(TEXTS, generator=sample_generators(7, range(2)), audio_start_in_s=0.5, audio_end_in_s=1.5, **asked)
    assert part.audios.shape == (2, 2, RATE)
    assert not torch.equal(part.audios, found[:, :, RATE // 2 : 3 * RATE // 2])  # it is told the seconds, too
    arrays = pipe(TEXTS, generator=sample_generators(7, range(2)), num_inference_steps=2).audios
    np.testing.assert_array_equal(arrays, found.numpy())
    for wrong, says in (
        ({"audio_end_in_s": 9.0}, r"from 0.0 to 9.0 seconds: this model makes 2 seconds at most"),
        ({"height": 8}, "makes sound, which has no height and width"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(TEXTS, **wrong)
    # By the code in the folder alone, and back.
    carried: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    carried.set_progress_bar_config(disable=True)
    assert type(carried).__module__ != type(pipe).__module__
    found = carried(TEXTS, generator=sample_generators(7, range(2)), **asked).audios
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    back: Any = load(folder)
    assert torch.equal(draw(back, 2, 2, seed=7, prompts=TEXTS, decode=True)[0], expected)
    again = pipeline(export(back, tmp_path / "again"))
    found = again(TEXTS, generator=sample_generators(7, range(2)), **asked).audios
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # The field itself is its own pipeline again.
    stock = export(load(source), tmp_path / "stock")
    index = json.loads((stock / "model_index.json").read_text())
    assert index["_class_name"] == "StableAudioPipeline"
    assert index["scheduler"] == ["diffusers", "CosineDPMSolverMultistepScheduler"]
    code = (tmp_path / "fast" / "README.md").read_text()
    assert 'audios = pipe(["rain on a tin roof"] * 4' in code


@pytest.mark.takes_seconds
def test_sound_is_written_as_wav(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", str(source), "--prompt", *TEXTS, "--steps", "2", "--seed", "7", "--device", "cpu"]
    assert main([*command, "--count", "2"]) == 0
    names = sorted(file.name for file in (tmp_path / "samples").iterdir() if not file.name.startswith("samples"))
    assert names == ["00000.wav", "00001.wav"]
    assert json.loads((tmp_path / "samples" / "samples.jsonl").read_text().splitlines()[1])["file_name"] == "00001.wav"
    assert main([*command, "--count", "1", "--out", "one.wav"]) == 0
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "samples" / "00000.wav").read_bytes()
    assert main([*command, "--count", "2", "--out", "both.npz"]) == 0
    data = np.load(tmp_path / "both.npz")["data"]
    with wave.open(str(tmp_path / "one.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (RATE, 2, 2, 32)
        written = np.frombuffer(file.readframes(32), "<i2").reshape(32, 2).T / 32767
    assert np.abs(written - data[0]).max() <= 0.5 / 32767 + 1e-6
    (tmp_path / "samples" / "00001.wav").unlink()
    assert main([*command, "--count", "2"]) == 0  # goes on
    assert (tmp_path / "samples" / "00001.wav").is_file()


def test_sound_that_cannot_be_written_so_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", str(source), "--prompt", "a cat", "--steps", "2", "--device", "cpu"]
    for more, says in (
        (["--count", "3", "--out", "all.wav"], "a .wav has one sample, and these are 3: --count 1, or a folder"),
        (["--count", "1", "--out", "all.png"], "sound is written as .wav, .npy, .npz"),
        (["--count", "1", "--out", "all.wav", "--latents"], "not known how many numbers of these samples are a second"),
    ):
        assert main([*command, *more]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Dance Diffusion


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dance Diffusion, as published: its config does not say how many waves are its time."""
    folder = tmp_path_factory.mktemp("dance") / "model"
    dance().save_pretrained(folder)
    file = folder / "unet" / "config.json"
    config = {**json.loads(file.read_text()), "_diffusers_version": "0.8.0.dev0", "key_of_later": None}
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "time_embedding_dim"}))
    return folder


@pytest.mark.takes_seconds
def test_a_field_says_what_dance_diffusion_does_at_each_step(waves: Path) -> None:
    stock, field = dance(), load(waves)
    stock.set_progress_bar_config(disable=True)
    seen: list[Any] = []
    stock.unet.register_forward_hook(lambda _, args, output: seen.append((*args, output.sample)))
    stock(2, num_inference_steps=4, generator=torch.Generator().manual_seed(3))
    assert len(seen) == 4
    for x, time, v in seen:
        a, s = torch.cos(time * np.pi / 2), torch.sin(time * np.pi / 2)
        with torch.no_grad():
            velocity = field(x / (a + s), max(0.0, float(a / (a + s))))  # pyright: ignore
        torch.testing.assert_close(velocity, (a * x - s * v) - (s * x + a * v), atol=1e-5, rtol=0)


@pytest.mark.takes_seconds
def test_the_ode_is_that_of_dance_diffusion_in_many_steps(waves: Path) -> None:
    """Its sampler makes nothing of its first call, where there is no signal: what that costs falls with the steps."""
    stock, field = dance(), load(waves)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = integrate(lambda x, t: field(x, t), noise, torch.linspace(0, 1, 25), "heun")  # pyright: ignore
    errors = []
    for steps in (10, 40):
        drawn = torch.from_numpy(stock(2, num_inference_steps=steps, generator=torch.Generator().manual_seed(3)).audios)
        errors.append(float((drawn - ours.clamp(-1, 1)).square().mean().sqrt() / drawn.std()))
    assert errors[1] < 0.12
    assert errors[0] / errors[1] > 2.5


@pytest.mark.takes_seconds
def test_dance_diffusion_is_converted_distilled_exported_and_heard(
    waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    field: Any = load(waves)
    assert (field.network.shape, field.network.rate) == ((2, 32), RATE)
    report = convert(waves, "flow", count=2, steps=[5, 20])
    assert report.agreement is not None
    assert report.agreement.is_good, report.verdict
    pipe: Any = DiffusionPipeline.from_pretrained("flow", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(2, num_inference_steps=4, generator=torch.Generator().manual_seed(3)).audios
    noise = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = integrate(lambda x, t: field(x, t), noise, (1 - pipe.scheduler.sigmas).float(), "euler").clamp(-1, 1)
    np.testing.assert_allclose(drawn, ours.numpy(), atol=1e-5)

    student = speak(FlowMap.from_field(field))
    expected = draw(student, 2, 2, seed=7)[0].clamp(-1, 1)
    folder = export(student, "fast")
    carried: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    carried.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "generator": sample_generators(7, range(2))}
    torch.testing.assert_close(carried(batch_size=2, **asked).audios, expected, atol=1e-5, rtol=0)
    stock: Any = DiffusionPipeline.from_pretrained(export(field, "stock"))
    assert type(stock) is diffusers.DanceDiffusionPipeline
    assert "audios = pipe(batch_size=4" in (tmp_path / "stock" / "README.md").read_text()

    assert main(["sample", str(folder), "--count", "2", "--steps", "2", "--seed", "7", "--device", "cpu"]) == 0
    with wave.open(str(tmp_path / "samples" / "00001.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (RATE, 2)
        written = np.frombuffer(file.readframes(32), "<i2").reshape(32, 2).T / 32767
    assert np.abs(written - expected[1].numpy()).max() <= 0.5 / 32767 + 1e-6
    with pytest.raises(ValueError, match="signals of 30 numbers: this UNet1DModel halves them 2 times"):
        field(torch.zeros(1, 2, 30), 0.5)
