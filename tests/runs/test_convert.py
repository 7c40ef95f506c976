"""Converted models: what diffusers makes of them, what fewstep reads back, and whether the report tells the truth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from toys.diffusion import CASES, SCHEDULES, ddim, make, node_times
from toys.families import conditions as some
from toys.families import tiny_model, tiny_pipeline, tiny_vae
from toys.unet import conditions, tiny_field, tiny_student, tiny_unet

import fewstep
from fewstep.cli import main
from fewstep.common.randomness import sample_generators
from fewstep.evaluation.agreement import SAME, compare_samplers, sampler_of, steps_for
from fewstep.evaluation.grids import image_grid
from fewstep.flows.change_of_path import scaling
from fewstep.flows.exact import CheckerboardField
from fewstep.flows.fields import DiffusionField, Guided, NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Reversed, Trigonometric
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated
from fewstep.latents.vae import Latents
from fewstep.models.export import diffusion_of
from fewstep.networks import FAMILIES, MLP, UNet, flow_model
from fewstep.networks.configs import public_config, with_image
from fewstep.networks.two_times.flux import pack
from fewstep.runs.convert import convert
from fewstep.runs.opening import load

FLOW_SIGMAS: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NAMES = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
# Differences of 1 and these are exact, so that 1 - t and t are the same time; both ends and beyond the schedule's.
TIMES = torch.cat([torch.arange(0, 1025) / 1024, 2.0 ** -torch.arange(11, 40), 1 - 2.0 ** -torch.arange(11, 40)])
TIMES = TIMES.double()


def toy(family: str, prediction: Any = "epsilon", **options: Any) -> Any:
    """A tiny random model of a family on a DDPM schedule."""
    if family == "unet":
        network: Any = UNet(tiny_unet(**options))
    else:
        model = tiny_model(family, **options)
        network = FAMILIES[type(model).__name__](model)
    return DiffusionField(network, DDPMScheduler(prediction_type=prediction))


def given(family: str, rows: int) -> dict[str, Tensor]:
    """Conditions for a toy."""
    if family == "unet":
        return {}
    if family == "dit":
        return {"class_labels": torch.arange(rows) % 5}
    return {name: value.repeat(rows // 2 + 1, *[1] * (value.ndim - 1))[:rows] for name, value in some(family).items()}


TOYS = ["unet", "sd", "sdxl", "dit", "pixart"]


def part_of(folder: Path) -> Path:
    return folder / "unet" if (folder / "unet").is_dir() else folder / "transformer"


# The code that a converted model carries


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_the_carried_arithmetic_is_that_of_the_paths(schedule: str, prediction: str) -> None:
    field, nodes = make(schedule, prediction)
    native: Any = field.native
    check_scaling(native, NAMES[prediction], diffusion_of(field) or {}, nodes)


@pytest.mark.parametrize("kind", ["edm", "v"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_carried_arithmetic_of_edm(kind: str, sigma_data: float) -> None:
    diffusion = {"prediction_type": "epsilon" if kind == "edm" else "v_prediction", "sigma_data": sigma_data}
    ends = {"sigma_min": 0.002, "sigma_max": 80.0}
    nodes = 1 / (1 + torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64))
    check_scaling(Preconditioned(sigma_data, **ends), kind, {**diffusion, **ends}, nodes)


def check_scaling(native: Trajectory, kind: str, diffusion: dict[str, Any], nodes: Tensor) -> None:
    for times, tolerance in ((TIMES, 1e-11), (nodes, 1e-7)):  # 1 - node is rounded
        expected = scaling(native, kind, Linear(), times)
        into, step, skip, out = flow_model.flow_scaling(1 - times, diffusion)
        pairs = ((into, expected.into), (step, expected.time), (skip, -expected.skip), (out, -expected.out))
        for got, wanted in pairs:
            assert got.isfinite().all()
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", TOYS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_converted_model_gives_the_flow_of_the_field(family: str, prediction: str, tmp_path: Path) -> None:
    field = toy(family, prediction)
    convert(field, tmp_path / "flow", check=False)
    made: Any = getattr(flow_model, f"Flow{type(field.network.model).__name__}")
    model = made.from_pretrained(part_of(tmp_path / "flow")).double().eval()
    field = field.double()
    t = torch.tensor([0.0, 2**-12, 0.25, 0.5, 1 - 2**-10, 1.0], dtype=torch.float64)
    x = torch.randn(6, *field.network.shape, dtype=torch.float64)
    cond = {name: value.double() if value.is_floating_point() else value for name, value in given(family, 6).items()}
    channels = x.shape[1]

    def flow(x: Tensor, timestep: Any, **cond: Any) -> Tensor:
        # As pipelines call them.
        names = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
        added = {name: cond.pop(name) for name in names if name in cond}
        if added:
            cond["added_cond_kwargs"] = added
        if family == "pixart":
            return model(x, timestep=timestep, return_dict=False, **cond)[0][:, :channels]
        return model(x, timestep, **cond).sample[:, :channels]

    with torch.no_grad():
        expected = -field(x, t, **cond)
        torch.testing.assert_close(flow(x, 1000 * (1 - t), **cond), expected, atol=1e-9, rtol=1e-9)
        # One timestep for all, as schedulers have it.
        for timestep in (torch.tensor(500.0), 500, torch.tensor([500.0])):
            torch.testing.assert_close(flow(x, timestep, **cond), -field(x, 0.5, **cond), atol=1e-9, rtol=1e-9)


def test_a_variance_is_kept_where_the_pipeline_splits_it_off_itself(tmp_path: Path) -> None:
    for family, channels in (("dit", 8), ("unet", 1)):
        options = {"out_channels": 2} if family == "unet" else {}
        field = toy(family, **options)
        report = convert(field, tmp_path / family, check=False)
        assert report.learned_variance
        made: Any = getattr(flow_model, report.written)
        model = made.from_pretrained(part_of(tmp_path / family))
        with torch.no_grad():
            flow = model(torch.randn(2, *field.network.shape), 300.0, **given(family, 2)).sample
        assert flow.shape[1] == channels


@pytest.mark.takes_seconds
@pytest.mark.parametrize("family", TOYS)
def test_fewstep_reads_a_converted_model_back_to_the_bit(family: str, tmp_path: Path) -> None:
    field = toy(family, "v_prediction")
    convert(field, tmp_path / "flow", check=False)
    for file in (tmp_path / "flow").rglob("*.py"):
        file.write_text("raise SystemExit('its code ran')")
    back = load(tmp_path / "flow")
    assert isinstance(back, DiffusionField)
    assert (back.native, back.prediction, back.path) == (field.native, field.prediction, field.path)
    assert type(back.network.model) is type(field.network.model)
    assert public_config(back.network.model).keys() == public_config(field.network.model).keys()
    x, t = torch.randn(3, *field.network.shape), torch.tensor([0.0, 0.4, 1.0])
    cond = given(family, 3)
    with torch.no_grad():
        assert torch.equal(back(x, t, **cond), field(x, t, **cond))
    convert(back, tmp_path / "again", check=False)  # goes on from there
    first, again = ((tmp_path / name / part_of(tmp_path / name).name / "config.json") for name in ("flow", "again"))
    assert first.read_text() == again.read_text()


def test_the_table_in_the_folder_is_the_one_that_counts(tmp_path: Path) -> None:
    """A scheduler of another version may compute its table with other roundings."""
    convert(tiny_field("epsilon"), tmp_path / "flow", check=False)
    file = tmp_path / "flow" / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["diffusion"]["log_ratios"][0] += 0.01
    file.write_text(json.dumps(config))
    back: Any = load(tmp_path / "flow")
    assert back.native == Tabulated(tuple(config["diffusion"]["log_ratios"]))


@pytest.mark.takes_seconds
def test_other_schedules_are_read_back(tmp_path: Path) -> None:
    zero = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.4, 1.0])
    line = UniPCMultistepScheduler(500, use_flow_sigmas=True)
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    for scheduler in (zero, EDMEulerScheduler(sigma_max=70.0), cosine, line):
        field = DiffusionField(UNet(tiny_unet()), scheduler)
        report = convert(field, tmp_path / "flow", check=False, overwrite=True)
        assert report.zero_snr == (scheduler is zero)
        back = load(tmp_path / "flow")
        model = flow_model.FlowUNet2DModel.from_pretrained(tmp_path / "flow" / "unet")
        with torch.no_grad():
            assert torch.equal(back(x, t), field(x, t))
            torch.testing.assert_close(model(x, 1000 * (1 - t)).sample, -field(x, t), atol=1e-4, rtol=1e-4)


# What diffusers makes of the folder

ELSEWHERE = """
    import sys
    from pathlib import Path

    import torch
    from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    folder = Path(sys.argv[1])
    try:
        DiffusionPipeline.from_pretrained(folder / "plain")
        sys.exit("its code ran without being trusted")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    images = {}
    for name in ("plain", "classes"):
        pipe = DiffusionPipeline.from_pretrained(folder / name, trust_remote_code=True)
        assert type(pipe) is DDPMPipeline and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        if name == "plain":
            generator = torch.Generator().manual_seed(3)
            images[name] = pipe(batch_size=3, num_inference_steps=6, generator=generator, output_type="pt").images
        else:
            pipe.scheduler.set_timesteps(6)
            with torch.no_grad():
                for t in pipe.scheduler.timesteps:
                    flow = pipe.unet(x, t, class_labels=torch.tensor([0, 1, 4])).sample
                    x = pipe.scheduler.step(flow, t, x).prev_sample
            images[name] = (x / 2 + 0.5).clamp(0, 1)
    assert "fewstep" not in sys.modules
    save_file({name: value.contiguous() for name, value in images.items()}, folder / "images.safetensors")
"""


def flow_grid(steps: int) -> Tensor:
    """The times of the steps of diffusers' flow-match scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return 1 - scheduler.sigmas


@pytest.mark.takes_seconds
def test_the_same_images_without_fewstep(tmp_path: Path, elsewhere: Callable[..., str]) -> None:
    fields = {"plain": tiny_field("v_prediction"), "classes": tiny_field("sample", 5)}
    for name, field in fields.items():
        convert(field, tmp_path / name, check=False)
    elsewhere(ELSEWHERE, tmp_path)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for name, images in load_file(tmp_path / "images.safetensors").items():
        samples = sample(fields[name], noise, grid=flow_grid(6), **conditions(5 if name == "classes" else None))
        torch.testing.assert_close(images, (samples / 2 + 0.5).clamp(0, 1), atol=2e-6, rtol=0)
        assert images.std() > 0.01


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "pixart", "sd3", "flux"])
def test_a_pipeline_keeps_its_parts_and_its_class(name: str, tmp_path: Path) -> None:
    original = tiny_pipeline(name)
    if name == "pixart":  # which its own pipeline tells of the size at 1024 pixels alone
        original.transformer = tiny_model("pixart", use_additional_conditions=False)
    original.save_pretrained(tmp_path / "original")
    choice = {"labels": [3, 4]} if name == "dit" else {"prompts": ["cat", "dog"]}
    # Flux does not say its size, and its 128 by default are more than a test needs.
    check = name != "flux"
    report = convert(tmp_path / "original", tmp_path / "flow", steps=[2, 4], count=2, check=check, **choice)
    if check:
        assert report.agreement is not None
        assert report.agreement.on_same_steps < 1e-5
        assert report.picture is not None  # of the decoded images
    assert report.missing == ()

    is_flow = name in ("sd3", "flux")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", **({} if is_flow else {"trust_remote_code": True}))
    assert type(pipe) is type(original)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert list((tmp_path / "flow").rglob("*.py")) == [] or not is_flow
    pipe.set_progress_bar_config(disable=True)
    back: Any = load(tmp_path / "flow")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    if name == "dit":
        cond = {"class_labels": torch.tensor([3, 4])}
        images = pipe([3, 4], generator=torch.Generator().manual_seed(3), **options).images
    else:
        cond = back.text.encode(["cat", "dog"])
        size = {"height": 16, "width": 16, "latents": pack(noise) if name == "flux" else noise}
        if name == "pixart":
            size["use_resolution_binning"] = False
        images = pipe(["cat", "dog"], **options, **size).images
    samples = sample(back, noise, grid=1 - pipe.scheduler.sigmas, **cond)
    torch.testing.assert_close(images, back.latents.decode(samples) / 2 + 0.5, atol=1e-4, rtol=0)


@pytest.mark.takes_seconds
def test_guidance_acts_on_a_flow_as_on_the_noise(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "flow", check=False)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    back: Any = load(tmp_path / "flow")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    images = pipe("cat", latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    guided = Guided(back, 3.0, null=back.text.null())
    samples = sample(guided, noise, grid=flow_grid(3), **back.text.encode(["cat"]))
    torch.testing.assert_close(images, back.latents.decode(samples) / 2 + 0.5, atol=1e-4, rtol=0)


def test_a_model_without_its_pipeline_says_what_is_missing(tmp_path: Path) -> None:
    report = convert(toy("sd"), tmp_path / "flow", check=False)
    assert report.pipeline == "StableDiffusionPipeline"
    assert {"vae", "text_encoder", "tokenizer"} <= set(report.missing)
    nothing = dict.fromkeys(report.missing)
    vae = tiny_vae()
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow", trust_remote_code=True, **{**nothing, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 8, 16)
    images = pipe(prompt_embeds=text, negative_prompt_embeds=0 * text, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert ", vae=..." in (tmp_path / "flow" / "README.md").read_text()


@pytest.mark.takes_seconds
@pytest.mark.parametrize("inverted", [False, True])
def test_a_flow_is_written_as_it_is(inverted: bool, tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
    field = DiffusionField(UNet(tiny_unet()), scheduler)
    report = convert(field, tmp_path / "flow", steps=[2, 3, 4], count=2)
    assert not list((tmp_path / "flow").rglob("*.py"))
    assert (report.written, report.covered, report.outside) == ("UNet2DModel", (0.0, 1.0), (0.0, 0.0))
    assert report.agreement is not None
    assert report.agreement.on_same_steps < 1e-6
    pipe: Any = DDPMPipeline.from_pretrained(tmp_path / "flow")
    assert pipe.scheduler.config.shift == 3.0
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "flow").velocity(x, 0.3), field(x, 0.3))


def test_half_precision(tmp_path: Path) -> None:
    """Weights and images in bf16, as users of diffusers ask for: the arithmetic around them stays in float32."""
    field = tiny_field("v_prediction")
    convert(field, tmp_path / "flow", check=False)
    model: Any = flow_model.FlowUNet2DModel.from_pretrained(tmp_path / "flow" / "unet", torch_dtype=torch.bfloat16)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.4, 0.9])
    with torch.no_grad():
        flow = model(x.bfloat16(), 1000 * (1 - t)).sample
        assert flow.dtype == torch.bfloat16
        torch.testing.assert_close(flow.float(), -field(x, t), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("classes", [None, 5])
def test_the_code_on_the_card_runs(classes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tiny_field("epsilon", classes), tmp_path / "flow", check=False)
    code = (tmp_path / "flow" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("50", "2"), names)
    assert len(names["images"] if classes is None else names["x"]) == 4


# The report


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
    """Row i of the picture is sample i of the seed."""
    field: Any = tiny_field("v_prediction", 5)
    report = convert(field, tmp_path / "flow", steps=[2], count=3, labels=[1, 3], seed=9)
    noise = sample_noise((3, 1, 8, 8), sample_generators(9, range(3)))
    cond = {"class_labels": torch.tensor([1, 3, 1])}
    agreement, *_ = compare_samplers(field, noise, (2,), cond, seed=9)
    assert report.agreement == agreement


# Runs, the command line, refusals


def test_a_run_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("objective: {name: FlowMatching}\n")
    field = tiny_field("v_prediction")
    monkeypatch.setattr("fewstep.runs.opening.load_run", lambda folder, **_: {run: field}[folder])
    convert(run, tmp_path / "flow", check=False)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "flow").velocity(x, 0.3), field(x, 0.3))


@pytest.mark.takes_seconds
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("ddpm")
    command = ["convert", "ddpm", "--out", "flow", "--steps", "2", "4", "--count", "2", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr()
    for part in ("DDPMScheduler", "linear betas", "flow, Heun", "the flow is the model", "flow/conversion.png"):
        assert part in printed.out
    for part in ("fewstep sample flow", "fewstep reflow flow", "fewstep distill --teacher flow"):
        assert part in printed.err
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command[:4], "--no-check", "--overwrite"]) == 0
    assert "not checked" in capsys.readouterr().out
    assert main(["sample", "flow", "--steps", "2", "--count", "4", "--out", "grid.png"]) == 0
    assert fewstep.convert is convert


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


def test_steps_by_default_divide_the_schedule() -> None:
    assert steps_for(tiny_field("epsilon"), None) == (10, 50, 200)
    odd = DiffusionField(UNet(tiny_unet()), DDPMScheduler(num_train_timesteps=256))
    assert all(256 % steps == 0 for steps in steps_for(odd, None))


def test_a_student_starts_from_a_converted_model(tmp_path: Path) -> None:
    convert(tiny_field("v_prediction"), tmp_path / "flow", check=False)
    back: Any = load(tmp_path / "flow")
    student = FlowMap.from_field(back)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(student.velocity(x, 0.3), back(x, 0.3))


# Parts that are not there, images beside the state, latents


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


# The caller's model, the exit code


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
