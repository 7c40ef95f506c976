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
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from torch import Tensor
from toys.conversions import flow_grid, toy
from toys.diffusion import CASES, make
from toys.families import conditions as some
from toys.families import tiny_model, tiny_pipeline, tiny_vae
from toys.unet import conditions, tiny_field, tiny_unet

import fewstep
from fewstep.cli import main
from fewstep.flows.change_of_path import scaling
from fewstep.flows.fields import DiffusionField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear
from fewstep.flows.paths import Path as Trajectory
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.sampling import sample
from fewstep.flows.tabulated import Tabulated
from fewstep.models.export import diffusion_of
from fewstep.networks import UNet, flow_model
from fewstep.networks.configs import public_config
from fewstep.networks.two_times.patches import pack
from fewstep.runs.convert import convert
from fewstep.runs.loading import load

NAMES = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
# Differences of 1 and these are exact, so that 1 - t and t are the same time; both ends and beyond the schedule's.
TIMES = torch.cat([torch.arange(0, 1025) / 1024, 2.0 ** -torch.arange(11, 40), 1 - 2.0 ** -torch.arange(11, 40)])
TIMES = TIMES.double()


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


# Runs, the command line, refusals


def test_a_run_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("objective: {name: FlowMatching}\n")
    field = tiny_field("v_prediction")
    monkeypatch.setattr("fewstep.runs.loading.load_run", lambda folder, **_: {run: field}[folder])
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


def test_a_student_starts_from_a_converted_model(tmp_path: Path) -> None:
    convert(tiny_field("v_prediction"), tmp_path / "flow", check=False)
    back: Any = load(tmp_path / "flow")
    student = FlowMap.from_field(back)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(student.velocity(x, 0.3), back(x, 0.3))


# Parts that are not there, images beside the state, latents


# The caller's model, the exit code
