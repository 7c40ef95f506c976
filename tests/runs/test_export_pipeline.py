"""The pipeline that an export carries: what it gives, takes and refuses, in every type of numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor
from toys.exports import pipeline, pixels
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

from fewstep.common.randomness import sample_generators
from fewstep.flows.chained import ChainedPath
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.tabulated import Tabulated
from fewstep.models.exported import FlowMapPipeline
from fewstep.networks import MLP, UNet, flow_model
from fewstep.pipelines.native_times import coefficients
from fewstep.runs.export import export
from fewstep.runs.loading import load


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> FlowMapPipeline:
    return pipeline(export(tiny_student("v_prediction", 5), tmp_path_factory.mktemp("labelled") / "export"))


def test_outputs(labelled: FlowMapPipeline) -> None:
    def draw(**options: Any) -> Any:
        return labelled(class_labels=3, batch_size=2, generator=torch.Generator().manual_seed(0), **options)

    tensor = draw(output_type="pt").images
    assert tensor.shape == (2, 1, 8, 8)
    array = draw(output_type="np").images
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = draw().images
    assert all(isinstance(p, Image.Image) and p.size == (8, 8) for p in pictures)
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1, ..., 0] * 255).round())
    assert torch.equal(draw(output_type="pt", return_dict=False)[0], tensor)


def test_noise_may_come_from_anywhere(labelled: FlowMapPipeline) -> None:
    def draw(**options: Any) -> Tensor:
        return labelled(output_type="pt", num_inference_steps=2, **options).images

    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    from_seed = draw(generator=torch.Generator().manual_seed(5), batch_size=2, class_labels=[1, 2])
    assert torch.equal(draw(latents=noise, class_labels=[1, 2]), from_seed)
    assert torch.equal(draw(latents=noise, class_labels=torch.tensor([1, 2])), from_seed)
    # One generator an image: an image is the same in any company.
    many = draw(generator=sample_generators(0, range(4)), class_labels=1)
    torch.testing.assert_close(draw(generator=sample_generators(0, [2]), class_labels=1), many[2:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"class_labels": 1, "gamma": 1.5}, "gamma is 1.5"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type is 'jpg'"),
        ({}, "class_labels are needed, 0 to 4"),
        ({"class_labels": 5}, "class_labels run from 0 to 4"),
        ({"class_labels": [1, 2], "batch_size": 3}, "3 images, but"),
        ({"class_labels": 1, "batch_size": 3, "generator": sample_generators(0, range(2))}, "3 images, but"),
    ],
)
def test_what_the_pipeline_refuses(labelled: FlowMapPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled(**options)


def test_labels_for_a_model_without_classes_and_no_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no classes"):
        pipeline(export(tiny_student("flow"), tmp_path / "a"))(class_labels=1)
    free = pipeline(export(tiny_student("flow", sample_size=None), tmp_path / "b"))
    with pytest.raises(ValueError, match="no fixed size: pass height and width, or the noise to start from as latents"):
        free()
    noise = torch.randn(1, 1, 16, 12, generator=torch.Generator().manual_seed(3))
    images = free(latents=noise, output_type="pt").images
    assert images.shape == (1, 1, 16, 12)
    sized = free(height=16, width=12, generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(sized, images)


@pytest.mark.parametrize("classes", [None, 5])
def test_half_precision(classes: int | None, tmp_path: Path) -> None:
    """Weights in bf16, as users of diffusers ask for: the state and the times stay in float32."""
    student = tiny_student("v_prediction", classes)
    pipe = FlowMapPipeline.from_pretrained(export(student, tmp_path / "export"), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.bfloat16
    images = pipe(
        num_inference_steps=2, generator=sample_generators(7, range(3)), output_type="pt", **conditions(classes)
    )
    torch.testing.assert_close(images.images, pixels(student, 2, 0.0, classes), atol=0.03, rtol=0)


def test_an_image_for_a_map_that_takes_none(labelled: FlowMapPipeline) -> None:
    with pytest.raises(ValueError, match="takes no image beside the state: leave image out"):
        labelled(class_labels=1, image=torch.zeros(1, 1, 8, 8))


OTHERS = {
    "edm": EDMEulerScheduler(),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_max=70.0),
    "forward": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, invert_sigmas=True),
    "noise on the line": UniPCMultistepScheduler(500, use_flow_sigmas=True),
    "data on the line": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="sample"),
    "no signal": DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def other_student(name: str) -> FlowMap:
    student = FlowMap.from_field(DiffusionField(UNet(tiny_unet()), OTHERS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return student


@pytest.mark.parametrize("name", OTHERS)
def test_the_calls_of_a_map_that_began_elsewhere(name: str, tmp_path: Path) -> None:
    student = other_student(name)
    folder = export(student, tmp_path / "map")
    back: Any = load(folder)
    assert (back.native, back.prediction, back.path) == (student.native, student.prediction, student.path)
    pipe, x = pipeline(folder), torch.randn(2, 1, 8, 8)
    for s, t in torch.tensor([[0.0, 0.3], [0.3, 0.9], [0.6, 0.6], [0.999, 0.9995]]):
        with torch.no_grad():
            expected = student(x, s, t)
            assert torch.equal(back(x, s, t), expected)
            found = pipe._map(x, s, t)
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_pixels_of_a_map_that_began_elsewhere(name: str, tmp_path: Path) -> None:
    student = other_student(name)
    pipe = pipeline(export(student, tmp_path / "map"))
    for steps in (1, 3):
        found = pipe(num_inference_steps=steps, generator=sample_generators(7, range(3)), output_type="pt").images
        expected = pixels(student, steps)
        assert expected.isfinite().all()
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["stock", "told"])
def test_a_pipeline_in_every_type_of_numbers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    student = FlowMap.from_field(tiny_field("v_prediction"), guidance=name == "told")
    pipe = pipeline(export(student, tmp_path / "map"))
    exact = pixels(student, 2)
    found = pipe.to(dtype)(num_inference_steps=2, generator=sample_generators(7, range(3)), output_type="pt").images
    torch.testing.assert_close(found.float(), exact, atol=1e-5 if dtype == torch.float64 else 0.05, rtol=0)


DIFFUSIONS: list[dict[str, Any]] = [
    *({"prediction_type": kind, "log_ratios": list(tiny_field("epsilon").native.log_ratios)}  # pyright: ignore
      for kind in ("epsilon", "sample", "v_prediction")),
    *({"prediction_type": kind, "sigma_data": data, "sigma_min": 0.002, "sigma_max": 80.0}
      for kind in ("epsilon", "v_prediction") for data in (0.5, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: f"{d['prediction_type']} {d.get('sigma_data')}")
def test_the_two_files_that_are_carried_agree(diffusion: dict[str, Any]) -> None:
    last = len(diffusion.get("log_ratios", [0])) - 1
    times = torch.cat([torch.arange(0, 64) / 64, 2.0 ** -torch.arange(7, 20), 1 - 2.0 ** -torch.arange(7, 20)]).double()
    into, step, skip, out = flow_model.flow_scaling(1 - times, diffusion)
    found = torch.tensor([coefficients(diffusion, time, last) for time in times], dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([into, step, -skip, -out], 1), atol=1e-11, rtol=1e-11)


def trajectories() -> list[Trajectory]:
    options: dict[Any, dict[str, Any]] = {
        Tabulated: {"log_ratios": (3.0, 0.5, -2.0)},
        Preconditioned: {"sigma_max": 9.0},
    }
    found, classes = [], Trajectory.__subclasses__()
    for kind in classes:
        classes.extend(kind.__subclasses__())
        # A chain of blocks has no path but its ODE, and is refused as an export.
        if kind.__module__.startswith("fewstep.flows.") and kind is not ChainedPath:
            found.append(kind(**options.get(kind, {})))
    return found


@pytest.mark.parametrize("path", trajectories(), ids=lambda path: type(path).__name__)
def test_a_network_on_every_path(path: Trajectory, tmp_path: Path) -> None:
    # between two data sets no path is another, and the velocity is all a network may say
    kind, read_on = ("flow", path) if path.two_sided else ("v", Linear())
    for model in (
        NetworkField(MLP(2, width=8, depth=2), path, kind, path=read_on),
        FlowMap(MLP(2, width=8, depth=2, times=2), path),
    ):
        back: Any = load(export(model, tmp_path / type(model).__name__))
        assert (back.native, back.prediction, back.path) == (model.native, model.prediction, model.path)
        x = torch.randn(3, 2)
        with torch.no_grad():
            assert torch.equal(back.velocity(x, 0.3), model.velocity(x, 0.3))
