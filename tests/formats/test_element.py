"""The table of element formats against torch.finfo and against every code of each format."""

import math

import pytest
import torch

from aotrain.formats import BFLOAT16, ELEMENT_FORMATS, INT8, ElementFormat
from aotrain.testing import all_codes

FLOAT8 = [element for element in ELEMENT_FORMATS.values() if element.dtype.is_floating_point]


@pytest.mark.parametrize("element", [*FLOAT8, BFLOAT16], ids=lambda element: element.name)
def test_constants_agree_with_finfo(element: ElementFormat):
    info = torch.finfo(element.dtype)
    assert element.max == info.max
    assert element.min_normal == info.tiny
    assert info.bits == 1 + element.exponent_bits + element.mantissa_bits
    assert 2.0**element.max_exponent <= element.max < 2.0 ** (element.max_exponent + 1)


@pytest.mark.parametrize("element", FLOAT8, ids=lambda element: element.name)
def test_every_code_decodes_to_the_formula(element: ElementFormat):
    decoded = all_codes(element).float()
    for code in range(256):
        sign = -1.0 if code >> 7 else 1.0
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
