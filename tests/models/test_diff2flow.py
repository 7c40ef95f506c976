"""Diffusion models as flows: against networks that are right by construction, and closed forms.

The oracle is the perfect network of a diffusion model whose data are Gaussian: at any step k, whole or not, it returns
the exact expectation of the noise, the data or v. So what the converted field gets wrong is the conversion's fault.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn
from toys.diffusion import CASES, COV, MEAN, Oracle, ddim, make, node_times
from toys.unet import tiny_unet

from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.paths import Linear
from fewstep.flows.sampling import sample
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import UNet

EXACT = GaussianField(MEAN, COV)

CASES += [("zero_snr", "v_prediction"), ("zero_snr", "sample")]


def states(t: Tensor) -> Tensor:
    """States of the linear path at times (B,), spread as the data and noise are."""
    generator = torch.Generator().manual_seed(0)
    data = MEAN + torch.randn(len(t), 2, generator=generator, dtype=t.dtype) @ torch.linalg.cholesky(COV).T
    return Linear().sample(torch.randn(len(t), 2, generator=generator, dtype=t.dtype), data, t)[0]


def error(field: NetworkField, t: Tensor) -> Tensor:
    x = states(t)
    return (field(x, t) - EXACT(x, t)).abs().amax(1)


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_the_velocity_is_exact_at_the_steps(schedule: str, prediction: str) -> None:
    field, nodes = make(schedule, prediction)
    assert error(field, nodes).max() < 1e-6
    # The network was asked at that very step.
    asked = torch.arange(len(nodes), dtype=torch.float64)
    torch.testing.assert_close(field.network.asked[0], asked, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_the_velocity_between_the_steps(schedule: str, prediction: str) -> None:
    field, nodes = make(schedule, prediction)
    other, _ = make(schedule, prediction, between="beta")
    for part in (0.1, 0.37, 0.5, 0.83):
        t = torch.lerp(nodes[:-1], nodes[1:], part)
        assert error(field, t).max() < 1e-6
        # The two readings part in the first steps, where a step halves the noise.
        assert error(other, t)[5:].max() < 1e-3
        assert error(other, t)[:5].max() < 1e-2


@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_the_velocity_is_finite_and_near_beyond_the_schedule(schedule: str, prediction: str) -> None:
    """At t = 0, t = 1 and wherever the schedule does not reach, the network is asked at its ends and no further."""
    field, nodes = make(schedule, prediction)
    to_noise, to_data = nodes[-1], 1 - nodes[0]
    part = torch.cat([torch.tensor([0.0, 1e-12, 1e-6]), torch.linspace(0.01, 1, 20)]).double()
    for t, reach in ((part * to_noise, to_noise), (1 - part * to_data, to_data)):
        x = states(t)
        velocity = field(x, t)
        assert velocity.isfinite().all()
        assert field(x.float(), t.float()).isfinite().all()
        # One of the estimates of data and noise is held there, and is off as the schedule's end is from a pure state.
        assert (velocity - EXACT(x, t)).abs().max() < 5 * reach
    asked = torch.cat(field.network.asked)
    assert asked.min() >= 0
    assert asked.max() <= (999 if schedule == "zero_snr" else len(nodes))
    for node in (nodes[0], nodes[-1]):  # no jump at either end
        x = states(node[None]).expand(2, -1)
        below, above = field(x, torch.stack([node - 1e-9, node + 1e-9]))
        torch.testing.assert_close(below, above, atol=1e-5, rtol=0)


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_200_steps_land_on_the_closed_form(schedule: str, prediction: str) -> None:
    """From the schedule's own noisiest point: before it the schedule, and so the model, knows nothing."""
    field, nodes = make(schedule, prediction)
    start = nodes[-1]
    x = states(start.expand(64))
    grid = start + (1 - start) * torch.linspace(0, 1, 201, dtype=torch.float64)
    for solver, bound in (("euler", 1e-2), ("heun", 2e-3)):
        error = integrate(field, x, grid, solver) - EXACT.flow(x, start, 1.0)
        assert error.square().sum(1).mean().sqrt() < bound


def ddim_case(prediction: str) -> tuple[UNet2DModel, DDIMScheduler, DiffusionField, Tensor, Tensor]:
    """A random model, its scheduler with steps that start at the schedule's first point, its field, and the same
    noise as DDIM has it and as the linear path has it there."""
    model = tiny_unet().double()
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    noise = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    power = scheduler.alphas_cumprod[-1].double()
    return model, scheduler, DiffusionField(UNet(model), scheduler), noise, noise / (power.sqrt() + (1 - power).sqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_on_the_steps_of_ddim_is_ddim(prediction: str) -> None:
    """Exactly: DDIM holds the estimates of data and noise in a step, which on the linear path is an Euler step. What is
    left is the float32 of the scheduler."""
    model, scheduler, field, noise, x = ddim_case(prediction)
    expected = ddim(scheduler, model, noise, 20)
    grid = torch.cat([node_times(scheduler)[scheduler.timesteps], torch.ones(1, dtype=torch.float64)])
    with torch.no_grad():
        got = integrate(field, x, grid, "euler")
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.takes_seconds
def test_many_steps_of_either_agree() -> None:
    """100 steps of DDIM, which is of first order, and 50 of Heun on a grid of their own: to 2 % of the image."""
    model, scheduler, field, noise, x = ddim_case("v_prediction")
    expected = ddim(scheduler, model, noise, 100)
    start = node_times(scheduler)[-1]
    with torch.no_grad():
        got = integrate(field, x, start + (1 - start) * torch.linspace(0, 1, 51, dtype=torch.float64), "heun")
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_no_signal_and_a_noise_prediction_is_refused_with_a_way_out() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    oracle = Oracle(scheduler)
    with pytest.raises(ValueError, match=r"zero terminal SNR.*alphas_cumprod\[:-1\]"):
        DiffusionField(oracle, scheduler)
    native = Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod[:-1])
    field = NetworkField(oracle, native, "noise", path=Linear())
    nodes = node_times(scheduler)
    assert error(field, nodes[nodes > 1e-3]).max() < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_match_model_is_its_network_with_time_reversed(shift: float) -> None:
    """A shift moves the sampler's steps, not what the network means at a timestep."""

    class Flow(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return -EXACT(x, 1 - k / 1000)

    field = DiffusionField(Flow(), FlowMatchEulerDiscreteScheduler(shift=shift))
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    assert error(field, t).max() < 1e-12
    x = states(torch.zeros(64, dtype=torch.float64))
    assert (sample(field, x, steps=200, solver="heun") - EXACT.flow(x, 0.0, 1.0)).abs().max() < 1e-3
