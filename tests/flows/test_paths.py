"""Paths: coefficients, the algebra between predictions, and the change of path, against closed forms in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.paths import BETAS, CONTINUOUS, DDPM, F64, PATHS, UNIT_POWER, by_kind, by_path, close, pair, predictions

from fewstep.flows.broadcasting import as_times
from fewstep.flows.change_of_path import scaling
from fewstep.flows.paths import Forward, Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.predictions import KINDS
from fewstep.flows.tabulated import Tabulated

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


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
