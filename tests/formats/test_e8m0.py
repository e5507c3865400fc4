"""E8M0 scales against the specification computed with exact rational arithmetic, and torch's own decoding."""

import math

import pytest
import torch

from aotrain.formats import (
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ElementFormat,
)
from aotrain.formats.e8m0 import E8M0_ROUNDINGS, decode_e8m0, e8m0_from_amax, e8m0_inverse
from aotrain.testing import all_bfloat16_values, assert_bitwise_equal
from tests.formats.reference import e8m0_byte

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
ELEMENTS = [FLOAT8_E4M3, FLOAT8_E5M2, FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1, INT8]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_byte_of_normal_amax(rounding: str, element: ElementFormat):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-120, 120, (3000,), generator=generator).double()
    amax = (torch.exp2(exponents) * (1 + torch.rand(3000, generator=generator).double())).float()
    powers = torch.exp2(torch.arange(-120, 120).double()).float()
    maxima = powers[60:180] * element.max
    amax = torch.cat([amax, powers, torch.nextafter(powers, powers * 0), maxima, torch.nextafter(maxima, maxima * 2)])
    got = e8m0_from_amax(amax, element, rounding)
    assert got.tolist() == [e8m0_byte(value, element, rounding) for value in amax.tolist()]


@pytest.mark.parametrize(
    ("amax", "floor", "rceil", "ceil", "even"),
    [
        (448.0, 127, 127, 128, 127),
        (449.0, 127, 128, 128, 127),
        (255.9, 126, 127, 127, 127),
        (500.0, 127, 128, 128, 128),
    ],
)
def test_published_table_for_e4m3(amax: float, floor: int, rceil: int, ceil: int, even: int):
    for rounding, want in (("floor", floor), ("rceil", rceil), ("ceil", ceil), ("even", even)):
        assert e8m0_from_amax(torch.tensor([amax]), FLOAT8_E4M3, rounding).item() == want


@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: element.name)
def test_byte_of_every_bfloat16_amax_and_of_the_float32_extremes(rounding: str, element: ElementFormat):
    """Subnormals, and just below infinity: there `even` rounds amax to 2^128, whose scale is as finite as any other."""
    largest = torch.finfo(torch.float32).max
    extremes = torch.tensor([1e-45, 5.877471754111438e-39, 5.877472454760670e-39, 1.1754943508222875e-38, largest])
    amax = torch.cat([all_bfloat16_values().float(), extremes])
    amax = amax[amax.isfinite() & ~amax.signbit()]
    got = e8m0_from_amax(amax, element, rounding)
    assert got.tolist() == [e8m0_byte(value, element, rounding) for value in amax.tolist()]
    assert got.max() < 255
    assert e8m0_from_amax(torch.tensor([largest]), element, "even").item() == 255 - element.max_exponent


@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_extremes(rounding: str):
    amax = torch.tensor([0.0, 1e-45, math.inf, math.nan, 3.4e38])
    got = e8m0_from_amax(amax, FLOAT8_E4M3, rounding).tolist()
    assert got[:4] == [0, 0, 255, 255]
    assert got[4] in (246, 247)


def test_decoding_every_byte():
    decoded, inverse = decode_e8m0(ALL_BYTES), e8m0_inverse(ALL_BYTES)
    assert_bitwise_equal(decoded[:255], ALL_BYTES[:255].view(torch.float8_e8m0fnu).float())
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert inverse[:255].tolist() == [2.0 ** (127 - byte) for byte in range(255)]
    assert decoded[255].isnan()
    assert inverse[255].isnan()


def test_unknown_rounding_lists_the_valid_ones():
    with pytest.raises(ValueError, match="floor, ceil, even, rceil"):
        e8m0_from_amax(torch.ones(1), FLOAT8_E4M3, "up")
