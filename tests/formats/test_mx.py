"""MX blocks, 1 x 32 with E8M0 scales, of every element format against the formulas; and their special values."""

import math

import numpy as np
import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    SCALE_FORMATS,
    ElementFormat,
    ScaledTensor,
    Scaling,
    decode_elements,
    dequantize,
    quantize,
    scale_shape,
)
from aotrain.formats.e8m0 import E8M0_ROUNDINGS
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from tests.formats.reference import e8m0_byte, nearest_even

ELEMENTS = [FLOAT8_E4M3, FLOAT8_E5M2, FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1, INT8]
FLOATS = ELEMENTS[:-1]
element_ids = {"ids": lambda element: element.name}
pytestmark = pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)


def mx(x: torch.Tensor, element: ElementFormat, rounding: str) -> ScaledTensor:
    return quantize(x, Scaling(element=element, scale=SCALE_FORMATS[f"e8m0_{rounding}"], block=BLOCKWISE_1X32))


def stored(q: ScaledTensor) -> torch.Tensor:
    return decode_elements(q.data, torch.float32, q.scaling.element)


def assert_follows_the_formulas(x: torch.Tensor, element: ElementFormat, rounding: str) -> None:
    q = mx(x, element, rounding)
    bytes_, exact = np.zeros(scale_shape(x.shape, BLOCKWISE_1X32), dtype=np.uint8), x.double().numpy()
    values = np.zeros_like(exact)
    for i, j in np.ndindex(bytes_.shape):
        block = exact[i, j * 32 : (j + 1) * 32]
        bytes_[i, j] = e8m0_byte(float(np.abs(block).max()), element, rounding)
        values[i, j * 32 : (j + 1) * 32] = nearest_even(block * 2.0 ** (127 - int(bytes_[i, j])), element)
    np.testing.assert_array_equal(q.scale.view(torch.uint8).numpy(), bytes_)
    np.testing.assert_array_equal(stored(q).numpy(), values)
    scale = 2.0 ** (bytes_.astype(np.float64) - 127).repeat(32, 1)[:, : x.shape[1]]
    with np.errstate(over="ignore"):  # 2^128
        np.testing.assert_array_equal(dequantize(q).numpy(), (values * scale).astype(np.float32))


@pytest.mark.parametrize("element", ELEMENTS, **element_ids)
def test_blocks_follow_the_formulas(element: ElementFormat, rounding: str):
    for dtype in (torch.float32, torch.bfloat16):
        assert_follows_the_formulas(torch.randn(20, 100).to(dtype), element, rounding)
        assert_follows_the_formulas(adversarial_matrix(21, 70, dtype), element, rounding)


@pytest.mark.parametrize("element", ELEMENTS, **element_ids)
def test_every_bfloat16_value_in_blocks_of_neighbours(element: ElementFormat, rounding: str):
    values = all_bfloat16_values()
    assert_follows_the_formulas(values[values.isfinite()].view(-1, 32), element, rounding)


@pytest.mark.parametrize("element", ELEMENTS, **element_ids)
def test_a_block_of_zeros_has_byte_0_and_keeps_their_signs(element: ElementFormat, rounding: str):
    q = mx(torch.tensor([[0.0, -0.0] * 16]), element, rounding)
    assert q.scale.view(torch.uint8).item() == 0
    assert not stored(q).any()
    assert element is INT8 or torch.equal(stored(q).signbit(), torch.tensor([[False, True] * 16]))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("element", ELEMENTS, **element_ids)
def test_infinity_and_nan_give_byte_255_and_nan_in_their_block_only(element: ElementFormat, bad: float, rounding: str):
    x = torch.randn(2, 96)
    clean = mx(x, element, rounding)
    x[0, 40] = bad
    q = mx(x, element, rounding)
    is_nan = dequantize(q).isnan()
    assert q.scale.view(torch.uint8)[0, 1] == 255
    assert bool(is_nan[0, 32:64].all())
    assert is_nan.sum() == 32
    assert_bitwise_equal(q.data[1], clean.data[1])
    assert torch.equal(q.data[~is_nan].view(torch.uint8), clean.data[~is_nan].view(torch.uint8))


def test_the_smallest_normal_float32_is_kept(rounding: str):
    for element in FLOATS:
        q = mx(torch.full((1, 32), 2.0**-126), element, rounding)
        assert q.scale.view(torch.uint8).item() == 0
        assert stored(q).unique().tolist() == [2.0]
        assert dequantize(q).unique().tolist() == [2.0**-126]


@pytest.mark.parametrize("element", FLOATS, **element_ids)
def test_the_largest_bfloat16_has_a_finite_scale(element: ElementFormat, rounding: str):
    """It rounds to 2^128, but for `floor`, which saturates: infinity in float32, and no NaN for its neighbours."""
    x = torch.full((1, 32), 1.0)
    x[0, 0] = torch.finfo(torch.bfloat16).max
    q = mx(x, element, rounding)
    assert q.scale.view(torch.uint8).item() == 255 - element.max_exponent - (rounding == "floor")
    largest = dequantize(q)[0, 0].item()
    assert largest == element.max * 2.0 ** (127 - element.max_exponent) if rounding == "floor" else largest == math.inf
    assert not dequantize(q)[0, 1:].any()
