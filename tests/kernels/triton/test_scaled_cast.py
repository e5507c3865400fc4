"""The rowwise Triton kernel against formats.quantize, bit for bit, under the interpreter; GPU twins at the end."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from aotrain.formats import (
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    ElementFormat,
    ScaledTensor,
    Scaling,
    philox_u32,
    quantize,
)
from aotrain.kernels.triton import scaled_cast as kernels
from aotrain.kernels.triton._numerics import magnitude_bits, scales_from_amax_bits
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal

SCALINGS = [
    Scaling(element=element, scale=SCALE_FORMATS[scale], block=ROWWISE)
    for element in (FLOAT8_E4M3, FLOAT8_E5M2, INT8)
    for scale in ("float32", "float32_pow2")
]
SHAPES = [(1, 1), (3, 31), (37, 100), (256, 512)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _cast(x: torch.Tensor, scaling: Scaling) -> ScaledTensor:
    return ScaledTensor(*kernels.scaled_cast_rowwise(x, scaling.element, scaling.scale), scaling)


def _assert_equals_reference(x: torch.Tensor, scaling: Scaling) -> None:
    actual, expected = _cast(x, scaling), quantize(x, scaling)
    assert_bitwise_equal(actual.scale, expected.scale, what="scale")
    assert_bitwise_equal(actual.data, expected.data, what="data")
    assert actual.data.is_contiguous()
    assert actual.scale.is_contiguous()


def _non_finite_matrix(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Rows with one NaN of either sign, one infinity of either sign, both, only infinities, and ordinary neighbours."""
    x = torch.randn(8, 50)
    x[0, 3], x[1, 49], x[2, 0], x[3, 7] = torch.nan, -torch.nan, torch.inf, -torch.inf
    x[4, :2] = torch.tensor([torch.inf, torch.nan])
    x[5] = -torch.inf
    return x.to(device, dtype)


@triton.jit
def _scales_kernel(
    amax_ptr,
    scale_ptr,
    inv_scale_ptr,
    ELEMENT_MAX: tl.constexpr,
    INV_SCALE_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    N: tl.constexpr,
):
    offsets = tl.arange(0, N)
    bits = magnitude_bits(tl.load(amax_ptr + offsets))
    scale, inv_scale = scales_from_amax_bits(bits, ELEMENT_MAX, INV_SCALE_MAX, POWER_OF_TWO)
    tl.store(scale_ptr + offsets, scale)
    tl.store(inv_scale_ptr + offsets, inv_scale)


@triton.jit
def _randint_kernel(counter_ptr, out_ptr, seed, N: tl.constexpr):
    offsets = tl.arange(0, N)
    words = tl.randint4x(seed, tl.load(counter_ptr + offsets))
    for word in tl.static_range(4):
        tl.store(out_ptr + offsets * 4 + word, words[word].to(tl.uint32, bitcast=True).to(tl.int64))


@pytest.mark.parametrize("limit", [448.0, 127.0], ids=["float8", "int8"])
def test_one_float32_division_equals_the_definition_in_float64(limit: float) -> None:
    # Every mantissa of one binade: both divisions are exact under powers of two, so this covers every normal quotient.
    # 448 and 57344 have the same mantissa, so it covers both float8 formats.
    amax = (np.arange(2**23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    definition = (limit / amax.astype(np.float64)).astype(np.float32)
    assert np.array_equal(np.float32(limit) / amax, definition)


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_adversarial_rows(self, scaling: Scaling, shape: tuple[int, int], dtype: torch.dtype) -> None:
        _assert_equals_reference(adversarial_matrix(*shape, dtype=dtype), scaling)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_nan_and_inf_rows(self, scaling: Scaling, dtype: torch.dtype) -> None:
        _assert_equals_reference(_non_finite_matrix(dtype), scaling)

    @pytest.mark.parametrize("columns", [1, 16384, 20011], ids=lambda columns: f"{columns}-columns")
    def test_long_rows(self, columns: int) -> None:
        x = adversarial_matrix(3, columns)
        x[2, columns // 2] = torch.nan
        _assert_equals_reference(x, SCALINGS[0])

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.t(),
            lambda x: x.t()[:, :200],
            lambda x: x[::2],
            lambda x: x[:, ::3],
            lambda x: x[5:, 7:],
            lambda x: x[:1].expand(9, -1),
            lambda x: x[:, :0],
        ],
        ids=["transposed", "transposed-one-tile", "rows", "columns", "offset", "expanded", "empty-rows"],
    )
    def test_strides(self, view) -> None:
        _assert_equals_reference(view(adversarial_matrix(300, 100)), SCALINGS[0])

    def test_no_rows(self) -> None:
        _assert_equals_reference(torch.randn(0, 16), SCALINGS[0])

    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_every_bfloat16_value(self, scaling: Scaling) -> None:
        # In order, so that each row holds values of at most two exponents and all of a row's values round visibly.
        _assert_equals_reference(all_bfloat16_values().view(512, 128), scaling)
        # One row per sign and 4 binades beside a fixed 1.0: the same values with rounding far below the maximum.
        x = all_bfloat16_values().view(128, 512).clone()
        x[:, 0] = 1.0
        _assert_equals_reference(x, scaling)

    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_scales_around_the_lower_bound_and_at_the_limits(self, scaling: Scaling) -> None:
        bound = torch.tensor(1e-12)
        near = (torch.arange(-8, 9, dtype=torch.int32) + bound.view(torch.int32)).view(torch.float32)
        special = torch.tensor([0.0, 1e-45, 1.2e-38, 3.4e38, torch.inf, torch.nan, -torch.nan])
        powers = torch.exp2(torch.arange(-39, 127).float())
        amax = torch.cat([near, special, powers, powers.nextafter(torch.zeros(1)), powers * 1.75, powers * 1.7499999])
        amax = torch.cat([amax, torch.rand(1024 - amax.numel()) * 10])
        scale, inv_scale = torch.zeros(2, 1024)
        constants = kernels.kernel_constants(scaling.element, scaling.scale)
        _scales_kernel[(1,)](amax, scale, inv_scale, **constants, N=1024)
        # As rows of a single element: quantize takes their magnitude as amax.
        assert_bitwise_equal(scale, quantize(amax[:, None], scaling).scale[:, 0])

    def test_two_runs_are_equal(self) -> None:
        x = adversarial_matrix(37, 100)
        first, second = _cast(x, SCALINGS[0]), _cast(x, SCALINGS[0])
        assert_bitwise_equal(first.data, second.data)
        assert_bitwise_equal(first.scale, second.scale)

    @pytest.mark.parametrize("seed", [0, 1, 0x9E3779B97F4A7C15 >> 1, 2**31 + 5])
    def test_triton_randint_is_philox_u32(self, seed: int) -> None:
        counters = torch.cat([torch.arange(500), torch.randint(0, 2**62, (12,))])
        out = torch.zeros(512, 4, dtype=torch.int64)
        _randint_kernel[(1,)](counters, out, seed, N=512)
        assert_bitwise_equal(out, philox_u32(seed, counters))


def test_configs_cover_each_row_length_with_the_first_tile_that_holds_it() -> None:
    sizes = [config.block_k for config in kernels.ROW_MAJOR_CONFIGS]
    assert sizes == sorted(sizes)
    for columns in (0, 1, 128, 129, 4096, 16384):
        config, fits = kernels.select_config(columns)
        assert fits
        assert config.block_k == min(size for size in sizes if size >= columns)
    assert kernels.select_config(16385) == (kernels.LONG_ROW_CONFIG, False)


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [*SHAPES, (5, 16384), (3, 20011)], ids=lambda shape: "x".join(map(str, shape)))
    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_adversarial_rows(self, scaling: Scaling, shape: tuple[int, int], dtype: torch.dtype) -> None:
        _assert_gpu_equals_cpu(adversarial_matrix(*shape, dtype=dtype), scaling)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scaling", SCALINGS, ids=str)
    def test_nan_and_inf_rows(self, scaling: Scaling, dtype: torch.dtype) -> None:
        _assert_gpu_equals_cpu(_non_finite_matrix(dtype), scaling)

    @pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8], ids=lambda element: element.name)
    def test_every_bfloat16_value(self, element: ElementFormat) -> None:
        _assert_gpu_equals_cpu(all_bfloat16_values().view(512, 128), Scaling(element=element, block=ROWWISE))

    def test_transposed(self) -> None:
        _assert_gpu_equals_cpu(adversarial_matrix(512, 320), SCALINGS[0], transpose=True)


def _assert_gpu_equals_cpu(x: torch.Tensor, scaling: Scaling, *, transpose: bool = False) -> None:
    on_gpu = x.cuda().t() if transpose else x.cuda()
    actual, expected = _cast(on_gpu, scaling), quantize(x.t() if transpose else x, scaling)
    assert_bitwise_equal(actual.scale.cpu(), expected.scale, what="scale")
    assert_bitwise_equal(actual.data.cpu(), expected.data, what="data")
