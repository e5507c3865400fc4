"""Philox against the published known-answer vectors, and as a source of uniform bits."""

import pytest
import torch

from aotrain.formats import data_key, philox_bits16, philox_u32
from aotrain.formats.random import seed_word


def test_known_answers():
    # Random123's kat_vectors, philox4x32-10: counter and key all zero.
    want = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_u32(0, torch.zeros((), dtype=torch.int64)).tolist() == want


def test_counters_beyond_32_bits_and_seeds_beyond_32_bits_matter():
    low, high = torch.tensor([5]), torch.tensor([5 + (1 << 32)])
    assert not torch.equal(philox_u32(3, low), philox_u32(3, high))
    assert not torch.equal(philox_u32(3, low), philox_u32(3 + (1 << 32), low))


def test_eight_indices_share_a_counter_wherever_they_are():
    words = philox_u32(99, torch.arange(3))
    want = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()
    order = torch.randperm(24)
    assert torch.equal(philox_bits16(99, torch.arange(24)), want)
    assert torch.equal(philox_bits16(99, order.view(4, 6)), want[order].view(4, 6))


def test_bits_are_uniform():
    draws = philox_bits16(1234, torch.arange(1 << 16)).double()
    assert draws.min() >= 0
    assert draws.max() < 1 << 16
    # Mean of 65536 uniform draws: standard deviation 2^16 / sqrt(12 * 65536) = 73.9; five of them.
    assert abs(draws.mean() - (2**16 - 1) / 2) < 5 * 73.9


def test_key_follows_from_seed_and_values_alone():
    x = torch.randn(7, 33).bfloat16()
    bits = x.float().numpy().view("int32").astype("int64").sum()
    assert data_key(0, x).item() == bits
    assert data_key(3, x).item() == bits ^ (
        (3 * 0x9E3779B97F4A7C15) % 2**64 - 2**64 * (3 * 0x9E3779B97F4A7C15 >> 63 & 1)
    )
    for same in (x.float(), x.t(), x.flip(0), x.clone()):
        assert data_key(3, same) == data_key(3, x)
    assert data_key(3, x[:0]) == data_key(3, torch.zeros(2))
    # A key as a tensor is the key as a number.
    counters = torch.arange(24)
    assert torch.equal(philox_bits16(data_key(3, x), counters), philox_bits16(int(data_key(3, x)), counters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_counts_and_no_sum_wraps_early(dtype: torch.dtype):
    """Also more rows than a sum of 16-bit parts has room for in 32 bits, and a vector."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for shape in ((6, 40), (40,), (2**16 + 3, 1), (2, 3, 5)):
        x = torch.randn(shape).to(dtype)
        x[0] = -1.0  # the most negative patterns are those of large negative numbers
        key = int(data_key(1, x))
        assert key == int(x.float().numpy().view("int32").astype("int64").sum()) ^ seed_word(1)
        for bit in (0, 3, x.element_size() * 8 - 1):
            other = x.clone()
            other.view(integer).view(-1)[-1] ^= torch.tensor(1 << bit, dtype=torch.int64).to(integer)
            assert int(data_key(1, other)) != key
    x = torch.full((2**17, 2), -torch.inf, dtype=dtype)
    assert int(data_key(0, x)) == 2**18 * (0xFF800000 - 2**32)


def test_keys_of_streams_are_independent():
    x = torch.randn(100)
    draws = torch.stack([philox_bits16(data_key(seed, x), torch.arange(4096)) for seed in range(4)]).double()
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert correlation.abs().max() < 5 / 64  # five standard deviations of 1 / sqrt(4096)
