"""Sampling: exact maps hit exact ends in any number of steps, re-noising keeps every marginal, calls are counted."""

import math

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.common.randomness import generator, normal, sample_generators
from fewstep.flows.calls import count_calls, each_call
from fewstep.flows.exact import CheckerboardField, GaussianField
from fewstep.flows.fields import DiffusionField, NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.tabulated import Tabulated
from fewstep.flows.times import GRIDS, step_grid
from fewstep.networks import MLP, ContinuousUNet, Conv1dNet, SequenceTransformer

F64 = torch.float64
SHORT = Tabulated((1.0, 0.5, 0.0, -1.0, -3.0))  # ends with much noise left, and begins with some data
PATHS = [Linear(), Trigonometric(), VariancePreserving(), SHORT]
by_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def close(x, y, tolerance=1e-12):
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


class ExactMap(FlowMap):
    """The exact flow map of a Gaussian on any path."""

    def __init__(self, field):
        super().__init__(nn.Identity(), field.path)
        self.field = field

    def average_velocity(self, x, s, t, **cond):
        raise NotImplementedError("this map knows its end points")

    def forward(self, x, s, t, **cond):
        return self.field.flow(x, s, t)


# Deterministic


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_an_exact_map_hits_the_exact_ends(gaussian, gaussian_map, points, grid, steps):
    end = gaussian.flow(points, 0.0, 1.0)
    close(sample(gaussian_map, points, steps, grid=grid), end, 1e-12)
    own = step_grid(steps, grid) ** 2
    close(sample(gaussian_map, points, grid=own), end, 1e-12)


@by_path
def test_an_exact_map_on_any_path(gaussian, points, path):
    exact = ExactMap(gaussian.on(path))
    for steps in (1, 3):
        close(sample(exact, points, steps), exact.field.flow(points, 0.0, 1.0), 1e-12)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_fields_converge_at_the_order_of_the_solver(gaussian, points, solver, order):
    field = gaussian.on(Trigonometric())
    end = field.flow(points, 0.0, 1.0)
    errors = [float((sample(field, points, steps, solver=solver) - end).norm()) for steps in (50, 100)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_adaptive(gaussian, points):
    end = gaussian.flow(points, 0.0, 1.0)
    for tolerance in (1e-4, 1e-8):
        assert (sample(gaussian, points, solver="adaptive", tolerance=tolerance) - end).abs().max() < 100 * tolerance


@pytest.mark.parametrize("grid", GRIDS)
def test_a_field_steps_along_its_grid(gaussian, points, grid):
    x, times = points, step_grid(4, grid)
    for i in range(4):
        x = x + (times[i + 1] - times[i]) * gaussian(x, float(times[i]))
    close(sample(gaussian, points, 4, grid=grid), x, 1e-14)


def test_samples_keep_their_type_and_have_no_grad():
    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=8, times=2))
    teacher = NetworkField(MLP(2, width=8))
    for model in (student, teacher):
        out = sample(model, torch.randn(3, 2), 2)
        assert out.dtype == torch.float32
        assert out.shape == (3, 2)
        assert not out.requires_grad
        assert sample(model.double(), torch.randn(3, 2, dtype=F64), 2).dtype == F64
    assert torch.is_grad_enabled()


def test_conditions_reach_the_network():
    seen = []

    class Net(nn.Module):
        def forward(self, x, *times, **cond):
            seen.append(cond)
            return x

    labels = torch.arange(3)
    sample(FlowMap(Net()), torch.zeros(3, 2), 2, class_labels=labels)
    sample(FlowMap(Net()), torch.zeros(3, 2), 2, gamma=1.0, class_labels=labels)
    sample(NetworkField(Net()), torch.zeros(3, 2), 2, class_labels=labels)
    assert len(seen) == 6
    assert all(cond["class_labels"] is labels for cond in seen)


# Stochastic


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@by_path
def test_re_noising_an_exact_map_keeps_the_marginal(gaussian, path, gamma):
    n = 20_000
    g = generator(3)
    exact = ExactMap(gaussian.on(path))
    # Where the path begins with some data in it, so must the start.
    noise = torch.randn(n, 2, generator=g, dtype=F64)
    start, _ = path.sample(noise, gaussian.data(n, g), 0.0)
    end = sample(exact, start, 4, gamma=gamma, generator=g)
    # On a table the last time has noise left: the law there.
    one = torch.ones(1, dtype=F64)
    a, s = path.alpha(one), path.sigma(one)
    mean = a * gaussian.mean
    cov = a * a * torch.tensor([[0.5, 0.3], [0.3, 1.7]], dtype=F64) + s * s * torch.eye(2, dtype=F64)
    assert ((end.mean(0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    spread = (2 * cov.diagonal().outer(cov.diagonal()) / n).sqrt()
    assert ((end.T.cov() - cov).abs() < 5 * spread).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_gamma_one_is_consistency_sampling(gaussian_map, points, grid):
    steps, times = 4, step_grid(4, grid)
    g, x = generator(5), points
    for i in range(steps):
        data = gaussian_map(x, times[i], 1.0)
        t = times[i + 1]
        x = data if t == 1 else t * data + (1 - t) * normal(x, g)
    close(sample(gaussian_map, points, steps, grid=grid, gamma=1.0, generator=generator(5)), x, 1e-14)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_gamma_between_is_its_formula(gaussian_map, points, gamma):
    # x <- (a_j / a_r) X_{i,r}(x) + gamma s_j eps with s_r / a_r = sqrt(1 - gamma^2) s_j / a_j; on the linear path
    # r = t / (t + sqrt(1 - gamma^2) (1 - t)).
    g = generator(6)
    keep = math.sqrt(1 - gamma**2)
    r = 0.5 / (0.5 + keep * 0.5)
    middle = 0.5 / r * gaussian_map(points, 0.0, r) + gamma * 0.5 * normal(points, g)
    expected = gaussian_map(middle, 0.5, 1.0)
    close(sample(gaussian_map, points, 2, gamma=gamma, generator=generator(6)), expected, 1e-13)


def test_gamma_zero_draws_nothing(gaussian_map, points):
    g = generator(1)
    before = g.get_state()
    assert torch.equal(sample(gaussian_map, points, 4, generator=g), sample(gaussian_map, points, 4))
    assert torch.equal(g.get_state(), before)
    # One step has nothing to re-noise.
    assert torch.equal(sample(gaussian_map, points, 1, gamma=1.0, generator=g), sample(gaussian_map, points, 1))
    assert torch.equal(g.get_state(), before)


def test_without_a_generator_new_noise_is_new(gaussian_map, points):
    torch.manual_seed(0)
    first, second = (sample(gaussian_map, points, 2, gamma=1.0) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(sample(gaussian_map, points, 2, gamma=1.0), first)


# Randomness


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_a_sample_is_the_same_in_any_batch(gamma):
    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=16, times=2))
    nn.init.normal_(student.network.second_time.last.weight)

    def draw(indices):
        generators = sample_generators(7, indices)
        return sample(student, sample_noise((len(indices), 2), generators), 4, gamma=gamma, generator=generators)

    whole = draw(range(8))
    torch.testing.assert_close(torch.cat([draw(range(3)), draw(range(3, 8))]), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw([6, 1]), whole[[6, 1]], rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(range(8)), whole, rtol=0, atol=0)


def test_noise_bits_do_not_depend_on_the_batch():
    whole = sample_noise((8, 3, 4, 4), sample_generators(7, range(8)))
    parts = [sample_noise((n, 3, 4, 4), sample_generators(7, range(at, at + n))) for at, n in ((0, 3), (3, 5))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float32
    assert sample_noise((2, 3), generator(0), F64).dtype == F64


def test_re_noising_bits_do_not_depend_on_the_batch():
    class Forget(nn.Module):
        """Carries all noise to 0, then leaves all as it is: the sample is the fresh noise of the step between."""

        def forward(self, x, s, t):
            return torch.where((s == 0)[:, None], -x, torch.zeros_like(x))

    def draw(indices):
        generators = sample_generators(7, indices)
        noise = sample_noise((len(indices), 5), generators)
        return sample(FlowMap(Forget()), noise, 2, gamma=1.0, generator=generators)

    whole = draw(range(6))
    assert torch.equal(torch.cat([draw(range(2)), draw(range(2, 6))]), whole)
    # Half of the second draw of each sample's own generator, as sigma is 1/2 there.
    second = [[torch.randn(1, 5, generator=g) for _ in range(2)][1] for g in sample_generators(7, range(6))]
    assert torch.equal(whole, torch.cat(second) / 2)


# Calls


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_map_takes_one_call_a_step(gaussian_map, points, gamma):
    for steps in (1, 2, 8):
        with count_calls(gaussian_map) as calls:
            sample(gaussian_map, points, steps, gamma=gamma)
        assert (calls.count, calls.rows) == (steps, 64 * steps)


@pytest.mark.parametrize(("solver", "a_step"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_calls_of_a_field(points, solver, a_step):
    for field in (NetworkField(MLP(2, width=8).double()), CheckerboardField()):
        with count_calls(field) as calls:
            sample(field, points, 5, solver=solver)
        assert calls.count == 5 * a_step


def test_calls_of_a_guided_field(gaussian, points):
    labelled = NetworkField(MLP(2, width=8, classes=3).double())
    labels = torch.zeros(64, dtype=torch.long)
    with count_calls(Guided(labelled, 2.0, null={"class_labels": 2})) as calls:
        sample(Guided(labelled, 2.0, null={"class_labels": 2}), points, 4, class_labels=labels)
    # One call a step, on both batches at once.
    assert (calls.count, calls.rows) == (4, 4 * 128)
    strong, weak = NetworkField(MLP(2, width=8).double()), NetworkField(MLP(2, width=4).double())
    guided = Guided(strong, 2.0, weak=weak)
    with count_calls(guided) as calls:
        sample(guided, points, 4)
    assert calls.count == 8
    # The same network as its own weak field is counted once a call.
    twice = Guided(strong, 2.0, weak=NetworkField(strong.network))
    with count_calls(twice) as calls:
        sample(twice, points, 4)
    assert calls.count == 8


def test_counting_ends_with_its_block(gaussian_map, points):
    with count_calls(gaussian_map) as calls:
        gaussian_map(points, 0.0, 1.0)
    gaussian_map(points, 0.0, 1.0)
    assert calls.count == 1
    with pytest.raises(ZeroDivisionError), count_calls(gaussian_map) as calls:
        raise ZeroDivisionError
    assert not gaussian_map.network._forward_pre_hooks


@pytest.mark.parametrize(("expected", "ticks"), [(8, [3.0] * 8), (16, [1.5] * 8 + [12]), (4, [6.0] * 4), (1, [24])])
def test_work_is_told_of_call_by_call_and_in_the_end_all_of_it(gaussian_map, points, expected, ticks):
    """Too few calls, or too many, are no more work than there is."""
    told, after = [], []
    gaussian_map.register_forward_hook(lambda *_: after.append(sum(told)))
    with each_call(gaussian_map, expected, told.append, work=24):
        sample(gaussian_map, points, 8)
    assert told == ticks
    assert after[3] == (sum(ticks[:3]) if expected > 1 else 0)  # while it is being done
    with pytest.raises(ZeroDivisionError), each_call(gaussian_map, 8, told.append, work=24):
        raise ZeroDivisionError
    assert len(gaussian_map._forward_hooks) == 1
    assert told == ticks


# Errors


def test_errors(gaussian, gaussian_map, points):
    for model in (gaussian, gaussian_map):
        for steps in (0, -1):
            with pytest.raises(ValueError, match=f"steps is {steps}: at least one is needed"):
                sample(model, points, steps)
        with pytest.raises(ValueError, match="unknown step grid 'shited': did you mean 'shifted'"):
            sample(model, points, 2, grid="shited")
        for grid in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0], [[0.0, 1.0]]):
            with pytest.raises(ValueError, match="the times of a grid rise from 0 to 1, these are"):
                sample(model, points, grid=torch.tensor(grid))
        with pytest.raises(ValueError, match=r"grid=\[0, 1\]: the times are a tensor"):
            sample(model, points, grid=[0, 1])
        with pytest.raises(ValueError, match=rf"the condition 'labels' has 2 rows, the noise {len(points)}: one each"):
            sample(model, points, labels=torch.zeros(2))
    for model in (NetworkField(MLP(2, width=8)), FlowMap(MLP(2, width=8, times=2))):
        with pytest.raises(ValueError, match=r"states of float64 for a MLP with weights of float32: start from x\.to"):
            sample(model, points.double())
        with pytest.raises(ValueError, match="unknown condition 'lables': did you mean 'class_labels'"):
            sample(model, points.float(), lables=torch.zeros(len(points)))
        with torch.autocast("cpu", torch.bfloat16):
            assert sample(model, points.float()).isfinite().all()
    for network, shape in (
        (Conv1dNet(2, 8, width=8, depth=1), (2, 8)),
        (SequenceTransformer(3, 4, width=8, depth=1, heads=2), (3, 4)),
        (ContinuousUNet((1, 4, 4), (4,), steps=1), (1, 4, 4)),
    ):
        with pytest.raises(
            ValueError, match=f"states of float64 for a {type(network).__name__} with weights of float32"
        ):
            sample(NetworkField(network), torch.zeros(2, *shape, dtype=F64))
    unet = fewstep.load("fewstep:fashion-mnist")
    with pytest.raises(ValueError, match=r"unknown condition 'guidance': Known: class_labels$"):
        sample(unet, torch.randn(2, 1, 28, 28), class_labels=torch.arange(2), guidance=torch.ones(2))
    with pytest.raises(ValueError, match="states of float64 for a UNet with weights of float32"):
        sample(unet, torch.randn(2, 1, 28, 28).double(), class_labels=torch.arange(2))
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        sample(gaussian, points, solver="rk4")
    with pytest.raises(ValueError, match="takes its steps itself: solver='heun' is for velocity fields"):
        sample(gaussian_map, points, solver="heun")
    with pytest.raises(ValueError, match=r"gamma=0\.5 re-noises .* solved as an ODE"):
        sample(gaussian, points, gamma=0.5)
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"gamma is {gamma}: it runs from 0"):
            sample(gaussian_map, points, 2, gamma=gamma)
    with pytest.raises(ValueError, match="takes a FlowMap or a VelocityField, not a MLP"):
        sample(MLP(2), points)


def test_an_infinite_velocity_is_an_error_not_a_nan(gaussian, points):
    # Heun asks at t = 1, where a network's velocity on a variance-preserving path is infinite.
    network = NetworkField(MLP(2, width=8).double(), VariancePreserving(), "noise")
    with pytest.raises(ValueError, match="infinite at t = 1; end the grid before it"):
        sample(network, points, 2, solver="heun")
    assert sample(network, points, 2, solver="midpoint").isfinite().all()
    exact = GaussianField(gaussian.mean, torch.eye(2, dtype=F64), VariancePreserving())
    assert sample(exact, points, 2, solver="heun").isfinite().all()


# The steps of diffusion models


def test_a_diffusion_model_takes_the_steps_of_its_own_schedule_if_asked():
    """Where DDIM takes them: its own times, mapped to the linear path, and the ends of that."""
    from diffusers import DDPMScheduler

    seen = []

    class Net(nn.Module):
        def forward(self, x, k):
            seen.append(float(k[0]))
            return torch.zeros_like(x)

    field, noise = DiffusionField(Net(), DDPMScheduler()), torch.randn(2, 3)
    sample(field, noise, steps=4, grid="native")
    assert seen == pytest.approx([999, 999 * 0.75, 999 * 0.5, 999 * 0.25], abs=1e-2)
    seen.clear()
    sample(field, noise, steps=4)
    assert seen[1] < 999 * 0.5  # far less noise already
    seen.clear()
    sample(Guided(field, 2.0, weak=field), noise, steps=2, grid="native")
    assert seen[-1] == pytest.approx(999 / 2, abs=1e-2)
    with pytest.raises(ValueError, match=r"unknown step grid 'naive'.*did you mean 'native'"):
        sample(field, noise, steps=4, grid="naive")
    with pytest.raises(ValueError, match=r"unknown step grid 'native'"):
        sample(CheckerboardField(), noise[:, :2], steps=4, grid="native")  # which was trained on no schedule


def test_noise_and_conditions_go_to_the_models_device() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return x + self.table(class_labels)

    student = FlowMap(Labelled(), Linear()).to("meta")  # as a student that was trained on a GPU
    drawn = sample(student, torch.randn(4, 2), steps=2, class_labels=torch.zeros(4, dtype=torch.long))
    assert (drawn.shape, drawn.device.type) == ((4, 2), "meta")
