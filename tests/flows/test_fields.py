"""Velocity fields of networks, of diffusers' models and under guidance."""

import pytest
import torch
from torch import nn

from fewstep.flows.exact import GaussianField, MixtureField
from fewstep.flows.fields import DiffusionField, NetworkField, VelocityField, schedule_of
from fewstep.flows.guided import Guided
from fewstep.flows.paths import Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.predictions import KINDS
from fewstep.flows.solvers import integrate
from fewstep.flows.tabulated import Tabulated
from fewstep.networks import MLP

F64 = torch.float64
DDPM = Tabulated.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0))
NATIVES = [Linear(), Trigonometric(), VariancePreserving(), DDPM, Reversed(1000.0)]
by_native = pytest.mark.parametrize("native", NATIVES, ids=lambda p: type(p).__name__)


class Oracle(nn.Module):
    """A perfect network for a Gaussian: predicts ``kind`` on ``native``, called in the units of its time."""

    def __init__(self, field, native, kind):
        super().__init__()
        self.truth, self.native, self.kind = field.on(native), native, kind

    def forward(self, x, time):
        t = time
        if isinstance(self.native, Tabulated):
            t = 1 - time / (self.native.steps - 1)
        elif isinstance(self.native, Reversed):
            t = 1 - time / self.native.scale
        return self.native.from_velocity(self.truth(x, t), x, t, self.kind)


class Constant(VelocityField):
    """The same velocity everywhere; notes its calls."""

    def __init__(self, value, path=None):
        super().__init__()
        self.value, self.path, self.rows = value, path or Linear(), []

    def forward(self, x, t, **cond):
        self.rows.append(len(x))
        return torch.full_like(x, self.value)


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


# Networks


@by_native
@pytest.mark.parametrize("path", NATIVES[:4], ids=lambda p: type(p).__name__)
def test_on_is_exact(gaussian, points, native, path):
    t = path.time_at(torch.linspace(-4.5, 4.5, 64, dtype=F64))
    for kind in KINDS:
        field = NetworkField(Oracle(gaussian, native, kind), native, kind).on(path)
        assert field.path == path
        close(field(points, t), gaussian.on(path)(points, t), 3e-11)
        # To a third path and back again changes nothing.
        assert torch.equal(field.on(Trigonometric()).on(path)(points, t), field(points, t))


def test_a_bare_network_is_called_as_it_is():
    seen = []

    class Net(nn.Module):
        def forward(self, x, t, **cond):
            seen.append((t, cond))
            return 2 * x

    x, labels = torch.randn(3, 2), torch.arange(3)
    field = NetworkField(Net())
    assert torch.equal(field(x, 0.25, class_labels=labels), 2 * x)
    assert seen[0][0].tolist() == [0.25] * 3
    assert seen[0][1]["class_labels"] is labels
    assert torch.equal(field.velocity(x, 0.25), 2 * x)
    # diffusers' flow-match models: time from data to noise, in thousands.
    flow = NetworkField(Net(), Reversed(1000.0), "flow", path=Linear())
    assert torch.equal(flow(x, 0.25), -2 * x)
    assert seen[-1][0].tolist() == [750] * 3


def test_times_stay_float32_beside_half_precision():
    seen = []

    class Net(nn.Module):
        def forward(self, x, t):
            seen.append(t.dtype)
            return x

    for kind in ("velocity", "noise"):
        out = NetworkField(Net(), DDPM, kind).on(Linear())(torch.randn(3, 2).bfloat16(), torch.rand(3))
        assert out.dtype == torch.bfloat16
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_score(gaussian, points, t):
    a, s = t, 1 - t
    cov = a * a * torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=F64) + s * s * torch.eye(2, dtype=F64)
    expected = -torch.linalg.solve(cov, (points - a * gaussian.mean).T).T
    close(gaussian.score(points, t), expected)
    network = NetworkField(Oracle(gaussian, DDPM, "noise"), DDPM, "noise").on(Linear())
    close(network.score(points, t), expected, 1e-10)
    with pytest.raises(ValueError, match="score from a velocity is not finite at t = 1"):
        gaussian.score(points, 1.0)


def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density(points):
    means, scales = torch.tensor([[-1.0, 0.3], [1.2, 0.8]], dtype=F64), torch.tensor([0.2, 0.5], dtype=F64)
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    t = 0.6

    def log_density(x):
        variance = (t * scales) ** 2 + (1 - t) ** 2
        squares = (x[:, None] - t * means).square().sum(-1)
        return torch.logsumexp(weights.log() - squares / (2 * variance) - variance.log(), 1).sum()

    close(MixtureField(means, scales, weights).score(points, t), torch.func.grad(log_density)(points))


def test_network_errors(points):
    with pytest.raises(ValueError, match="unknown prediction kind 'eps'"):
        NetworkField(MLP(2), prediction="eps")
    with pytest.raises(ValueError, match="one time a sample"):
        NetworkField(MLP(2))(points.float(), torch.zeros(3))
    field = NetworkField(Oracle(GaussianField(torch.zeros(2), torch.eye(2)), Linear(), "velocity"))
    with pytest.raises(ValueError, match="infinite at t = 1"):
        field.on(VariancePreserving())(points, 1.0)


# diffusers


def scheduler(name="DDIMScheduler", **config):
    import diffusers

    return getattr(diffusers, name)(**config)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_euler_on_the_linear_path_is_ddim(gaussian, points, kind):
    # x = a x1 + s x0 over a + s is t x1 + (1 - t) x0 at t = a / (a + s): each step of DDIM is one of Euler there.
    ddim = scheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(20)
    native, prediction = schedule_of(ddim)
    oracle = Oracle(gaussian, native, prediction)
    x = points
    for k in ddim.timesteps:
        x = ddim.step(oracle(x, k.double().expand(len(x))), k, x).prev_sample

    field = DiffusionField(oracle, ddim)
    assert field.path == Linear()
    t = 1 - ddim.timesteps.double() / 999
    a, s = native.alpha(t), native.sigma(t)
    grid = torch.cat([a / (a + s), torch.ones(1, dtype=F64)])
    end = integrate(field, points / (a + s)[0], grid, "euler")
    # diffusers computes with float32 coefficients.
    close(end, x, 2e-5)


def test_flow_match_schedulers(gaussian, points):
    field = DiffusionField(
        Oracle(gaussian, Reversed(1000.0), "flow"), scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    )
    t = torch.linspace(0, 1, 64, dtype=F64)
    close(field(points, t), gaussian(points, t))
    native, kind = schedule_of(scheduler("FlowMapEulerDiscreteScheduler"))
    assert (native, kind) == (Reversed(1000.0), "flow")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_zero_terminal_snr(gaussian, points, kind):
    zero = scheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    if kind == "epsilon":
        with pytest.raises(ValueError, match=r"1000 steps of this DDIMScheduler has no signal.*leave it out.*\[:-1\]"):
            DiffusionField(MLP(2), zero)
        return
    native, prediction = schedule_of(zero)
    assert native.steps == 1000
    field = DiffusionField(Oracle(gaussian, native, prediction), zero)
    t = torch.linspace(0, 1, 64, dtype=F64)
    velocity = field(points, t)
    assert velocity.isfinite().all()
    inside = t < 0.98
    close(velocity[inside], gaussian(points, t)[inside], 1e-9)


def test_little_signal_is_signal(gaussian, points):
    # The cosine schedule ends below the 2^-24 that stands for none elsewhere.
    cosine = scheduler("DDPMScheduler", beta_schedule="squaredcos_cap_v2")
    native, kind = schedule_of(cosine)
    assert len(native.log_ratios) == 1000
    t = torch.linspace(1.01e-3, 0.98, 64, dtype=F64)  # before, the noise is held
    close(DiffusionField(Oracle(gaussian, native, kind), cosine)(points, t), gaussian(points, t), 1e-9)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no signal"):
        schedule_of(scheduler("EulerDiscreteScheduler", rescale_betas_zero_snr=True))


def test_scheduler_errors():
    with pytest.raises(ValueError, match="KarrasVeScheduler has no alphas_cumprod, and is no EDM and no flow-match"):
        DiffusionField(MLP(2), scheduler("KarrasVeScheduler"))
    odd = scheduler("DDPMScheduler")
    odd.register_to_config(prediction_type="velocity")
    with pytest.raises(ValueError, match=r"unknown prediction type 'velocity'.*Known: epsilon, sample"):
        DiffusionField(MLP(2), odd)


# Guidance


@pytest.fixture
def wide(gaussian):
    """A weaker field: the same mean, twice the covariance."""
    return GaussianField(gaussian.mean, 2 * gaussian.basis * gaussian.variances @ gaussian.basis.T)


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.3, 4.0])
def test_autoguidance_in_closed_form(gaussian, wide, points, scale):
    t = torch.linspace(0, 1, 64, dtype=F64)
    strong, weak = gaussian(points, t), wide(points, t)
    close(Guided(gaussian, scale, weak=wide)(points, t), weak + scale * (strong - weak), 1e-14)


def test_the_whole_interval_asks_no_numbers():
    """On the meta device there are none to ask for; on a GPU the question would wait for all that came before."""
    field = NetworkField(MLP(2, width=8, classes=3)).to("meta")
    x, t, labels = torch.empty(4, 2, device="meta"), torch.empty(4, device="meta"), torch.zeros(4).long().to("meta")
    assert Guided(field, 2.0, null={"class_labels": 2})(x, t, class_labels=labels).shape == (4, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        Guided(field, 2.0, (0.1, 0.9), null={"class_labels": 2})(x, t, class_labels=labels)


def test_an_interval_holds_for_each_row_and_outside_it_is_the_field(gaussian, wide, points):
    t = torch.linspace(0, 1, 64, dtype=F64)
    t[5], t[6] = 0.25, 0.5
    guided = Guided(gaussian, 2.5, (0.25, 0.5), weak=wide)(points, t)
    inside = (t >= 0.25) & (t <= 0.5)
    assert inside[5]
    assert inside[6]
    assert torch.equal(guided[~inside], gaussian(points, t)[~inside])
    close(guided[inside], Guided(gaussian, 2.5, weak=wide)(points, t)[inside], 1e-15)


def test_nothing_is_called_for_nothing(points):
    strong, weak = Constant(1.0), Constant(0.0)
    for guided, t in ((Guided(strong, 1.0, weak=weak), 0.5), (Guided(strong, 3.0, (0.2, 0.4), weak=weak), 0.5)):
        assert torch.equal(guided(points, t), torch.ones_like(points))
    assert weak.rows == []
    assert torch.equal(Guided(strong, 3.0, weak=weak)(points, 0.5), torch.full_like(points, 3.0))
    assert weak.rows == [64]


def test_classifier_free_guidance_is_one_call_on_both():
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=2, classes=11).double()
    field = NetworkField(network)
    x, t = torch.randn(6, 2, dtype=F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    labels, null = torch.arange(6), torch.full((6,), 10)
    rows = []
    handle = network.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    guided = Guided(field, 1.7, null={"class_labels": 10})(x, t, class_labels=labels)
    handle.remove()
    assert rows == [12]
    strong, weak = field(x, t, class_labels=labels).detach(), field(x, t, class_labels=null).detach()
    close(guided, weak + 1.7 * (strong - weak), 1e-14)
    assert not torch.equal(strong, weak)


def test_null_may_be_a_tensor_and_leaves_other_conditions_alone():
    seen = []

    class Text(VelocityField):
        path = Linear()

        def forward(self, x, t, **cond):
            seen.append(cond)
            return x + cond["text"].sum(-1, keepdim=True) + cond["size"][:, None]

    x, text, size = torch.zeros(2, 3), torch.ones(2, 5), torch.tensor([10.0, 20.0])
    empty = torch.full((5,), 2.0)
    out = Guided(Text(), 2.0, null={"text": empty})(x, 0.5, text=text, size=size)
    torch.testing.assert_close(out, (10 + 2 * (5 - 10) + size)[:, None].expand(2, 3))
    assert seen[0]["size"].tolist() == [10, 20, 10, 20]
    assert text.tolist() == torch.ones(2, 5).tolist()


def test_null_and_weak_together():
    class Labelled(Constant):
        def forward(self, x, t, **cond):
            return super().forward(x, t) + cond["class_labels"][:, None]

    strong, weak = Labelled(1.0), Labelled(0.0)
    out = Guided(strong, 2.0, null={"class_labels": 7}, weak=weak)(
        torch.zeros(2, 3), 0.5, class_labels=torch.tensor([3, 4])
    )
    # weak + 2 (strong - weak), weak = 7, strong = 1 + label.
    torch.testing.assert_close(out[:, 0], torch.tensor([7 + 2 * (4 - 7), 7 + 2 * (5 - 7)], dtype=out.dtype))


@pytest.mark.parametrize("path", [Trigonometric(), VariancePreserving(), DDPM], ids=lambda p: type(p).__name__)
def test_guidance_keeps_its_noise_levels_on_another_path(gaussian, wide, points, path):
    guided = Guided(gaussian, 2.0, (0.3, 0.6), weak=wide)
    moved = guided.on(path)
    assert moved.path == path
    # The same state on both paths: x scales with the power of the path, and so does the data that a velocity means.
    log_ratio = torch.linspace(-3, 3, 64, dtype=F64)
    t, t_moved = Linear().time_at(log_ratio), path.time_at(log_ratio)
    scale = (path.alpha(t_moved) / Linear().alpha(t))[:, None]
    here = Linear().from_velocity(guided(points, t), points, t, "data")
    there = path.from_velocity(moved(points * scale, t_moved), points * scale, t_moved, "data")
    close(there, here, 1e-10)
    assert Guided(gaussian, 2.0, weak=wide).on(path).interval == (0, 1)


def test_guidance_errors(gaussian, wide, points):
    with pytest.raises(ValueError, match="needs something weaker"):
        Guided(gaussian, 2.0)
    for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match=r"interval .* is not within \[0, 1\]"):
            Guided(gaussian, 2.0, interval, weak=wide)
    with pytest.raises(ValueError, match=r"the weak field is on Trigonometric.*use weak\.on\(field\.path\)"):
        Guided(gaussian, 2.0, weak=wide.on(Trigonometric()))
    with pytest.raises(ValueError, match=r"guidance replaces the condition 'class_labels'.*pass it"):
        Guided(gaussian, 2.0, null={"class_labels": 3})(points, 0.5)
