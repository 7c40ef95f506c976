"""Denoising: the loss of diffusion models against closed forms, and what training by it leaves."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fewstep import Denoising, DiffusionField, FlowMap, Linear, NetworkField, fit
from fewstep.common.randomness import generator, normal, uniform
from fewstep.data.batch import Batch
from fewstep.flows.exact import GaussianField
from fewstep.flows.paths import Trigonometric
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import MLP

F64 = torch.float64
SCHEDULE = Tabulated.from_alphas_cumprod(DDPMScheduler().alphas_cumprod)


class Seen(nn.Module):
    """Keeps what it was asked, and answers with nothing."""

    def forward(self, x: Tensor, k: Tensor, **cond: Tensor) -> Tensor:
        self.x, self.k, self.cond = x, k, cond
        return torch.zeros_like(x)


@pytest.mark.parametrize("kind", ["noise", "data", "v"])
def test_the_loss_is_that_of_the_schedule(kind: str) -> None:
    """At whole steps, from the same table as the scheduler noises by."""
    network, data = Seen(), torch.randn(256, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    noise = normal(data, generator(1))
    field = NetworkField(network, SCHEDULE, kind, path=Linear())
    labels = torch.arange(256)
    loss = Denoising()(field, Batch(data, {"class_labels": labels}, noise), generator=generator(0)).total
    k = network.k.round().long()
    torch.testing.assert_close(network.k, k.double(), atol=1e-9, rtol=0)
    assert network.cond["class_labels"] is labels
    power = DDPMScheduler().alphas_cumprod.double()[k][:, None]
    torch.testing.assert_close(network.x, power.sqrt() * data + (1 - power).sqrt() * noise, atol=1e-12, rtol=0)
    v = power.sqrt() * noise - (1 - power).sqrt() * data
    expected = {"noise": noise, "data": data, "v": v}[kind].square().mean()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def test_every_step_is_as_likely() -> None:
    network = Seen()
    field = NetworkField(network, Tabulated((3.0, 1.0, 0.0, -4.0)), "noise", path=Linear())
    data = torch.zeros(40_000, 1)
    loss = Denoising()(field, Batch(data), generator=generator(0))
    counts = torch.bincount(network.k.round().long(), minlength=4) / 40_000
    assert (counts - 0.25).abs().max() < 0.01
    times = loss.times["denoising"]
    assert times.shape == (40_000, 2)
    torch.testing.assert_close(3 * (1 - times[:, 0]), network.k)
    # A path without steps is asked anywhere.
    Denoising()(NetworkField(network, Trigonometric(), "v"), Batch(data), generator=generator(0))
    torch.testing.assert_close(network.k, uniform(40_000, [generator(0)]), atol=1, rtol=0)
    assert 0.49 < float(network.k.mean()) < 0.51
    assert len(network.k.unique()) > 30_000


def test_a_continuous_schedule_is_asked_where_it_was_trained() -> None:
    network = Seen()
    field = NetworkField(network, Preconditioned(0.5, 0.01, 20.0), "edm", path=Linear())
    field.prediction = "v"
    Denoising()(field, Batch(torch.zeros(20_000, 1)), generator=generator(0))
    noise = (4 * network.k).exp()
    assert 0.0099 < float(noise.min()) < 0.02
    assert 10 < float(noise.max()) < 20.01


@pytest.mark.parametrize("deviation", [0.25, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["v", "edm", "noise", "data"])
def test_the_minimiser_of_the_loss_is_the_flow_of_the_data(kind: str, deviation: float) -> None:
    """Data N(0, d^2) on EDM's path: the expectation of the target given the state, which is linear in it, read as a
    velocity, is that of the Gaussian; with the target of d = 1 it samples data of another deviation."""
    native = Preconditioned(deviation, 0.01, 50.0)
    exact = GaussianField(torch.zeros(1, dtype=F64), torch.full((1, 1), deviation**2, dtype=F64))

    class Probe(Seen):
        def forward(self, x: Tensor, k: Tensor, **cond: Tensor) -> Tensor:
            super().forward(x, k)
            return torch.zeros_like(x, requires_grad=True)

    rows, n = 64, torch.ones(64, 1, dtype=F64)
    targets = []
    for noise, data in ((n, 0 * n), (0 * n, n)):  # the target's share of either, by the gradient of the loss at 0
        network = Probe()
        field = NetworkField(network, native, kind, path=Linear())
        answer = []
        network.register_forward_hook(lambda _, __, out, keep=answer: keep.append(out))
        loss = Denoising()(field, Batch(data, {}, noise), generator=generator(5)).total
        targets.append(-torch.autograd.grad(loss, answer[0])[0] * rows / 2)
    times = Denoising()(field, Batch(n, {}, n), generator=generator(5)).times["denoising"][:, 0]
    a, s = native.alpha(times)[:, None], native.sigma(times)[:, None]
    of_noise, of_data = targets
    slope = (of_noise * s + of_data * a * deviation**2) / (a**2 * deviation**2 + s**2)
    x = torch.linspace(-2, 2, rows, dtype=F64)[:, None]
    found = native.to_velocity(slope * x, x, times, kind)
    torch.testing.assert_close(found, exact.on(native)(x, times), atol=1e-11, rtol=1e-11)


def test_the_last_step_without_signal_is_trained_and_asked() -> None:
    """Zero terminal SNR: pure noise comes in at the last step, and the target there is -data."""
    scheduler = DDPMScheduler(50, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    network = Seen()
    field = DiffusionField(network, scheduler)
    data, noise = torch.full((4000, 1), 0.7, dtype=F64), torch.randn(4000, 1, dtype=F64)
    Denoising()(field, Batch(data, {}, noise), generator=generator(0))
    k = network.k.round().long()
    assert torch.bincount(k, minlength=50).min() > 40
    assert torch.equal(network.x[k == 49], noise[k == 49])
    target = field.native.prediction(noise, data, torch.zeros(4000, dtype=F64), "v")
    torch.testing.assert_close(target, -data, atol=0, rtol=0)
    field(noise, 0.0)
    assert network.k.unique().tolist() == [49]


@pytest.mark.takes_seconds
def test_what_it_trains_is_the_flow_of_the_data() -> None:
    """From scratch, as a diffusion model, and read as a flow."""
    torch.manual_seed(0)
    exact = GaussianField(torch.tensor([0.8, -0.4]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP(2, width=64, depth=3)

        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            return self.net(x, k / 999)

    field = DiffusionField(Steps(), DDPMScheduler(prediction_type="v_prediction"))
    draw = torch.Generator().manual_seed(0)
    data = exact.data(20_000, draw).float()
    x, t = torch.randn(512, 2, generator=draw), torch.linspace(0.05, 0.95, 512)

    def error() -> float:
        state, _ = Linear().sample(x, data[:512], t)
        with torch.no_grad():
            return float((field(state, t) - exact(state, t)).square().mean())

    before = error()
    fit(field, Denoising(), data, steps=600, batch=256, lr=3e-3, ema=None, quiet=True)
    assert error() < 0.02 * before


def test_what_it_cannot_train() -> None:
    with pytest.raises(ValueError, match="Denoising trains the network of a NetworkField, not a FlowMap"):
        Denoising().check_student(FlowMap(MLP(2, times=2)))
    with pytest.raises(ValueError, match="predicts noise, data or v, this one predicts velocity: train it by FlowM"):
        Denoising().check_student(NetworkField(MLP(2)))
