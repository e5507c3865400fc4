"""E8M0 scales against the specification computed with exact rational arithmetic, and torch's own decoding."""

import math
from fractions import Fraction

import pytest
import torch

from aotrain.formats import FLOAT8_E4M3, FLOAT8_E5M2, ElementFormat
from aotrain.formats.e8m0 import E8M0_ROUNDINGS, decode_e8m0, e8m0_from_amax, e8m0_inverse
from aotrain.testing import assert_bitwise_equal

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def want_byte(amax: float, element: ElementFormat, rounding: str) -> int:
    exact = Fraction(amax)
    if exact == 0:
        return 0
    if rounding == "rceil":
        quotient = torch.tensor(amax) * torch.tensor(1 / element.max, dtype=torch.float32)
        exact = Fraction(quotient.item())
        if exact == 0:
            return 0
        floor = floor_log2(exact)
        return max(floor + (Fraction(2) ** floor != exact) + 127, 0)
    floor = floor_log2(exact)
    mantissa = exact / Fraction(2) ** floor
    if rounding == "ceil":
        floor += mantissa != 1
    if rounding == "even":
        floor += mantissa >= 2 - Fraction(1, 2 ** (element.mantissa_bits + 1))
    return max(floor - element.max_exponent + 127, 0)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2], ids=lambda element: element.name)
@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_byte_of_normal_amax(rounding: str, element: ElementFormat):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-120, 120, (3000,), generator=generator).double()
    amax = (torch.exp2(exponents) * (1 + torch.rand(3000, generator=generator).double())).float()
    powers = torch.exp2(torch.arange(-120, 120).double()).float()
    maxima = powers[60:180] * element.max
    amax = torch.cat([amax, powers, torch.nextafter(powers, powers * 0), maxima, torch.nextafter(maxima, maxima * 2)])
    got = e8m0_from_amax(amax, element, rounding)
    assert got.tolist() == [want_byte(value, element, rounding) for value in amax.tolist()]


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
