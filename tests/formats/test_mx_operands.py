"""MX operands: the transform, the noise that an operand's own bits decide, and that its expectation is the operand."""

from dataclasses import replace

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    ROWWISE,
    SCALE_FORMATS,
    Scaling,
    dequantize,
    hadamard_signs,
    hadamard_transform,
    inverse_hadamard_transform,
    philox_bits16,
    quantize,
    quantize_mx,
    stochastic_key,
)
from aotrain.testing import assert_bitwise_equal, sqnr

NEAREST = Scaling(element=FLOAT4_E2M1, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
STOCHASTIC = replace(NEAREST, rounding="stochastic")


def test_without_additions_it_is_quantize():
    x = torch.randn(5, 70)
    for got, want in zip(quantize_mx(x, NEAREST), quantize(x, NEAREST), strict=True):
        assert_bitwise_equal(got, want) if isinstance(got, torch.Tensor) else None


@pytest.mark.parametrize("shape", [(4, 64), (3, 70), (2, 3, 31), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [16, 32])
def test_a_transformed_operand_is_quantized_whole_blocks_of_the_transform(shape, size):
    x = torch.randn(shape)
    q = quantize_mx(x, replace(NEAREST, hadamard=size))
    assert q.data.shape == (*shape[:-1], -(-shape[-1] // size) * size)
    transformed = hadamard_transform(x, hadamard_signs(0, size))
    assert_bitwise_equal(q.data, quantize(transformed, NEAREST).data)
    back = inverse_hadamard_transform(dequantize(q), hadamard_signs(0, size))[..., : shape[-1]]
    assert sqnr(x, back) > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_noise_is_a_function_of_the_bits(dtype: torch.dtype):
    x = torch.randn(6, 40).to(dtype)
    key = stochastic_key(x)
    assert key.dtype == torch.int64
    assert stochastic_key(x.clone()) == key
    assert stochastic_key(x.t().contiguous().t()) == key  # the layout does not matter
    assert stochastic_key(x.view(2, 3, 40)) == key
    assert stochastic_key(x.t()) != key
    # Every single bit of every element counts.
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for row, column, bit in ((0, 0, 0), (5, 39, 3), (2, 17, x.element_size() * 8 - 1)):
        other = x.clone()
        flip = torch.tensor(1 << bit, dtype=torch.int64).to(integer)
        other.view(integer)[row, column] ^= flip
        assert stochastic_key(other) != key
    noise = philox_bits16(key, torch.arange(x.numel())).view(x.shape)
    q = quantize_mx(x, STOCHASTIC)
    assert_bitwise_equal(q.data, quantize(x, STOCHASTIC, noise=noise).data)


def test_the_key_is_the_documented_sum():
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.bfloat16)
    bits = [[0x3F80, 0xC000 - 0x10000], [0x3F00, 0x4040]]
    golden = 0x9E3779B97F4A7C15
    want = ((bits[0][0] + bits[1][0]) * golden + (bits[0][1] + bits[1][1]) * 3 * golden) % 2**64
    assert int(stochastic_key(x)) % 2**64 == want


def test_the_key_of_more_rows_than_a_32_bit_sum_holds():
    x = torch.full((2**16 + 3, 1), -1.0, dtype=torch.bfloat16)  # bits 0xBF80
    assert int(stochastic_key(x)) % 2**64 == (2**16 + 3) * (0xBF80 - 2**16) * 0x9E3779B97F4A7C15 % 2**64


def test_the_expectation_is_the_operand_and_nothing_saturates():
    """RCEIL keeps every element within reach of rounding up: with FLOOR the largest ones would be cut off."""
    x = torch.randn(1, 32) * 3
    generator = torch.Generator().manual_seed(0)
    draws = 4096
    total = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(draws):
        noise = torch.randint(2**16, x.shape, generator=generator)
        total += dequantize(quantize_mx(x, STOCHASTIC, noise=noise)).double()
    step = 2 * float(x.abs().max()) / 6  # at most, of e2m1 at this scale
    assert float((total / draws - x).abs().max()) < 6 * step / 2 / draws**0.5
    floor = replace(STOCHASTIC, scale=SCALE_FORMATS["e8m0_floor"])
    x = torch.full((1, 32), 7.9)
    noise = torch.randint(2**16, x.shape, generator=generator)
    assert float(dequantize(quantize_mx(x, floor, noise=noise)).max()) == 6.0
    assert float(dequantize(quantize_mx(x, STOCHASTIC, noise=noise)).max()) == 8.0


def test_noise_of_neighbouring_keys_is_independent():
    """Keys are sums: two that differ by one must not give related bits."""
    index = torch.arange(1 << 14)
    one, other = (philox_bits16(torch.tensor(key), index).double() - 32767.5 for key in (12345, 12346))
    correlation = (one * other).mean() / (one.std() * other.std())
    assert abs(float(correlation)) < 5 / len(index) ** 0.5


def test_what_is_not_mx_is_refused():
    with pytest.raises(ValueError, match="want blocks of 1x32"):
        quantize_mx(torch.ones(2, 2), replace(NEAREST, block=ROWWISE))
    with pytest.raises(ValueError, match="at most 32"):
        quantize_mx(torch.ones(2, 2), replace(NEAREST, hadamard=64))
    with pytest.raises(ValueError, match="use quantize_mx"):
        quantize(torch.ones(2, 2), replace(NEAREST, hadamard=32))
    with pytest.raises(ValueError, match="power of two"):
        replace(NEAREST, hadamard=12)
