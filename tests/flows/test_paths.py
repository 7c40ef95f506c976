"""Paths: coefficients, the algebra between predictions, and the change of path, against closed forms in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.flows.broadcasting import as_times
from fewstep.flows.change_of_path import scaling
from fewstep.flows.paths import Forward, Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.predictions import KINDS
from fewstep.flows.tabulated import Tabulated

F64 = torch.float64
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
DDPM = Tabulated.from_alphas_cumprod((1 - BETAS).cumprod(0))
CONTINUOUS = [Linear(), Trigonometric(), VariancePreserving(), VariancePreserving(0.3, 45.0)]
UNIT_POWER = [*CONTINUOUS[1:], DDPM, Tabulated((3.0, 1.0, 0.0, -4.0))]
PATHS = [Linear(), *UNIT_POWER, Preconditioned(0.5)]

by_path = pytest.mark.parametrize("path", PATHS, ids=str)
by_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def close(x, y, tolerance=1e-12):
    """Equal to the tolerance, relative to the size of y."""
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())))


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=g, dtype=F64)


def predictions(path, x1, x0, t):
    """What a perfect network of each kind says, from the true data and noise; t (B,), x (B, D)."""
    a, s, a_dot, s_dot = (c[:, None] for c in path.coefficients(t))
    velocity = a_dot * x1 + s_dot * x0
    d = path.sigma_data if isinstance(path, Preconditioned) else 1.0
    return {
        "velocity": velocity,
        "data": x1,
        "noise": x0,
        "v": d * a * x0 - s * x1 / d,
        "edm": s * x1 / d - d * a * x0,
        "score": -x0 / s,
        "flow": -velocity,
    }


# Coefficients


@pytest.mark.takes_seconds
@by_path
@few
@given(t=st.floats(0.001, 0.999))
def test_rates_are_the_derivatives_of_the_coefficients(path, t):
    t = torch.tensor([t], dtype=F64)
    one = torch.ones_like(t)
    for value, rate in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        close(torch.func.jvp(value, (t,), (one,))[1], rate(t))
    close(path.noise_rate(t), path.sigma(t) * path.sigma_dot(t))


@pytest.mark.parametrize("path", UNIT_POWER, ids=str)
def test_power_is_one(path):
    t = torch.linspace(0, 1, 101, dtype=F64)
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_ends_are_exact(dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    for path in (Linear(), Trigonometric()):
        assert path.alpha(ends).tolist() == [0, 1]
        assert path.sigma(ends).tolist() == [1, 0]
    vp = VariancePreserving()
    assert vp.sigma(ends)[1] == 0
    assert vp.alpha(ends)[1] == 1
    # The integral of beta is the mean of its ends.
    torch.testing.assert_close(vp.alpha(ends)[0], torch.tensor(math.exp(-0.25 * 20.1), dtype=dtype), rtol=1e-6, atol=0)
    # Where sigma' is infinite, sigma sigma' is not.
    assert vp.sigma_dot(ends)[1] == -math.inf
    torch.testing.assert_close(vp.noise_rate(ends)[1], torch.tensor(-0.05, dtype=dtype))


def test_linear_and_trigonometric_values():
    t = torch.tensor([0.25], dtype=F64)
    assert [float(c) for c in Linear().coefficients(t)] == [0.25, 0.75, 1, -1]
    angle = math.pi / 8
    expected = [math.sin(angle), math.cos(angle), math.pi / 2 * math.cos(angle), -math.pi / 2 * math.sin(angle)]
    assert [float(c) for c in Trigonometric().coefficients(t)] == pytest.approx(expected, rel=1e-14)


def test_variance_preserving_solves_its_diffusion():
    # d(alpha)/dtau = -beta/2 alpha and d(sigma^2)/dtau = beta (1 - sigma^2), tau = 1 - t.
    path, t = VariancePreserving(0.2, 12.0), torch.linspace(0.01, 0.99, 50, dtype=F64)
    beta = 0.2 + 11.8 * (1 - t)
    close(path.alpha_dot(t), beta / 2 * path.alpha(t))
    close(2 * path.noise_rate(t), -beta * (1 - path.sigma(t) ** 2))


def test_a_table_is_met_at_its_steps():
    k = torch.arange(1000)
    t = 1 - k.double() / 999
    power = (1 - BETAS).cumprod(0)
    close(DDPM.alpha(t), power.sqrt())
    close(DDPM.sigma(t), (1 - power).sqrt())
    close(DDPM.network_time(t), k.double(), 1e-12)
    assert Reversed(1000.0).network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1000, 750, 0]
    assert Forward(500.0).network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 125, 500]
    assert Linear().network_time(t) is t


def test_the_scaling_of_edm():
    """Table 1 of arXiv 2206.00364: c_in, c_skip, c_out and c_noise, by their own formulas."""
    path, n = Preconditioned(0.5, 0.01, 50.0), torch.tensor([0.01, 0.3, 1.0, 7.0, 50.0], dtype=F64)
    t = path.time_at(-n.log())
    c_in = 1 / (n**2 + 0.25).sqrt()
    close(path.alpha(t), c_in)
    close(path.sigma(t), n * c_in)
    close(path.network_time(t), n.log() / 4)
    assert path.hold_range("edm") == (float(t[-1]), float(t[0]))
    ends = path.network_time(torch.tensor([0.0, 1.0], dtype=F64))
    close(ends, torch.stack([n[-1], n[0]]).log() / 4)
    # What EDM calls the denoiser, from the state x = x1 + n x0 that is not scaled.
    x, f = pair(5, 3)
    denoised = (0.25 / (n**2 + 0.25))[:, None] * x + (n * 0.5 * c_in)[:, None] * f
    velocity = path.to_velocity(f, c_in[:, None] * x, t, "edm")
    close(path.from_velocity(velocity, c_in[:, None] * x, t, "data"), denoised, 1e-10)


def test_float32_times_in_a_table_lose_nothing():
    t = torch.linspace(0, 1, 777)
    for value in (DDPM.alpha, DDPM.sigma):
        assert value(t).dtype == torch.float32
        torch.testing.assert_close(value(t), value(t.double()).float(), rtol=3e-7, atol=0)


@few
@given(ratios=st.lists(st.floats(0.01, 3.0), min_size=2, max_size=8), top=st.floats(-4, 9))
def test_a_table_that_ends_in_noise(ratios, top):
    """Alpha is 0 at t = 0, and the last step with a signal is at 1 / (K - 1); rates and times are of one path."""
    table = Tabulated(tuple(top - sum(ratios[:k]) for k in range(len(ratios))), ends_in_noise=True)
    inside = Tabulated(table.log_ratios)
    last = len(ratios)
    nodes = torch.arange(1, last + 1, dtype=F64) / last
    close(table.alpha(nodes), inside.alpha(torch.linspace(0, 1, last, dtype=F64)), 1e-11)
    close(table.network_time(torch.tensor([0.0, 1.0], dtype=F64)), torch.tensor([last, 0.0], dtype=F64))
    assert [float(c) for c in (table.alpha(torch.zeros(1)), table.sigma(torch.zeros(1)))] == [0, 1]
    t = torch.linspace(0, 1, 173, dtype=F64)[:-1] + 1e-4
    one = torch.ones_like(t)
    for value, rate in ((table.alpha, table.alpha_dot), (table.sigma, table.sigma_dot)):
        close(torch.func.jvp(value, (t,), (one,))[1], rate(t), 1e-10)
    close(table.time_of(table.alpha(t), table.sigma(t)), t, 1e-9)
    close(table.time_at(table.alpha(t).log() - table.sigma(t).log()), t, 1e-9)
    assert table.hold_range("v")[0] == 0
    assert float(table.alpha(torch.tensor(table.hold_range("noise")[0], dtype=F64))) == pytest.approx(1e-3, rel=1e-5)
    assert Tabulated.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0])).ends_in_noise


@pytest.mark.parametrize("path", [*PATHS, Tabulated((9.0, 0.0, -10.0)), Preconditioned(0.5, 1e-5, 1e5), Reversed()])
@pytest.mark.parametrize("kind", ["noise", "score", "data"])
def test_no_error_of_a_network_counts_more_than_a_thousandfold(path, kind):
    """Of noise where there is hardly data and of data where there is hardly noise, whatever the schedule reaches."""
    t = torch.cat([torch.linspace(0, 1, 4001, dtype=F64), 2.0 ** -torch.arange(12.0, 40.0, dtype=F64)])
    assert float(scaling(path, kind, Linear(), t).out.abs().max()) < 1002


# Times


@by_path
@few
@given(t=st.floats(0.0005, 0.9995))
def test_time_at_inverts_the_log_ratio(path, t):
    t = torch.tensor([t], dtype=F64)
    close(path.time_at(path.alpha(t).log() - path.sigma(t).log()), t)
    close(path.time_of(7 * path.alpha(t), 7 * path.sigma(t)), t)


@by_path
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_time_at_infinity_is_an_end(path, dtype):
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    assert path.time_at(ends).tolist() == [0, 1]
    assert path.time_at(ends).dtype == dtype
    assert path.time_of(torch.tensor([0.0, 2], dtype=dtype), torch.tensor([2.0, 0], dtype=dtype)).tolist() == [0, 1]


@by_path
def test_time_at_rises_and_stays_inside(path):
    t = path.time_at(torch.linspace(-40, 40, 801, dtype=F64))
    assert (t.diff() >= 0).all()
    assert t.min() >= 0
    assert t.max() <= 1


def test_as_times():
    x = torch.zeros(3, 2, dtype=F64)
    assert as_times(0.25, x).tolist() == [0.25] * 3
    assert as_times(torch.tensor(0.25), x).shape == (3,)
    assert as_times(torch.tensor([0.25, 0.5, 1]), x).dtype == F64
    assert as_times(0.25, x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"shape \(2,\), samples \(3, 2\)"):
        as_times(torch.zeros(2), x)
    with pytest.raises(ValueError, match=r"shape \(3, 1\)"):
        as_times(torch.zeros(3, 1), x)
    for wrong in (7, 999.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="outside \\[0, 1\\]: t = 0 is noise"):
            as_times(wrong, x)


# Samples and predictions


@by_path
def test_sample_is_the_interpolant_and_its_derivative(path):
    (x1, x0), t = pair(9, 3), torch.linspace(0.01, 0.99, 9, dtype=F64)
    x, dx = path.sample(x0, x1, t)
    close(x, path.alpha(t)[:, None] * x1 + path.sigma(t)[:, None] * x0, 1e-15)

    def state(t):
        return path.sample(x0, x1, t)[0]

    close(dx, torch.func.jvp(state, (t,), (torch.ones_like(t),))[1])


@by_path
@by_kind
@few
@given(log_ratio=st.floats(-6, 6), seed=st.integers(0, 99))
def test_every_kind_gives_the_velocity_and_back(path, kind, log_ratio, seed):
    x1, x0 = pair(4, 3, seed=seed)
    t = path.time_at(torch.full((4,), log_ratio, dtype=F64))
    x, dx = path.sample(x0, x1, t)
    prediction = predictions(path, x1, x0, t)[kind]
    # A division by alpha or sigma loses what it multiplies by.
    tolerance = 1e-14 * math.exp(abs(log_ratio))
    close(path.to_velocity(prediction, x, t, kind), dx, tolerance)
    close(path.from_velocity(dx, x, t, kind), prediction, tolerance)


@by_path
@by_kind
def test_algebra_to_1e_12_where_nothing_is_divided_by_little(path, kind):
    log_ratio = torch.linspace(-2, 2, 8, dtype=F64)
    (x1, x0), t = pair(8, 5), path.time_at(log_ratio)
    x, dx = path.sample(x0, x1, t)
    prediction = predictions(path, x1, x0, t)[kind]
    close(path.to_velocity(prediction, x, t, kind), dx)
    close(path.from_velocity(dx, x, t, kind), prediction)
    for other in KINDS:
        through = path.from_velocity(path.to_velocity(prediction, x, t, kind), x, t, other)
        close(through, predictions(path, x1, x0, t)[other])


@by_path
@by_kind
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 4)], ids=str)
def test_a_time_belongs_to_its_row_even_where_all_sizes_agree(path, kind, shape):
    (x1, x0), t = pair(*shape), torch.tensor([0.1, 0.35, 0.6, 0.85], dtype=F64)
    x, dx = path.sample(x0, x1, t)
    for i in range(4):
        x_i, dx_i = path.sample(x0[i : i + 1], x1[i : i + 1], float(t[i]))
        close(x[i], x_i[0], 1e-15)
        close(dx[i], dx_i[0], 1e-15)
    prediction = path.from_velocity(dx, x, t, kind)
    whole = path.to_velocity(prediction, x, t, kind)
    rows = [path.to_velocity(prediction[i : i + 1], x[i : i + 1], float(t[i]), kind)[0] for i in range(4)]
    close(whole, torch.stack(rows), 1e-15)
    close(whole, dx, 1e-10)


@by_path
@by_kind
def test_float32(path, kind):
    t = path.time_at(torch.linspace(-2, 2, 8, dtype=F64))
    x1, x0 = pair(8, 3)
    x, dx = path.sample(x0, x1, t)
    low = path.to_velocity(path.from_velocity(dx, x, t, kind).float(), x.float(), t.float(), kind)
    assert low.dtype == torch.float32
    close(low.double(), dx, 1e-5)
    # float32 times beside float64 samples do not make the samples float32.
    assert path.sample(x0, x1, t.float())[0].dtype == F64


@pytest.mark.parametrize(
    ("path", "kind", "t"),
    [
        (Linear(), "noise", 0.0),
        (Linear(), "score", 0.0),
        (Linear(), "data", 1.0),
        (Trigonometric(), "noise", 0.0),
        (Trigonometric(), "data", 1.0),
        (VariancePreserving(), "noise", 1.0),
        (VariancePreserving(), "v", 1.0),
    ],
    ids=str,
)
def test_a_singular_end_is_an_error_that_names_path_and_time(path, kind, t):
    x, f = pair(3, 2)
    with pytest.raises(ValueError, match=rf"{type(path).__name__}.*velocity from a {kind} prediction.*t = {t:g};"):
        path.to_velocity(f, x, torch.tensor([0.5, t, 0.5], dtype=F64), kind)


@pytest.mark.parametrize("path", CONTINUOUS, ids=str)
def test_there_is_no_score_without_noise(path):
    x, f = pair(3, 2)
    with pytest.raises(ValueError, match=rf"{type(path).__name__}.*score from a velocity.*t = 1;"):
        path.from_velocity(f, x, 1.0, "score")


def test_other_errors():
    x, f = pair(3, 2)
    for convert in (Linear().to_velocity, Linear().from_velocity):
        with pytest.raises(ValueError, match=r"unknown prediction kind 'epsilon'.*Known: data, edm, flow, n"):
            convert(f, x, 0.5, "epsilon")
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2\), data \(3, 1\)"):
        Linear().sample(x, f[:, :1], 0.5)
    for table in ((1.0,), (0.0, 1.0), (1.0, 1.0), (math.inf, 0.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="two or more finite log-ratios, each below the one before"):
            Tabulated(table)


def test_sameness_and_names():
    assert Linear().same_as(Reversed())
    assert Reversed().same_as(Linear())
    assert not Linear().same_as(Trigonometric())
    assert VariancePreserving().same_as(VariancePreserving(0.1, 20.0))
    assert not VariancePreserving().same_as(VariancePreserving(0.1, 19.0))
    assert Tabulated((1.0, 0.0)).same_as(Tabulated((1.0, 0.0)))
    assert not Tabulated((1.0, 0.0)).same_as(Tabulated((1.0, -1.0)))
    assert Forward().same_as(Linear())
    assert not Preconditioned(0.5).same_as(Preconditioned(1.0))
    assert not Preconditioned(1.0).same_as(Trigonometric())
    with pytest.raises(ValueError, match=r"Preconditioned.*sigma_min=2.0.*0 < sigma_min < sigma_max"):
        Preconditioned(0.5, 2.0, 1.0)
    assert repr(DDPM) == "Tabulated(1000 steps, log-ratios 4.61 to -5.06)"


# Change of path


def posterior(x, path, t):
    """E[data given x] and E[noise given x] for data N(0.4, 1.5^2) in each component, from Bayes' rule alone."""
    a, s = (c[:, None] for c in path.coefficients(t)[:2])
    gain = (x - a * 0.4) / (a * a * 2.25 + s * s)
    return 0.4 + a * 2.25 * gain, s * gain


def truth(x, path, t):
    data, noise = posterior(x, path, t)
    return path.alpha_dot(t)[:, None] * data + path.sigma_dot(t)[:, None] * noise


def oracle(native, kind):
    """A perfect network of this kind on its native path, called in the units of its own time."""

    def network(x, time):
        t = time
        if isinstance(native, Tabulated):
            t = 1 - time / (len(native.log_ratios) - 1)
        elif isinstance(native, Reversed):
            t = 1 - time / native.scale
        elif isinstance(native, Preconditioned):
            t = native.time_at(-4 * time)
        return predictions(native, *posterior(x, native, t), t)[kind]

    return network


def converted(x, native, kind, path, t):
    c = scaling(native, kind, path, t)
    return c.skip[:, None] * x + c.out[:, None] * oracle(native, kind)(c.into[:, None] * x, c.time)


NATIVES = [
    Linear(),
    Trigonometric(),
    VariancePreserving(),
    DDPM,
    Reversed(1000.0),
    Preconditioned(0.7, sigma_max=200.0),
]
by_native = pytest.mark.parametrize("native", NATIVES, ids=lambda p: type(p).__name__)
by_wanted = pytest.mark.parametrize("path", NATIVES[:4], ids=lambda p: type(p).__name__)


@by_native
@by_wanted
@by_kind
def test_a_change_of_path_is_exact(native, path, kind):
    # All signal-to-noise ratios that every path reaches.
    t = path.time_at(torch.linspace(-4.9, 4.5, 40, dtype=F64))
    x = path.sample(*pair(40, 3), t)[0]
    close(converted(x, native, kind, path, t), truth(x, path, t), 2e-11)


@by_native
@by_wanted
@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_conversions_are_finite_and_smooth_on_all_of_the_interval(native, path, kind, dtype):
    last = 1 - 1e-6 if isinstance(path, VariancePreserving) else 1.0
    special = [0.0, 1e-12, 1e-6, native.hold_range(kind)[0], native.hold_range(kind)[1], last]
    t = torch.cat([torch.tensor(special, dtype=dtype), torch.linspace(0, last, 301, dtype=dtype)]).clamp(max=last)

    def coefficients(t):
        c = scaling(native, kind, path, t)
        return torch.stack([c.into, c.time, c.skip, c.out])

    value, rate = torch.func.jvp(coefficients, (t,), (torch.ones_like(t),))
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert rate.isfinite().all()


@by_path
@by_kind
def test_predictions_are_held_where_they_say_little(path, kind):
    """Noise where there is less than 1 data to 1000 noise, data the other way; else only where the path ends."""
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    first, last = (path.alpha(ends) / path.sigma(ends)).tolist()
    if isinstance(path, Preconditioned):  # which holds the ends of its training
        first, last = 1 / 80, 1 / 0.002
    held = torch.tensor(path.hold_range(kind), dtype=F64)
    low, high = (path.alpha(held) / path.sigma(held)).tolist()
    assert low == pytest.approx(max(first, 1e-3) if kind in ("noise", "score") else first, rel=1e-9)
    # The rate of sigma is infinite at the end of a variance-preserving path: all kinds are held before it.
    to_data = kind == "data" or isinstance(path, VariancePreserving)
    assert high == pytest.approx(min(last, 1e3) if to_data else last, rel=1e-9)


@by_native
@by_wanted
@by_kind
def test_holding_is_continuous(native, path, kind):
    for edge in native.hold_range(kind):
        at = torch.tensor(edge, dtype=F64)
        middle = path.time_of(native.alpha(at), native.sigma(at))
        if not 1e-6 < middle < 1 - 1e-6:
            continue
        t = middle + 1e-7 * torch.tensor([-3, -1, 1, 3], dtype=F64)
        c = scaling(native, kind, path, t)
        for value in (c.into, c.time, c.skip, c.out):
            # Across the edge no more happens than the steeper of its sides explains.
            before, across, after = value.diff().abs()
            assert across <= 2 * torch.maximum(before, after) + 1e-9 * value.abs().max()


@pytest.mark.parametrize("native", [Linear(), Trigonometric(), VariancePreserving(), DDPM], ids=str)
@pytest.mark.parametrize("kind", ["noise", "score"])
def test_towards_noise_the_data_estimate_is_held(native, kind):
    # At t = 0 of the linear path: x is all noise, and the data estimate is that of the last time the network knows.
    x, t = pair(6, 3)[0], torch.zeros(6, dtype=F64)
    last = torch.full_like(t, native.hold_range(kind)[0])
    power = torch.hypot(native.alpha(last), native.sigma(last))[:, None]
    data, _ = posterior(x * power, native, last)
    close(converted(x, native, kind, Linear(), t), data - x, 1e-11)


@pytest.mark.parametrize("native", [Linear(), Trigonometric(), VariancePreserving(), DDPM], ids=str)
def test_towards_data_the_noise_estimate_is_held(native):
    # At t = 1 of the linear path: x is all data, and the noise estimate is that of the last time the network knows.
    x, t = pair(6, 3)[0], torch.ones(6, dtype=F64)
    last = torch.full_like(t, native.hold_range("data")[1])
    power = torch.hypot(native.alpha(last), native.sigma(last))[:, None]
    _, noise = posterior(x * power, native, last)
    close(converted(x, native, "data", Linear(), t), x - noise, 1e-10)


def test_the_linear_data_predictor_in_numbers():
    t = torch.tensor([0.0, 0.25, 0.5], dtype=F64)
    c = scaling(Linear(), "data", Linear(), t)
    close(c.into, torch.ones_like(t))
    close(c.skip, -1 / (1 - t))
    close(c.out, 1 / (1 - t))
    assert torch.equal(c.time, t)


def test_variance_preserving_to_linear_in_numbers():
    # alpha = t / hypot(t, 1 - t); for v: velocity = (a - s) x - (a + s) v, both on the variance-preserving path.
    t = torch.linspace(0.02, 0.98, 25, dtype=F64)
    power = torch.hypot(t, 1 - t)
    a, s = t / power, (1 - t) / power
    c = scaling(DDPM, "v", Linear(), t)
    close(c.into, 1 / power)
    close(c.skip, (a - s) / power)
    close(c.out, -(a + s))
    close(DDPM.alpha(1 - c.time / 999), a)


def test_a_network_of_the_wanted_velocity_is_left_alone():
    t = torch.linspace(0, 1, 5)
    c = scaling(Reversed(1000.0), "flow", Linear(), t)
    assert torch.equal(c.out, -torch.ones(5))
    assert torch.equal(c.skip, torch.zeros(5))
    assert torch.equal(c.into, torch.ones(5))
    torch.testing.assert_close(c.time, 1000 * (1 - t))


def test_an_infinite_velocity_is_an_error():
    t = torch.tensor([0.5, 1.0])
    for native, kind in ((Linear(), "velocity"), (VariancePreserving(), "noise"), (DDPM, "v")):
        with pytest.raises(ValueError, match=r"VariancePreserving.*infinite at t = 1; end the grid before it"):
            scaling(native, kind, VariancePreserving(), t)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="unknown prediction kind 'nois': did you mean 'noise'"):
        scaling(Linear(), "nois", Trigonometric(), torch.tensor([0.5]))


def test_a_time_that_all_rows_share_is_scaled_once_and_to_the_same_numbers():
    """Under no_grad, as samplers ask; a derivative in the time is never taken from what was kept."""
    table = Tabulated(tuple(torch.linspace(4, -4, 100).tolist()))
    for native, kind in ((VariancePreserving(), "noise"), (table, "v"), (Linear(), "data"), (Linear(), "flow")):
        for time in (0.0, 0.3, 0.9):
            asked = scaling(native, kind, Linear(), torch.full((3,), time))
            with torch.no_grad():
                kept = [scaling(native, kind, Linear(), torch.tensor(time).expand(3)) for _ in range(2)]
                t = torch.tensor(time, dtype=torch.float64)
                along = lambda t: scaling(native, kind, Linear(), t.expand(3)).out  # noqa: B023, E731
                _, slope = torch.func.jvp(along, (t,), (torch.ones_like(t),))
                along_rows = lambda t: scaling(native, kind, Linear(), t).out  # noqa: B023, E731
                _, expected = torch.func.jvp(along_rows, (t.repeat(3),), (torch.ones(3, dtype=torch.float64),))
            assert torch.equal(slope, expected)
            for name in ("into", "time", "skip", "out"):
                assert kept[0].out is not asked.out
                torch.testing.assert_close(getattr(kept[1], name), getattr(asked, name), rtol=1e-6, atol=1e-7)
