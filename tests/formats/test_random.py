"""Philox against the published known-answer vectors, and as a source of uniform bits."""

import torch

from aotrain.formats import philox_bits16, philox_u32


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
