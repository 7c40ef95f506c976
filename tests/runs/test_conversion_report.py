"""What the report of a conversion says, and its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn
from toys.diffusion import CASES, SCHEDULES, ddim, make, node_times
from toys.unet import tiny_field, tiny_unet

from fewstep.common.randomness import sample_generators
from fewstep.evaluation.agreement import SAME, compare_samplers, sampler_of, steps_for
from fewstep.evaluation.grids import image_grid
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import sample_noise
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import UNet
from fewstep.runs.convert import convert

FLOW_SIGMAS: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_a_perfect_network_draws_the_same_with_both(schedule: str, prediction: str) -> None:
    """Gaussian data, whose perfect prediction is known at every step: what remains is float32 of DDIM's table."""
    field, _ = make(schedule, prediction)
    noise = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    agreement, original, flow = compare_samplers(field, noise, (5, 20, 50), {})
    assert agreement.is_good
    assert agreement.on_same_steps < 1e-5
    apart = {(row.sampler, row.steps): row.difference for row in agreement.rows}
    heun = apart["flow, Heun", 50]
    assert heun is not None
    assert heun < 0.1  # what 50 steps of DDIM cost
    if (schedule, prediction) == ("squaredcos_cap_v2", "epsilon"):  # begins where the noise says something of the data
        torch.testing.assert_close(original, original_by_hand(field, noise, 20), atol=1e-2, rtol=0)
    else:
        assert torch.equal(original, original_by_hand(field, noise, 20))
    assert (original - flow).abs().max() < 0.5


def original_by_hand(field: DiffusionField, noise: Tensor, steps: int) -> Tensor:
    betas = field.scheduler.betas
    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type=field.scheduler.config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )

    class Bare(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Any:
            return type("Output", (), {"sample": field.network(x, k.expand(len(x)))})

    return ddim(scheduler, Bare(), noise, steps)


@pytest.mark.takes_seconds
def test_the_numbers_of_the_report_are_what_they_say() -> None:
    field: Any = tiny_field("v_prediction")
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    agreement, original, flow = compare_samplers(field, noise, (2, 4, 8), {}, seed=6)
    reference = original_by_hand(field, noise, 8)
    power = field.scheduler.alphas_cumprod[-1].double()
    start, x = node_times(field.scheduler)[-1], noise / float(power.sqrt() + (1 - power).sqrt())

    def ode(solver: str, steps: int) -> Tensor:
        grid = start + (1 - start) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        with torch.no_grad():
            return integrate(field, x, grid.float(), solver)

    assert [(row.sampler, row.steps, row.calls) for row in agreement.rows] == [
        *[("original (DDIMScheduler)", n, n) for n in (2, 4, 8)],
        *[("flow, Euler", n, n) for n in (2, 4, 8)],
        *[("flow, Heun", n, 2 * n) for n in (2, 4, 8)],
    ]
    drawn = [original_by_hand(field, noise, n) for n in (2, 4)] + [None]
    drawn += [ode("euler", n) for n in (2, 4, 8)] + [ode("heun", n) for n in (2, 4, 8)]
    for row, samples in zip(agreement.rows, drawn, strict=True):
        if samples is None:
            assert row.difference is None
        else:
            expected = float((samples - reference).square().mean().sqrt() / reference.std())
            assert row.difference == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(original, original_by_hand(field, noise, 4))
    torch.testing.assert_close(flow, ode("euler", 4), atol=1e-5, rtol=1e-4)
    assert (agreement.count, agreement.seed, agreement.same_steps) == (3, 6, 2)


def by_hand() -> NetworkField:
    """A field on a table, without a scheduler."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    return NetworkField(
        UNet(tiny_unet()), Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod), "noise", path=Linear()
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"),
        EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=80.0
        ),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True),
        DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1, thresholding=True),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(**SCHEDULES["trained_betas"]),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, invert_sigmas=True),
        None,
    ],
)
def test_every_kind_of_scheduler_has_its_sampler(scheduler: Any) -> None:
    field = by_hand() if scheduler is None else DiffusionField(UNet(tiny_unet()), scheduler)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    agreement, *_ = compare_samplers(field, noise, (2, 5), {})
    # Two steps of EDM end at t = 0.998, where float32 keeps 1 - t to 3e-5.
    assert agreement.on_same_steps < (1e-4 if agreement.original == "EDMEulerScheduler" else 2e-6)
    assert agreement.is_good


def test_the_sampler_of_a_flow_has_its_shift() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(**FLOW_SIGMAS)):
        config = sampler_of(DiffusionField(UNet(tiny_unet()), scheduler)).config
        assert config.get("shift", config.get("flow_shift")) == 3.0


@pytest.mark.takes_seconds
def test_the_rows_of_the_picture(tmp_path: Path) -> None:
    field: Any = tiny_field("sample")
    convert(field, tmp_path / "flow", steps=[2, 5, 10], count=3)
    noise = sample_noise((3, 1, 8, 8), sample_generators(0, range(3)))
    _, original, flow = compare_samplers(field, noise, (2, 5, 10), {})
    rows = ["diffusion", "flow", "difference"]
    expected = image_grid(torch.cat([original, flow, flow - original]), columns=3, labels=rows)
    assert (tmp_path / "flow" / "conversion.png").read_bytes() == expected


@pytest.mark.takes_seconds
def test_a_conversion_by_another_schedule_is_found_out(tmp_path: Path) -> None:
    field: Any = tiny_field("sample")
    field.scheduler = DDPMScheduler(prediction_type="sample", beta_end=0.012)
    report = convert(field, tmp_path / "flow", steps=[2, 5, 10], count=4)
    assert report.agreement is not None
    assert report.agreement.on_same_steps > 4 * SAME
    assert "NOT" in report.verdict
    assert "NOT" in (tmp_path / "flow" / "README.md").read_text()
    # A network that gives no numbers agrees with nothing.
    field = tiny_field("v_prediction")
    with torch.no_grad():
        next(field.parameters()).fill_(torch.nan)
    report = convert(field, tmp_path / "nan", steps=[2], count=2)
    assert report.agreement is not None
    assert not report.agreement.is_good


def test_what_the_report_says_of_the_model(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0, thresholding=True)
    field = DiffusionField(UNet(tiny_unet(5)), scheduler)
    report = convert(field, tmp_path / "flow", steps=[2, 4], count=3, labels=[4], seed=3)
    power, nodes = scheduler.alphas_cumprod.double(), node_times(scheduler)
    snr = (power / (1 - power)).log()
    assert report.log_snr == pytest.approx((float(snr[-1]), float(snr[0])), rel=1e-6)
    assert report.covered == pytest.approx((1 / 1001, float(nodes[0])))  # the noise is held there
    assert report.outside == pytest.approx((1 / 1001, 1 - float(nodes[0])))
    assert (report.schedule, report.train_steps, report.prediction) == ("squaredcos_cap_v2 betas", 1000, "noise")
    assert report.options == {
        "clip_sample": True,
        "thresholding": True,
        "clip_sample_range": 2.0,
        "timestep_spacing": "leading",
    }
    saved = json.loads((tmp_path / "flow" / "conversion.json").read_text())
    assert saved["verdict"] == report.verdict
    assert saved["agreement"]["rows"][0] == {
        "sampler": "original (DPMSolverMultistepScheduler)",  # of first order: it begins where the prediction does
        "steps": 2,
        "calls": 2,
        "difference": pytest.approx(report.agreement.rows[0].difference),  # pyright: ignore
    }
    card = (tmp_path / "flow" / "README.md").read_text()
    for part in ("squaredcos_cap_v2", "thresholding=True", "held towards noise", "conversion.png"):
        assert part in card
    assert (tmp_path / "flow" / "conversion.png").read_bytes().startswith(b"\x89PNG")


def test_edm_in_the_report(tmp_path: Path) -> None:
    report = convert(DiffusionField(UNet(tiny_unet()), EDMEulerScheduler()), tmp_path / "flow", check=False)
    assert (report.schedule, report.train_steps, report.prediction) == ("EDM", None, "edm")
    assert report.covered == pytest.approx((1 / 81, 1 / 1.002))
    assert report.verdict.startswith("not checked")
    assert not (tmp_path / "flow" / "conversion.png").exists()


def test_the_same_noise_and_labels_as_samples_have(tmp_path: Path) -> None:
    """Row i of the image is sample i of the seed."""
    field: Any = tiny_field("v_prediction", 5)
    report = convert(field, tmp_path / "flow", steps=[2], count=3, labels=[1, 3], seed=9)
    noise = sample_noise((3, 1, 8, 8), sample_generators(9, range(3)))
    cond = {"class_labels": torch.tensor([1, 3, 1])}
    agreement, *_ = compare_samplers(field, noise, (2,), cond, seed=9)
    assert report.agreement == agreement


def test_steps_by_default_divide_the_schedule() -> None:
    assert steps_for(tiny_field("epsilon"), None) == (10, 50, 200)
    odd = DiffusionField(UNet(tiny_unet()), DDPMScheduler(num_train_timesteps=256))
    assert all(256 % steps == 0 for steps in steps_for(odd, None))
