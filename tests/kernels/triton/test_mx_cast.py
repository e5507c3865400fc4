"""The MX cast kernel against formats.quantize, bit for bit, under the interpreter; a GPU twin at the end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    SCALE_FORMATS,
    ElementFormat,
    Scaling,
    decode_elements,
    pack_float4,
    quantize,
    quantize_mx,
    to_blocked,
)
from aotrain.formats.scaling import scales_from_amax
from aotrain.kernels.triton._numerics import e8m0_from_amax_bits, e8m0_inverse, magnitude_bits
from aotrain.kernels.triton.mx_cast import kernel_constants, mx_cast_tiles
from aotrain.kernels.triton.nvfp4_cast import measure
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from aotrain.testing.interpreter import corrected_interpreter

ELEMENTS = [FLOAT8_E4M3, FLOAT8_E5M2, FLOAT4_E2M1]
SCALES = [name for name in SCALE_FORMATS if name.startswith("e8m0")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One tile, tails of both directions, several tiles and matrices; 1 x 128 scales are whole words.
SHAPES = [(1, 1, 1), (1, 37, 100), (2, 130, 129), (1, 128, 256), (1, 31, 33)]
by_name = {"ids": lambda element: element.name}


def scaling_of(element: ElementFormat, scale: str) -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS[scale], block=BLOCKWISE_1X32)


def measures_of(x: torch.Tensor) -> torch.Tensor:
    return measure(x.reshape(-1, x.shape[-1]), 0, plain=False, transform=False, checksum=True)


def assert_casts(x: torch.Tensor, scaling: Scaling, *, packed: bool = False, blocked: bool = False) -> None:
    """x [batch, M, K], both ways; and what packing and tiling the definition's result gives."""
    arguments = scaling.element, scaling.scale, measures_of(x) if scaling.rounding == "stochastic" else None
    data, scale, data_t, scale_t = mx_cast_tiles(x, *arguments, rows=True, columns=True, packed=packed, blocked=blocked)
    for got, got_scale, operand in ((data, scale, x), (data_t, scale_t, x.mT)):
        want = quantize_mx(operand.contiguous().cpu(), scaling)
        assert_bitwise_equal(got_scale.cpu(), to_blocked(want.scale) if blocked else want.scale, what="scale")
        assert_bitwise_equal(got.cpu(), pack_float4(want.data) if packed else want.data, what="data")


@triton.jit
def _scales_kernel(
    amax_ptr,
    byte_ptr,
    inverse_ptr,
    ROUNDING: tl.constexpr,
    ELEMENT_MAX_INVERSE: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    N: tl.constexpr,
):
    offsets = tl.arange(0, N)
    bits = magnitude_bits(tl.load(amax_ptr + offsets).to(tl.float32))
    byte = e8m0_from_amax_bits(bits, ROUNDING, ELEMENT_MAX_INVERSE, MAX_EXPONENT, MANTISSA_BITS)
    tl.store(byte_ptr + offsets, byte)
    tl.store(inverse_ptr + offsets, e8m0_inverse(byte))


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("element", ELEMENTS, **by_name)
    def test_shapes_dtypes_and_layouts(self, element: ElementFormat, scale: str):
        for number, shape in enumerate(SHAPES):
            x = torch.stack([adversarial_matrix(*shape[1:], DTYPES[number % 3], seed) for seed in range(shape[0])])
            assert_casts(x, scaling_of(element, scale), packed=element is FLOAT4_E2M1, blocked=True)
            assert_casts(x.mT, scaling_of(element, scale))

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("element", ELEMENTS, **by_name)
    def test_every_bfloat16_value_as_the_largest_and_among_its_neighbours(self, element: ElementFormat, scale: str):
        formats = element, SCALE_FORMATS[scale]
        values = all_bfloat16_values()
        for amax in (values, values.float() * 1.0078125):  # and between two bfloat16 values
            constants = kernel_constants(*formats, blocked=False)
            byte, inverse = torch.empty(65536, dtype=torch.int32), torch.empty(65536)
            names = ("ROUNDING", "ELEMENT_MAX_INVERSE", "MAX_EXPONENT", "MANTISSA_BITS")
            _scales_kernel[(1,)](amax, byte, inverse, **{name: constants[name] for name in names}, N=65536)
            want_scale, want_inverse = scales_from_amax(amax.float().abs(), scaling_of(element, scale))
            assert_bitwise_equal(byte.to(torch.uint8), want_scale.view(torch.uint8))
            assert_bitwise_equal(inverse, want_inverse)
        assert_casts(values.view(1, 256, 256), scaling_of(element, scale))

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("element", ELEMENTS, **by_name)
    def test_ties_and_their_neighbours(self, element: ElementFormat, scale: str):
        codes = torch.arange(2**element.bits, dtype=torch.uint8).view(element.dtype)
        values = decode_elements(codes, torch.float32, element)
        values = values[values.isfinite() & (values >= 0)].sort().values
        values = torch.cat([values, (values[:-1] + values[1:]) / 2, torch.tensor([element.min_subnormal / 2])])
        values = torch.cat([values, *(values.nextafter(torch.tensor(end)) for end in (-np.inf, np.inf))])
        # 31 of them with the format's largest value, so that the scale is 1 or a few powers of two.
        values = torch.cat([values, -values, values.new_zeros(-2 * len(values) % 31)]).view(-1, 31)
        x = torch.cat([values, values.new_full((len(values), 1), element.max)], 1)
        x = torch.cat([x * 2.0**power for power in (-30, 0, 20)])[None]
        data, got, _, _ = mx_cast_tiles(x, element, SCALE_FORMATS[scale])
        want = quantize(x, scaling_of(element, scale))
        assert_bitwise_equal(got, want.scale)
        assert_bitwise_equal(data, want.data)

    @pytest.mark.parametrize("element", ELEMENTS, **by_name)
    def test_infinities_and_nans_fill_their_block_and_no_other(self, element: ElementFormat):
        x = torch.randn(1, 70, 140)
        x[0, 3, 5], x[0, 40, 100], x[0, 69, 139] = torch.inf, torch.nan, -torch.nan
        x[0, 20, 33], x[0, 21, 33] = -torch.inf, torch.nan
        for dtype in DTYPES:
            assert_casts(x.to(dtype), scaling_of(element, "e8m0_rceil"))

    def test_stochastic_rounding(self):
        scaling = replace(scaling_of(FLOAT4_E2M1, "e8m0_rceil"), rounding="stochastic")
        for number, shape in enumerate(((1, 1, 1), (1, 37, 100), (2, 33, 129), (1, 16, 256))):
            x = torch.stack([adversarial_matrix(*shape[1:], DTYPES[number % 3], seed) for seed in range(shape[0])])
            assert_casts(x, scaling, packed=True, blocked=True)
            assert_casts(x.mT, scaling)
        x = torch.randn(1, 40, 70)
        x[0, 3, 5], x[0, 30, 60], x[0, 39, 69] = torch.inf, torch.nan, -torch.nan
        assert_casts(x, scaling)

    def test_stochastic_rounding_of_rows_alone_in_whole_tiles(self):
        """The large tile, whose scales are words."""
        scaling = replace(scaling_of(FLOAT4_E2M1, "e8m0_even"), rounding="stochastic")
        x = torch.randn(1, 144, 256).bfloat16()
        want = quantize_mx(x, scaling)
        for blocked in (False, True):
            arguments = scaling.element, scaling.scale, measures_of(x)
            data, scale = mx_cast_tiles(x, *arguments, packed=blocked, blocked=blocked)[:2]
            assert_bitwise_equal(scale, to_blocked(want.scale) if blocked else want.scale)
            assert_bitwise_equal(data, pack_float4(want.data) if blocked else want.data)

    def test_one_output_alone_is_that_of_both(self):
        x = torch.randn(1, 100, 70)
        formats = FLOAT8_E4M3, SCALE_FORMATS["e8m0_rceil"]
        both = mx_cast_tiles(x, *formats, columns=True)
        rows = mx_cast_tiles(x, *formats)
        columns = mx_cast_tiles(x, *formats, rows=False, columns=True)
        for got, want in zip((*rows[:2], *columns[2:]), both, strict=True):
            assert_bitwise_equal(got, want)
        assert [t.numel() for t in (*rows[2:], *columns[:2])] == [0] * 4


def any_float32(bits: bytes, size: int) -> torch.Tensor:
    """Float32 values of any bit pattern, their exponents moved together half of the time so that blocks mean something.

    A draw of hypothesis seeds them: drawing a million values one by one would take hours.
    """
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(bits, "little")))
    patterns = generator.integers(0, 2**32, size, dtype=np.uint32)
    kind = generator.integers(0, 4)
    if kind:  # the exponents of a normal block, of all magnitudes
        center = generator.integers(0, 255 - 8 * kind, size // 32, dtype=np.uint32).repeat(32)
        exponent = center + generator.integers(0, 8 * kind, size, dtype=np.uint32)
        patterns = (patterns & np.uint32(0x807FFFFF)) | (exponent.astype(np.uint32) << np.uint32(23))
    return torch.from_numpy(patterns.view(np.float32))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ELEMENTS, **by_name)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(bits=st.binary(min_size=16, max_size=16))
def test_a_million_values_of_any_bits_per_rounding(element: ElementFormat, scale: str, bits: bytes):
    """2 draws of 2^18 values for each of three elements, 1.5 * 10^6 in all; in few programs, which cost most here."""
    x = any_float32(bits, 1 << 18).view(1, 512, 512)
    scaling = scaling_of(element, scale)
    want = quantize(x, scaling)
    with corrected_interpreter():
        data, got, _, _ = mx_cast_tiles(x, element, scaling.scale)
    assert_bitwise_equal(got, want.scale)
    assert_bitwise_equal(data, want.data)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ELEMENTS, **by_name)
def test_on_a_gpu(element: ElementFormat, scale: str):
    for shape in (*SHAPES, (1, 512, 768)):
        x = torch.stack([adversarial_matrix(*shape[1:], torch.bfloat16, seed) for seed in range(shape[0])])
        for packed in {False, element is FLOAT4_E2M1}:
            for blocked in (False, True):
                formats = element, SCALE_FORMATS[scale]
                outputs = mx_cast_tiles(x.cuda(), *formats, rows=True, columns=True, packed=packed, blocked=blocked)
                for got, got_scale, operand in ((*outputs[:2], x), (*outputs[2:], x.mT)):
                    want = quantize(operand.contiguous(), scaling_of(element, scale))
                    assert_bitwise_equal(got_scale.cpu(), to_blocked(want.scale) if blocked else want.scale)
                    assert_bitwise_equal(got.cpu(), pack_float4(want.data) if packed else want.data)


@pytest.mark.gpu
def test_stochastic_rounding_on_a_gpu():
    scaling = replace(scaling_of(FLOAT4_E2M1, "e8m0_rceil"), rounding="stochastic")
    for shape in (*SHAPES, (1, 512, 768)):
        assert_casts(torch.randn(shape).bfloat16().cuda(), scaling)
