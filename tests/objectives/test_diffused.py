"""Diffusion-GAN's noise on a critic's rows: its levels, its controller, and why it helps, in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.common.randomness import generator
from fewstep.networks.critics import ConvCritic, MLPCritic
from fewstep.objectives.diffused import Diffused


class Sum(nn.Module):
    """A critic that is told no level."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1)


class Level(nn.Module):
    """A critic that says the level it is told."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return level


def sure(critic: Diffused, steps: int, rows: int, of: float = 1.0, first: int = 0) -> None:
    """Training steps in which a share of real rows is found real."""
    real = torch.where(torch.arange(rows) < of * rows, 1.0, -1.0)
    for step in range(first, first + steps):
        critic.draws(torch.zeros(rows, 2), generator(step), step)
        critic.see(real)


def test_a_critic_that_is_sure_raises_p_from_0_to_1_in_as_many_rows_as_said():
    critic = Diffused(Sum(), images=4000, interval=4, steps=(10, 1000))
    sure(critic, 40, 100)
    assert float(critic.p) == pytest.approx(0.9)  # 9 changes of 400 rows; those of the last 4 steps are to come
    assert float(critic.most) == round(10 + 0.9 * 990)
    critic.draws(torch.zeros(100, 2), generator(0), 40)
    assert float(critic.p) == pytest.approx(1.0)
    assert float(critic.most) == 1000
    sure(critic, 8, 100, first=40)
    assert float(critic.p) == 1.0


def test_p_falls_below_the_target_and_stands_still_at_it():
    critic = Diffused(Sum(), target=0.6, images=1000, interval=1)
    critic.p.fill_(0.5)
    sure(critic, 3, 100, of=0.5)  # r = 0: below
    assert float(critic.p) == pytest.approx(0.3)
    critic.see(torch.ones(0))
    sure(critic, 1, 100, of=0.8, first=3)  # r = 0.6 from here on: no change but the one that was due
    before = float(critic.p)
    sure(critic, 3, 100, of=0.8, first=4)
    assert float(critic.p) == before == pytest.approx(0.2)
    sure(critic, 30, 100, of=0.0, first=7)
    assert float(critic.p) == 0.0
    assert float(critic.most) == 10


def test_nothing_is_counted_without_gradients():
    critic = Diffused(Sum(), images=1000, interval=1)
    with torch.no_grad():
        sure(critic, 5, 100)
    assert float(critic.rows) == float(critic.p) == 0.0


def test_a_batch_in_parts_sees_the_noise_of_one_in_whole():
    whole, parts = (Diffused(Sum(), images=1000, interval=2) for _ in range(2))
    for step in range(7):
        whole.draws(torch.zeros(64, 2), generator(step), step)
        seen = []
        for _ in range(4):
            parts.draws(torch.zeros(16, 2), generator(step), step)
            seen.append(float(parts.p))
            parts.see(torch.ones(16))
        assert seen == [float(whole.p)] * 4
        whole.see(torch.ones(64))
    assert float(whole.p) > 0


@pytest.mark.parametrize("levels", ["priority", "uniform"])
def test_half_of_the_rows_are_clean_and_the_others_have_every_step_by_its_share(levels: str):
    critic = Diffused(Sum(), steps=(4, 4), levels=levels)
    drawn = critic.draws(torch.zeros(200_000, 1, dtype=torch.float64), generator(0))["level"]
    kept = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 4, dtype=torch.float64), 0)
    at = [(drawn - level).abs() < 1e-4 for level in [0.0, *(1 - kept).sqrt().tolist()]]
    shares = [float(rows.double().mean()) for rows in at]
    of_steps = [k / 20 for k in (1, 2, 3, 4)] if levels == "priority" else [0.125] * 4  # of half of the rows
    assert shares == pytest.approx([0.5, *of_steps], abs=0.004)
    assert sum(shares) == pytest.approx(1.0)


def test_the_noise_is_as_the_formula_says():
    critic = Diffused(Sum(), sd=0.5, steps=(10, 1000))
    critic.p.fill_(1.0)
    kept = critic.kept()
    assert float(kept[0]) == 1.0
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    torch.testing.assert_close(kept[1:].double(), torch.cumprod(1 - betas, 0), rtol=1e-3, atol=1e-6)
    x, noise = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator(1))
    level = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
    y = torch.stack([x[0], 0.8 * x[1] + 0.3 * noise[1], 0.5 * noise[2]])
    torch.testing.assert_close(critic(x, level=level, noise=noise), y.sum(1))


def test_where_there_is_no_noise_the_critic_sees_the_rows_to_the_bit():
    x = torch.randn(4, 2, generator=generator(0))
    assert torch.equal(Diffused(Sum())(x, level=torch.zeros(4), noise=torch.randn_like(x)), Sum()(x))


def test_the_critic_is_told_the_level_where_it_takes_one():
    level = torch.tensor([0.1, 0.7])
    assert torch.equal(Diffused(Level())(torch.zeros(2, 3), level=level, noise=torch.zeros(2, 3)), level)
    for inner in (MLPCritic((2,), 8, level=True), ConvCritic((1, 8, 8), 4, level=True)):
        shape = (2,) if isinstance(inner, MLPCritic) else (1, 8, 8)
        critic, x = Diffused(inner), torch.randn(4, *shape)
        one, two = (critic(x, level=torch.full((4,), each), noise=torch.zeros_like(x)) for each in (0.0, 0.6))
        assert not torch.allclose(one, two)


def test_the_distance_of_distant_gaussians_has_a_slope_under_noise_alone():
    """What the best critic measures is the Jensen-Shannon divergence, by quadrature here, of N(m, 1) and N(-m, 1).
    Without noise it is log 2 to the last digit for all distant m; the mean over the levels is still growing."""
    critic = Diffused(Sum(), sd=1.0)
    critic.p.fill_(1.0)

    def divergence(m: float, kept: Tensor) -> Tensor:
        """(levels,), for a_k (levels,)."""
        y = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
        variance = (kept + (1 - kept) * critic.sd**2)[:, None]
        logs = [-((y - sign * kept.sqrt()[:, None] * m) ** 2) / (2 * variance) for sign in (1, -1)]
        both = torch.logaddexp(*logs) - math.log(2)
        parts = [(log.exp() * (log - both)).sum(1) for log in logs]
        return (parts[0] + parts[1]) / 2 * (y[1] - y[0]) / (2 * math.pi * variance[:, 0]).sqrt()

    levels = critic.kept().double()[::50]
    plain = torch.ones(1, dtype=torch.float64)
    assert float(divergence(10.0, plain)) == pytest.approx(math.log(2), abs=1e-9)
    assert float(divergence(10.5, plain) - divergence(10.0, plain)) == pytest.approx(0.0, abs=1e-12)
    assert float((divergence(10.5, levels) - divergence(10.0, levels)).mean()) > 2e-3


def test_what_cannot_be():
    with pytest.raises(ValueError, match="did you mean 'priority'"):
        Diffused(Sum(), levels="priorty")
    with pytest.raises(ValueError, match="steps are"):
        Diffused(Sum(), steps=(1, 10))
    with pytest.raises(ValueError, match="target lies between"):
        Diffused(Sum(), target=1.0)
    with pytest.raises(ValueError, match="level=True"):
        Diffused(MLPCritic((2,), 8))
    with pytest.raises(ValueError, match="by itself"):
        Diffused(Diffused(Sum()))
