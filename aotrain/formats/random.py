"""Counter-based random bits: Philox4x32-10 in integer torch arithmetic.

A counter-based generator is a pure function of (seed, counter), so the bits that round element `i` at step `t` do not
depend on the device, on how many ranks share the tensor, or on what was drawn before. Triton's
`tl.randint(seed, offset)` is the same function, which lets a kernel reproduce this reference bit for bit.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3 and table 2.
"""

import torch

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# 2^64 over the golden ratio, an odd number: multiples of it differ in most bits.
_SEED_MULTIPLIER = 0x9E3779B97F4A7C15
# |sum| of as many 16-bit integers is at most 2^30.
_ROWS_IN_32_BITS = 2**15


def data_key(seed: int, x: torch.Tensor) -> torch.Tensor:
    """A Philox key that follows from a seed and the values of a tensor: int64 without dimensions.

    The sum of the float32 bit patterns of all elements, as signed 32-bit integers in 64 bits, exclusive-or the low 64
    bits of `seed * 0x9E3779B97F4A7C15`. A sum of integers does not depend on its order, nor on strides.

    Noise with such a key needs no state: a repeated computation repeats its noise (activation checkpointing, a resumed
    run), ranks with equal data draw equal noise and stay equal, ranks and steps with other data draw other noise.

    Args:
        seed: any integer.
        x: float32, bfloat16 or float16, any shape.
    """
    return _sum_of_bits(x) ^ seed_word(seed)


def _sum_of_bits(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.bfloat16 or x.dim() < 2:
        return x.float().view(torch.int32).sum(dtype=torch.int64)
    # The upper half of the float32 patterns. Sums in 32 bits, along columns, take a third of the time on CPU.
    rows = x.view(torch.int16).flatten(0, -2).split(_ROWS_IN_32_BITS)
    return torch.stack([part.sum(0, dtype=torch.int32) for part in rows]).sum(dtype=torch.int64) << 16


def seed_word(seed: int) -> int:
    """The part of `data_key` that follows from the seed, a signed 64-bit integer."""
    word = (seed * _SEED_MULTIPLIER) & _MASK64
    return word - (1 << 64) if word >> 63 else word


def philox_u32(seed: int | torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """128 random bits per counter, as four words.

    Args:
        seed: the 64-bit key, an integer or an int64 tensor that broadcasts to the counter.
        counter: int64 tensor of any shape, values >= 0; the low 64 bits of Philox's 128-bit counter.

    Returns:
        int64 tensor [..., 4] with values in [0, 2^32): Philox's output words.
    """
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(c0, _ROUND_MULTIPLIERS[0])
        high1, low1 = _multiply_wide(c2, _ROUND_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_INCREMENTS[0]) & _MASK32, (key1 + _KEY_INCREMENTS[1]) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def philox_bits16(seed: int | torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """16 random bits per index, int64 in [0, 2^16): the noise that `round_stochastic` takes.

    Eight neighbours share one Philox call, which is what a kernel limited by memory bandwidth can afford: index i takes
    the low (i even) or high (i odd) half of word `i // 2 % 4` of counter `i // 8`.

    Args:
        seed: the 64-bit key, an integer or an int64 tensor without dimensions.
        index: int64 tensor of any shape, values >= 0.
    """
    # Neighbouring indices are neighbours in the tensor as a rule: find each counter once.
    counters, at = (index >> 3).unique_consecutive(return_inverse=True)
    words = philox_u32(seed, counters)[at, (index >> 1) & 3]
    return (words >> ((index & 1) << 4)) & 0xFFFF


def _multiply_wide(x: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) 32-bit halves of x * multiplier, in 16-bit limbs: int64 cannot hold a 64-bit unsigned product."""
    low_product = x * (multiplier & 0xFFFF)  # < 2^48
    high_product = x * (multiplier >> 16)  # < 2^48
    middle = (low_product >> 16) + high_product  # < 2^49
    low = ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)
    return middle >> 16, low
