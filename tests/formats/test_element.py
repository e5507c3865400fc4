"""The table of element formats against torch.finfo and against every code of each format."""

import math

import pytest
import torch

from aotrain.formats import (
    BFLOAT16,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    INT8,
    ElementFormat,
    decode_elements,
)
from aotrain.testing import all_codes

FLOAT8 = [element for element in ELEMENT_FORMATS.values() if element.dtype.is_floating_point]
CODES = [FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1]


@pytest.mark.parametrize("element", [*FLOAT8, BFLOAT16], ids=lambda element: element.name)
def test_constants_agree_with_finfo(element: ElementFormat):
    info = torch.finfo(element.dtype)
    assert element.max == info.max
    assert element.min_normal == info.tiny
    assert info.bits == 1 + element.exponent_bits + element.mantissa_bits
    assert 2.0**element.max_exponent <= element.max < 2.0 ** (element.max_exponent + 1)


@pytest.mark.parametrize("element", [*FLOAT8, *CODES], ids=lambda element: element.name)
def test_every_code_decodes_to_the_formula(element: ElementFormat):
    decoded = decode_elements(all_codes(element), torch.float32, element)
    for code in range(2**element.bits):
        sign = -1.0 if code >> (element.bits - 1) else 1.0
        exponent = (code >> element.mantissa_bits) & (2**element.exponent_bits - 1)
        mantissa = (code & (2**element.mantissa_bits - 1)) / 2**element.mantissa_bits
        value = decoded[code].item()
        if exponent == 0:
            want = sign * 2.0**element.min_exponent * mantissa
        else:
            want = sign * 2.0 ** (exponent - element.bias) * (1 + mantissa)
        if math.isnan(value):
            # The only codes without a value: 0x80 for fnuz; beyond max for the others.
            assert (code == 0x80) if element.name.endswith("fnuz") else abs(want) > element.max, hex(code)
        elif math.isinf(value):
            assert element.has_inf, hex(code)
        else:
            assert value == want, hex(code)
            assert math.copysign(1, value) == sign, hex(code)
    finite = decoded[decoded.isfinite()]
    assert finite.max().item() == element.max
    assert finite[finite > 0].min().item() == element.min_subnormal
    assert bool(decoded.isinf().any()) == element.has_inf


def test_int8_is_a_format_of_subnormals():
    assert (INT8.max, INT8.min_subnormal) == (127.0, 1.0)
    assert INT8.min_normal > INT8.max
    # Its values m * 2^(1 - B - M), with both signs: -128 is the one code without a place.
    values = {
        sign * 2.0 ** (1 - INT8.bias) * mantissa / 2**INT8.mantissa_bits for mantissa in range(128) for sign in (1, -1)
    }
    assert values == set(all_codes(INT8).tolist()) - {-128}


def test_formats_below_8_bits_have_the_values_of_the_specification():
    # OCP MX 1.0, tables 2 to 5: largest, smallest normal and smallest value; no infinity, no NaN.
    for element, constants in ((FLOAT6_E3M2, (28.0, 0.25, 0.0625)), (FLOAT6_E2M3, (7.5, 1.0, 0.125))):
        assert (element.max, element.min_normal, element.min_subnormal) == constants
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    decoded = decode_elements(all_codes(FLOAT4_E2M1), torch.float32, FLOAT4_E2M1)
    assert decoded.tolist() == values + [-value for value in values]
    for element in CODES:
        decoded = decode_elements(all_codes(element), torch.float32, element)
        assert bool(decoded.isfinite().all())
        assert decoded.unique().numel() == 2**element.bits - 1  # the zeros are equal


@pytest.mark.parametrize("element", CODES, ids=lambda element: element.name)
def test_decoding_ignores_the_high_bits_and_is_exact_in_bfloat16(element: ElementFormat):
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = decode_elements(codes, torch.float32, element)
    assert torch.equal(decoded, decoded[: 2**element.bits].repeat(256 // 2**element.bits))
    assert torch.equal(decode_elements(codes, torch.bfloat16, element).float(), decoded)
    assert torch.equal(decode_elements(codes.view(8, 32).t(), torch.float32, element), decoded.view(8, 32).t())


def test_decoding_needs_the_format_of_codes():
    with pytest.raises(ValueError, match="without their format"):
        decode_elements(torch.zeros(2, dtype=torch.uint8), torch.float32)
    with pytest.raises(ValueError, match=r"data of float4_e2m1fn is torch\.uint8"):
        decode_elements(torch.zeros(2, dtype=torch.int8), torch.float32, FLOAT4_E2M1)
