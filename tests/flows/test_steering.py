"""Steering by a reward: the law of the sampler times e^r in any number of steps, held against closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys.families import tiny_vae
from toys.gaussian import GaussianAverageVelocity

import fewstep
from fewstep.common.randomness import generator, sample_generators
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.mixed import Mixed
from fewstep.flows.paths import Trigonometric, VariancePreserving
from fewstep.flows.population import Particles
from fewstep.flows.rewards import Reward
from fewstep.flows.sampling import sample, sample_noise
from fewstep.flows.steering import steer
from fewstep.latents.vae import Latents

F64 = torch.float64
ROWS = 20_000


def line(mean: float, variance: float) -> GaussianField:
    return GaussianField(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64))


@pytest.fixture
def unit_map() -> FlowMap:
    """The exact map of N(0, 1)."""
    return FlowMap(GaussianAverageVelocity(line(0.0, 1.0)))


@pytest.fixture
def noise() -> Tensor:
    return sample_noise((ROWS, 1), generator(0), F64)


def parabola(x: Tensor) -> Tensor:
    """``2 x - x^2 / 2``: of N(0, 1) it makes N(1, 1/2), with E e^r = e / sqrt(2)."""
    return 2 * x[:, 0] - x[:, 0].square() / 2


def moments(particles: Particles) -> tuple[float, float]:
    mean = particles.mean(particles.x)[0]
    return float(mean), float(particles.mean((particles.x - mean).square()))


def tilted(mean: float, variance: float) -> tuple[float, float, float]:
    """Mean and variance of ``N(mean, variance) e^parabola``, and the logarithm of its mass."""
    new = 1 / (1 / variance + 1)
    middle = new * (mean / variance + 2)
    mass = 0.5 * math.log(new / variance) + middle**2 / (2 * new) - mean**2 / (2 * variance)
    return middle, new, mass


# Flow maps


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_an_exact_map_hits_the_target_in_any_number_of_steps(
    unit_map: FlowMap, noise: Tensor, steps: int, gamma: float, gradient: bool
) -> None:
    if gradient and not gamma:
        return
    reward = Reward(parabola, gradient=gradient)
    particles = steer(unit_map, noise, steps, reward, gamma=gamma, generator=generator(1))
    # A standard error of mean and variance is some .01 (.7 / sqrt(ESS)), of the normaliser too.
    mean, variance = moments(particles)
    assert abs(mean - 1) < 0.03
    assert abs(variance - 0.5) < 0.03
    assert abs(float(particles.log_normalizer) - (1 - math.log(2) / 2)) < 0.03
    assert particles.ess.shape == (steps, 1)


def test_the_gradient_keeps_twice_the_particles(unit_map: FlowMap, noise: Tensor) -> None:
    least = [
        float(steer(unit_map, noise, 4, Reward(parabola, gradient=way), generator=generator(1)).ess.min()) / ROWS
        for way in (False, True)
    ]
    assert least == pytest.approx([0.44, 0.85], abs=0.02)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_wrong_map_gives_what_it_samples_times_the_reward(noise: Tensor, steps: int, gradient: bool) -> None:
    """Whatever the map is: all the weights of a particle together are e^r of its end."""

    class Shrinks(nn.Module):
        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return 0.3 - 0.5 * x * (1 + s)[:, None]

    model = FlowMap(Shrinks())
    mean, variance, gamma = 0.0, 1.0, 0.8
    for i in range(steps):
        s, t = i / steps, (i + 1) / steps
        ratio = (1 - t) / t * math.sqrt(1 - gamma**2) if t < 1 else 0.0
        r = 1 / (1 + ratio)
        a, b = 1 - (r - s) * 0.5 * (1 + s), (r - s) * 0.3
        mean, variance = t / r * (a * mean + b), (t / r * a) ** 2 * variance + (gamma * (1 - t)) ** 2
    truth = tilted(mean, variance)
    particles = steer(model, noise, steps, Reward(parabola, gradient=gradient), gamma=gamma, generator=generator(2))
    assert (*moments(particles), float(particles.log_normalizer)) == pytest.approx(truth, abs=0.02)
    without = tilted(0.0, 1.0)
    assert abs(truth[0] - without[0]) > 0.1


@pytest.mark.parametrize("schedule", [lambda t: 1.0, lambda t: t**3, lambda t: 2 - t], ids=["all", "late", "falling"])
def test_the_schedule_leaves_the_target(unit_map: FlowMap, noise: Tensor, schedule: Any) -> None:
    particles = steer(unit_map, noise, 3, Reward(parabola, schedule), generator=generator(1))
    assert (*moments(particles), float(particles.log_normalizer)) == pytest.approx((1.0, 0.5, 0.6534), abs=0.04)


def test_the_strength_is_a_factor(unit_map: FlowMap, noise: Tensor) -> None:
    one = steer(unit_map, noise, 3, Reward(lambda x: 3 * x[:, 0]), generator=generator(1))
    other = steer(unit_map, noise, 3, Reward(lambda x: x[:, 0], strength=3.0), generator=generator(1))
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.log_weights, other.log_weights)
    none = steer(unit_map, noise, 2, Reward(parabola, strength=0.0), generator=generator(1))
    torch.testing.assert_close(none.x, sample(unit_map, noise, 2, gamma=1.0, generator=generator(1)))
    assert none.ess.min() == pytest.approx(ROWS)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("steps", [1, 4])
def test_eight_gaussians_lean_as_they_should(steps: int) -> None:
    field = eight_gaussians().double()

    class Exact(FlowMap):
        def forward(self, x: Tensor, s: Any, t: Any, **cond: Any) -> Tensor:
            return field.flow(x, float(s), float(t), tolerance=1e-6)

    start = sample_noise((3000, 2), generator(5), F64)
    particles = steer(Exact(nn.Identity()), start, steps, Reward(lambda x: 3 * x[:, 0]), generator=generator(6))
    assert float(particles.mean(particles.x[:, 0])) == pytest.approx(1.3063852, abs=0.05)
    assert float(particles.log_normalizer) == pytest.approx(2.7177023, abs=0.12)
    near = (particles.x[:, None] - field.means).square().sum(2).argmin(1)
    shares = particles.mean(nn.functional.one_hot(near, 8).double())[0]
    truth = torch.tensor([0.616981, 0.181485, 0.009459, 0.000493, 0.000145, 0.000493, 0.009459, 0.181485], dtype=F64)
    torch.testing.assert_close(shares, truth, rtol=0, atol=0.07)
    least = float(particles.ess.min()) / 3000
    assert least == pytest.approx(0.41 if steps == 4 else 0.21, abs=0.05)


def test_a_step_takes_two_calls_and_the_gradient_one_more(unit_map: FlowMap, noise: Tensor) -> None:
    for options, reward, calls in (
        ({}, Reward(parabola), 7),
        ({}, Reward(parabola, gradient=True), 10),
        ({"ess": 0.0}, Reward(parabola), 4),  # nobody looks at what is on the way
        ({"gamma": 0.0}, Reward(parabola), 4),
        ({"greedy": True, "groups": 8}, Reward(parabola), 8),
    ):
        with count_calls(unit_map) as counted:
            steer(unit_map, noise[:8], 4, reward, generator=generator(1), **options)
        assert counted.count == calls


# Velocity fields


@pytest.mark.parametrize("gradient", [False, True])
def test_a_field_gives_what_its_sde_samples_times_the_reward(noise: Tensor, gradient: bool) -> None:
    steps, mean, variance = 10, 0.0, 1.0
    for i in range(steps):  # Euler-Maruyama of N(0.5, 0.25), and no noise in the last step
        t, h = i / steps, 1 / steps
        c = t * t / 4 + (1 - t) ** 2
        slope, eps = (t / 4 - (1 - t)) / c, min((1 - t) / t if t else 9.0, 2.0) if i < steps - 1 else 0.0
        a = 1 + h * (slope - eps / c)
        mean, variance = a * mean + h * (0.5 - slope * t / 2 + eps * t / 2 / c), a * a * variance + 2 * eps * h
    particles = steer(line(0.5, 0.25), noise, steps, Reward(parabola, gradient=gradient), generator=generator(1))
    truth = tilted(mean, variance)
    assert (*moments(particles), float(particles.log_normalizer)) == pytest.approx(truth, abs=0.012)
    field = line(0.5, 0.25)
    with count_calls(field) as calls:
        steer(field, noise[:8], steps, Reward(parabola, gradient=gradient), generator=generator(1))
    assert calls.count == (2 * steps - 1 if gradient else steps)  # the look ahead is the next step's velocity


@pytest.mark.takes_seconds
def test_a_field_on_another_path(noise: Tensor) -> None:
    field = line(0.0, 1.0).on(Trigonometric())
    particles = steer(field, noise, 40, Reward(parabola), eps="linear", generator=generator(1))
    assert (*moments(particles), float(particles.log_normalizer)) == pytest.approx((1.0, 0.5, 0.6534), abs=0.04)


# Conditions, generators, shapes


class ByClass(nn.Module):
    """The field of N(label, 1/4)^D; told a strength of guidance, of N(label + guidance, 1/4)."""

    classes, shape = 3, (2,)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        middle = (class_labels if guidance is None else class_labels + guidance).to(x)
        t, m = (value.reshape(-1, *[1] * (x.ndim - 1)).to(x) for value in (t, middle))
        return m + (t / 4 - (1 - t)) / (t * t / 4 + (1 - t) ** 2) * (x - t * m)


class MapByClass(ByClass):
    def forward(self, x: Tensor, s: Tensor, t: Tensor, class_labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        middle = (class_labels if guidance is None else class_labels + guidance).to(x)
        s, t, m = (value.reshape(-1, *[1] * (x.ndim - 1)).to(x) for value in (s, t, middle))
        before, after = ((r * r / 4 + (1 - r) ** 2).sqrt() for r in (s, t))
        end = t * m + after / before * (x - s * m)
        return torch.where(t > s, (end - x) / (t - s).clamp(min=1e-12), 0.0)


@pytest.mark.parametrize("model", [NetworkField(ByClass()), FlowMap(MapByClass())], ids=["field", "map"])
def test_conditions_go_with_their_particle(model: Any) -> None:
    labels = torch.arange(3).repeat(400)
    noise = sample_noise((1200, 2), generator(0), F64)
    steps = 4 if isinstance(model, FlowMap) else 40
    particles = steer(
        model, noise, steps, Reward(lambda x: 4 * x.sum(1)), generator=generator(1), class_labels=labels, ess=1.0
    )
    own = labels[particles.ancestors]
    assert (particles.x.mean(1) - own).abs().max() < 4  # each is still of its own class
    assert float(particles.mean((own == 2).double())) > 0.95  # e^(8 label) of the classes: the last is left
    assert 1 < int(particles.unique) < 1200


def test_a_reward_is_told_the_conditions_that_it_names() -> None:
    seen = []

    def reward(x: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        return x.new_zeros(len(x))

    labels = torch.tensor([0, 0, 2, 2])
    noise = sample_noise((4, 2), generator(0))
    guidance = torch.ones(4)
    steer(FlowMap(MapByClass()), noise, 2, Reward(reward), groups=2, class_labels=labels, guidance=guidance)
    assert all(torch.equal(told, labels) for told in seen)
    assert len(seen) == 2


def test_a_module_is_a_reward_too() -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor, class_labels: Tensor) -> Tensor:
            return -(x - class_labels[:, None]).square().sum(1)

    labels, noise = torch.ones(8, dtype=torch.long), sample_noise((8, 2), generator(0))
    model = FlowMap(MapByClass())
    one = steer(model, noise, 2, Reward(Far()), generator=generator(1), class_labels=labels)
    other = steer(
        model, noise, 2, Reward(lambda x: -(x - 1).square().sum(1)), generator=generator(1), class_labels=labels
    )
    assert torch.equal(one.log_weights, other.log_weights)


def test_a_map_is_told_its_own_strength_of_guidance() -> None:
    model = FlowMap(MapByClass())
    model.guidance = 5.0
    labels = torch.zeros(64, dtype=torch.long)
    particles = steer(model, sample_noise((64, 2), generator(0)), 2, Reward(lambda x: x[:, 0] * 0), class_labels=labels)
    assert float(particles.x.mean()) == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_samples_of_any_rank_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = torch.zeros(8, dtype=torch.long)
    noise = sample_noise((8, *shape), generator(0)).to(dtype)
    reward = Reward(lambda x: x.reshape(len(x), -1).sum(1), gradient=True)
    for model, steps in ((NetworkField(ByClass()), 5), (FlowMap(MapByClass()), 2)):
        particles = steer(model, noise, steps, reward, groups=2, generator=generator(1), class_labels=labels)
        assert particles.x.shape == noise.shape
        assert particles.x.dtype is dtype
        assert particles.log_weights.dtype is (F64 if dtype is F64 else torch.float32)
        assert particles.draw(generator(2)).shape == (2, *shape)


def test_a_population_with_generators_of_its_own_is_alone(unit_map: FlowMap) -> None:
    def steered(rows: range) -> Particles:
        generators = sample_generators(3, rows)
        noise = sample_noise((len(rows), 1), generators, F64)
        reward = Reward(lambda x: 4 * x[:, 0])
        return steer(unit_map, noise, 3, reward, groups=len(rows) // 8, generator=generators, ess=1.0)

    both, second = steered(range(16)), steered(range(8, 16))
    torch.testing.assert_close(both.x[8:], second.x, rtol=0, atol=1e-12)
    assert torch.equal(both.ancestors[8:] - 8, second.ancestors)
    again = steered(range(16))
    assert torch.equal(both.x, again.x)
    assert int(both.unique.max()) < 8


def test_no_gradient_is_left(unit_map: FlowMap, noise: Tensor) -> None:
    weight = torch.tensor(2.0, dtype=F64, requires_grad=True)
    reward = Reward(lambda x: weight * x[:, 0], gradient=True)
    particles = steer(unit_map, noise[:8], 2, reward, generator=generator(1))
    assert weight.grad is None
    assert not any(value.requires_grad for value in vars(particles).values())


@pytest.mark.takes_seconds
def test_nothing_is_waited_for_on_the_way(unit_map: FlowMap, noise: Tensor) -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def waits(model: Any, steps: int, target: Any) -> int:
        start = noise[:8].clone()
        with Waits() as mode:
            steer(model, start, steps, target, generator=generator(1))
        return mode.count

    field, other = line(0.0, 1.0), line(1.0, 0.5)
    for model, target in (
        (field, Reward(parabola, gradient=True)),
        (field, Mixed({field: 1.0, other: 1.0})),
        (field, Reward(parabola)),
    ):
        assert waits(model, 4, target) == waits(model, 9, target)
    # Of a map the grid is made of numbers first: one more a step, on the CPU, whatever the device.
    assert waits(unit_map, 9, Reward(parabola)) == waits(unit_map, 9, Reward(parabola, gradient=True))


# Latents


def test_a_reward_of_images_on_a_latent_model() -> None:
    latents = Latents(tiny_vae())
    labels = torch.zeros(6, dtype=torch.long)
    noise = sample_noise((6, latents.channels, 4, 4), generator(0))
    seen = []

    def bright(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return 50 * images.mean(dim=(1, 2, 3))

    reward = Reward(bright, gradient=True, decode=latents.decode)
    steered = steer(FlowMap(MapByClass()), noise, 2, reward, generator=generator(1), class_labels=labels)
    assert set(seen) == {(6, *latents.image_shape_of(tuple(noise.shape[1:])))}
    plain = sample(FlowMap(MapByClass()), noise, 2, gamma=1.0, generator=generator(1), class_labels=labels)
    assert not torch.equal(steered.x, plain)  # the gradient came through the decoder


# One particle


def test_greedy_climbs_with_one_particle(unit_map: FlowMap) -> None:
    noise = sample_noise((4, 1), generator(0), F64)
    particles = steer(unit_map, noise, 2, Reward(lambda x: 3 * x[:, 0]), groups=4, greedy=True)
    x = noise
    for s, t in ((0.0, 0.5), (0.5, 1.0)):
        gain = (1.0 if s == 0 else 1 / math.sqrt(0.5)) * 3  # X_{s,1}(x) = x sqrt(C_1 / C_s)
        x = unit_map(x + (t - s) * gain, s, t)
    torch.testing.assert_close(particles.x, x, rtol=0, atol=1e-12)
    assert particles.ess.tolist() == [[1.0] * 4]
    assert particles.log_normalizer.isnan().all()
    assert torch.equal(particles.draw(), particles.x)
    field = line(0.0, 1.0)
    by_field = steer(field, noise, 20, Reward(lambda x: 3 * x[:, 0]), groups=4, greedy=True)
    assert (by_field.x > sample(field, noise, 20) + 1).all()


# What is refused


def paired() -> VelocityField:
    """A field that has no score."""
    field = line(0.0, 1.0)
    field.coupling = "ot"
    return field


def refuses(model: Any, change: dict[str, Any], says: str) -> None:
    noise = sample_noise((8, 1), generator(0), F64)
    arguments: dict[str, Any] = {"noise": noise, "steps": 4, "target": Reward(parabola)}
    with pytest.raises(ValueError, match=says):
        steer(model, **(arguments | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"groups": 3}, r"8 rows of noise cannot be shared equally by 3 populations"),
        ({"groups": 8}, r"of one particle each: weights need two or more.*greedy=True"),
        ({"ess": 1.5}, r"ess is 1.5"),
        ({"gamma": 2.0}, r"gamma is 2.0"),
        ({"eps": torch.ones_like}, r"a flow map has gamma"),
        ({"generator": sample_generators(0, range(3))}, r"3 generators cannot be shared"),
        ({"class_labels": torch.zeros(4)}, r"the condition 'class_labels' has 4 rows, the noise 8"),
        ({"target": parabola}, r"steer takes Reward\(function\) or Mixed"),
        ({"target": Reward(lambda x: x)}, r"the reward gave torch.float64 of shape \(8, 1\) for 8 samples"),
        ({"target": Reward(lambda x, mood: x[:, 0])}, r"the reward asks for the condition 'mood'.*: none"),
        ({"target": Reward(lambda x: x.sum())}, r"of shape \(\) for 8 samples: a number for each is needed, \(8,\)"),
        ({"target": Reward(lambda x: (x[:, 0] > 0).long())}, r"the reward gave torch.int64"),
        ({"target": Reward(lambda x: 1.0)}, r"the reward gave 1.0"),  # pyright: ignore
        ({"target": Reward(lambda x: x[:, 0] / 0)}, r"NaN or an infinite number"),
        ({"target": Reward(lambda x: x[:, 0].detach(), gradient=True)}, r"no gradient in its samples"),
        ({"target": Reward(lambda x: x[:, 0] * 0 + torch.ones(1, requires_grad=True).detach(), gradient=True),
          "gamma": 0.0}, r"there is none: gamma or eps above 0"),
        ({"target": Mixed({line(0.0, 1.0): 2.0})}, r"Mixed is for velocity fields in many steps"),
        ({"steps": 0}, r"steps is 0"),
    ],
)  # fmt: skip
def test_what_a_map_refuses(unit_map: FlowMap, change: dict[str, Any], says: str) -> None:
    refuses(unit_map, change, says)


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        (line(0.0, 1.0), {"gamma": 0.5}, r"gamma=0.5 re-noises between the steps of a flow map"),
        (line(0.0, 1.0), {"eps": torch.ones_like}, r"is 1 at t = 1 on Linear\(\) and leaves noise"),
        (line(0.0, 1.0), {"eps": 0.5}, r"eps=0.5 is 0.5 at t = 1"),
        (line(0.0, 1.0), {"eps": "kapa"}, r"did you mean 'kappa'"),
        (paired(), {}, r"steering needs noise that is independent of the data"),
        (line(0.0, 1.0), {"target": Mixed({line(0.0, 1.0): 1.0, paired(): 1.0})}, r"none of the fields"),
        (line(0.0, 1.0).on(VariancePreserving()), {}, r"is 0.05 at t = 1.*field.on\(Linear\(\)\)"),
        (line(0.0, 1.0), {"eps": torch.zeros_like, "target": Reward(parabola, gradient=True)}, r"there is none"),
        (line(0.0, 1.0), {"target": Mixed({line(0.0, 1.0): 2.0})}, r"none of the fields of Mixed"),
    ],
)
def test_what_a_field_refuses(field: VelocityField, change: dict[str, Any], says: str) -> None:
    refuses(field, change, says)


def test_a_late_nan_is_found(unit_map: FlowMap, noise: Tensor) -> None:
    calls = []

    def reward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x[:, 0] * (math.nan if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match="NaN or an infinite number"):
        steer(unit_map, noise[:8], 4, Reward(reward), generator=generator(1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": lambda t: t / 2}, r"the schedule of a reward is 0.5 at t = 1"),
        ({"strength": math.inf}, r"the strength of a reward is inf"),
        ({"strength": "3"}, r"the strength of a reward is '3'"),
        ({"reward": 3}, r"a reward is a function of samples"),
    ],
)
def test_what_a_reward_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Reward(**({"reward": parabola} | options))


def test_a_schedule_may_not_be_infinite_on_the_way(unit_map: FlowMap, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        steer(unit_map, noise[:8], 2, Reward(parabola, lambda t: 1 / t if t else math.inf))


def test_it_is_public() -> None:
    assert (fewstep.steer, fewstep.Reward, fewstep.Mixed, fewstep.Particles) == (steer, Reward, Mixed, Particles)
