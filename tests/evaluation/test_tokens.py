"""How near rows of tokens are to the data's, against values known by hand."""

import math

import pytest
import torch

from fewstep.common.randomness import generator
from fewstep.evaluation.tokens import bigram_kl, entropy, spelling


def test_pairs_of_neighbours_are_counted() -> None:
    data, other = torch.tensor([[0, 1, 0, 1]] * 1000), torch.tensor([[0, 0, 1, 1]] * 1000)
    assert bigram_kl(data, data, 2) == 0
    p = torch.tensor([0.5, 2000.5, 1000.5, 0.5], dtype=torch.float64) / 3002
    q = torch.tensor([1000.5, 1000.5, 0.5, 1000.5], dtype=torch.float64) / 3002
    assert bigram_kl(other, data, 2) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)
    draws = torch.randint(5, (4000, 30), generator=generator(0)), torch.randint(5, (4000, 30), generator=generator(1))
    assert bigram_kl(*draws, 5) < 1e-3


def test_entropy_falls_where_rows_repeat_themselves() -> None:
    assert entropy(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), 4) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([[1, 1, 1, 1]]), 4) == 0
    assert entropy(torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]), 4) == pytest.approx(math.log(2) / 2)


def test_words_between_two_spaces_are_looked_up() -> None:
    symbols = " abc"
    rows = torch.tensor([[symbols.index(c) for c in text] for text in ("c ab abc", "a cc  ab", "abcabcab")])
    assert spelling(rows, symbols, {"ab", "abc"}) == 1 / 2  # "ab" is one, "cc" is none; what the edges cut counts not
    assert spelling(rows[2:], symbols, {"ab"}) == 0
