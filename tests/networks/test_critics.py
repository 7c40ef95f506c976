"""The critics that come along: images of any size, points, classes, levels, and how they see rows that are alike."""

import pytest
import torch
from torch import nn

from fewstep.common.randomness import generator
from fewstep.networks.critics import ConvCritic, MLPCritic, deviation


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (5, 9, 33), (1, 64, 64)])
def test_images_of_any_size_and_channels_get_a_logit_a_row(shape: tuple[int, ...]):
    critic, x = ConvCritic(shape, width=4), torch.randn(6, *shape)
    assert critic(x).shape == (6,)
    assert critic.stem.weight.shape == (4, shape[0], 3, 3)
    assert critic.last.weight.shape[0] == min(4 * 2 ** len(critic.blocks), 16)
    side = min(shape[1:])
    assert len(critic.blocks) == {8: 1, 28: 3, 9: 2, 64: 4}[side]


def test_points_and_samples_of_any_shape_get_a_logit_a_row():
    assert MLPCritic((2,), 8)(torch.randn(5, 2)).shape == (5,)
    assert MLPCritic((2, 32), 8, depth=1)(torch.randn(5, 2, 32)).shape == (5,)


def test_points_go_in_as_sines_too_and_images_do_not():
    critic, x = MLPCritic((2,), 8, frequencies=2), torch.randn(5, 2, generator=generator(0))
    seen: list[torch.Tensor] = []
    critic.input.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    critic(x)
    torch.testing.assert_close(seen[0], torch.cat([x, x.sin(), (2 * x).sin(), x.cos(), (2 * x).cos()], dim=1))
    assert [MLPCritic(shape, 4).input.in_features for shape in ((2,), (16,), (17,))] == [18, 144, 17]


def test_the_seed_decides_the_weights_and_nothing_else_notices():
    before = torch.get_rng_state()
    one, two, other = ConvCritic((1, 8, 8), 4, seed=1), ConvCritic((1, 8, 8), 4, seed=1), ConvCritic((1, 8, 8), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.stem.weight, other.stem.weight)
    assert not torch.equal(MLPCritic((2,), 8, seed=1).input.weight, MLPCritic((2,), 8).input.weight)


@pytest.mark.parametrize("critic", [ConvCritic((1, 8, 8), 4, classes=3), MLPCritic((1, 8, 8), 8, classes=3)])
def test_classes_are_a_projection_that_starts_at_none(critic: ConvCritic | MLPCritic):
    x, labels = torch.randn(4, 1, 8, 8, generator=generator(0)), torch.tensor([0, 1, 2, 2])
    plain = critic(x, class_labels=labels)
    assert torch.equal(plain, critic(x, class_labels=labels.flip(0)))
    assert critic.head.label is not None
    nn.init.normal_(critic.head.label.weight)
    assert not torch.allclose(critic(x, class_labels=labels), critic(x, class_labels=labels.flip(0)))
    with pytest.raises(ValueError, match="class_labels"):
        critic(x)


@pytest.mark.parametrize("critic", [ConvCritic((1, 8, 8), 4, level=True), MLPCritic((1, 8, 8), 8, level=True)])
def test_the_level_is_told(critic: nn.Module):
    x = torch.randn(4, 1, 8, 8, generator=generator(0))
    low, high = (critic(x, level=torch.full((4,), level)) for level in (0.0, 1.0))
    assert (low - high).abs().min() > 1e-4
    with pytest.raises(ValueError, match="level"):
        critic(x)


def test_rows_that_are_alike_are_seen():
    h = torch.randn(8, 3, 2, 2, dtype=torch.float64, generator=generator(0))
    by_hand = torch.cat([part.std(0, correction=0).mean().expand(4) for part in h.split(4)])
    torch.testing.assert_close(deviation(h), by_hand, rtol=1e-6, atol=0)
    assert float(deviation(h[:1].expand(4, -1, -1, -1)).max()) < 1.1e-4
    assert [len(deviation(h[:n]).unique()) for n in (8, 6, 2, 5)] == [2, 3, 1, 1]  # groups of 4, 2, 2, 1
    # On two processes, which have whole groups each, as on one.
    assert torch.equal(deviation(h), torch.cat([deviation(h[:4]), deviation(h[4:])]))
    # One row of a group changes what is said of the others.
    critic, x = ConvCritic((1, 8, 8), 4), torch.randn(8, 1, 8, 8, generator=generator(0))
    moved = x.clone()
    moved[0] *= 3
    told = (critic(x) - critic(moved)).abs() > 1e-6
    assert told.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("critic", [ConvCritic((1, 8, 8), 4), MLPCritic((1, 8, 8), 8)])
def test_gradients_have_gradients(critic: nn.Module):
    critic = critic.double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator(0), requires_grad=True)

    def slope() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    weight = next(critic.parameters())
    (of_weight,) = torch.autograd.grad(slope(), weight)
    step = 1e-6 * torch.randn(weight.shape, dtype=torch.float64, generator=generator(1))
    with torch.no_grad():
        weight += step
    above = slope()
    with torch.no_grad():
        weight -= 2 * step
    assert float((above - slope()).detach()) / 2 == pytest.approx(float((of_weight * step).sum()), rel=1e-4)


def test_what_cannot_be_is_said_in_one_line():
    with pytest.raises(ValueError, match="sides of 8 or more, and samples are \\(1, 7, 28\\): take the critic mlp"):
        ConvCritic((1, 7, 28))
    with pytest.raises(ValueError, match="samples are \\(2,\\)"):
        ConvCritic((2,))
    with pytest.raises(ValueError, match="critic conv has width 0: it is 1 or more"):
        ConvCritic((1, 8, 8), width=0)
    with pytest.raises(ValueError, match="depth 0"):
        MLPCritic((2,), depth=0)
