"""Conversions of models whose parts are missing or damaged, of models that take an image, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
)
from toys.conversions import flow_grid, toy
from toys.families import tiny_pipeline, tiny_vae
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.cli import main
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.paths import Linear, Reversed, Trigonometric
from fewstep.flows.sampling import sample
from fewstep.latents.vae import Latents
from fewstep.networks import MLP, UNet, flow_model
from fewstep.networks.configs import with_image
from fewstep.runs.convert import convert
from fewstep.runs.loading import load


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: tiny_student(), {}, "flow map is no diffusion model.*fewstep export"),
        (CheckerboardField, {}, "CheckerboardField has no network"),
        (lambda: Guided(tiny_field("v_prediction", 5), 2.0, null={"class_labels": 4}), {}, "the field inside it"),
        (lambda: NetworkField(MLP(2), Linear()), {}, "MLP is no model of diffusers.*UNet"),
        (
            lambda: NetworkField(UNet(tiny_unet()), Reversed(), "flow", path=Trigonometric()),
            {},
            r"on the linear path.*Trigonometric\(\).*\.on\(Linear\(\)\)",
        ),
        (
            lambda: NetworkField(UNet(tiny_unet()), Trigonometric(), "noise", path=Linear()),
            {},
            r"noise on Trigonometric\(\) has no counterpart",
        ),
        (lambda: tiny_field("epsilon"), {"labels": [0]}, "the model has no classes"),
        (lambda: tiny_field("epsilon", 5), {"labels": [5]}, "the classes 0 to 4"),
        (lambda: tiny_field("epsilon"), {"prompts": ["a cat"]}, "no text encoders"),
        (lambda: tiny_field("epsilon"), {"count": 1}, "count is 1"),
        (lambda: tiny_field("epsilon"), {"steps": [30, 50]}, r"steps 30 50.*divide the schedule's 1000, which 25 50"),
        (lambda: tiny_field("epsilon"), {"steps": [0]}, "at least 1"),
        (lambda: DiffusionField(UNet(tiny_unet()), EDMEulerScheduler()), {"steps": [1]}, "EDM's sampler needs 2"),
        (lambda: toy("sd"), {}, "needs the condition encoder_hidden_states"),
    ],
)
def test_what_cannot_be_converted(model: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model(), tmp_path / "flow", **options)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_there(tmp_path: Path) -> None:
    field = tiny_field("epsilon")
    convert(field, tmp_path / "flow", check=False)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(field, tmp_path / "flow", check=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    with pytest.raises(ValueError, match="photos is there and is no model"):
        convert(field, tmp_path / "photos", check=False, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(tmp_path / "nowhere", tmp_path / "other")


def broken(folder: Path, how: str) -> None:
    """A Stable Diffusion whose safety checker is absent, or as a hub snapshot has it: a config without weights."""
    tiny_pipeline("sd").save_pretrained(folder)
    file = folder / "model_index.json"
    index = {**json.loads(file.read_text()), "requires_safety_checker": True}
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    file.write_text(json.dumps(index))
    if how == "snapshot":
        for part, name in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
            (folder / part).mkdir()
            (folder / part / name).write_text(json.dumps({"_class_name": "CLIPImageProcessor"}))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("how", ["absent", "snapshot"])
def test_optional_parts_that_are_not_whole_are_left_out(how: str, tmp_path: Path) -> None:
    broken(tmp_path / "original", how)
    report = convert(tmp_path / "original", tmp_path / "flow", steps=[2], count=2, prompts=["cat"])
    assert report.missing == ()
    left = {"safety_checker", *(["feature_extractor"] if how == "absent" else [])}
    assert set(report.left_out) == left
    assert f"(without its {', '.join(report.left_out)}, which it does not" in (tmp_path / "flow/README.md").read_text()
    index = json.loads((tmp_path / "flow" / "model_index.json").read_text())
    assert all(index[name] == [None, None] for name in left)
    assert index["requires_safety_checker"] is False
    if how == "absent":
        pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("cat", num_inference_steps=2, output_type="pt", height=16, width=16).images.shape == (1, 3, 16, 16)


def test_parts_that_are_needed_are_missed_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "text_encoder" / "model.safetensors").unlink()
    field = load(tmp_path / "original")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr("fewstep.runs.convert.compare_samplers", never)
    with pytest.raises(FileNotFoundError, match=r"no text_encoder in .*original, or not its weights.*--no-check"):
        convert(field, tmp_path / "flow")
    report = convert(field, tmp_path / "flow", check=False)
    assert report.missing == ("text_encoder",)
    assert report.left_out == ()
    assert ", text_encoder=..." in (tmp_path / "flow" / "README.md").read_text()
    assert not (tmp_path / "flow" / "text_encoder").exists()
    encoder = tiny_pipeline("sd").text_encoder
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True, text_encoder=encoder)
    assert pipe.text_encoder is encoder


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_model_that_takes_an_image(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field: Any = tiny_field(prediction, 5, in_channels=3)
    with pytest.raises(ValueError, match=r"takes an image of 2 channels.*cond=\{'image': tensor\}.*--no-check"):
        convert(field, tmp_path / "flow")
    image = torch.randn(3, 2, 8, 8)
    report = convert(field, tmp_path / "flow", steps=[2, 4], count=3, cond={"image": image})
    assert report.agreement is not None
    assert report.agreement.is_good
    assert "none gives it the image" in report.by_hand
    model = flow_model.FlowUNet2DModel.from_pretrained(tmp_path / "flow" / "unet")
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.4, 1.0]), conditions(5)
    with torch.no_grad():
        flow = model(torch.cat([x, image], dim=1), 1000 * (1 - t), **cond).sample
        torch.testing.assert_close(flow, -field(x, t, image=image, **cond), atol=1e-4, rtol=1e-4)
        assert torch.equal(
            load(tmp_path / "flow").velocity(x, t, image=image, **cond), field(x, t, image=image, **cond)
        )
    card = (tmp_path / "flow" / "README.md").read_text()
    assert "cannot be called: none gives it the image" in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("50", "2"), names)
    assert names["x"].shape == (4, 1, 8, 8)


@pytest.mark.takes_seconds
def test_a_text_model_that_was_given_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "sd")
    field: Any = load(tmp_path / "sd")
    field.network = with_image(field.network, 1)
    report = convert(field, tmp_path / "flow", check=False)
    assert "none gives it the image" in report.by_hand
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "flow" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("steps=50", "steps=2").replace("a photo of a cat", "cat"), names)
    assert names["images"].shape == (4, 3, 16, 16)


@pytest.mark.takes_seconds
def test_a_latent_model_of_images_without_its_pipeline(tmp_path: Path) -> None:
    """By the pipeline that decodes; where that would do so wrongly, the card says how."""
    for name, options in (("plain", {}), ("shifted", {"shift_factor": 0.2})):
        field = tiny_field("epsilon")
        field.latents = Latents(tiny_vae(latent_channels=1, **options))
        report = convert(field, tmp_path / name, check=False)
        assert report.pipeline == "LDMPipeline"
        assert bool(report.by_hand) == (name == "shifted")
        pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        back = load(tmp_path / name)
        assert back.latents is not None
        pipe.set_progress_bar_config(disable=True)
        if name == "plain":
            images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np").images
            noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
            expected = back.latents.decode(sample(back, noise, grid=flow_grid(2))) / 2 + 0.5
            torch.testing.assert_close(torch.tensor(images), expected.permute(0, 2, 3, 1), atol=1e-5, rtol=0)


def test_a_field_goes_back_to_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field: Any = tiny_field("epsilon")
    moves: list[Any] = []
    plain = field.to

    def move(place: Any) -> Any:
        moves.append(torch.device(place).type)
        return field if moves[-1] == "cuda" else plain(place)

    field.to = move
    monkeypatch.setattr("fewstep.runs.convert.choose_device", lambda *_: torch.device("cuda"))
    convert(field, tmp_path / "flow", steps=[2], count=2)
    monkeypatch.setattr("fewstep.runs.convert.compare_samplers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(field, tmp_path / "again", steps=[2], count=2)
    assert moves == ["cuda", "cpu", "cuda", "cpu"]


def test_the_command_fails_where_the_flow_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    field: Any = tiny_field("sample")
    field.scheduler = DDPMScheduler(prediction_type="sample", beta_end=0.012)
    monkeypatch.setattr("fewstep.runs.convert.load", lambda *_, **__: field)
    command = ["convert", "ddpm", "--out", str(tmp_path / "flow"), "--steps", "2", "--count", "2", "--device", "cpu"]
    assert main(command) == 1
    assert "NOT" in capsys.readouterr().out
    assert (tmp_path / "flow" / "model_index.json").is_file()
    assert main([*command, "--overwrite", "--no-check"]) == 0
