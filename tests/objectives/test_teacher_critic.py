"""The teacher's features as a critic: on every family, with the gradient to the sample and none to the teacher."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from toys.students import NAMES, field_of, rows

from fewstep.common.randomness import generator
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.interpolants import Interpolant
from fewstep.networks import MLP
from fewstep.objectives.teacher_critic import TeacherCritic, blocks_of


class Own(nn.Module):
    """A network of a user's own: a list of blocks, the time into each, and a condition without which it fails."""

    shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 5), nn.SiLU())  # of the time: sees no x
        self.first = nn.Linear(3, 5)
        self.body = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.out = nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, *, shift: Tensor) -> Tensor:
        self.calls += 1
        h = self.first(x) + self.embed(t[:, None]) + shift[:, None]
        for layer in self.body:
            h = h + layer(torch.tanh(h))
        return self.out(h)


class Bare(nn.Module):
    """A network without parts."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


SHIFT = {"shift": torch.ones(1)}


def mlp_critic(**options: object) -> TeacherCritic:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = NetworkField(MLP(2, width=16, depth=5))
    return TeacherCritic(field, **{"width": 8, **options})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.takes_seconds
def test_every_family_is_a_critic_by_one_rule(name: str):
    field = field_of(name)
    x, cond = rows(name)
    before = deepcopy(field.state_dict())
    critic = TeacherCritic(field, shape=tuple(x.shape[1:]), width=8)
    x.requires_grad_()
    drawn = critic.draws(x, generator(0))
    logits = critic(x, **drawn, **cond)
    assert logits.shape == (2,)
    (gradient,) = torch.autograd.grad(logits[0], x, retain_graph=True)
    assert float(gradient[0].abs().sum()) > 0
    assert float(gradient[1].abs().sum()) == 0  # each row is judged by itself
    logits.sum().backward()
    assert all(p.grad is None for p in field.parameters())
    assert all(p.grad is not None for p in critic.parameters())
    assert all(torch.equal(value, before[key]) for key, value in field.state_dict().items())
    assert not any(module._forward_hooks for module in field.modules())  # pyright: ignore[reportPrivateUsage]


def test_the_default_layers_end_a_quarter_a_half_and_three_quarters_of_the_way():
    assert mlp_critic().layers == ["hidden.0", "hidden.1", "hidden.2"]  # of 4
    assert TeacherCritic(NetworkField(Own()), cond=SHIFT).layers == ["body.0", "body.1", "body.2"]
    assert blocks_of(Own()) == ["embed.0", "embed.1", "body.0", "body.1", "body.2", "body.3"]
    assert blocks_of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))) == ["0", "1"]


def test_layers_are_named_and_run_in_their_order():
    critic = TeacherCritic(NetworkField(Own()), layers=["body.3", "first"], cond=SHIFT)
    assert critic.layers == ["first", "body.3"]
    with pytest.raises(ValueError, match=r"unknown module of the teacher's network 'bodi.3': did you mean 'body.3'"):
        TeacherCritic(NetworkField(Own()), layers=["bodi.3"], cond=SHIFT)
    with pytest.raises(ValueError, match="'embed' of the teacher's network gives no features of x"):
        TeacherCritic(NetworkField(Own()), layers=["embed", "body.0"], cond=SHIFT)


def test_logits_are_the_heads_means_of_the_features_of_the_noised_row():
    critic, x = mlp_critic(times=(0.3, 0.3)), torch.randn(6, 2, generator=generator(1))
    drawn = critic.draws(x, generator(2))
    assert torch.equal(drawn["time"], torch.full((6,), 0.3))
    noised = 0.3 * x + 0.7 * drawn["noise"]
    network: MLP = critic.field.network  # pyright: ignore[reportAssignmentType]
    h, logits = network.input(noised), []
    from fewstep.networks import sinusoidal

    h = h + network.time(sinusoidal(drawn["time"], 64, low=0.5, high=30.0))
    for layer, head in zip(network.hidden[:3], critic.heads, strict=True):
        h = layer(nn.functional.gelu(h))
        normed = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        told = sinusoidal(drawn["time"], 32, low=0.5, high=30.0) @ head.time.weight.T  # pyright: ignore
        inner = normed @ head.first.weight.T + head.first.bias + told  # pyright: ignore
        logits.append(nn.functional.silu(inner) @ head.last.weight[0] + head.last.bias)  # pyright: ignore
    torch.testing.assert_close(critic(x, **drawn), torch.stack(logits).mean(0))


def test_the_call_ends_at_the_last_layer_and_a_guided_teacher_is_asked_once():
    own = Own()
    after: list[int] = []
    own.body[3].register_forward_hook(lambda *_: after.append(1))
    field = NetworkField(own)
    critic = TeacherCritic(Guided(field, 3.0, weak=field), cond=SHIFT)
    own.calls, x = 0, torch.randn(4, 3)
    after.clear()
    critic(x, **critic.draws(x, generator(0)), shift=torch.ones(4), guidance=torch.full((4,), 2.0))
    assert own.calls == 1
    assert after == []


def test_the_teacher_is_not_checkpointed_and_goes_where_the_heads_go():
    critic = mlp_critic()
    assert not any("hidden" in name for name in critic.state_dict())
    assert {p.shape for p in critic.parameters()} == {p.shape for p in critic.heads.parameters()}
    critic.double()
    assert next(critic.field.parameters()).dtype == torch.float64


def test_times_are_drawn_between_the_two_and_the_seed_decides_the_heads():
    x = torch.zeros(2000, 2)
    time = mlp_critic(times=(0.4, 0.8)).draws(x, generator(0))["time"]
    assert 0.4 <= float(time.min()) < 0.41
    assert 0.79 < float(time.max()) <= 0.8
    one, two, other = mlp_critic(), mlp_critic(), mlp_critic(seed=1)
    assert torch.equal(one.heads[0].first.weight, two.heads[0].first.weight)  # pyright: ignore
    assert not torch.equal(one.heads[0].first.weight, other.heads[0].first.weight)  # pyright: ignore


def test_what_cannot_be_is_said_in_one_line():
    with pytest.raises(ValueError, match="a GaussianField has none: take the critic conv or mlp"):
        TeacherCritic(GaussianField(torch.zeros(2), torch.eye(2)))
    with pytest.raises(ValueError, match="width of the critic teacher is 0"):
        mlp_critic(width=0)
    with pytest.raises(ValueError, match="times of the critic teacher"):
        mlp_critic(times=(0.9, 0.2))
    with pytest.raises(ValueError, match=r"Own does not run on a row of shape \(3,\) with no conditions .*cond="):
        TeacherCritic(NetworkField(Own()))
    with pytest.raises(ValueError, match="no list of blocks"):
        TeacherCritic(NetworkField(Bare()), shape=(2,))


def test_a_teacher_between_two_data_sets_is_no_critic() -> None:
    teacher = NetworkField(MLP(2), Interpolant(latent="sine"))
    with pytest.raises(ValueError, match=r"the critic teacher needs .* normal noise.*: take the critic conv or mlp"):
        TeacherCritic(teacher)
