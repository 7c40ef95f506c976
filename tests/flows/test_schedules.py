"""What schedulers say of their networks: every family of diffusers, drawn schedules, EDM, flow matching."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys.cosine import cosine_scheduler

from fewstep.evaluation.agreement import compare_samplers
from fewstep.flows.exact import GaussianField, MixtureField
from fewstep.flows.fields import DiffusionField
from fewstep.flows.paths import Forward, Linear, Reversed
from fewstep.flows.preconditioned import Cosine, Preconditioned
from fewstep.flows.scheduler_classes import cosine_scheduler_class
from fewstep.flows.schedules import schedule_of
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated

F64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.5], [0.9, 0.2], [0.1, -1.2]], dtype=F64)
SCALES = torch.tensor([0.3, 0.5, 0.2], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
MIXTURE = MixtureField(MEANS, SCALES, WEIGHTS)


def posterior(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[data given x] and E[noise given x] for the mixture, x (B, 2) = alpha data + sigma noise, by Bayes' rule."""
    a, s = alpha[:, None, None], sigma[:, None, None]
    variance = (a * SCALES[:, None]) ** 2 + s**2
    away = x[:, None] - a * MEANS
    log = WEIGHTS.log() - variance[..., 0].log() - away.square().sum(-1) / (2 * variance[..., 0])
    share = torch.softmax(log, dim=1)[..., None]
    data = (share * (MEANS + a * SCALES[:, None] ** 2 / variance * away)).sum(1)
    return data, (share * s / variance * away).sum(1)


class Oracle(nn.Module):
    """The perfect diffusion network of the mixture at step k of a table of alphas_cumprod; log-SNR linear between."""

    def __init__(self, power: Tensor, prediction: str) -> None:
        super().__init__()
        self.log_snr, self.prediction = (power / (1 - power)).log(), prediction

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        low, last = k.floor().long().clamp(0, len(self.log_snr) - 2), len(self.log_snr) - 1
        log_snr = torch.lerp(self.log_snr[low], self.log_snr[low + 1], k - low)
        # Behind the last there may be a step without signal; before that the ratio itself is linear.
        log_snr = torch.where(k > last, self.log_snr[-1] + 2 * (last + 1 - k).log(), log_snr)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        data, noise = posterior(x, alpha, sigma)
        v = alpha[:, None] * noise - sigma[:, None] * data
        return {"epsilon": noise, "sample": data, "v_prediction": v}[self.prediction]


def error(field: Any, t: Tensor) -> Tensor:
    """How far a field is from the mixture's, at states spread as the path's are."""
    draw = torch.Generator().manual_seed(0)
    data = MIXTURE.data(len(t), draw).to(F64)
    x, _ = Linear().sample(torch.randn(data.shape, generator=draw, dtype=F64), data, t)
    return (field(x, t) - MIXTURE(x, t)).abs().amax(1)


@st.composite
def schedules(draw: Any) -> Any:
    """A DDPM scheduler of any kind of betas, with a prediction that it allows."""
    steps = draw(st.integers(20, 1000))
    prediction = draw(st.sampled_from(["epsilon", "v_prediction", "sample"]))
    kind = draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"]))
    first = draw(st.floats(1e-5, 2e-3))
    last = draw(st.floats(4e-3, 3e-2))
    options: dict[str, Any] = {"beta_schedule": kind, "beta_start": first, "beta_end": last}
    if kind == "trained":
        seed = draw(st.integers(0, 99))
        rough = torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=F64)
        options = {"trained_betas": (first + (last - first) * rough).tolist()}
    options["rescale_betas_zero_snr"] = kind != "squaredcos_cap_v2" and prediction != "epsilon" and draw(st.booleans())
    return DDPMScheduler(num_train_timesteps=steps, prediction_type=prediction, **options)


@pytest.mark.takes_seconds
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(scheduler=schedules())
def test_any_schedule_is_exact_at_its_steps_and_finite_everywhere(scheduler: Any) -> None:
    power = scheduler.alphas_cumprod.double()
    power = power[power > 2**-24]
    field = DiffusionField(Oracle(power, scheduler.config.prediction_type), scheduler)
    alpha, sigma = power.sqrt(), (1 - power).sqrt()
    nodes = alpha / (alpha + sigma)
    if field.prediction == "noise":  # held where there is hardly data
        nodes = nodes[nodes > 1 / 1001]
    assert error(field, nodes).max() < 1e-6
    assert error(field, (nodes[1:] + nodes[:-1]) / 2).max() < 1e-6
    everywhere = torch.cat([torch.tensor([0.0, 1e-15, 1e-9, 1 - 1e-9, 1.0], dtype=F64), torch.linspace(0, 1, 101)])
    for x in (torch.randn(106, 2, dtype=F64), torch.zeros(106, 2, dtype=F64)):
        assert field(x, everywhere).isfinite().all()


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FAMILIES = [
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "SASolverScheduler", "LCMScheduler",
    "DDPMParallelScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "TCDScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_table(name: str) -> None:
    """However a family samples, the network behind it was trained on one schedule."""
    expected, _ = schedule_of(DDPMScheduler(**BETAS))
    for prediction, kind in (("epsilon", "noise"), ("v_prediction", "v")):
        native, found = schedule_of(getattr(diffusers, name)(prediction_type=prediction, **BETAS))
        assert found == kind
        assert isinstance(native, Tabulated)
        assert isinstance(expected, Tabulated)
        assert native.log_ratios == pytest.approx(expected.log_ratios, rel=1e-6)


def test_options_of_sampling_change_nothing() -> None:
    plain = schedule_of(EulerDiscreteScheduler(**BETAS))
    options = {"use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1}
    assert schedule_of(EulerDiscreteScheduler(**BETAS, **options)) == plain
    assert schedule_of(diffusers.DDIMScheduler(**BETAS, clip_sample=False, thresholding=True)) == plain


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_however_a_family_writes_it(name: str) -> None:
    scheduler = getattr(diffusers, name)(rescale_betas_zero_snr=True, prediction_type="v_prediction", **BETAS)
    native, _ = schedule_of(scheduler)
    assert isinstance(native, Tabulated)
    assert (len(native.log_ratios), native.steps, native.ends_in_noise) == (999, 1000, True)
    assert float(native.alpha(torch.zeros(1))) == 0
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule_of(scheduler)


# EDM


MEAN, COV = torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
GAUSS = GaussianField(MEAN, COV)


class Denoiser(nn.Module):
    """The perfect network of an EDM scheduler for Gaussian data, undone from the scheduler's own preconditioning."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.asked: list[Tensor] = []

    def forward(self, scaled: Tensor, time: Tensor) -> Tensor:
        self.asked.append(time)
        n, d = (4 * time.double()).exp()[:, None], self.scheduler.config.sigma_data
        x = scaled.double() * (n**2 + d**2).sqrt()
        cov = COV + (n**2)[..., None] * torch.eye(2, dtype=F64)
        data = MEAN + torch.linalg.solve(cov, x - MEAN) @ COV
        skip = self.scheduler.precondition_outputs(x, torch.zeros_like(x), n)
        out = self.scheduler.precondition_outputs(torch.zeros_like(x), torch.ones_like(x), n)
        return ((data - skip) / out).to(scaled)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_exact(prediction: str, sigma_data: float) -> None:
    scheduler = EDMEulerScheduler(prediction_type=prediction, sigma_data=sigma_data)
    network = Denoiser(scheduler)
    field = DiffusionField(network, scheduler)
    n = torch.logspace(-2.69, 1.9, 60, dtype=F64)
    t = 1 / (1 + n)
    draw = torch.Generator().manual_seed(0)
    data = GAUSS.data(60, draw).to(F64)
    x, _ = Linear().sample(torch.randn(60, 2, generator=draw, dtype=F64), data, t)
    assert (field(x, t) - GAUSS(x, t)).abs().max() < 1e-6
    torch.testing.assert_close(network.asked[0], n.log() / 4, atol=1e-9, rtol=0)
    ends = torch.tensor([0.0, 1e-9, 1 / 82, 1 - 1e-4, 1.0], dtype=F64)
    velocity = field(x[:5], ends)
    assert velocity.isfinite().all()
    assert (velocity - GAUSS(x[:5], ends)).abs().max() < 0.1
    asked = torch.cat(network.asked)
    assert asked.min() >= torch.tensor(0.002).log() / 4 - 1e-6
    assert asked.max() <= torch.tensor(80.0).log() / 4 + 1e-6


def test_edm_sampling_is_its_own_schedulers() -> None:
    """Euler on the same noise levels: one is in x1 + n x0, the other on the linear path, and a step is the same."""

    class Net(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.tanh(2 * x + time.to(x)[:, None].cos())

    scheduler, network = EDMEulerScheduler(), Net()
    scheduler.set_timesteps(30)
    noise = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    sigmas = scheduler.sigmas.double()
    x = noise * sigmas[0]
    for time in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, time), time.expand(5)), time, x).prev_sample
    grid = 1 / (1 + sigmas)
    field = DiffusionField(network, EDMEulerScheduler())
    got = integrate(field, noise * sigmas[0] * grid[0], grid, "euler")
    # x1 + n x0 = 80 x0 to begin with in the one, and the scheduler computes in float32.
    torch.testing.assert_close(got, x, atol=2e-4, rtol=0)


class Turned(nn.Module):
    """The perfect network of a cosine schedule for Gaussian data: v, by the rule of v-diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        self.asked.append(time)
        angle = time.double()[:, None] * math.pi / 2
        a, s = angle.cos(), angle.sin()
        cov = (a**2)[..., None] * COV + (s**2)[..., None] * torch.eye(2, dtype=F64)
        data = MEAN + a * (torch.linalg.solve(cov, z.double() - a * MEAN) @ COV)
        noise = s * torch.linalg.solve(cov, z.double() - a * MEAN)
        return (a * noise - s * data).to(z)


@pytest.mark.parametrize("scheduler", [cosine_scheduler(), IPNDMScheduler()])
def test_a_cosine_schedule_is_exact_to_both_its_ends(scheduler: Any) -> None:
    """Stable Audio's and Dance Diffusion's, of whose schedulers sigma_min is where sampling ends."""
    network = Turned()
    field = DiffusionField(network, scheduler)
    t = torch.cat([torch.tensor([0.0, 1e-9, 1 / 501, 0.8, 0.99, 1.0]), torch.linspace(0.01, 0.99, 60)]).double()
    x = torch.randn(len(t), 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert (field(x, t) - GAUSS(x, t)).abs().max() < 1e-12
    torch.testing.assert_close(network.asked[0], ((1 - t) / t).atan() * 2 / math.pi, atol=1e-15, rtol=0)
    assert field.native == Cosine()


def test_what_cosine_schedulers_compute_is_what_the_field_says() -> None:
    scheduler = cosine_scheduler()
    scheduler.set_timesteps(20)
    sigmas, network = scheduler.sigmas[:-1].double(), Turned()
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * (1 + sigmas[:, None] ** 2).sqrt()
    output = network(scheduler.precondition_inputs(x, sigmas[:, None]), scheduler.timesteps)
    torch.testing.assert_close(scheduler.timesteps.double(), network.asked[0].double(), atol=0, rtol=0)
    data = scheduler.precondition_outputs(x, output, sigmas[:, None])
    grid = 1 / (1 + sigmas)
    z = x * grid[:, None]
    velocity = DiffusionField(network, scheduler)(z, grid)
    torch.testing.assert_close(z + (1 - grid)[:, None] * velocity, data, atol=1e-6, rtol=0)  # its times are float32


def test_without_its_package_the_scheduler_is_known_by_the_config_that_it_has() -> None:
    own, here = cosine_scheduler(sigma_min=0.1), cosine_scheduler_class()(sigma_min=0.1)
    assert type(here).__name__ == type(own).__name__
    assert dict(here.config) == dict(own.config)
    assert schedule_of(here) == schedule_of(own) == (Cosine(), "v")


def test_cosine_schedulers_of_other_data_or_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"CosineDPMSolverMultistepScheduler with sigma_data 0\.5: it is known with 1"):
        schedule_of(cosine_scheduler(sigma_data=0.5))
    with pytest.raises(ValueError, match="unknown prediction type 'sample'"):
        schedule_of(cosine_scheduler(prediction_type="sample"))


def test_continuous_timesteps_are_edm_with_data_of_deviation_one() -> None:
    """As Stable Video Diffusion has them."""
    options = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", **BETAS, **options)
    assert schedule_of(scheduler) == (Preconditioned(1.0, 0.002, 700.0), "v")
    scheduler.set_timesteps(10)
    native, _ = schedule_of(scheduler)
    sigmas = scheduler.sigmas[:-1].double()
    torch.testing.assert_close(native.network_time(native.time_at(-sigmas.log())), scheduler.timesteps.double())
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match="continuous timesteps is known with v_prediction alone, not epsilon"):
        schedule_of(scheduler)


# Flow matching


def test_flow_match_schedulers() -> None:
    assert schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0)) == (Reversed(1000.0), "flow")
    assert schedule_of(diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=500)) == (Reversed(500.0), "flow")
    assert schedule_of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)) == (Forward(1000.0), "velocity")
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        flow = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        assert schedule_of(flow) == (Reversed(1000.0), "flow")


class OnTheLine(nn.Module):
    """The perfect network of the mixture on the linear path, told 1000 (1 - t)."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        sigma = (k / 1000).to(x)
        data, noise = posterior(x, 1 - sigma, sigma)
        return {"epsilon": noise, "sample": data, "flow_prediction": noise - data}[self.prediction]


FLOW_SIGMAS = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
@pytest.mark.parametrize("name", FLOW_SIGMAS)
def test_flow_sigmas_leave_the_prediction_what_it_is(name: str, prediction: str) -> None:
    """The field is the mixture's, and the original's own reading of the same network draws the same from it."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(use_flow_sigmas=True, prediction_type=prediction, flow_shift=3.0)
    kind = {"epsilon": "noise", "sample": "data", "flow_prediction": "flow"}[prediction]
    assert schedule_of(scheduler) == (Reversed(1000), kind)
    field = DiffusionField(OnTheLine(prediction), scheduler)
    low, high = field.native.hold_range(kind)
    t = torch.linspace(low, min(high, 0.9999), 65, dtype=F64)
    assert error(field, t).max() < 1e-9
    noise = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    agreement, original, flow = compare_samplers(field, noise, (8, 64), {})
    assert agreement.on_same_steps < 1e-4
    assert (original - flow).abs().max() < 0.2
    if name != "SASolver":  # which draws at random; the others, as they are, land where the mixture's flow does
        scheduler.set_timesteps(100)
        x = noise
        for k, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x = scheduler.step(OnTheLine(prediction)(x, (1000 * sigma).expand(64)), k, x).prev_sample
        assert (x - MIXTURE.flow(noise, float(1 - scheduler.sigmas[0]), 1.0)).abs().max() < 0.05
    for kind in {"noise", "data", "flow"} - {field.prediction}:  # read as anything else it is found out
        wrong = DiffusionField(OnTheLine(prediction), scheduler)
        wrong.prediction = kind
        assert not compare_samplers(wrong, noise, (8, 64), {})[0].is_good


def test_flow_sigmas_that_contradict_the_prediction_or_that_a_class_knows_nothing_of() -> None:
    flow: Any = {"use_flow_sigmas": True, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="UniPCMultistepScheduler with use_flow_sigmas and prediction_type: v_predic"):
        schedule_of(diffusers.UniPCMultistepScheduler(**flow))
    made = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    other = diffusers.DDIMScheduler.from_config(made.config)
    assert other.config.use_flow_sigmas
    assert isinstance(schedule_of(other)[0], Tabulated)  # which is how it samples


def test_inverted_sigmas_run_from_noise_to_data() -> None:
    """The scheduler's own Euler steps, of a network in its own time, are those of the field."""

    class Net(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.tanh(x) + time.to(x)[:, None] / 1000

    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(7)
    x = noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for time in scheduler.timesteps:
        x = scheduler.step(Net()(x, time.expand(4)), time, x, return_dict=False)[0]
    got = integrate(DiffusionField(Net(), scheduler), noise, scheduler.sigmas, "euler")
    torch.testing.assert_close(got, x, atol=1e-5, rtol=0)


def test_what_no_schedule_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KarrasVeScheduler has no alphas_cumprod.*NetworkField"):
        schedule_of(diffusers.KarrasVeScheduler())
    with pytest.raises(
        ValueError, match=r"consistency model \(Sana-Sprint\), .* no velocity: draw from it with diffus"
    ):
        schedule_of(diffusers.SCMScheduler())
    with pytest.raises(ValueError, match=r"CMStochasticIterativeScheduler has no alphas_cumprod"):
        schedule_of(diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match=r"unknown prediction type 'epsilom'.*did you mean 'epsilon'"):
        schedule_of(DDPMScheduler(prediction_type="epsilom"))
    scheduler = EDMEulerScheduler()
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match=r"unknown prediction type 'sample'.*Known: epsilon, v_prediction"):
        schedule_of(scheduler)
