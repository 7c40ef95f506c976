"""Times of training, as distributions, and the grids of sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys.times import GAP, N, gap

from fewstep.common.randomness import generator
from fewstep.flows.times import DISTRIBUTIONS, GRIDS, check_grid, draw_pairs, draw_times, step_grid


def test_uniform_times():
    t = draw_times(N, generator(1))
    assert t.shape == (N,)
    assert t.dtype == torch.float32
    assert gap(t, lambda t: t) < GAP


def test_logit_normal_times():
    t = draw_times(N, generator(2), "logit-normal")
    assert (t > 0).all()
    assert (t < 1).all()
    assert gap(t, lambda t: torch.special.ndtr(torch.logit(t))) < GAP


def test_pairs_are_uniform_over_the_triangle():
    s, t = draw_pairs(N, generator(3))
    assert s.shape == t.shape == (N,)
    assert (s <= t).all()
    # Under the uniform density 2 on s < t: these, and the ratio s / t independent of t.
    assert gap(s, lambda s: 1 - (1 - s) ** 2) < GAP
    assert gap(t, lambda t: t**2) < GAP
    assert gap(t - s, lambda d: 1 - (1 - d) ** 2) < GAP
    assert gap(s / t, lambda r: r) < GAP
    assert abs(float(torch.corrcoef(torch.stack([s / t, t]))[0, 1])) < 5 / N**0.5


def test_pairs_of_logit_normal_times():
    s, t = draw_pairs(N, generator(4), "logit-normal")
    for values, distribution in ((s, lambda u: 1 - (1 - u) ** 2), (t, lambda u: u**2)):
        assert gap(values, lambda v, f=distribution: f(torch.special.ndtr(torch.logit(v)))) < GAP


def test_calls_give_their_share_the_intervals_of_sampling():
    s, t = draw_pairs(N, generator(6), "calls(0.6)")
    plain = draw_pairs(N, generator(6))
    is_step = (s != plain[0]) | (t != plain[1])
    assert float(is_step.float().mean()) == pytest.approx(0.6, abs=5 * (0.24 / N) ** 0.5)
    intervals = torch.stack([s, t], dim=1)[is_step]
    wanted = torch.tensor([[k / n, (k + 1) / n] for n in (1, 2, 4, 8) for k in range(n)])
    share = (intervals[:, None] == wanted).all(2).float().mean(0)
    assert float(share.sum()) == 1.0
    expected = torch.tensor([1 / (4 * n) for n in (1, 2, 4, 8) for _ in range(n)])
    spread = 5 * (expected * (1 - expected) / is_step.sum()).sqrt()
    assert ((share - expected).abs() < spread).all()
    assert torch.equal(draw_times(8, generator(7), "calls"), draw_times(8, generator(7)))
    with pytest.raises(ValueError, match=r"say calls\(0.75\), the last number above 0 and at most 1"):
        draw_pairs(8, generator(6), "calls(1.5)")


@pytest.mark.parametrize("ends", [0.1, 0.5])
def test_ends_have_their_probability_each_of_its_own(ends):
    s, t = draw_pairs(N, generator(5), ends=ends)
    start, end = s == 0, t == 1
    spread = 5 * (ends * (1 - ends) / N) ** 0.5
    assert float(start.float().mean()) == pytest.approx(ends, abs=spread)
    assert float(end.float().mean()) == pytest.approx(ends, abs=spread)
    assert float((start & end).float().mean()) == pytest.approx(ends**2, abs=spread)
    assert (s <= t).all()
    # The rest stays as it was.
    plain_s, plain_t = draw_pairs(N, generator(5))
    assert torch.equal(s[~start], plain_s[~start])
    assert torch.equal(t[~end], plain_t[~end])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("ends", [0.0, 0.3])
def test_chunks_see_the_times_that_one_process_would(distribution, ends):
    whole = draw_pairs(24, [generator(0, k) for k in range(3)], distribution, ends)
    parts = [draw_pairs(8, generator(0, k), distribution, ends) for k in range(3)]
    for one, many in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(many))


def test_unknown_distribution():
    with pytest.raises(ValueError, match="unknown distribution of times 'lognormal': did you mean 'logit-normal'"):
        draw_times(4, generator(0), "lognormal")


@pytest.mark.takes_seconds
@pytest.mark.parametrize("kind", GRIDS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(steps=st.integers(1, 1000))
def test_grids_rise_from_0_to_1_exactly(kind, steps):
    grid = step_grid(steps, kind)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.float().diff() > 0).all()


def test_grids_in_numbers():
    assert step_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert step_grid(2, "quadratic").tolist() == [0, 0.75, 1]
    # The shift of arXiv 2403.03206 acts on its noise level 1 - t: 3 n / (1 + 2 n).
    noise = 1 - step_grid(4)
    torch.testing.assert_close(1 - step_grid(4, "shifted"), 3 * noise / (1 + 2 * noise))
    torch.testing.assert_close(step_grid(7, "shifted", shift=1.0), step_grid(7))


def test_where_steps_crowd():
    shifted, quadratic = (step_grid(8, kind).diff() for kind in ("shifted", "quadratic"))
    assert (shifted.diff() > 0).all()  # small steps first, at the noise
    assert (quadratic.diff() < 0).all()  # small steps last, at the data


def test_grid_errors():
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"steps is {steps}: at least one"):
            step_grid(steps)
    with pytest.raises(ValueError, match="steps is 1000001: 1,000,000 at most"):
        step_grid(1_000_001)
    with pytest.raises(ValueError, match="unknown step grid 'uniforn': did you mean 'uniform'"):
        step_grid(4, "uniforn")


@pytest.mark.parametrize(("mean", "deviation"), [(-0.8, 1.0), (1.1, 2.0)])
def test_logit_normal_times_of_a_mean_and_a_deviation(mean, deviation):
    t = draw_times(N, generator(2), f"logit-normal({mean}, {deviation})")
    assert gap(t, lambda t: torch.special.ndtr((torch.logit(t) - mean) / deviation)) < GAP
    assert torch.equal(draw_times(99, generator(2), "logit-normal(0, 1)"), draw_times(99, generator(2), "logit-normal"))


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0])
def test_power_times_and_their_mirror(k):
    assert gap(draw_times(N, generator(2), f"power({k})"), lambda t: t ** (k + 1)) < GAP
    assert gap(draw_times(N, generator(2), f"mirrored-power({k})"), lambda t: 1 - (1 - t) ** (k + 1)) < GAP


@pytest.mark.parametrize("longest", [1.0, 0.4])
def test_pairs_whose_length_is_drawn_first(longest):
    s, t = draw_pairs(N, generator(3), "gap(-0.6, 1.6)", longest=longest)
    assert ((s >= 0) & (s <= t) & (t <= 1)).all()
    inside = (t - s) / longest
    assert gap(inside, lambda d: torch.special.ndtr((torch.logit(d.clamp(1e-9, 1 - 1e-9)) + 0.6) / 1.6)) < GAP
    assert gap((s / (1 - (t - s))).clamp(0, 1), lambda u: u) < GAP
    assert gap(draw_times(N, generator(2), "gap"), lambda t: t) < GAP


@pytest.mark.parametrize(
    "said", ["logit-normal(1)", "logit-normal(0, 0)", "power(x)", "power(-1)", "uniform(1)", "gap(0, 1", "gap(nan, 1)"]
)
def test_numbers_that_a_distribution_does_not_have(said):
    with pytest.raises(ValueError, match=r"times .* say "):
        draw_times(4, generator(0), said)


def test_one_check_of_times_serves_grids_candidates_and_what_is_kept():
    for wrong in (
        [0.0, 0.5],
        [0.1, 1.0],
        [0.0, 0.6, 0.5, 1.0],
        [0.0, 0.5, 0.5, 1.0],
        [0.0],
        [[0.0, 1.0]],
        [0, torch.nan, 1],
    ):
        with pytest.raises(ValueError, match="these times rise from 0 to 1, these are "):
            check_grid("these times", torch.tensor(wrong))
    check_grid("these times", torch.tensor([0.0, 0.2, 1.0]))
