"""Rounding against an independent search over all codes: docs/numerics.md, section 2."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import (
    BFLOAT16,
    ELEMENT_FORMATS,
    INT8,
    ElementFormat,
    decode_elements,
    round_nearest,
    round_stochastic,
)
from aotrain.testing import all_bfloat16_values, all_codes, assert_bitwise_equal
from tests.formats.reference import finite_values, nearest_even

FORMATS = list(ELEMENT_FORMATS.values())
FLOAT8 = [element for element in FORMATS if element.dtype.is_floating_point]
CODES = [element for element in FORMATS if element.stored_as_codes]
element_ids = {"ids": lambda element: element.name}


def decode(data: torch.Tensor, element: ElementFormat) -> torch.Tensor:
    return data.float() if element is BFLOAT16 else decode_elements(data, torch.float32, element)


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_nearest_on_every_bfloat16_value(element: ElementFormat):
    x = all_bfloat16_values().float()
    rounded = decode(round_nearest(x, element), element).numpy()
    number = ~x.isnan().numpy()
    np.testing.assert_array_equal(rounded[number], nearest_even(x.numpy()[number], element))
    assert (np.isnan(rounded) if element in FLOAT8 else rounded == 0)[~number].all()


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_nearest_at_midpoints_and_their_float32_neighbours(element: ElementFormat):
    values = finite_values(element)
    midpoints = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    x = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(np.inf)), np.nextafter(midpoints, -np.inf)])
    x = x.astype(np.float32)
    rounded = decode(round_nearest(torch.from_numpy(x), element), element).numpy()
    np.testing.assert_array_equal(rounded, nearest_even(x, element))


@pytest.mark.parametrize("element", CODES, **element_ids)
@pytest.mark.parametrize("noise", [None, 0, 0x8000, 0xFFFF])
def test_codes_keep_the_sign_and_use_the_low_bits_only(element: ElementFormat, noise: int | None):
    x = all_bfloat16_values().float()
    noises = torch.full(x.shape, noise or 0)
    codes = round_nearest(x, element) if noise is None else round_stochastic(x, element, noises)
    assert codes.dtype == torch.uint8
    number = ~x.isnan()
    assert torch.equal((codes >> (element.bits - 1))[number], x.signbit()[number].to(torch.uint8))
    assert not codes[~number].any()


def test_ties_of_e2m1_go_to_the_published_codes():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    e2m1 = ELEMENT_FORMATS["float4_e2m1fn"]
    assert round_nearest(x, e2m1).tolist() == [0, 2, 2, 4, 4, 6, 6, 7]
    assert round_nearest(-x, e2m1).tolist() == [8, 10, 10, 12, 12, 14, 14, 15]


@pytest.mark.parametrize("element", [*FORMATS, BFLOAT16], **element_ids)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_saturates_and_keeps_nan(element: ElementFormat, rounding: str):
    x = torch.tensor([float("inf"), float("-inf"), 3.4e38, -3.4e38, float("nan")])
    noise = torch.full(x.shape, 0xFFFF)
    rounded = round_nearest(x, element) if rounding == "nearest" else round_stochastic(x, element, noise)
    assert decode(rounded[:4], element).tolist() == [element.max, -element.max, element.max, -element.max]
    # Integers and the formats below 8 bits have no NaN: there the block's scale carries it.
    assert rounded[4] == 0 if element is INT8 or element in CODES else rounded[4].isnan()


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_codes_round_to_themselves_whatever_the_noise(element: ElementFormat):
    codes = all_codes(element)
    values = decode(codes, element)
    has_value = values.isfinite() & (values.abs() <= element.max)
    codes, values = codes[has_value], values[has_value]
    assert_bitwise_equal(round_nearest(values, element), codes)
    for noise in (0, 0x8000, 0xFFFF):
        assert_bitwise_equal(round_stochastic(values, element, torch.full(codes.shape, noise)), codes)


def test_bfloat16_values_round_to_themselves_whatever_the_noise():
    x = all_bfloat16_values()
    x = x[x.float().isfinite()]
    for noise in (0, 0xFFFF):
        assert_bitwise_equal(round_stochastic(x.float(), BFLOAT16, torch.full(x.shape, noise)), x)


@pytest.mark.parametrize("element", [*FLOAT8, *CODES, BFLOAT16], **element_ids)
def test_stochastic_is_the_bit_trick_of_a_kernel(element: ElementFormat):
    """For normal results: add the noise, aligned to the dropped bits, to the float32 pattern and truncate."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=generator)
    x = x[x.abs() > element.min_normal]
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator)
    dropped = 23 - element.mantissa_bits
    bits = x.view(torch.int32).to(torch.int64) + (noise << (dropped - 16))
    want = ((bits >> dropped) << dropped).to(torch.int32).view(torch.float32)
    assert_bitwise_equal(decode(round_stochastic(x, element, noise), element), want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    value=st.floats(-500, 500, width=32, allow_nan=False),
    element=st.sampled_from(FORMATS),
)
def test_stochastic_expectation_is_the_value(value: float, element: ElementFormat):
    """Averaged over all 65536 noises the result is exact up to 2^-16 of the local spacing."""
    x = torch.full((1 << 16,), value).clamp(-element.max, element.max)
    rounded = decode(round_stochastic(x, element, torch.arange(1 << 16)), element).double()
    spacing = max((rounded.max() - rounded.min()).item(), element.min_subnormal)
    assert abs(rounded.mean().item() - x[0].double().item()) <= spacing * 2.0**-16
    assert rounded.unique().numel() <= 2
