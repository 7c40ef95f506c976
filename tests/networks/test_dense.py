"""An image beside the state: of every family a start that does not heed it, and a training that does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor
from toys.students import NAMES, S, T, field_of, loud, network, rows
from toys.unet import tiny_unet

from fewstep import FlowMap, FlowMatching, Guided, NetworkField, add_lora, fit, load, sample, with_image
from fewstep.cli import main
from fewstep.data import ArrayData, Dropped, load_data
from fewstep.flows.fields import DiffusionField
from fewstep.flows.signature import image_channels, needed_conditions, takes
from fewstep.networks import MLP, UNet
from fewstep.networks.configs import with_image as widened
from fewstep.runs.export import export


def image_for(x: Tensor, channels: int) -> Tensor:
    return torch.randn(len(x), channels, *x.shape[2:], dtype=x.dtype, generator=torch.Generator().manual_seed(4))


def beside(name: str) -> tuple[Tensor, dict[str, Any]]:
    """A state and its conditions, an image of two channels among them."""
    x, cond = rows(name)
    return x, {**cond, "image": image_for(x, 2)}


def wide(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


# The first layer of these sees patches with the channels last.
CLOSED = ("z-image", "lumina2", "wan experts", "stable audio", "dance")


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLOSED])
def test_a_network_that_takes_an_image_starts_as_it_was(name: str) -> None:
    """In float64: to the last bit on most machines, to rounding where a kernel sums more channels in another order."""
    channels = 4  # as many as the state has: of a model with a variance the numbers alone would not tell
    own = network(name).double()
    new, (x, cond) = widened(own, channels), rows(name)
    x, cond = x.double(), wide(cond)
    image = image_for(x, channels)
    assert (new.image_channels, new.channels, own.image_channels) == (channels, 4, 0)
    with torch.no_grad():
        torch.testing.assert_close(new(x, S, image=image, **cond), own(x, S, **cond), atol=1e-13, rtol=0)
        with pytest.raises(ValueError, match=r"takes \d+ channels, the state has 4: they must add up"):
            new(x, S, **cond)
        with pytest.raises(ValueError, match=r"the condition image has shape .* beside a state .*: scale it to \(2, "):
            new(x, S, image=image[..., :4], **cond)
        # Once its weights are no zeros, it is heeded, and the state is not.
        weight = dict(loud(new.model).named_parameters())[f"{new.first}.weight"]
        torch.nn.init.normal_(weight.data[:, own.model.config["in_channels"] :], std=0.3)
        assert not torch.allclose(new(x, S, image=image, **cond), new(x, S, image=0 * image, **cond))
    with pytest.raises(ValueError, match=rf"takes an image of {channels} channels already"):
        widened(new, 2)
    blank = new.blank((4, *x.shape[2:]), 3, 8)
    assert blank["image"].shape == (3, channels, *x.shape[2:])


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["unet", "sd", "dit", "pixart", "sd3", "flux", "wan"])
def test_a_map_with_an_image_starts_as_its_field(name: str) -> None:
    field = with_image(field_of(name), 2)
    student = FlowMap.from_field(field)
    x, cond = beside(name)
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        assert torch.equal(student.velocity(x, t, **cond), field(x, t, **cond))
        # A map that was made before is widened as well as a field.
        late = with_image(FlowMap.from_field(field_of(name)), 2)
        torch.testing.assert_close(late(x, S / 1000, 1 - T / 1000, **cond), student(x, S / 1000, 1 - T / 1000, **cond))
    assert image_channels(student) == 2
    assert takes(student, "image")
    assert "image" in needed_conditions(late)


def test_what_takes_no_image_says_so() -> None:
    with pytest.raises(ValueError, match=r"a MLP is none: have its forward take image=None"):
        with_image(NetworkField(MLP(2)), 1)
    for channels in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"image is .*: how many channels it has is needed, such as 3"):
            with_image(NetworkField(UNet(tiny_unet())), channels)  # pyright: ignore
    before = torch.random.get_rng_state()
    with_image(NetworkField(UNet(tiny_unet())), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_adapter_reads_the_image() -> None:
    """Of a transformer too the first layer is among those that adapt."""
    field = with_image(field_of("sd3"), 2)
    add_lora(field, rank=2)
    network: Any = field.network
    assert hasattr(network.model.pos_embed.proj, "lora_A")


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_an_export_takes_it_as_the_model_does(name: str, tmp_path: Path) -> None:
    student = FlowMap.from_field(with_image(field_of(name), 2))
    loud(student)
    x, cond = beside(name)
    folder = export(student, tmp_path / "map")
    back: Any = load(folder, trust=True)
    with torch.no_grad():
        assert torch.equal(back(x, 0.2, 0.7, **cond), student(x, 0.2, 0.7, **cond))
    pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(latents=x, num_inference_steps=2, output_type="latent", **cond).images
    torch.testing.assert_close(drawn, sample(student, x, 2, **cond), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"image of shape \(2, 2, 8, 8\) is needed"):
        pipe(latents=x, **{key: value for key, value in cond.items() if key != "image"})


@pytest.mark.takes_seconds
def test_what_is_seen_beside_is_drawn_and_guidance_drops_it() -> None:
    """Pictures that are their image, and noise of a tenth: the model with it draws it in one call, without it never."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(256, 1, 8, 8, generator=draw)
    data = ArrayData(image + 0.1 * torch.randn(256, 1, 8, 8, generator=draw), {"image": image})
    plain = DiffusionField(UNet(tiny_unet()), DDPMScheduler(prediction_type="v_prediction"))
    field = with_image(plain, 1)
    dropped = Dropped(data, 0.2, {"image": 0.0})
    fit(field, FlowMatching(), dropped, steps=150, batch=32, lr=1e-2, ema=None, quiet=True)
    field.eval()
    noise, shown = torch.randn(64, 1, 8, 8, generator=draw), image[:64]
    drawn = sample(field, noise, 4, image=shown)
    assert (drawn - shown).square().mean() < 0.35
    blind = sample(field, noise, 4, image=torch.zeros_like(shown))
    assert (blind - shown).square().mean() > 1
    guided = Guided(field, 1.0, null={"image": 0.0})
    assert torch.equal(sample(guided, noise, 4, image=shown), drawn)
    nothing = sample(Guided(field, 0.0, null={"image": 0.0}), noise, 4, image=shown)
    torch.testing.assert_close(nothing, blind, atol=1e-4, rtol=1e-4)


# From files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Depths, and photos of the same names in another form."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for folder, suffix, shape in (("depths", "png", (8, 8)), ("photos", "bmp", (8, 8, 3))):
        for inner in ("in", "out"):
            (tmp_path / folder / inner).mkdir(parents=True)
            for k in range(2):
                pixels = draw.integers(0, 255, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / inner / f"{k}.{suffix}")
    return tmp_path


def test_a_folder_with_another_beside_it(photos: Path) -> None:
    from PIL import Image

    data: Any = load_data(photos / "depths", channels=1, beside=str(photos / "photos"), labels=False)
    batch = data.rows(torch.arange(4), torch.Generator())
    assert (batch.data.shape, batch.cond["image"].shape) == ((4, 1, 8, 8), (4, 3, 8, 8))
    last = np.asarray(Image.open(photos / "photos" / "out" / "1.bmp"))
    torch.testing.assert_close(batch.cond["image"][3], torch.from_numpy(last.copy()).permute(2, 0, 1) / 127.5 - 1)
    (photos / "photos" / "out" / "1.bmp").rename(photos / "photos" / "out" / "2.bmp")
    with pytest.raises(ValueError, match=r"1 of 4 images in .*depths have none of their name in .*first is out/1.png"):
        load_data(photos / "depths", channels=1, beside=str(photos / "photos"))
    Image.fromarray(last[:4]).save(photos / "photos" / "out" / "1.png")
    with pytest.raises(ValueError, match=r"several sizes"):
        load_data(photos / "depths", channels=1, beside=str(photos / "photos"))


@pytest.mark.takes_seconds
def test_the_command_line_from_a_folder_to_samples(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DDPMPipeline

    monkeypatch.chdir(photos)
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("ddpm")
    options = ["--training.steps", "2", "--training.batch", "4", "--training.quiet", "true", "--evaluation.count", "0"]
    options += ["--student.image", "3", "--data.beside", "photos", "--out", "run"]
    assert main(["train", "--teacher", "ddpm", "--data", "depths", *options]) == 0
    assert main(["export", "run", "tuned"]) == 0
    for image in ("photos", "photos/in/0.bmp"):
        assert main(["sample", "tuned", "--image", image, "--count", "3", "--steps", "1", "--out", "x.npz"]) == 0
        found = np.load("x.npz")
        assert (found["data"].shape, found["image"].shape) == ((3, 1, 8, 8), (3, 3, 8, 8))
        assert -1 <= found["image"].min() < -0.5 < 0.5 < found["image"].max() <= 1
    np.save("floats.npy", found["image"])
    assert main(["sample", "tuned", "--image", "floats.npy", "--count", "3", "--steps", "1", "--out", "y.npz"]) == 0
    np.testing.assert_array_equal(np.load("y.npz")["data"], found["data"])
    np.save("wrong.npy", found["image"][:, :2])
    for model, image, said in (
        ("tuned", "wrong.npy", r"--image wrong.npy: its rows have the shape (2, 8, 8), and (3, 8, 8) is needed"),
        ("ddpm", "photos", "--image photos: this model takes no image beside its samples"),
        ("tuned", "nowhere.png", "nowhere.png cannot be read"),
    ):
        assert main(["sample", model, "--image", image, "--out", "never.png"]) == 2
        assert said in capsys.readouterr().err
