"""The change of path is exact: closed forms in float64, over every native path and kind of prediction."""

import pytest
import torch
from toys.paths import DDPM, F64, by_kind, by_path, close, pair, predictions

from fewstep.flows.change_of_path import scaling
from fewstep.flows.paths import Linear, Reversed, Trigonometric, VariancePreserving
from fewstep.flows.preconditioned import Preconditioned
from fewstep.flows.tabulated import Tabulated


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
