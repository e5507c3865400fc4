"""The random Hadamard transform: its matrix, orthogonality, inverse, exactness, and what it is for."""

import pytest
import torch

from aotrain.formats import hadamard_signs, hadamard_transform, inverse_hadamard_transform, philox_u32, quantize_nvfp4
from aotrain.formats.nvfp4 import dequantize_nvfp4
from aotrain.testing import adversarial_matrix, assert_bitwise_equal, sqnr

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
# float32 rounding of log2(n) additions and a product: measured 142-149 dB over the sizes, 139-147 there and back.
FLOAT32_DB = 130.0


def sylvester(size: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("size", SIZES)
def test_is_the_product_with_the_documented_matrix(size: int):
    signs = hadamard_signs(7, size)
    matrix = signs.double()[:, None] * sylvester(size) / size**0.5
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    got = hadamard_transform(torch.eye(size), signs)
    assert_bitwise_equal(got, (signs[:, None] * sylvester(size).float()) * (1 / size**0.5))
    x = torch.randn(5, 3 * size)
    want = (x.double().unflatten(-1, (3, size)) @ matrix).flatten(-2)
    assert got.dtype == torch.float32
    assert size == 1 or sqnr(want, hadamard_transform(x, signs)) > FLOAT32_DB


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_whole_numbers_are_transformed_exactly_and_come_back(size: int):
    x = torch.randint(-128, 128, (20, 4 * size)).float()
    signs = hadamard_signs(3, size)
    y = hadamard_transform(x, signs)
    want = (x.double().unflatten(-1, (4, size)) * signs @ sylvester(size)).flatten(-2) / size**0.5
    assert torch.equal(y.double(), want)
    assert torch.equal(inverse_hadamard_transform(y, signs), x)
    assert torch.equal(y.double().square().sum(), x.double().square().sum())


def test_bfloat16_values_of_close_exponents_are_exact():
    exponent = torch.randint(0, 13, (500, 16)).float()
    x = (torch.randn(500, 16).sign() * (1 + torch.rand(500, 16)) * torch.exp2(exponent)).bfloat16()
    x[:, 0], x[:, 1] = 1.9921875, -1.9921875 * 2**11
    signs = hadamard_signs(1)
    assert torch.equal(inverse_hadamard_transform(hadamard_transform(x, signs), signs), x.float())


@pytest.mark.parametrize("size", SIZES)
def test_inverse(size: int):
    x = torch.randn(7, 5 * size)
    signs = hadamard_signs(11, size)
    back = inverse_hadamard_transform(hadamard_transform(x, signs), signs)
    assert torch.equal(back, x) or sqnr(x, back) > FLOAT32_DB


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 33])
def test_products_stay_as_they_are_with_ragged_blocks_too(columns: int):
    a, b = torch.randn(6, columns), torch.randn(4, columns)
    signs = hadamard_signs(5)
    a_t, b_t = hadamard_transform(a, signs), hadamard_transform(b, signs)
    assert a_t.shape == (6, -(-columns // 16) * 16)
    torch.testing.assert_close(a_t @ b_t.t(), a @ b.t(), rtol=1e-5, atol=1e-5)
    back = inverse_hadamard_transform(a_t, signs)
    assert not back[:, columns:].abs().gt(1e-6).any()


def test_signs_are_the_documented_bits():
    signs = hadamard_signs(42, 64)
    words = philox_u32(42, torch.arange(64))[:, 0]
    assert signs.tolist() == [-1.0 if word & 1 else 1.0 for word in words.tolist()]
    assert signs.dtype == torch.float32
    assert torch.equal(hadamard_signs(42, 16), signs[:16])
    assert not torch.equal(hadamard_signs(43, 64), signs)


def test_non_contiguous_input_and_other_dtypes():
    x = adversarial_matrix(32, 48)
    signs = hadamard_signs(0)
    assert_bitwise_equal(hadamard_transform(x.t(), signs), hadamard_transform(x.t().contiguous(), signs))
    assert_bitwise_equal(hadamard_transform(x, signs), hadamard_transform(x.float(), signs))


def test_an_outlier_flushes_fewer_of_its_neighbours_to_zero():
    x = torch.randn(64, 256)
    x[:, ::16] *= 30.0
    signs = hadamard_signs(9)
    others = torch.arange(256) % 16 != 0
    plain = dequantize_nvfp4(quantize_nvfp4(x))
    transformed = inverse_hadamard_transform(dequantize_nvfp4(quantize_nvfp4(hadamard_transform(x, signs))), signs)
    # The outliers' own error spreads over the block in exchange.
    zeros = [values[:, others].eq(0).sum().item() for values in (plain, transformed)]
    assert zeros[1] < zeros[0] / 4


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="2\\^k signs"):
        hadamard_transform(torch.ones(2, 12), torch.ones(12))
    with pytest.raises(ValueError, match="want a multiple of 16"):
        inverse_hadamard_transform(torch.ones(2, 12), torch.ones(16))
