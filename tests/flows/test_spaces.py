"""Spaces: what a step, a way and a prediction are in each, held against closed forms in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.exact_spaces import BoxesInBoxField, TokensField
from fewstep.flows.fields import NetworkField
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric
from fewstep.flows.products import Product
from fewstep.flows.sampling import sample
from fewstep.flows.solvers import integrate
from fewstep.flows.sources import Normal, Uniform, starting_points
from fewstep.flows.spaces import Box, Euclid, Tokens, Torus
from fewstep.flows.times import draw_times
from fewstep.networks import MLP

F64 = torch.float64
CHAIN = Tokens(3)


def chain() -> TokensField:
    """The chain of three tokens, three places: all 27 rows with their probabilities."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    step = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.05, 0.9, 0.05]], dtype=F64)
    rows = torch.cartesian_prod(*[torch.arange(3)] * 3)
    return TokensField(rows, first[rows[:, 0]] * step[rows[:, 0], rows[:, 1]] * step[rows[:, 1], rows[:, 2]], CHAIN)


def shares(field: TokensField, tokens: Tensor) -> Tensor:
    """How often each of the 27 rows is among tokens (N, 3)."""
    return torch.bincount(tokens @ torch.tensor([9, 3, 1]), minlength=27) / len(tokens)


# Tokens


def test_the_posterior_of_tokens_is_that_of_bayes() -> None:
    field = chain()
    zero, x = torch.zeros(1, 3, 3, dtype=F64), torch.eye(3, dtype=F64)[[0, 1, 2]][None].clone()
    x[0, 1] = 0
    assert torch.allclose(field.end(zero, 0.0)[0, 0], torch.tensor([0.5, 0.3, 0.2], dtype=F64), atol=1e-12)
    wanted = [[0.818864, 0.059254, 0.121882], [0.529727, 0.382084, 0.088189], [0.268170, 0.098728, 0.633102]]
    assert torch.allclose(field.end(x, 0.5)[0], torch.tensor(wanted, dtype=F64), atol=1e-6)
    # By summing over the rows with the Gaussian density of x - t E_y itself.
    t, noise = 0.3, torch.randn(4, 3, 3, dtype=F64, generator=generator(0))
    weights = field.log_weights - (noise[:, None] - t * field.states).square().flatten(2).sum(2) / (2 * (1 - t) ** 2)
    mean = (torch.softmax(weights, 1) @ field.states.flatten(1)).reshape(4, 3, 3)
    assert torch.allclose(field.end(noise, t), mean, atol=1e-12)
    assert torch.allclose(noise + (1 - t) * field(noise, t), mean, atol=1e-12)


def test_the_endpoint_of_the_map_lies_in_the_simplex_and_one_call_has_the_joint_law() -> None:
    field, x = chain(), torch.randn(4000, 3, 3, dtype=F64, generator=generator(1))
    s, t = 0.3, 0.7
    at = field.flow(x, 0.0, s, tolerance=1e-6)
    pi = at + (1 - s) / (t - s) * (field.flow(at, s, t, tolerance=1e-6) - at)
    assert pi.min() > -1e-5
    assert (pi.sum(-1) - 1).abs().max() < 1e-5
    tokens = CHAIN.decode(field.flow(x, 0.0, 1.0))
    joint = field.log_weights.exp().float()
    apart = 0.5 * (shares(field, tokens) - joint).abs().sum()
    # A product of the right marginals, which is the best that a chain does in one step, is .558 away.
    marginals = [torch.einsum("k,kv->v", field.log_weights.exp(), field.states[:, place]) for place in range(3)]
    product = torch.einsum("a,b,c->abc", *marginals).flatten().float()
    assert 0.5 * (product - joint).abs().sum() == pytest.approx(0.55784, abs=1e-4)
    assert apart < 0.03


def test_tokens_are_encoded_and_read_back() -> None:
    space = Tokens(tuple("ab "))
    x = space.encode(["ab a", "bb  "])
    assert x.shape == (2, 4, 3)
    assert space.text(x + 0.4 * torch.rand(x.shape)) == ["ab a", "bb  "]
    assert Tokens(3).text(x) == ["0 1 2 0", "1 1 2 2"]
    for data, why in (
        (["ab", "b"], "texts of 1 to 2 characters"), (["abc"], "'c' is not in the vocabulary of 3"),
        (torch.tensor([[0, 3]]), "tokens from 0 to 3"), (torch.tensor([[0.0]]), "as torch.float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            space.encode(data)
    with pytest.raises(ValueError, match="'a' is twice"):
        Tokens(("a", "b", "a"))
    with pytest.raises(ValueError, match="two tokens at least"):
        Tokens(1)
    with pytest.raises(ValueError, match=r"are no rows of 3 tokens, one-hot"):
        space.check(torch.rand(4, 2, 3))


def test_the_error_of_tokens_is_the_divergence_and_zero_at_the_goal() -> None:
    p = torch.softmax(torch.randn(5, 4, 7, dtype=F64, generator=generator(2)), -1)
    q = torch.softmax(torch.randn(5, 4, 7, dtype=F64, generator=generator(3)), -1).requires_grad_(True)
    wanted = (p * (p.log() - q.log())).sum(-1).mean(1)
    assert torch.allclose(Tokens(7).error(q, p), wanted, atol=1e-12)
    assert Tokens(7).error(p, p).abs().max() < 1e-12
    hard = torch.nn.functional.one_hot(p.argmax(-1), 7).to(p)
    assert torch.allclose(Tokens(7).error(q, hard), -(hard * q.log()).sum(-1).mean(1), atol=1e-12)  # the cross-entropy
    Tokens(7).error(q, hard).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


# Boxes


def test_the_flow_of_a_box_in_a_box_is_its_quantiles() -> None:
    one = BoxesInBoxField(torch.tensor([[[0.1, 0.4]]]), Box(0, 1))
    z = torch.tensor([[0.05], [0.3], [0.8]], dtype=F64)
    assert torch.allclose(one.flow(z, 0.0, 1 - 1e-6), 0.1 + 0.3 * z, atol=1e-4)
    two = BoxesInBoxField(torch.tensor([[[0, 0.2]], [[0.6, 0.9]]]), Box(0, 1), torch.tensor([0.5, 0.5]))
    z = torch.tensor([[0.1], [0.4], [0.6], [0.95]], dtype=F64)
    wanted = torch.tensor([[0.04], [0.16], [0.66], [0.87]], dtype=F64)
    assert torch.allclose(two.flow(z, 0.0, 1 - 1e-6), wanted, atol=1e-4)


def test_the_mean_in_a_box_is_that_of_the_formula_and_of_draws() -> None:
    field, t, x = BoxesInBoxField(torch.tensor([[[0.1, 0.4]]], dtype=F64), Box(0, 1)), 0.6, 0.35
    wanted = (max(0.1, (x - 1 + t) / t) + min(0.4, x / t)) / 2
    assert float(field.end(torch.tensor([[x]], dtype=F64), t)) == pytest.approx(wanted, abs=1e-12)
    board = BoxesInBoxField(torch.tensor([[[0, 0.5], [0, 0.5]], [[0.5, 1], [0.5, 1]]]), Box(0, 1))
    draw = generator(4)
    data, noise = board.data(400_000, draw).double(), torch.rand(400_000, 2, generator=draw, dtype=F64)
    state = t * data + (1 - t) * noise
    near = (state - torch.tensor([0.55, 0.5])).abs().amax(1) < 0.02
    mean = board.end(torch.tensor([[0.55, 0.5]], dtype=F64), t)
    assert torch.allclose(data[near].mean(0), mean[0], atol=0.02)


def test_no_sample_leaves_its_box() -> None:
    space = Box(-1, 2)
    torch.manual_seed(0)
    network = MLP(3, width=16, depth=2, times=2)
    with torch.no_grad():
        network.output.weight.mul_(100)
    free = FlowMap(network, Interpolant(), "velocity", space=space)
    ends = FlowMap(network, Interpolant(), "data", space=space)
    noise = starting_points(free, (500, 3), generator(0))
    assert -1 <= noise.min() < -0.9
    assert 1.9 < noise.max() <= 2
    with torch.no_grad():
        assert sample(free, noise, 4).min() >= -1
        # A prediction of data cannot point outside, even without the projection.
        pi = noise + ends.average_velocity(noise, 0.0, 0.5)
        assert pi.min() >= -1
        assert pi.max() <= 2
        zero, half = torch.zeros(500), torch.full((500,), 0.5)
        assert torch.equal(ends.end(noise, zero, half), -1 + 3 * torch.sigmoid(network(noise, zero, half)))
    with pytest.raises(ValueError, match=r"the data go from -4 to 1, .* low: -4, high: 1"):
        space.check(torch.tensor([-4.0, 1.0]))
    with pytest.raises(ValueError, match="low is below high"):
        Box(1, 1)


# Torus


def test_a_way_on_the_torus_is_the_shorter_one() -> None:
    space, pi = Torus(), math.pi
    noise, data = torch.tensor([[3.0], [-3.0], [0.5]], dtype=F64), torch.tensor([[-3.0], [3.0], [-0.5]], dtype=F64)
    x, dx = space.between(Interpolant(), noise, data, 0.5)
    assert torch.allclose(dx[:, 0], torch.tensor([2 * pi - 6, 6 - 2 * pi, -1.0], dtype=F64), atol=1e-12)
    assert torch.allclose(x[:, 0].abs(), torch.tensor([pi, pi, 0.0], dtype=F64), atol=1e-12)
    for t in (0.0, 1.0):
        x, _ = space.between(Interpolant(), noise, data, t)
        assert torch.allclose(space.wrap(x - (data if t else noise)), torch.zeros(3, 1, dtype=F64), atol=1e-12)


def test_a_point_on_the_torus_has_the_map_of_its_exponential() -> None:
    """Data at one point y: ``X_{s,t}(x) = exp_x((t - s) / (1 - s) log_x y)``, by steps of the flow as at once."""
    space, y = Torus(), torch.tensor([2.5, -1.0], dtype=F64)
    x = Uniform(-math.pi, math.pi).sample((64, 2), generator(5)).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return space.wrap(y - x) / (1 - t)[:, None]

    s, t = 0.2, 0.9
    exact = space.move(x, (t - s) / (1 - s) * space.wrap(y - x))
    found = integrate(velocity, x, torch.linspace(s, t, 2, dtype=F64), "euler", space=space)
    assert space.wrap(found - exact).abs().max() < 1e-12
    fine = integrate(velocity, x, torch.linspace(s, t, 33, dtype=F64), "heun", space=space)
    assert space.wrap(fine - exact).abs().max() < 1e-12  # the way is straight


def test_angles_in_degrees_are_seen() -> None:
    with pytest.raises(ValueError, match=r"go up to 270.*deg2rad"):
        Torus().check(torch.tensor([10.0, 270.0]))
    with pytest.raises(ValueError, match="wrap them first"):
        Torus(1.0).check(torch.tensor([0.7]))
    Torus().check(torch.tensor([math.pi, -3.0]))
    with pytest.raises(ValueError, match="period"):
        Torus(0.0)


# Products, sources, checks


def test_a_product_is_each_of_its_parts() -> None:
    space = Product(((Euclid(), (2, 3)), (Torus(), (4,)), (Tokens(5), (2, 5))))
    assert space.shape == (20,)
    source: Any = space.source
    noise = source.sample((9, 20), generator(0))
    data = space.encode([torch.randn(9, 2, 3), torch.rand(9, 4), torch.randint(5, (9, 2))])
    x, dx = space.between(Interpolant(), noise, data, torch.full((9,), 0.4))
    parts = zip(space.parts, *(space.split(value) for value in (noise, data, x, dx)), strict=True)
    for (part, _), some_noise, some_data, some_x, some_dx in parts:
        wanted = part.between(Interpolant(), some_noise, some_data, 0.4)
        assert torch.allclose(some_x, wanted[0])
        assert torch.allclose(some_dx, wanted[1])
    assert space.decode(data)[2].shape == (9, 2)
    assert torch.equal(space.join(space.split(x)), x)
    assert space.split(space.move(x, 9 * dx))[1].abs().max() <= math.pi
    log = source.log_prob(noise)
    angles, rest = space.split(noise)[1], torch.cat([p.flatten(1) for p in space.split(noise)[::2]], 1)
    assert torch.allclose(log, Normal().log_prob(rest) + Uniform(-math.pi, math.pi).log_prob(angles), atol=1e-4)
    with pytest.raises(ValueError, match=r"the parts of this product have \(20,\)"):
        space.split(torch.zeros(2, 19))


def test_a_network_of_a_product_says_the_data_of_its_tokens_and_the_velocity_of_the_rest() -> None:
    space = Product(((Euclid(), (2,)), (Torus(), (1,)), (Tokens(3), (2, 3))))
    torch.manual_seed(0)
    net, x = MLP(9, width=8, depth=2, times=2).double(), torch.randn(5, 9, dtype=F64)
    s, t = torch.rand(5, dtype=F64), torch.ones(5, dtype=F64)
    model = FlowMap(net, Interpolant(), space=space)
    with torch.no_grad():
        output, u, said = net(x, s, t), model.average_velocity(x, s, t), model.end(x, s, t)
    data = torch.softmax(output[:, 3:].reshape(5, 2, 3), -1).flatten(1)
    assert torch.allclose(u[:, :3], output[:, :3], atol=1e-12)
    assert torch.allclose(x[:, 3:] + (1 - s)[:, None] * u[:, 3:], data, atol=1e-12)
    assert torch.allclose(said, torch.cat([output[:, :3], data], 1), atol=1e-12)
    assert torch.allclose(space.aim(u, x, s), said, atol=1e-12)
    assert torch.allclose(space.velocity(said, x, s), u, atol=1e-12)
    aim = torch.cat([torch.randn(5, 3, dtype=F64), torch.eye(3, dtype=F64)[torch.randint(3, (5, 2))].flatten(1)], 1)
    squares = (said - aim).square()
    likelihood = -(aim[:, 3:] * data.log()).sum(1) / 2  # the cross-entropy, the mean of two places
    assert torch.allclose(space.error(said, aim), squares[:, :2].mean(1) + squares[:, 2] + likelihood, atol=1e-12)
    # The last step of Heun's asks at t = 1.
    field = NetworkField(MLP(9, width=8, depth=2), Interpolant(), space=space)
    assert sample(field, x.float(), 2, solver="heun").isfinite().all()


def test_flow_matching_on_a_product_is_the_error_of_its_parts() -> None:
    space = Product(((Euclid(), (2,)), (Tokens(3), (1, 3))))
    torch.manual_seed(0)
    field = NetworkField(MLP(5, width=8, depth=2), Interpolant(), space=space)
    data = space.encode([torch.randn(64, 2), torch.randint(3, (64, 1))])
    loss = fewstep.FlowMatching()(field, Batch(data, {}), generator=generator(0))
    source: Any = space.source
    draw = generator(0)
    noise = source.sample((64, 5), draw)
    t = draw_times(64, draw)
    x = noise + t[:, None] * (data - noise)
    output = field.network(x, t)
    wanted = (output[:, :2] - (data - noise)[:, :2]).square().mean(1)
    wanted = wanted + torch.nn.functional.cross_entropy(output[:, 2:], data[:, 2:].argmax(1), reduction="none")
    assert torch.allclose(loss.total, wanted.mean(), atol=1e-5)
    assert list(loss.terms) == ["tokens"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([torch.zeros(4, 1), 300 * torch.rand(4, 2), torch.zeros(4, 1).long()], r"degrees, as it seems.*deg2rad"),
        ([torch.zeros(4, 1), torch.zeros(4, 2), torch.full((4, 1), 3)], "the vocabulary having 3"),
        ([torch.zeros(4, 1), torch.zeros(4, 2)], "data of 2 parts for a product of 3"),
        ([torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(4, 1).long()], r"part 1, Torus.*given \(4, 3\): \(4, 2\)"),
        ([torch.zeros(4, 1), torch.zeros(5, 2), torch.zeros(4, 1).long()], r"part 1, Torus.*given \(5, 2\): \(4, 2\)"),
    ],
)
def test_parts_that_are_none_are_refused(data: list[Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Product(((Euclid(), (1,)), (Torus(), (2,)), (Tokens(3), (1, 3)))).encode(data)


def test_data_outside_their_space_are_refused_by_fit_before_a_step() -> None:
    student = FlowMap(MLP(2, width=8, depth=2, times=2), Interpolant(), space=Torus())
    with pytest.raises(ValueError, match="deg2rad"):
        fewstep.fit(student, fewstep.PSD(), 360 * torch.rand(50, 2), steps=1, quiet=True, device="cpu")


@pytest.mark.takes_seconds
def test_one_call_on_a_product_keeps_what_holds_between_its_parts() -> None:
    """An angle of two arcs, one across the cut; a token that says which, and a place that is its cosine."""
    draw = generator(0)
    which = torch.randint(2, (20_000, 1), generator=draw)
    angle = Torus().wrap(torch.tensor([math.pi, 0.5])[which] + 0.25 * torch.randn(20_000, 1, generator=draw))
    space = Product(((Euclid(), (1,)), (Torus(), (1,)), (Tokens(2), (1, 2))))
    data = space.encode([angle.cos(), angle, which])
    torch.manual_seed(0)
    field = NetworkField(MLP(4, width=64, depth=3), Interpolant(), space=space)
    options = {"steps": 400, "batch": 256, "quiet": True, "device": "cpu"}
    fewstep.fit(field, fewstep.FlowMatching(), data, lr=5e-3, **options)
    student = FlowMap.from_field(field)
    fewstep.fit(student, fewstep.ITVM(field), data, lr=3e-3, **options)
    noise = starting_points(student, (4000, 4), generator(1))

    def apart(model: Any) -> tuple[float, float]:
        place, angle, token = space.decode(sample(model, noise, 1))
        near = (space.parts[1][0].wrap(angle - math.pi).abs() > 1.4).long()  # pyright: ignore[reportAttributeAccessIssue]
        return float((place - angle.cos()).square().mean().sqrt()), float((token != near).double().mean())

    euler, own = apart(field), apart(student)
    assert euler[0] > 0.3
    assert euler[1] > 0.2
    assert own[0] < 0.25
    assert own[1] < 0.08


def test_sources_have_their_densities() -> None:
    x = torch.tensor([[0.2, 0.5], [0.2, 1.5]], dtype=F64)
    assert Uniform(0, 1).log_prob(x).tolist() == [0.0, -math.inf]
    assert Uniform(-1, 3).log_prob(x).tolist() == pytest.approx([-2 * math.log(4)] * 2)
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    assert torch.allclose(Normal().log_prob(x), wanted, atol=1e-12)


def test_euclid_is_as_it_was_to_the_bit() -> None:
    torch.manual_seed(0)
    network, x = MLP(2, width=8, depth=2, times=2), torch.randn(7, 2)
    model = FlowMap(network)
    with torch.no_grad():
        u = network(x, torch.full((7,), 0.2), torch.full((7,), 0.9))
        assert torch.equal(model(x, 0.2, 0.9), x + (torch.full((7, 1), 0.9) - torch.full((7, 1), 0.2)) * u)


@pytest.mark.parametrize(
    ("space", "path", "kind", "why"),
    [
        (Tokens(3), Linear(), "velocity", "in a Tokens networks predict the data"),
        (Torus(), Interpolant(), "data", "in a Torus networks predict the velocity"),
        (Box(), Linear(), "data", r"a Box starts from noise of its own: its path is Interpolant\(\)"),
        (Tokens(3), Interpolant(), "data", r"its path is Linear\(\)"),
        (Tokens(3), Trigonometric(), "data", "needs the straight path"),
        (Torus(), Interpolant("trigonometric"), "velocity", "needs the straight path"),
    ],
)
def test_a_space_says_which_path_and_prediction_it_needs(space: object, path: object, kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NetworkField(MLP(2), path, kind, space=space)  # pyright: ignore[reportArgumentType]


@pytest.mark.takes_seconds
def test_a_map_on_the_torus_reaches_both_arcs_in_one_call() -> None:
    """Two arcs, one of them across the cut: ITVM of a learned velocity puts most angles there in one call, where an
    Euler step, which goes to the mean of two ways, puts few."""
    space, draw = Torus(), generator(0)
    centres = torch.tensor([3.1, 0.5])
    which = torch.randint(2, (20_000, 1), generator=draw)
    data = space.wrap(centres[which] + 0.2 * torch.randn(20_000, 1, generator=draw))
    space.check(data)
    torch.manual_seed(0)
    field = NetworkField(MLP(1, width=64, depth=3), Interpolant(), space=space)
    options = {"steps": 400, "batch": 256, "quiet": True, "device": "cpu"}
    fewstep.fit(field, fewstep.FlowMatching(), data, lr=5e-3, **options)
    student = FlowMap.from_field(field)
    fewstep.fit(student, fewstep.ITVM(field), data, lr=3e-3, **options)

    def near(x: Tensor) -> float:
        assert x.abs().max() <= math.pi
        return float((space.wrap(x - centres).abs() < 0.6).any(1).double().mean())

    noise = starting_points(student, (4000, 1), generator(1))
    assert near(sample(field, noise, 1)) < 0.4
    assert near(sample(student, noise, 1)) > 0.8
    with pytest.raises(ValueError, match=r"LSD is for R\^n, and the student's samples live in a Torus"):
        fewstep.LSD().check_data(data, student)
