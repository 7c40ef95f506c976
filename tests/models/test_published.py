"""Whatever is loaded can be called, and samples as diffusers does, or is refused before its weights are read."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys.families import tiny_pipeline, tiny_vae
from toys.published import DDPM, LOADED, PNDM, REFUSED, conditional, edit, movq, unet, wan_vae, write

from fewstep.cli import main
from fewstep.common.model_files import load_weights, variant_in
from fewstep.evaluation.agreement import compare_samplers
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample
from fewstep.flows.schedules import schedule_of, todays_config
from fewstep.flows.signature import image_channels, shape_at, takes
from fewstep.flows.tabulated import Tabulated
from fewstep.latents.encoders import text_identity, vae_identity
from fewstep.latents.vae import Latents
from fewstep.models.diffusers_configs import look_into
from fewstep.models.export import no_pipeline
from fewstep.models.exported import FlowMapPipeline
from fewstep.models.writing import copy_part
from fewstep.networks import Wan
from fewstep.runs.build import build
from fewstep.runs.export import export
from fewstep.runs.loading import load, make_teacher
from fewstep.runs.recipe import Teacher
from fewstep.runs.recipes import load_recipe


def rows(network: Any, shape: tuple[int, ...], count: int) -> dict[str, Tensor]:
    """Random conditions of all that a network says it needs."""
    cond: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(1)
    for name, value in network.blank(shape, count, 6).items():
        is_label = value.dtype == torch.long
        cond[name] = torch.arange(count) % network.classes if is_label else torch.randn(value.shape, generator=draw)
    return cond


def shape_of(network: Any) -> tuple[int, ...]:
    if hasattr(network, "size"):  # of latents, which no config says
        return network.channels, *([2] if isinstance(network, Wan) else []), 8, 8
    return network.shape if network.has_size else (network.channels, 8, 8)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", list(LOADED))
def test_what_is_published_is_called_and_sampled_as_diffusers_does(name: str, tmp_path: Path) -> None:
    make, call = LOADED[name]
    folder = make(tmp_path / "model")
    field: Any = load(folder)
    network: Any = field.network
    shape = shape_of(network)
    cond: dict[str, Any] = rows(network, shape, 2)
    draw = torch.Generator().manual_seed(0)
    x, k = torch.randn(2, *shape, generator=draw), torch.tensor([3.0, 41.0])
    part = "unet" if "UNet" in type(network.model).__name__ else "transformer"
    kind = type(getattr(network.model, "transformer", network.model))  # of two experts the first
    model = kind.from_pretrained(folder / part).eval()
    model.place = folder
    with torch.no_grad():
        assert torch.equal(network(x, k, **cond), call(model, x, k, cond))
        for key, value in cond.items():  # each is heard, and there is none that a call can do without
            assert not torch.equal(network(x, k, **{**cond, key: value.flip(0)}), network(x, k, **cond)), key
            with pytest.raises(ValueError, match=f"needs the condition {key}|they must add up"):
                network(x, k, **{other: value for other, value in cond.items() if other != key})
    agreement, _, _ = compare_samplers(field, x, (5, 10), cond)  # pyright: ignore[reportArgumentType]
    assert agreement.is_good, agreement.verdict
    assert sample(field, x, steps=2, **cond).isfinite().all()


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_sampled_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, says = REFUSED[name]
    folder = make(tmp_path / "model")
    monkeypatch.setattr(diffusers.ModelMixin, "from_pretrained", None)  # before any weights are read
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        load(folder)
    text = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in text
    assert len(text) < 400, text


def test_old_keys_of_schedulers_mean_what_they_meant(tmp_path: Path) -> None:
    """diffusers of today passes over ``timesteps`` and ``predict_epsilon``."""
    field: Any = load(LOADED["ddpm of diffusers 0.0.4"][0](tmp_path / "0.0.4"))
    assert isinstance(field.native, Tabulated)
    assert len(field.native.log_ratios) == 100
    assert field.scheduler.config.num_train_timesteps == 100
    field = load(LOADED["ddpm that predicts the data"][0](tmp_path / "data"))
    assert (field.prediction, field.scheduler.config.prediction_type) == ("data", "sample")
    # What it predicts is what it draws, to the bit: from there the data is known.
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        data = field.network(x / field.native.sigma(torch.tensor(0.0)), torch.tensor([999.0, 999.0]))
        assert torch.allclose(sample(field, x, steps=1), data, atol=1e-4)
    old = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "timesteps": 100}
    with pytest.raises(ValueError, match="says num_train_timesteps 100 under an old name, and diffusers passed over"):
        schedule_of(diffusers.DDPMScheduler.from_config(old))
    path, prediction = schedule_of(diffusers.DDPMScheduler.from_config(todays_config(old)))
    assert (len(path.log_ratios), prediction) == (100, "data")  # pyright: ignore[reportAttributeAccessIssue]
    # What a later diffusers wrote beside them is what holds; its default of the prediction says nothing.
    both = {"predict_epsilon": False, "prediction_type": "epsilon", "timesteps": 100, "num_train_timesteps": 200}
    assert todays_config(both) == {"prediction_type": "sample", "num_train_timesteps": 200}
    assert (
        todays_config({"predict_epsilon": True, "prediction_type": "v_prediction"})["prediction_type"] == "v_prediction"
    )
    assert (
        todays_config({"predict_epsilon": False, "prediction_type": "v_prediction"})["prediction_type"]
        == "v_prediction"
    )


@pytest.mark.takes_seconds
def test_a_state_is_told_from_what_stands_beside_it(tmp_path: Path) -> None:
    wanted = {
        "deepfloyd IF-I": ((3, 8, 8), 0), "deepfloyd IF-II": ((3, 8, 8), 3), "marigold": ((4, 8, 8), 4),
        "kandinsky 2.2": ((4, 8, 8), 0), "kandinsky 2.2 inpainting": ((4, 8, 8), 5),
        "stable-diffusion x4 upscaler": ((4, 8, 8), 3), "ldm super-resolution": ((3, 8, 8), 3),
    }  # fmt: skip
    for name, (shape, beside) in wanted.items():
        field: Any = load(LOADED[name][0](tmp_path / name))
        assert (field.network.shape, image_channels(field)) == (shape, beside), name
        assert takes(field, "image") == bool(beside)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["deepfloyd IF-II", "marigold", "geowizard", "kandinsky 2.2 inpainting"])
def test_a_student_knows_it_too(name: str, tmp_path: Path) -> None:
    """From its export as well, whose code knows no pipeline."""
    field: Any = load(LOADED[name][0](tmp_path / "model"))
    network: Any = field.network
    cond = rows(network, network.shape, 2)
    x = torch.randn(2, *network.shape)
    if name == "deepfloyd IF-II":
        with pytest.raises(ValueError, match="class_embed_type='timestep' has no room for a second time"):
            FlowMap.from_field(field)
        return
    student = FlowMap.from_field(field)
    with torch.no_grad():
        assert torch.equal(student.velocity(x, 0.4, **cond), field(x, 0.4, **cond))
        folder = export(student, tmp_path / "export")
        again = load(folder)
        assert torch.equal(again(x, 0.0, 1.0, **cond), student(x, 0.0, 1.0, **cond))
        stock = load(export(field, tmp_path / "stock"))
        assert torch.equal(stock(x, 0.4, **cond), field(x, 0.4, **cond))


@pytest.mark.takes_seconds
@torch.no_grad()
def test_kandinsky_and_wan_decode_as_their_pipelines_do(tmp_path: Path) -> None:
    """``KandinskyV22Pipeline`` by neither scale nor codebook, ``WanPipeline`` by the statistics of each channel."""
    field: Any = load(LOADED["kandinsky 2.2"][0](tmp_path / "kandinsky"))
    z = torch.randn(2, 4, 8, 8)
    expected = movq().decode(z, force_not_quantize=True)["sample"].clamp(-1, 1)
    assert torch.equal(field.latents.decode(z), expected)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(field.latents.encode(image), movq().encode(image).latents)

    field, vae = load(LOADED["Wan 2.1"][0](tmp_path / "wan")), wan_vae()
    assert field.latents is not None
    z = torch.randn(1, 4, 2, 2, 2)
    mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    video = field.latents.decode(z)
    assert torch.allclose(video, vae.decode(z / (1.0 / std) + mean).sample.clamp(-1, 1), atol=1e-6)
    assert video.shape == (1, 3, 5, 16, 16)
    assert field.latents.image_shape_of((4, 2, 2, 2)) == (3, 5, 16, 16)
    assert field.latents.shape_of((3, 5, 16, 16)) == (4, 2, 2, 2)
    assert shape_at(field, (16, 32), (4, 2, 2, 2)) == (4, 2, 2, 4)
    with pytest.raises(ValueError, match="multiples of 8"):
        shape_at(field, (16, 12), (4, 2, 2, 2))
    mode = vae.encode(video).latent_dist.mode()
    assert torch.allclose(field.latents.encode(video), (mean - mode).neg() / std, atol=1e-6)
    for shape, says in (((3, 6, 16, 16), "videos of 6 frames"), ((3, 16, 16), r"takes videos \(C, F, H, W\)")):
        with pytest.raises(ValueError, match=says):
            field.latents.shape_of(shape)


@pytest.mark.takes_seconds
def test_an_index_with_code_of_its_own(tmp_path: Path) -> None:
    """``_class_name`` is a pair there: the file, and the class."""
    folder = LOADED["stable-diffusion 1.5"][0](tmp_path / "model")
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert load(folder).text is None
    assert look_into(folder).text is None
    edit(folder / "model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"])
    assert load(folder).latents is not None


@pytest.mark.takes_seconds
def test_samples_of_any_size_have_the_size_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LOADED["ddpm of any size"][0](tmp_path / "any")
    out = tmp_path / "samples.npy"
    command = ["sample", str(folder), "--steps", "1", "--count", "2", "--device", "cpu", "--out", str(out)]
    assert main([*command, "--size", "8x12"]) == 0
    assert np.load(out).shape == (2, 3, 8, 12)
    capsys.readouterr()
    assert main(command) == 2
    assert "has no sample_size: say it (`fewstep sample --size 64`" in capsys.readouterr().err
    assert main([*command, "--size", "9"]) == 2
    assert "both sides must be multiples of 2 pixels" in capsys.readouterr().err


def test_oblong_samples_keep_their_pipeline(tmp_path: Path) -> None:
    field: Any = load(LOADED["ddpm of oblong samples"][0](tmp_path / "oblong"))
    assert no_pipeline(field) == ""  # pyright: ignore[reportArgumentType]
    pipe: Any = diffusers.DDPMPipeline.from_pretrained(export(field, tmp_path / "export"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 12, 3)
    # Of a size that nobody knows, and of latents, diffusers' pipelines make nothing.
    free = load(LOADED["ddpm of any size"][0](tmp_path / "any"))
    assert no_pipeline(free) == "none knows the size of its samples"  # pyright: ignore[reportArgumentType]


def as_variant(folder: Path, variant: str) -> None:
    """Its weights are this variant alone, as ``save_pretrained(variant=...)`` names them."""
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


@pytest.mark.takes_seconds
def test_variants_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one that is asked for, else the plain ones, else the only one that there is, which is said."""
    folder = tmp_path / "model"
    pipeline = tiny_pipeline("sd")
    pipeline.save_pretrained(folder)
    expected: Any = load(folder)
    x, text = torch.randn(1, 4, 8, 8), expected.text.encode(["a cat"])
    image = expected.latents.decode(x)
    as_variant(folder, "fp16")
    with pytest.warns(UserWarning, match="unet has its weights as the variant fp16 alone: they are read"):
        field: Any = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked: Any = load(folder, variant="fp16")
        assert asked.text.encode(["a cat"])["encoder_hidden_states"].equal(text["encoder_hidden_states"])
        with torch.no_grad():
            assert torch.equal(asked(x, 0.4, **text), expected(x, 0.4, **text))
            assert torch.equal(asked.latents.decode(x), image)
    assert vae_identity(asked.latents) == vae_identity(field.latents)
    assert text_identity(asked.text) is not None
    # What is written of it has plain names, and loads alone.
    for k, model in enumerate((asked, FlowMap.from_field(asked))):
        again: Any = load(export(model, tmp_path / f"export-{k}"))
        assert again.text.encode(["a cat"])["encoder_hidden_states"].equal(text["encoder_hidden_states"])
        assert torch.equal(again.latents.decode(x), image)
        assert not list((tmp_path / f"export-{k}").rglob("*fp16*"))
    with pytest.raises(FileNotFoundError, match=r"no variant bf16 .*unet, which has diffusion_pytorch_model\.fp16"):
        load(folder, variant="bf16")
    # Two and no plain ones: nobody knows which.
    weights = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"weights as fp16, non_ema: say one of them.*--variant of a command"):
        load(folder)
    command = ["sample", str(folder), "--steps", "1", "--count", "1", "--prompt", "a cat", "--device", "cpu"]
    assert main([*command, "--variant", "non_ema", "--out", str(tmp_path / "cat.png")]) == 0
    assert main([*command, "--out", str(tmp_path / "dog.png")]) == 2
    assert "say one of them" in capsys.readouterr().err
    recipe = {"source": str(folder), "options": {"variant": "fp16"}}
    assert make_teacher(Teacher(**recipe)).latents.variant == "fp16"  # pyright: ignore
    # Plain ones beside it are what is read, if nothing is asked for.
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.safetensors"))
    assert variant_in(folder / "unet") is None
    with pytest.raises(FileNotFoundError, match=r"no variant bf16 of the weights in .*leave it out"):
        load(folder, variant="bf16")


@pytest.mark.parametrize("is_old", [False, True])
def test_a_variant_in_pieces(is_old: bool, tmp_path: Path) -> None:
    """As today, ``model.fp16-00001-of-00002``, and as before, ``model-00001-of-00002.fp16``."""
    model = conditional()
    model.save_pretrained(tmp_path / "unet", max_shard_size="30KB", variant="fp16")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    pieces = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(pieces) > 1
    if is_old:
        for file in pieces:
            file.rename(file.with_name(file.name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")))
        said = json.loads(index.read_text())
        said["weight_map"] = {
            key: name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")
            for key, name in said["weight_map"].items()
        }
        index.write_text(json.dumps(said))
    assert variant_in(tmp_path / "unet", wanted="fp16") == "fp16"
    copy_part(tmp_path / "unet", tmp_path / "copy", tmp_path, variant="fp16")
    assert not list((tmp_path / "copy").glob("*fp16*"))
    for folder, variant in ((tmp_path / "unet", "fp16"), (tmp_path / "copy", None)):
        again = load_weights(diffusers.UNet2DConditionModel, folder, variant)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.takes_seconds
def test_what_is_fetched_where_there_is_one_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain weights are asked for first; of a part that has none, any."""
    source = tmp_path / "there" / "someone" / "model"
    tiny_pipeline("sd").save_pretrained(source)
    as_variant(source, "fp16")

    def download(name: str, allow_patterns: list[str]) -> str:
        found = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        for file in filter_repo_objects(found, allow_patterns=allow_patterns):
            (tmp_path / "here" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, tmp_path / "here" / file)
        return str(tmp_path / "here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for variant in ("fp16", None):
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            field: Any = load("someone/model", variant=variant)
        assert "encoder_hidden_states" in field.text.encode(["a cat"])
        assert not (tmp_path / "here" / "safety_checker").exists()


def arrays(folder: Path, network: Any, file: str = "rows.npz", count: int = 8) -> list[str]:
    """Rows for a network in a file, and the names of their conditions but its labels."""
    cond = rows(network, network.shape, count)
    data = torch.randn(count, *network.shape, generator=torch.Generator().manual_seed(2))
    named: dict[str, Any] = {name: value.numpy() for name, value in cond.items()}
    np.savez(folder / file, data=data.numpy(), **named)
    return [name for name in cond if name != "class_labels"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["stable-diffusion 2.1 unclip", "geowizard", "kandinsky 2.2"])
def test_what_a_model_is_told_can_be_trained_on(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class labels that are vectors are a condition like any other: of data, of samples, of the images of a run."""
    teacher, run, out = LOADED[name][0](tmp_path / "model"), tmp_path / "run", tmp_path / "samples.npz"
    field: Any = load(teacher)
    conditions = arrays(tmp_path, field.network)
    data = {"name": str(tmp_path / "rows.npz"), "conditions": conditions}
    command = ["distill", "--teacher", str(teacher), "--data", json.dumps(data), "--out", str(run), "--steps", "2"]
    keys = {"training.batch": 4, "evaluation.count": 4, "evaluation.steps": [1], "training.device": "cpu"}
    assert main([*command, *(word for key, value in keys.items() for word in (f"--{key}", json.dumps(value)))]) == 0
    assert main(["sample", str(run), "--count", "3", "--latents", "--device", "cpu", "--out", str(out)]) == 0
    with np.load(out) as drawn, np.load(tmp_path / "rows.npz") as known:
        for key in field.network.needed:
            assert np.array_equal(drawn[key], known[key][:3]), key
    capsys.readouterr()
    if "class_labels" in field.network.needed:
        assert main(["sample", str(run), "--labels", "1", "--device", "cpu", "--out", str(out)]) == 2
        assert "labels [1]: the model has no classes" in capsys.readouterr().err
    assert main(["sample", str(teacher), "--count", "1", "--device", "cpu", "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert "needs the condition" in error or "takes an image of" in error


def test_an_export_is_told_vectors_too(tmp_path: Path) -> None:
    field: Any = load(LOADED["stable-diffusion 2.1 unclip"][0](tmp_path / "model"))
    student = FlowMap.from_field(field)
    cond: dict[str, Any] = rows(field.network, field.network.shape, 2)
    pipe: Any = FlowMapPipeline.from_pretrained(export(student, tmp_path / "map"))
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8)
    found = pipe(latents=x, num_inference_steps=1, output_type="latent", **cond).images
    torch.testing.assert_close(found, sample(student, x, steps=1, **cond), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"embeds class_labels as numbers: a tensor \(B, \.\.\.\)"):
        pipe(latents=x, encoder_hidden_states=cond["encoder_hidden_states"])


def test_labels_that_a_model_of_classes_cannot_take(tmp_path: Path) -> None:
    folder = write(tmp_path / "classes", "DDPMPipeline", unet(num_class_embeds=5), DDPM)
    np.savez(tmp_path / "rows.npz", data=np.zeros((4, 3, 8, 8), np.float32), class_labels=np.ones((4, 2), np.float32))
    recipe = {"name": "x", "teacher": str(folder), "student": {"network": "auto"}, "objective": "ITVM"}
    with pytest.raises(
        ValueError, match=r"has 5 classes, and the data .* class_labels of torch.float32 and shape \(4, 2\)"
    ):
        build(load_recipe({**recipe, "data": str(tmp_path / "rows.npz"), "training": {"steps": 1, "batch": 2}}))


def test_sides_that_the_levels_cannot_halve(tmp_path: Path) -> None:
    """Not what the student took for its own size, but what it takes."""
    folder = write(tmp_path / "model", "DDPMPipeline", unet(), DDPM)
    np.save(tmp_path / "odd.npy", np.zeros((4, 3, 15, 15), np.float32))
    recipe = {"name": "x", "teacher": str(folder), "student": {"network": "auto"}, "objective": "FlowMatching"}
    says = r"shape \(3, 15, 15\): a state of 15 x 15: this UNet2DModel halves it 1 times, .* multiples of 2"
    with pytest.raises(ValueError, match=says):
        build(load_recipe({**recipe, "data": str(tmp_path / "odd.npy"), "training": {"steps": 1, "batch": 2}}))
    with pytest.raises(ValueError, match="both sides must be multiples of 2"):
        sample(load(folder), torch.randn(1, 3, 15, 15), steps=1)


@pytest.mark.takes_seconds
def test_attention_as_the_first_versions_named_it(tmp_path: Path) -> None:
    """``query``, ``key``, ``value`` and ``proj_attn``, in U-Nets and VAEs: of what google/ddpm and the first Stable
    Diffusions were saved with."""
    folder = write(tmp_path / "model", "StableDiffusionPipeline", conditional(), PNDM, tiny_vae())
    images = write(tmp_path / "ddpm", "DDPMPipeline", unet(), DDPM)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for file in (folder / "vae", images / "unet"):
        file = file / "diffusion_pytorch_model.safetensors"
        old = {}
        for key, value in load_file(file).items():
            new = next((key.replace(a, b) for a, b in names.items() if f".attentions.0.{a}." in key), key)
            old[new] = value
        assert old.keys() != load_file(file).keys()
        save_file(old, file, metadata={"format": "pt"})
    field: Any = load(images)
    x, k = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 41.0])
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(field.network(x, k), unet()(x, k).sample)
        latents: Any = load(folder).latents
        assert torch.equal(latents.decode(z), Latents(tiny_vae()).decode(z))


@pytest.mark.takes_seconds
def test_prompts_of_a_model_of_any_size(tmp_path: Path) -> None:
    """What SDXL is told of the size of its images, where its config does not say one, or one for each side."""
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    for size, told in ((None, [256.0, 256.0]), ([8, 12], [16.0, 24.0]), (8, [16.0, 16.0])):
        edit(tmp_path / "unet" / "config.json", sample_size=size)
        cond = load(tmp_path).text.encode(["a cat"])  # pyright: ignore
        assert cond["time_ids"][0, :2].tolist() == told
