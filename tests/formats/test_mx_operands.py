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
    data_key,
    dequantize,
    hadamard_signs,
    hadamard_transform,
    inverse_hadamard_transform,
    philox_bits16,
    quantize,
    quantize_mx,
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
@pytest.mark.parametrize("shape", [(6, 40), (3, 64), (2, 3, 33)], ids=str)
@pytest.mark.parametrize("hadamard", [0, 16, 32])
def test_the_noise_is_a_function_of_the_values(dtype: torch.dtype, shape, hadamard: int):
    x = torch.randn(shape).to(dtype)
    scaling = replace(STOCHASTIC, hadamard=hadamard)
    y = hadamard_transform(x, hadamard_signs(0, hadamard)) if hadamard else x
    padded = torch.nn.functional.pad(y, (0, -y.shape[-1] % 32))
    noise = philox_bits16(data_key(hadamard, x), torch.arange(padded.numel())).view(padded.shape)[..., : y.shape[-1]]
    want = quantize(y, STOCHASTIC, noise=noise)
    for same in (x, x.clone(), x.mT.contiguous().mT):
        assert_bitwise_equal(quantize_mx(same, scaling).data, want.data)


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


def test_the_two_products_of_backward_have_independent_noise():
    """A gradient and its transposition have equal sums of bits; the transform of one sets them apart (recipe mxfp4)."""
    x = torch.randn(128, 128)
    index = torch.arange(x.numel())
    draws = [philox_bits16(data_key(size, x), index).double() - 32767.5 for size in (0, 32)]
    assert abs(float(torch.corrcoef(torch.stack(draws))[0, 1])) < 5 / len(index) ** 0.5
