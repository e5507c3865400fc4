"""Rounding against an independent search over all codes: docs/numerics.md, section 2."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import BFLOAT16, ELEMENT_FORMATS, INT8, ElementFormat, round_nearest, round_stochastic
from aotrain.testing import all_bfloat16_values, all_codes, assert_bitwise_equal

FORMATS = list(ELEMENT_FORMATS.values())
FLOAT8 = [element for element in FORMATS if element.dtype.is_floating_point]
element_ids = {"ids": lambda element: element.name}


def finite_values(element: ElementFormat) -> np.ndarray:
    """All finite values of a format, ascending, without negative zero, float64."""
    decoded = all_codes(element).double()
    # The integer -128 is a code without use.
    return np.unique(decoded[decoded.isfinite() & (decoded.abs() <= element.max)].numpy() + 0.0)


def nearest_even(x: np.ndarray, element: ElementFormat) -> np.ndarray:
    """Nearest value of the format by search, ties to the even code, saturating: no rounding code of the library."""
    values = finite_values(element)
    x = np.clip(x.astype(np.float64), values[0], values[-1])
    upper = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[upper - 1], values[upper]
    code = {value: index for index, value in enumerate(values[values >= 0])}
    low_is_even = np.array([code[abs(value)] % 2 == 0 for value in low])
    below, above = x - low, high - x
    return np.where((below < above) | ((below == above) & low_is_even), low, high)


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_nearest_on_every_bfloat16_value(element: ElementFormat):
    x = all_bfloat16_values().float()
    rounded = round_nearest(x, element).double().numpy()
    number = ~x.isnan().numpy()
    np.testing.assert_array_equal(rounded[number], nearest_even(x.numpy()[number], element))
    assert (np.isnan(rounded) if element in FLOAT8 else rounded == 0)[~number].all()


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_nearest_at_midpoints_and_their_float32_neighbours(element: ElementFormat):
    values = finite_values(element)
    midpoints = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    x = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(np.inf)), np.nextafter(midpoints, -np.inf)])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(
        round_nearest(torch.from_numpy(x), element).double().numpy(), nearest_even(x, element)
    )


@pytest.mark.parametrize("element", [*FORMATS, BFLOAT16], **element_ids)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_saturates_and_keeps_nan(element: ElementFormat, rounding: str):
    x = torch.tensor([float("inf"), float("-inf"), 3.4e38, -3.4e38, float("nan")])
    noise = torch.full(x.shape, 0xFFFF)
    rounded = round_nearest(x, element) if rounding == "nearest" else round_stochastic(x, element, noise)
    assert rounded[:4].float().tolist() == [element.max, -element.max, element.max, -element.max]
    # Integers have no NaN: there the block's scale carries it.
    assert rounded[4] == 0 if element is INT8 else rounded[4].isnan()


@pytest.mark.parametrize("element", FORMATS, **element_ids)
def test_codes_round_to_themselves_whatever_the_noise(element: ElementFormat):
    codes = all_codes(element)
    codes = codes[codes.float().isfinite() & (codes.float().abs() <= element.max)]
    for noise in (0, 0x8000, 0xFFFF):
        assert_bitwise_equal(round_stochastic(codes.float(), element, torch.full(codes.shape, noise)), codes)


def test_bfloat16_values_round_to_themselves_whatever_the_noise():
    x = all_bfloat16_values()
    x = x[x.float().isfinite()]
    for noise in (0, 0xFFFF):
        assert_bitwise_equal(round_stochastic(x.float(), BFLOAT16, torch.full(x.shape, noise)), x)


@pytest.mark.parametrize("element", [*FLOAT8, BFLOAT16], **element_ids)
def test_stochastic_is_the_bit_trick_of_a_kernel(element: ElementFormat):
    """For normal results: add the noise, aligned to the dropped bits, to the float32 pattern and truncate."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=generator)
    x = x[x.abs() > element.min_normal]
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator)
    dropped = 23 - element.mantissa_bits
    bits = x.view(torch.int32).to(torch.int64) + (noise << (dropped - 16))
    want = ((bits >> dropped) << dropped).to(torch.int32).view(torch.float32)
    assert_bitwise_equal(round_stochastic(x, element, noise).float(), want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    value=st.floats(-500, 500, width=32, allow_nan=False),
    element=st.sampled_from(FORMATS),
)
def test_stochastic_expectation_is_the_value(value: float, element: ElementFormat):
    """Averaged over all 65536 noises the result is exact up to 2^-16 of the local spacing."""
    x = torch.full((1 << 16,), value).clamp(-element.max, element.max)
    rounded = round_stochastic(x, element, torch.arange(1 << 16)).double()
    spacing = max((rounded.max() - rounded.min()).item(), element.min_subnormal)
    assert abs(rounded.mean().item() - x[0].double().item()) <= spacing * 2.0**-16
    assert rounded.unique().numel() <= 2
