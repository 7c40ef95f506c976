"""Randomness: one seed decides all, whatever the batch, the number of processes and the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.common.randomness import chunk_rows, generator, mix, normal, sample_generators, uniform


def test_the_hash_stays_what_it_is():
    # These numbers decide every training run and every sample: a change here breaks their repetition.
    hashes = [mix(0), mix(1), mix(0, 0), mix(1, 2, 3), mix(-1)]
    assert hashes == [1024642535, 794693847, 1910460566, 1986607068, 175353063]


def test_no_two_of_a_long_training_share_a_generator():
    words = [(seed, step, chunk) for seed in range(2) for step in range(2000) for chunk in range(8)]
    assert len({mix(*w) for w in words}) == len(words)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(words=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4), bit=st.integers(0, 63))
def test_one_bit_in_changes_half_of_the_bits_out(words, bit):
    other = [*words[:-1], words[-1] ^ (1 << bit)]
    assert 0 <= mix(*words) < 2**32
    assert mix(*words) != mix(*words, 0)
    assert 4 <= (mix(*words) ^ mix(*other)).bit_count() <= 28


def test_near_words_give_unrelated_numbers():
    x = torch.stack([torch.randn(4096, generator=generator(0, step)) for step in range(32)])
    off_diagonal = torch.corrcoef(x) - torch.eye(32)
    assert off_diagonal.abs().max() < 5.5 / 4096**0.5


def test_torch_keeps_32_bits_of_a_seed():
    # Why hashes have 32 bits: two seeds that differ only above would be one.
    one, other = (torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(one, other)


def test_the_same_words_give_the_same_bits():
    like = torch.zeros(5, 3)
    assert torch.equal(normal(like, generator(1, 2)), normal(like, generator(1, 2)))
    assert not torch.equal(normal(like, generator(1, 2)), normal(like, generator(2, 1)))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_chunks_reproduce_the_rows_of_one_process(processes):
    # 4 chunks of 3 rows, dealt to processes in order; two draws in a row, as a training step makes.
    def draws(chunks):
        generators = [generator(7, 11, chunk) for chunk in chunks]
        rows = 3 * len(generators)
        like = torch.zeros(rows, 2, 2)
        return normal(like, generators), uniform(rows, generators), normal(like, generators)

    each = 4 // processes
    parts = [draws(range(p * each, (p + 1) * each)) for p in range(processes)]
    for whole, part in zip(draws(range(4)), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(part))


def test_a_sample_has_its_noise_in_any_batch():
    like = torch.zeros(10, 3, 8, 8)
    whole = normal(like, sample_generators(3, range(10)))
    for split in (1, 3, 7):
        parts = [
            normal(like[first : first + split], sample_generators(3, range(first, min(first + split, 10))))
            for first in range(0, 10, split)
        ]
        assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[[7, 2]], normal(like[:2], sample_generators(3, [7, 2])))
    assert not torch.equal(whole, normal(like, sample_generators(4, range(10))))


def test_samples_of_a_run_never_share_a_seed():
    seeds = [g.initial_seed() for g in sample_generators(0, range(5000))]
    assert len(set(seeds)) == 5000
    assert max(seeds) < 2**32
    others = {g.initial_seed() for seed in range(1, 4) for g in sample_generators(seed, range(5000))}
    assert len(others) == 15_000
    assert not others & set(seeds)


def test_samples_with_consecutive_seeds_are_independent():
    x = normal(torch.zeros(64, 1024), sample_generators(0, range(64)))
    assert (torch.corrcoef(x) - torch.eye(64)).abs().max() < 5.5 / 1024**0.5
    assert x.mean().abs() < 5 / (64 * 1024) ** 0.5
    assert (x.var() - 1).abs() < 5 * (2 / (64 * 1024)) ** 0.5
    # Points of the plane take two numbers of each generator, the first ones: these must do, too.
    first = normal(torch.zeros(5000, 2), sample_generators(1, range(5000)))
    torch.testing.assert_close(first.T.cov(), torch.eye(2), rtol=0, atol=5 * (2 / 5000) ** 0.5)
    assert first.mean(0).abs().max() < 5 / 5000**0.5
    neighbours = torch.cat([first[1:], first[:-1]], dim=1).T.corrcoef() - torch.eye(4)
    assert neighbours.abs().max() < 5 / 5000**0.5


def test_half_precision_starts_from_the_same_noise():
    full = normal(torch.zeros(40, 3), generator(0))
    for dtype in (torch.float16, torch.bfloat16):
        half = normal(torch.zeros(40, 3, dtype=dtype), generator(0))
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))
    assert normal(torch.zeros(4, 3, dtype=torch.float64), generator(0)).dtype == torch.float64


def test_uniform_numbers():
    u = uniform(10_000, generator(0))
    assert u.shape == (10_000,)
    assert 0 <= u.min() < u.max() < 1
    assert uniform(4, generator(0), torch.float64).dtype == torch.float64


def test_chunk_rows():
    assert chunk_rows(12, generator(0)) == 12
    assert chunk_rows(12, [generator(0)] * 4) == 3


def test_rows_that_cannot_be_shared():
    with pytest.raises(ValueError, match="10 rows cannot be shared equally by 4 generators"):
        normal(torch.zeros(10, 2), [generator(k) for k in range(4)])
    with pytest.raises(ValueError, match="10 rows"):
        uniform(10, [generator(k) for k in range(4)])
