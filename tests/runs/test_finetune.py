"""Fine-tuning of diffusion models as flows: what it costs, what it learns, and what a recipe may change on the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn
from toys.unet import tiny_unet

from fewstep import DiffusionField, FlowMap, FlowMatching, Linear, NetworkField, fit, load
from fewstep.cli import main
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, load_data
from fewstep.data.batch import Batch
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField
from fewstep.flows.paths import Reversed
from fewstep.networks import UNet
from fewstep.networks.configs import with_image
from fewstep.runs.build import build
from fewstep.runs.loading import load_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

F64 = torch.float64


def ddpm(folder: Path, **options: Any) -> Path:
    DDPMPipeline(tiny_unet(**options), DDPMScheduler()).save_pretrained(folder)
    return folder


# What it costs


def kept(field: NetworkField, batch: Batch) -> tuple[float, int, int]:
    """The loss of a step, the network calls it takes and the bytes that it keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), count_calls(field) as calls:
        loss = FlowMatching()(field, batch, generator=generator(0))
    loss.total.backward()
    return float(loss.total.detach()), calls.count, sum(sizes.values())


def test_the_exact_velocity_costs_no_call_and_no_activation() -> None:
    batch = Batch(torch.randn(16, 1, 8, 8))
    unet = UNet(tiny_unet())
    _, plain_calls, plain_bytes = kept(NetworkField(unet, Reversed(1000.0), "flow", path=Linear()), batch)
    _, calls, size = kept(DiffusionField(unet, DDPMScheduler()), batch)
    assert calls == plain_calls == 1
    # Beyond those of plain flow matching: a number a row, what the output is multiplied by.
    assert size - plain_bytes <= 16 * 8
    one_image = 16 * 1 * 8 * 8 * 4
    assert size - plain_bytes < one_image


# What it learns


class Steps(nn.Module):
    """The perfect noise prediction for data N(mean, I), in float64, and a weight that shifts the mean."""

    def __init__(self, scheduler: Any, mean: Tensor) -> None:
        super().__init__()
        self.table = scheduler.alphas_cumprod.double()
        self.mean = nn.Parameter(mean.double())

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        low = k.double().floor().long().clamp(0, 998)
        log_snr = (self.table / (1 - self.table)).log()
        value = torch.lerp(log_snr[low], log_snr[low + 1], k.double() - low)[:, None]
        alpha, sigma = torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()
        return (sigma * (x - alpha * self.mean)).to(x)


@pytest.mark.takes_seconds
def test_it_finds_the_new_data_from_the_old_model() -> None:
    """Data at another place: the one weight that has to move gets there, and the field is the exact one."""
    scheduler = DDPMScheduler()
    field = DiffusionField(Steps(scheduler, torch.tensor([1.0, -1.0])), scheduler)
    new = torch.tensor([-0.5, 0.7], dtype=F64)
    exact = GaussianField(new, torch.eye(2, dtype=F64))
    data = exact.data(4096, torch.Generator().manual_seed(0)).to(F64)
    fit(field, FlowMatching(), data, steps=400, batch=256, lr=0.02, ema=None, quiet=True)
    network: Any = field.network
    assert (network.mean - data.mean(0)).abs().max() < 0.03
    x, t = torch.randn(64, 2, dtype=F64), torch.linspace(0.1, 0.99, 64, dtype=F64)
    assert (field(x, t) - exact(x, t)).abs().max() < 0.15


def test_a_network_that_predicts_data_is_not_drowned_by_its_last_times() -> None:
    """The error is that of the data: finite, and the network's own, up to t = 1."""
    network = Steps(DDPMScheduler(), torch.zeros(2))
    field = NetworkField(network, Linear(), "data")
    field.network.forward = lambda x, t: x * 0 + network.mean.to(x)  # pyright: ignore
    data = torch.randn(512, 2, dtype=F64)
    loss = FlowMatching()(field, Batch(data), generator=generator(0)).total
    torch.testing.assert_close(loss, data.square().mean(), rtol=1e-9, atol=0)
    assert FlowMatching(error_in="velocity")(field, Batch(data), generator=generator(0)).total > 20 * loss
    with pytest.raises(ValueError, match="unknown error_in of FlowMatching 'dta': did you mean 'data'"):
        FlowMatching(error_in="dta")


# By recipe


def recipe_of(teacher: Path, data: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "tuned", "teacher": str(teacher), "data": data, "objective": "FlowMatching",
        "student": {"network": "auto", "kind": "field"}, "training": {"steps": 2, "batch": 8, "quiet": True},
        "evaluation": {"count": 0}, **more,
    }  # fmt: skip


@pytest.mark.takes_seconds
def test_a_model_and_data_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ddpm(tmp_path / "ddpm", classes=10)
    words = ["train", "--teacher", str(teacher), "--data", "digits", "--steps", "2", "--training.batch", "8"]
    words += ["--evaluation.count", "8", "--evaluation.steps", "[1]", "--evaluation.extractor", "none"]
    assert main([*words, "--training.quiet", "true", "--out", str(tmp_path / "run")]) == 0
    tuned = load_run(tmp_path / "run")
    assert isinstance(tuned, DiffusionField)
    # It stays a diffusion model, which its export is.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    back, first = load(tmp_path / "out"), load(teacher)
    assert isinstance(back, DiffusionField)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert torch.equal(back(x, t, class_labels=labels), tuned(x, t, class_labels=labels))
        assert not torch.equal(back(x, t, class_labels=labels), first.velocity(x, t, class_labels=labels))
    assert "end points" not in capsys.readouterr().out


def test_naive_fine_tuning_takes_the_output_for_the_flow(tmp_path: Path) -> None:
    teacher = ddpm(tmp_path / "ddpm", classes=10)
    student = {"network": "auto", "kind": "field", "conversion": "none"}
    built = build(load_recipe(recipe_of(teacher, "digits", student=student)))
    field, diffusion = built.student, load(teacher)
    assert isinstance(field, NetworkField)
    assert isinstance(diffusion, NetworkField)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.25, 1.0]), torch.tensor([1, 2])
    with torch.no_grad():
        raw = diffusion.network(x, 1000 * (1 - t), class_labels=labels)
        assert torch.equal(field.eval()(x, t, class_labels=labels), -raw)


@pytest.mark.takes_seconds
def test_conditions_are_dropped_in_training_and_not_in_judging(tmp_path: Path) -> None:
    teacher = ddpm(tmp_path / "ddpm", classes=11)
    drop = {"share": 0.5, "null": {"class_labels": 10}}
    built = build(load_recipe(recipe_of(teacher, "digits", drop=drop)))
    labels = built.data.rows(torch.arange(100), generator(0)).cond["class_labels"]
    assert 30 < int((labels == 10).sum()) < 70
    done = run(load_recipe(recipe_of(teacher, "digits", drop=drop)), tmp_path / "run")
    assert done.result.step == 2
    with pytest.raises(ValueError, match="no condition 'text' to drop, the data has class_labels"):
        build(load_recipe(recipe_of(teacher, "digits", drop={"share": 0.5, "null": {"text": 10}})))


@pytest.mark.takes_seconds
def test_conditions_for_none_that_the_model_does_not_know_are_found_before_the_training(tmp_path: Path) -> None:
    teacher = ddpm(tmp_path / "ddpm", classes=11)
    with pytest.raises(ValueError, match=r"Are the conditions for none, \{'class_labels': 11\}, among those that it"):
        build(load_recipe(recipe_of(teacher, "digits", drop={"share": 0.5, "null": {"class_labels": 11}})))
    with pytest.raises(ValueError, match="null: text is an empty prompt, and the teacher has no text encoders"):
        build(load_recipe(recipe_of(teacher, "digits", drop={"share": 0.5, "null": "text"})))
    # Guidance is asked where it acts.
    guidance = {"scale": 2.0, "null": {"class_labels": 11}, "interval": [0.8, 1.0]}
    tree = recipe_of(teacher, "digits", objective="ITVM", student="auto")
    tree["teacher"] = {"source": str(teacher), "guidance": guidance}
    with pytest.raises(ValueError, match="the teacher does not take the data 'digits'"):
        build(load_recipe(tree))


def test_labels_that_the_model_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"It may know no classes: say data.labels: false"):
        build(load_recipe(recipe_of(ddpm(tmp_path / "ddpm"), "digits")))


def test_a_network_that_a_recipe_makes_is_told_what_the_data_say(tmp_path: Path) -> None:
    """The option that a recipe lacks is named, with its number where the data know it."""
    rng = np.random.default_rng(0)
    told = rng.normal(size=(40, 5)).astype("float32")
    np.savez(tmp_path / "points.npz", x=rng.normal(size=(40, 3)).astype("float32"), vector=told)
    np.savez(tmp_path / "signals.npz", x=rng.normal(size=(40, 2, 16)).astype("float32"), vector=told)
    np.savez(tmp_path / "images.npz", x=rng.normal(size=(40, 1, 16, 16)).astype("float32"), y=rng.integers(0, 3, 40))

    def made(data: dict[str, Any], network: str, **options: Any) -> Any:
        student = {"network": network, "options": options}
        tree = {"data": data, "objective": "FlowMatching", "student": student, "name": "told"}
        tree["training"] = {"steps": 2}
        return build(load_recipe(tree))

    points = {"name": str(tmp_path / "points.npz"), "key": "x", "conditions": ["vector"]}
    signals = {**points, "name": str(tmp_path / "signals.npz")}
    for data, network in ((points, "mlp"), (signals, "conv1d")):
        with pytest.raises(ValueError, match=r"made for them: student\.options\.vector: 5$"):
            made(data, network, width=16)
        made(data, network, width=16, vector=5)
    images = {"name": str(tmp_path / "images.npz"), "key": "x", "label": "y"}
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
             "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}  # fmt: skip
    with pytest.raises(ValueError, match=r"data\.labels: false, or tell it them: student\.options\.num_class_embeds$"):
        made(images, "unet", **small)
    made(images, "unet", num_class_embeds=3, **small)


def test_a_model_without_a_size_gets_that_of_the_data(tmp_path: Path) -> None:
    teacher = ddpm(tmp_path / "ddpm", classes=10, sample_size=None)
    built = build(load_recipe(recipe_of(teacher, "digits")))
    assert built.student.network.shape == (1, 8, 8)  # pyright: ignore


@pytest.mark.takes_seconds
def test_another_resolution(tmp_path: Path) -> None:
    """A U-Net made for 8 pixels, fine-tuned at 16, is a model for 16 from then on."""
    teacher = ddpm(tmp_path / "ddpm")
    np.save(tmp_path / "large.npy", np.random.default_rng(0).integers(0, 255, (12, 1, 16, 16), dtype=np.uint8))
    run(load_recipe(recipe_of(teacher, str(tmp_path / "large.npy"))), tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert main(["sample", str(tmp_path / "out"), "--count", "2", "--steps", "1", "--out", f"{tmp_path}/x.npy"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (2, 1, 16, 16)


# Conditioned on an image


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    """Images, and of each what goes beside it."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 255, (16, 1, 8, 8), dtype=np.uint8)
    beside = draw.normal(size=(16, 2, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "edges.npz", data=pictures, image=beside)
    return tmp_path / "edges.npz"


def test_conditions_of_an_archive(edges: Path) -> None:
    data: Any = load_data(edges, conditions=["image"])
    assert data.shape == (1, 8, 8)
    assert {name: value.shape for name, value in data.cond.items()} == {"image": (16, 2, 8, 8)}
    with pytest.raises(ValueError, match=r"unknown array in .*edges.npz 'depth'.*Known: data, image"):
        load_data(edges, conditions=["depth"])
    # Images are images, and what stands beside one turns with it.
    pictures = np.arange(4 * 8, dtype=np.uint8).reshape(4, 1, 1, 8)
    turned = ArrayData(pictures, {"image": pictures[:, :, :, ::-1].copy()}, flip=True)
    batch = turned.rows(torch.arange(4).repeat(8), torch.Generator().manual_seed(0))
    assert torch.equal(batch.cond["image"], batch.data.flip(-1))
    assert len(batch.data.unique(dim=0)) == 8
    # What is no image of that size stays as it is.
    text = torch.randn(4, 5, 3, 2)
    kept = ArrayData(pictures, {"text": text.numpy()}, flip=True).rows(
        torch.arange(4), torch.Generator().manual_seed(0)
    )
    assert torch.equal(kept.cond["text"], text)


def test_a_network_that_takes_an_image_starts_as_it_was(tmp_path: Path) -> None:
    network = UNet(tiny_unet())
    wide = with_image(network, 2)
    x, k, image = torch.randn(3, 1, 8, 8), torch.tensor([3.0, 50.0, 900.0]), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(wide(x, k, image=image), network(x, k), atol=1e-6, rtol=0)
    assert wide.shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"takes 3 channels, the state has 1: they must add up"):
        wide(x, k)
    with pytest.raises(ValueError, match=r"the state has 1 and the condition image 1: they must"):
        wide(x, k, image=image[:, :1])
    with pytest.raises(ValueError, match="widens the first layer of a model of diffusers, and a Linear is none"):
        with_image(nn.Linear(2, 2), 1)
    # And as a flow map.
    field = DiffusionField(wide, DDPMScheduler())
    student = FlowMap.from_field(field)
    t = torch.rand(3)
    with torch.no_grad():
        assert torch.equal(student.velocity(x, t, image=image), field(x, t, image=image))


@pytest.mark.takes_seconds
def test_an_image_beside_the_state_is_learned_and_kept(edges: Path, tmp_path: Path) -> None:
    teacher = ddpm(tmp_path / "ddpm")
    student = {"network": "auto", "kind": "field", "image": 2}
    tree = recipe_of(teacher, "", student=student)
    tree["data"] = {"name": str(edges), "conditions": ["image"]}
    tree["training"] = {"steps": 4, "batch": 8, "lr": 1e-2, "ema": None, "quiet": True}
    done = run(load_recipe(tree), tmp_path / "run")
    network: Any = done.result.student
    weight = network.network.model.conv_in.weight
    assert weight[:, 1:].abs().min() > 0  # heeded by now
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    back: Any = load(tmp_path / "out")
    x, t, image = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(back(x, t, image=image), network.eval()(x, t, image=image))
    np.save(tmp_path / "bare.npy", np.zeros((4, 1, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"the student does not take the data .*takes 3 channels, the state has 1"):
        build(load_recipe({**tree, "data": str(tmp_path / "bare.npy")}))
