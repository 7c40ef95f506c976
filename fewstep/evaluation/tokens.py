"""How near rows of tokens are to the data's: pairs of neighbours, words, and how varied they are.

Tokens come as whole numbers (N, L). All is computed in float64: an entropy that falls unseen makes any likelihood look
good, so it is measured beside the others.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

METRICS = ("bigram_kl", "spelling", "entropy")


def bigram_kl(samples: Tensor, data: Tensor, size: int) -> float:
    """The divergence of the samples' pairs of neighbouring tokens from the data's, ``sum p log(p / q)`` in nats with p
    the data's, half a count added to each pair.

    Args:
        size: of the vocabulary.
    """
    p, q = (_pairs(tokens, size) for tokens in (data, samples))
    return float((p * (p / q).log()).sum())


def _pairs(tokens: Tensor, size: int) -> Tensor:
    places = tokens[:, :-1] * size + tokens[:, 1:]
    counts = torch.bincount(places.flatten(), minlength=size * size).double() + 0.5
    return counts / counts.sum()


def entropy(samples: Tensor, size: int) -> float:
    """The entropy in nats of the tokens within a sample, the mean over samples: it falls where rows repeat a token."""
    counts = torch.nn.functional.one_hot(samples, size).double().mean(1)
    return float(-(counts * counts.clamp(min=1e-300).log()).sum(1).mean())


def spelling(samples: Tensor, symbols: Sequence[Any], words: Collection[str]) -> float:
    """The share of the samples' whole words, those between two spaces, that are among the ``words``; 0 where there are
    none."""
    right = whole = 0
    for row in samples.tolist():
        inner = "".join([symbols[token] for token in row]).split(" ")[1:-1]
        inner = [word for word in inner if word]
        whole += len(inner)
        right += sum(word in words for word in inner)
    return right / whole if whole else 0.0
