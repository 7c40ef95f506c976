"""Continuous-time Markov chains of tokens: the other way to make discrete data, as a baseline and a teacher.

At time t each token of x_t is that of the data with the probability t, else noise: a mask, or a token drawn uniformly
(arXiv 2211.16750, 2402.04997, 2406.07524). A network that predicts the data's tokens at each place, ``p(x1 | x_t)``,
gives the rates of the way back: a token jumps with the rate ``1 / (1 - t)`` to one drawn from p. Within a step each
token jumps by itself, so a chain of few steps knows no more than the product of its marginals at a time.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, uniform
from fewstep.flows.broadcasting import expand

CHAINS = ("masked", "uniform")


def check_chain(kind: str) -> str:
    """The kind of a chain, which is known.

    Raises:
        ValueError: it is not.
    """
    if kind not in CHAINS:
        raise unknown("chain", kind, CHAINS)
    return kind


def chain_noise(kind: str, noise: Tensor) -> Tensor:
    """What a chain starts from, of normal numbers (B, L, V): masks, which are zeros, or one-hot tokens, uniform as the
    largest of V equal numbers is."""
    return torch.zeros_like(noise) if kind == "masked" else one_hot(noise.argmax(-1), noise.shape[-1]).to(noise)


def chain_state(kind: str, noise: Tensor, data: Tensor, t: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """x_t (B, L, V) of data, one-hot, and which places are noise (B, L)."""
    is_noise = uniform(data.shape[:-1], generator).to(data) >= expand(t, data[..., 0])
    return torch.where(is_noise[..., None], chain_noise(kind, noise), data), is_noise


@torch.no_grad()
def sample_chain(field: Any, noise: Tensor, times: Tensor, kind: str, *, generator: Generators, **cond: Any) -> Tensor:
    """One-hot tokens (B, L, V) along times from 0 to 1 (tau-leaping): from s to t each noisy token is replaced, with
    the probability ``(t - s) / (1 - s)``, by one of ``p(x1 | x_s)``. A call of the network a step.

    Args:
        field: whose ``end(x, s, t, **cond)`` are the probabilities of tokens.
        noise: (B, L, V), normal, which makes the first tokens.
        kind: masked, where a token once there stays, or uniform.
    """
    x = chain_noise(kind, noise)
    for s, t in pairwise(times.tolist()):
        at = torch.full((len(x),), s, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        chances = field.end(x, at, at, **cond).double()
        u = uniform((*x.shape[:-1], 2), generator, torch.float64).to(x.device)
        # In float64: rounding to float32 makes rare tokens rarer.
        drawn = (chances.cumsum(-1) < u[..., :1] * chances.sum(-1, keepdim=True)).sum(-1).clamp(max=x.shape[-1] - 1)
        jumps = u[..., 1] < (t - s) / (1 - s)
        jumps = jumps & (x.sum(-1) == 0) if kind == "masked" else jumps
        x = torch.where(jumps[..., None], one_hot(drawn, x.shape[-1]).to(x), x)
    return x
