"""quantize, dequantize, fake_quantize over every scale format and block shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import (
    COLWISE,
    ELEMENT_FORMATS,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT6_E3M2,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    ElementFormat,
    Scaling,
    decode_elements,
    dequantize,
    fake_quantize,
    philox_bits16,
    quantize,
    scale_shape,
)
from aotrain.formats.scaling import expand_blocks, scale_to_float
from aotrain.testing import adversarial_matrix, assert_bitwise_equal, sqnr

BLOCKS = [TENSORWISE, ROWWISE, COLWISE, (1, 32), (128, 128)]
SCALINGS = [
    Scaling(element=element, scale=scale, block=block)
    for element in (FLOAT8_E4M3, FLOAT8_E5M2, FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1)
    for scale in SCALE_FORMATS.values()
    for block in BLOCKS
]
# Half a unit in the last place of a uniform mantissa is 6.02 m + 10.8 dB; less 4 dB for rows that use little of the
# range and 1 dB for saturation under e8m0_floor. Measured on the matrix below: e4m3 28.0-35.5 dB, e5m2 22.6-29.6 dB.
# e2m3 and e2m1 have three binades: the small elements of a large block fall below them, so blocks of 32 have their own
# floor. Measured on three matrices: e3m2 25.3-26.6, e2m3 22.9-32.4 (1x32 28.7-32.4), e2m1 10.8-20.0 (1x32 16.8-20.0).
SQNR_DB = {
    "float8_e4m3fn": 25.0,
    "float8_e5m2": 19.0,
    "float6_e3m2fn": 24.0,
    "float6_e2m3fn": 21.5,
    "float4_e2m1fn": 9.5,
}
SQNR_DB_1X32 = SQNR_DB | {"float6_e2m3fn": 27.0, "float4_e2m1fn": 15.5}


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_error_of_a_normal_matrix(scaling: Scaling):
    x = torch.randn(100, 130)
    q = quantize(x, scaling)
    assert q.data.dtype == scaling.element.dtype
    assert q.data.shape == x.shape
    assert q.scale.shape == scale_shape(x.shape, scaling.block)
    assert q.scale.dtype == scaling.scale.dtype
    floors = SQNR_DB_1X32 if scaling.block == (1, 32) else SQNR_DB
    assert sqnr(x, dequantize(q)) >= floors[scaling.element.name]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_requantizing_with_the_same_scale_changes_nothing(scaling: Scaling, dtype: torch.dtype):
    q = quantize(adversarial_matrix(37, 100, dtype), scaling)
    again = quantize(dequantize(q), scaling, scale=q.scale)
    # Just below infinity an element may round to 2^128, which float32 does not hold.
    finite = dequantize(q).isfinite()
    assert_bitwise_equal(again.data[finite], q.data[finite])


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_zeros_stay_zeros_and_finite_stays_finite(scaling: Scaling):
    x = adversarial_matrix(37, 100, torch.float32)
    assert not dequantize(quantize(torch.zeros(5, 40), scaling)).any()
    q = quantize(x, scaling)
    exact = decode_elements(q.data, torch.float32, scaling.element).double()
    exact = exact * expand_blocks(scale_to_float(q.scale), x.shape, scaling.block)
    # Only an element that rounds to 2^128, just above float32's range, may become an infinity; of 3e38, in e2m1 alone.
    overflows = exact.abs() > torch.finfo(torch.float32).max
    assert torch.equal(dequantize(q).isfinite(), ~overflows)
    assert exact.abs().max() <= 2.0**128
    assert scaling.element is FLOAT4_E2M1 or not overflows.any()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_empty(shape: tuple[int, int], block: tuple[int, int]):
    q = quantize(torch.empty(shape), Scaling(element=FLOAT8_E4M3, block=block))
    assert q.data.shape == shape
    assert q.scale.shape == scale_shape(shape, block)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", SCALE_FORMATS)
@pytest.mark.parametrize("element", ELEMENT_FORMATS.values(), ids=lambda element: element.name)
def test_a_non_finite_value_poisons_its_own_block_only(element: ElementFormat, name: str, bad: float):
    x = torch.randn(4, 64)
    scaling = Scaling(element=element, scale=SCALE_FORMATS[name], block=ROWWISE)
    clean = quantize(x, scaling)
    x[1, 3] = bad
    q = quantize(x, scaling)
    assert bool(dequantize(q)[1].isnan().all())
    for row in (0, 2, 3):
        assert_bitwise_equal(q.data[row], clean.data[row])


def test_a_given_scale_saturates_infinities():
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    q = quantize(x, Scaling(element=FLOAT8_E4M3), scale=torch.ones(1, 1))
    assert q.data.float()[0, :2].tolist() == [448.0, -448.0]
    assert q.data[0, 2].isnan()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    scaling=st.sampled_from(SCALINGS),
    exponent=st.integers(-60, 60),
)
def test_error_is_at_most_half_a_step_of_the_block_maximum(rows: int, columns: int, scaling: Scaling, exponent: int):
    x = torch.randn(rows, columns) * 2.0**exponent
    q = quantize(x, scaling)
    # A power-of-two scale may leave up to one bit of range unused, and e8m0_floor saturates up to 12.5 %.
    step = 2.0 ** -(scaling.element.mantissa_bits + 1)
    bound = x.abs().amax() * (0.5 if scaling.scale.name in ("e8m0_floor", "e8m0_even") else 1.01 * step)
    assert bool(((x - dequantize(q)).abs() <= bound).all())


@pytest.mark.parametrize(
    "element", [FLOAT8_E4M3, FLOAT6_E3M2, FLOAT6_E2M3, FLOAT4_E2M1], ids=lambda element: element.name
)
def test_stochastic_rounding_is_unbiased_and_needs_noise(element: ElementFormat):
    scaling = Scaling(element=element, block=ROWWISE, rounding="stochastic")
    x = torch.randn(1, 50).repeat(2000, 1)
    noise = philox_bits16(7, torch.arange(x.numel())).view(x.shape)
    mean = dequantize(quantize(x, scaling, noise=noise)).double().mean(0)
    nearest = fake_quantize(x[:1], Scaling(element=element, block=ROWWISE))
    # Averaging 2000 draws leaves 1/sqrt(2000) of the error of one: 33 dB less, give or take 6.
    assert sqnr(x[0].double(), mean) > sqnr(x[0], nearest[0]) + 20
    with pytest.raises(ValueError, match="noise"):
        quantize(x, scaling)


def test_fake_quantize_is_the_round_trip_in_the_input_dtype():
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    scaling = Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    assert_bitwise_equal(fake_quantize(x, scaling), dequantize(quantize(x, scaling), torch.bfloat16))


def test_bad_arguments_say_what_to_do():
    scaling = Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    with pytest.raises(TypeError, match="cast the tensor first"):
        quantize(torch.ones(2, 2, dtype=torch.int32), scaling)
    with pytest.raises(ValueError, match=r"want shape \(4, 1\)"):
        quantize(torch.ones(4, 4), scaling, scale=torch.ones(1, 1))
    with pytest.raises(ValueError, match="dtype"):
        quantize(torch.ones(4, 4), scaling, scale=torch.ones(4, 1, dtype=torch.float64))


def test_a_given_amax_replaces_that_of_the_blocks_and_is_checked():
    x = torch.randn(6, 8)
    scaling = Scaling(element=FLOAT8_E4M3, block=ROWWISE)
    whole = quantize(torch.cat([x, 2 * x], 1), scaling)
    part = quantize(x, scaling, amax=2 * x.abs().amax(1, keepdim=True))
    assert_bitwise_equal(part.data, whole.data[:, :8])
    assert_bitwise_equal(part.scale, whole.scale)
    with pytest.raises(ValueError, match=r"amax of shape \(6, 2\).*want shape \(6, 1\)"):
        quantize(x, scaling, amax=torch.ones(6, 2))
    with pytest.raises(ValueError, match="give one of them"):
        quantize(x, scaling, amax=torch.ones(6, 1), scale=torch.ones(6, 1))
