"""What ``fewstep.load`` takes, and how it says no."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from toys.families import MODELS, conditions, ddim, tiny_model, tiny_pipeline, tiny_vae
from toys.unet import tiny_unet

from fewstep.flows.fields import DiffusionField
from fewstep.flows.paths import Linear
from fewstep.flows.signature import image_channels
from fewstep.latents.vae import Latents
from fewstep.models.diffusers_pipeline import hub_files
from fewstep.networks import FAMILIES, UNet
from fewstep.runs.loading import load


def write(folder: Path, scheduler: Any = None, layout: str = "pipeline", **options: Any) -> Path:
    """A diffusers folder, as one of the layouts in which they come."""
    model, scheduler = tiny_unet(**options), scheduler or DDPMScheduler()
    if layout == "pipeline":
        DDPMPipeline(model, scheduler).save_pretrained(folder)
    elif layout == "folders":
        model.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
    else:
        model.save_pretrained(folder)
        scheduler.save_pretrained(folder)
    return folder


def check(folder: Path, scheduler: Any, **options: Any) -> DiffusionField:
    """The loaded field is the one made by hand, to the bit."""
    field, expected = load(folder), DiffusionField(UNet(tiny_unet(**options)), scheduler)
    assert isinstance(field, DiffusionField)
    assert field.path.same_as(Linear())
    assert not field.training
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.4, 1.0])
    labels = {"class_labels": torch.tensor([0, 1, 2])} if options.get("classes") else {}
    with torch.no_grad():
        assert torch.equal(field(x, t, **labels), expected(x, t, **labels))
        assert field(x, t, **labels).isfinite().all()
    return field


@pytest.mark.parametrize("layout", ["pipeline", "folders", "bare"])
def test_the_layouts(layout: str, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    check(write(tmp_path / "model", scheduler, layout), scheduler)


def test_an_index_beside_a_bare_model(tmp_path: Path) -> None:
    """As the first repositories of diffusers had it."""
    write(tmp_path, layout="bare")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    check(tmp_path, DDPMScheduler())


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="sample"),
        DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        PNDMScheduler(),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_schedulers(scheduler: Any, tmp_path: Path) -> None:
    check(write(tmp_path / "model", scheduler), scheduler)


def test_classes_are_passed_through(tmp_path: Path) -> None:
    check(write(tmp_path / "model", classes=5), DDPMScheduler(), classes=5)


def test_a_flow_match_folder_round_trip(tmp_path: Path) -> None:
    from fewstep.runs.export import export

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    field = check(write(tmp_path / "model", scheduler), scheduler)
    back = check(export(field, tmp_path / "export"), scheduler)
    assert back.native == field.native


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("layout", ["folders", "bare"])
def test_each_family(name: str, layout: str, tmp_path: Path) -> None:
    model, scheduler = (
        tiny_model(name),
        ddim() if name in ("sd", "sdxl", "dit", "pixart") else FlowMatchEulerDiscreteScheduler(),
    )
    part = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    model.save_pretrained(tmp_path / part if layout == "folders" else tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler" if layout == "folders" else tmp_path)
    field, expected = load(tmp_path), DiffusionField(FAMILIES[MODELS[name][0]](model), scheduler)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(field(x, 0.4, **conditions(name)), expected(x, 0.4, **conditions(name)))
    assert (field.latents, field.text) == (None, None)


def test_a_pipeline_comes_with_its_vae(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("dit")
    pipeline.save_pretrained(tmp_path)
    field = load(tmp_path)
    assert field.text is None
    assert field.latents is not None
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        images = pipeline.vae.decode(z / 0.7).sample.clamp(-1, 1)
    assert torch.equal(field.latents.decode(z), images)


def test_a_dit_and_a_pixart_as_they_were_first_saved(tmp_path: Path) -> None:
    for name, norm in (("dit", "ada_norm_zero"), ("pixart", "ada_norm_single")):
        folder = tmp_path / name
        tiny_model(name).save_pretrained(folder)
        ddim().save_pretrained(folder)
        edit(folder / "config.json", _class_name="Transformer2DModel", norm_type=norm)
        assert isinstance(load(folder).network, FAMILIES[MODELS[name][0]])


def test_a_run_is_left_to_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("{}")
    field = DiffusionField(UNet(tiny_unet()), DDPMScheduler())
    monkeypatch.setattr("fewstep.runs.loading.load_run", lambda folder, **_: {tmp_path: field}[folder])
    assert load(str(tmp_path)) is field


# Refusals


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file: a model is loaded from its folder"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no model in .*recipe\.yaml and checkpoints/"):
        load(tmp_path)
    with pytest.raises(ValueError, match="unknown packaged model 'nothing'"):
        load("fewstep:nothing")


def test_a_hub_name_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder someone/model here.*hub.*hf download someone/model"):
        load("someone/model")


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The configurations are fetched and judged first, then the weights of the model and nothing else."""
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write(tmp_path / "someone" / "model")
    assert isinstance(load("someone/model"), DiffusionField)
    assert asked[0] == ["*.json"]
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
    asked.clear()
    write(tmp_path / "someone" / "other", FlowMatchEulerDiscreteScheduler())
    edit(tmp_path / "someone" / "other" / "unet" / "config.json", _class_name="UVit2DModel")
    with pytest.raises(ValueError, match="UVit2DModel"):
        load("someone/other")
    assert len(asked) == 1


@pytest.mark.takes_seconds
def test_exports_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whose configurations are not those of a diffusers model that fewstep knows."""
    from toys.unet import tiny_student

    from fewstep.flows.maps import FlowMap
    from fewstep.networks import MLP
    from fewstep.runs.export import export

    def download(name: str, allow_patterns: list[str]) -> str:
        """What of the repository is asked for, and nothing else."""
        home, found = tmp_path / "hub" / name, tmp_path / name
        for file in filter_repo_objects(
            [str(f.relative_to(found)) for f in found.rglob("*")], allow_patterns=allow_patterns
        ):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found / file, home / file)
        return str(home)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    latent = tiny_student()
    latent.latents = Latents(tiny_vae(latent_channels=1))
    models = {
        "plain": tiny_student("flow"),
        "classes": tiny_student("v_prediction", 5),
        "guided": FlowMap.from_field(DiffusionField(UNet(tiny_unet()), DDPMScheduler()), guidance=True),
        "latent": latent,
        "points": FlowMap(MLP(2, width=8, depth=2, times=2)),
    }
    for name, model in models.items():
        export(model, tmp_path / "someone" / name)
        back: Any = load(f"someone/{name}")
        assert back.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
        assert (back.latents is None) == (model.latents is None)


def test_what_is_fetched_of_a_whole_pipeline() -> None:
    """One variant of the weights, as safetensors, and all that the text encoders need."""
    wanted = [
        "unet/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors", "tokenizer/merges.txt",
        "text_encoder_3/model-00002-of-00002.safetensors", "tokenizer_3/spiece.model",
    ]  # fmt: skip
    left = [
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors", "flux1-dev.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects([*wanted, *left], allow_patterns=hub_files())) == wanted


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    for name in ("UVit2DModel", "Transformer2DModel"):
        edit(folder / "unet" / "config.json", _class_name=name)
        says = rf"is a {name}, and fewstep.load knows .*DiT.*DiffusionField\(network, scheduler\).*NetworkField"
        with pytest.raises(ValueError, match=says):
            load(folder)
    edit(folder / "unet" / "config.json", _class_name="UNet2DModel", time_embedding_type="fourier")
    with pytest.raises(ValueError, match="fourier time embedding"):
        load(folder)


def test_schedulers_that_do_not_do(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    edit(config, _class_name="ScoreSdeVeScheduler")
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler has no alphas_cumprod"):
        load(folder)
    for name in ("MyScheduler", "UNet2DModel"):  # unknown, and known but no scheduler
        edit(config, _class_name=name)
        with pytest.raises(ValueError, match=f"scheduler in .* is a {name}, which diffusers does not have"):
            load(folder)
    edit(config, _class_name="DDPMScheduler", prediction_type="epsilom")
    with pytest.raises(ValueError, match="unknown prediction type 'epsilom': did you mean 'epsilon'"):
        load(folder)
    edit(config, prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        load(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"no scheduler in .*save_pretrained.*DiffusionField"):
        load(folder)


def test_a_vae_that_does_not_belong_to_the_model(tmp_path: Path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path)
    vae = tmp_path / "vae"
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "away")
    with pytest.raises(
        FileNotFoundError, match=r"no weights in .*vae: diffusion_pytorch_model\.safetensors is missing"
    ):
        load(tmp_path)
    (tmp_path / "away").rename(weights)
    edit(vae / "config.json", _class_name="AutoencoderKLMochi")
    with pytest.raises(ValueError, match=r"unknown VAE 'AutoencoderKLMochi'.*Known: AutoencoderDC, AutoencoderKL, "):
        load(tmp_path)
    tiny_vae(latent_channels=3).save_pretrained(vae)
    says = r"DiTTransformer2DModel in .*transformer is for 4 channels, and the VAE in .*vae has latents of 3"
    with pytest.raises(ValueError, match=says):
        load(tmp_path)
    shutil.rmtree(vae)
    with pytest.raises(FileNotFoundError, match=r"no VAE in .*vae: .* AutoencoderKL that model_index\.json names"):
        load(tmp_path)


def test_the_channels_of_packed_latents(tmp_path: Path) -> None:
    tiny_model("flux").save_pretrained(tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    tiny_vae(latent_channels=16).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"is for 4 channels, and the VAE in .* has latents of 16"):
        load(tmp_path)


def test_a_model_that_takes_more_than_the_sample(tmp_path: Path) -> None:
    """As those for inpainting: state, mask and masked image. A U-Net has a condition for the others."""
    tiny_model("sd", in_channels=9).save_pretrained(tmp_path / "unet")
    tiny_vae().save_pretrained(tmp_path / "vae")
    ddim().save_pretrained(tmp_path / "scheduler")
    field, x = load(tmp_path), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert field(x, 0.4, **conditions("sd"), image=torch.randn(2, 5, 8, 8)).shape == x.shape
    with pytest.raises(ValueError, match="takes 9 channels, the state has 4: they must add up"):
        field(x, 0.4, **conditions("sd"))
    shutil.rmtree(tmp_path / "unet")
    tiny_model("flux", in_channels=32, out_channels=16).save_pretrained(tmp_path / "transformer")
    assert image_channels(load(tmp_path)) > 0  # a transformer that takes an image beside the state, as Flux Fill


def test_refusals_come_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "model", DDPMScheduler(prediction_type="v_prediction"))
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="ScoreSdeVeScheduler")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(UNet2DModel, "from_pretrained", read)
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler"):
        load(folder)


def test_weights_that_are_not_safe_missing_or_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a safetensors file"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
            load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*diffusion_pytorch_model\.safetensors is missing"):
        load(folder)
    tiny_unet().save_pretrained(folder / "unet", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"\.bin files only.*safe_serialization=True"):
        load(folder)


def test_weights_of_another_model(tmp_path: Path) -> None:
    """diffusers would fill up what is missing with random numbers, and warn."""
    folder = write(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    taken = tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"not those of its config\.json: 1 are missing, one is 'conv_in.weight'"):
        load(folder)
    save_file({**tensors, "conv_in.weight": taken, "more": taken.clone()}, weights)
    with pytest.raises(ValueError, match=r"not those of its config\.json: 1 are unexpected, one is 'more'"):
        load(folder)
    save_file({**tensors, "conv_in.weight": taken[1:].clone()}, weights)
    with pytest.raises(ValueError, match=r"not those of its config\.json: .*size mismatch for conv_in.weight"):
        load(folder)


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "unet" / "config.json").write_text('{"_class_name": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(folder)


def test_damaged_exports(tmp_path: Path) -> None:
    from toys.unet import tiny_student

    from fewstep.flows.maps import FlowMap
    from fewstep.networks import MLP
    from fewstep.runs.export import export

    folder = export(tiny_student("flow"), tmp_path / "map")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        load(folder)
    folder = export(FlowMap(MLP(2, width=8, depth=2, times=2)), tmp_path / "points")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(folder)
    edit(folder / "config.json", network={"name": "MPL", "options": {}})
    with pytest.raises(ValueError, match="unknown network 'MPL': did you mean 'MLP'"):
        load(folder)
