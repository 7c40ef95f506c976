"""Markov chains of tokens: with exact conditionals they make what is known of them, and no more."""

import pytest
import torch
from flows.test_spaces import CHAIN, F64, chain, shares
from torch import Tensor

import fewstep
from fewstep.common.randomness import generator, normal
from fewstep.flows.chains import chain_noise, chain_state, sample_chain
from fewstep.flows.fields import NetworkField
from fewstep.flows.times import draw_pairs, draw_times
from fewstep.flows.token_times import Deciding, decided, time_decided
from fewstep.networks import SequenceTransformer


class Exact:
    """``p(x1 at a place | x_t)`` of the chain of three tokens, masks being zeros or noise uniform."""

    def __init__(self, kind: str) -> None:
        self.kind, self.field = kind, chain()

    def end(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        states, k = self.field.states, torch.einsum("blv,klv->bkl", x.double(), self.field.states)  # 1 where they agree
        if self.kind == "masked":
            known = x.sum(-1)[:, None] > 0
            fits = torch.where(known, k, 1.0)
        else:
            noise = (1 - s.double())[:, None, None] / 3
            fits = noise + s.double()[:, None, None] * k
        weights = fits.prod(-1) * self.field.log_weights.exp()
        return torch.einsum("bk,klv->blv", weights / weights.sum(1, keepdim=True), states)


@pytest.mark.parametrize(
    ("kind", "steps", "wanted"),
    [("masked", 1, 0.558), ("masked", 2, 0.302), ("masked", 4, 0.158), ("masked", 16, 0.041), ("uniform", 1, 0.558)],
)
def test_an_exact_chain_of_few_steps_has_the_law_of_the_product(kind: str, steps: int, wanted: float) -> None:
    """The total variation to the joint law by masked chains of 1, 2, 4, 16 steps; of 100 by both it is small."""
    draw, rows = generator(7), 40_000
    noise = normal(torch.empty(rows, 3, 3), draw)
    joint = chain().log_weights.exp().float()

    def apart(n: int) -> float:
        x = sample_chain(Exact(kind), noise, torch.linspace(0, 1, n + 1, dtype=F64), kind, generator=draw)
        assert torch.equal(x.sum(-1), torch.ones(rows, 3))
        return float(0.5 * (shares(chain(), CHAIN.decode(x)) - joint).abs().sum())

    assert apart(steps) == pytest.approx(wanted, abs=0.012)
    if steps == 1:
        assert apart(64) < 0.04


def test_a_state_is_noise_as_often_as_its_time_says() -> None:
    data = CHAIN.encode(torch.randint(3, (20_000, 3), generator=generator(0)))
    noise, t = normal(data, generator(1)), torch.full((20_000,), 0.3)
    x, is_noise = chain_state("masked", noise, data, t, generator(2))
    assert float(is_noise.double().mean()) == pytest.approx(0.7, abs=0.01)
    assert torch.equal(x.sum(-1) == 0, is_noise)
    x, is_noise = chain_state("uniform", noise, data, t, generator(2))
    assert torch.equal(x[~is_noise], data[~is_noise])
    assert x[is_noise].mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert torch.equal(chain_noise("uniform", noise).argmax(-1), noise.argmax(-1))


def small(times: int = 1) -> SequenceTransformer:
    torch.manual_seed(0)
    return SequenceTransformer(3, 3, width=16, depth=1, heads=2, times=times)


def test_a_chain_is_trained_by_its_conditionals_and_is_no_velocity() -> None:
    field, data = NetworkField(small(), prediction="data", space=CHAIN), CHAIN.encode(torch.tensor([[0, 1, 2]] * 64))
    result = fewstep.fit(field, fewstep.MarkovChain(), data, steps=60, batch=32, lr=1e-2, quiet=True, device="cpu")
    assert field.chain == "masked"
    drawn = fewstep.sample(field, torch.randn(8, 3, 3), 2, generator=generator(0))
    assert CHAIN.decode(drawn).tolist() == [[0, 1, 2]] * 8
    assert result.step == 60
    none = "needs a velocity, and the model is a masked Markov chain of tokens, which has none"
    with pytest.raises(ValueError, match=f"ITVM {none}"):
        fewstep.ITVM(field)
    with pytest.raises(ValueError, match=f"the score {none}"):
        field.score(torch.randn(2, 3, 3), 0.5)
    with pytest.raises(ValueError, match="chain"):
        fewstep.MarkovChain("absorbing")
    with pytest.raises(ValueError, match="trains a field of tokens"):
        fewstep.MarkovChain().check_student(NetworkField(small()))


# When tokens are decided


def test_the_share_decided_is_that_of_the_formula_and_of_draws() -> None:
    for size, t, wanted in ((3, 0.5, 0.451), (3, 0.75, 0.953), (30_000, 0.75, 0.142), (30_000, 0.85, 0.932)):
        assert float(decided(torch.tensor(t, dtype=F64), size)) == pytest.approx(wanted, abs=6e-4)
    t = 0.6
    x = (1 - t) * torch.randn(100_000, 27, generator=generator(0))
    x[:, 0] += t
    chance = float((x.argmax(1) == 0).double().mean())
    assert float(decided(torch.tensor(t, dtype=F64), 27)) == pytest.approx((27 * chance - 1) / 26, abs=0.006)
    share = torch.linspace(0, 1, 101, dtype=F64)
    assert torch.allclose(decided(time_decided(share, 27), 27), share, atol=1e-6)
    assert time_decided(torch.tensor([0.0, 1.0]), 27).tolist() == [0.0, 1.0]
    assert float(Deciding(27).network_time(torch.tensor([1.0]))) == 1.0


def test_times_of_tokens_are_drawn_where_they_are_decided() -> None:
    t = draw_times(20_000, generator(0), "tokens(27, 0.75)")
    share = decided(t, 27)
    assert float(share.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.double().std()) == pytest.approx(12**-0.5, abs=0.01)
    s, t = draw_pairs(20_000, generator(0), "tokens(27, 1)")
    edges = {round(float(edge), 4) for edge in decided(torch.cat([s, t]), 27)}
    assert edges == {round(k / 8, 4) for k in range(9)}
    with pytest.raises(ValueError, match=r"say tokens\(27, 0.75\)"):
        draw_times(2, generator(0), "tokens(27)")
    field = NetworkField(small(), prediction="data", space=CHAIN)
    whole = fewstep.sample(field, torch.zeros(2, 3, 3), 3, grid="tokens")
    grid = time_decided(torch.linspace(0, 1, 4, dtype=F64), 3)
    assert torch.equal(whole, fewstep.sample(field, torch.zeros(2, 3, 3), 3, grid=grid))


# The network


def test_a_map_of_tokens_begins_as_its_field() -> None:
    field = NetworkField(small(), Deciding(3), "data", path=fewstep.Linear(), space=CHAIN)
    student = fewstep.FlowMap.from_field(field)
    assert student.space == CHAIN
    x = torch.randn(4, 3, 3)
    with torch.no_grad():
        assert torch.equal(student.velocity(x, 0.4), field(x, 0.4))
        end = student.end(x, torch.full((4,), 0.4), torch.full((4,), 0.4))
        assert torch.allclose(end, x + 0.6 * field(x, 0.4), atol=1e-6)
        assert torch.allclose(end.sum(-1), torch.ones(4, 3))
    for options, why in (
        ({"heads": 3}, "the heads share the width"), ({"depth": 0}, "depth 0"), ({"guidance": "interval"}, "alone"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            SequenceTransformer(3, 3, **{"width": 16, **options})
    with pytest.raises(ValueError, match=r"for rows \(3, 3\) was given \(4, 3\)"):
        small()(torch.randn(2, 4, 3), torch.zeros(2))


@pytest.mark.takes_seconds
def test_one_call_of_a_map_knows_what_tokens_have_to_do_with_each_other() -> None:
    """The chain of three tokens learned by ITVM from its exact field: one call is nearer to the joint law than any
    chain or any Euler step can be (.558, .680), by the cross-entropy of tokens."""
    exact = chain()
    torch.manual_seed(0)
    network = SequenceTransformer(3, 3, width=48, depth=2, heads=2, times=2)
    student = fewstep.FlowMap.from_field(exact, network)
    objective = fewstep.ITVM(exact, times="tokens(3, 0.75)")
    fewstep.fit(student, objective, lambda_data(exact), steps=500, batch=256, lr=4e-3, quiet=True, device="cpu")
    joint, noise = exact.log_weights.exp().float(), torch.randn(20_000, 3, 3, generator=generator(5))
    one = shares(exact, CHAIN.decode(fewstep.sample(student, noise, 1)))
    euler = shares(exact, CHAIN.decode(fewstep.sample(exact, noise, 1)))
    assert 0.5 * (euler - joint).abs().sum() > 0.6
    assert 0.5 * (one - joint).abs().sum() < 0.2


def lambda_data(exact: fewstep.TokensField) -> Tensor:
    return exact.data(20_000, generator(3))
