"""The nvfp4_mm op against products of dequantized operands, and the exactness that its emulation rests on."""

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_16X16,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    Nvfp4Tensor,
    decode_elements,
    dequantize_nvfp4,
    unpack_float4,
)
from aotrain.kernels.nvfp4_cast import Nvfp4Operand, nvfp4_cast
from aotrain.kernels.nvfp4_mm import nvfp4_mm
from aotrain.testing import all_codes, assert_bitwise_equal, sqnr

# Against the exact product of the same operands: float32 sums round (110 dB), results to 16 bits once or twice.
SQNR_DB = {torch.float32: 110.0, torch.bfloat16: 50.0, torch.float16: 65.0}


def values(q: Nvfp4Operand) -> torch.Tensor:
    codes = unpack_float4(q.data, 2 * q.data.shape[1])
    return dequantize_nvfp4(Nvfp4Tensor(codes, q.scale, q.global_scale, BLOCKWISE_1X16)).double()


def test_every_code_times_every_scale_is_exact_in_bfloat16() -> None:
    codes = decode_elements(all_codes(FLOAT4_E2M1), torch.float32, FLOAT4_E2M1)
    scales = all_codes(FLOAT8_E4M3).float()
    scales = scales[scales.isfinite()]
    exact = codes.double()[:, None] * scales.double()
    assert torch.equal(exact.bfloat16().double(), exact)
    product = codes.bfloat16()[:, None] * scales.bfloat16()
    assert torch.equal(product.double(), exact)


@pytest.mark.parametrize("dtype", list(SQNR_DB), ids=str)
@pytest.mark.parametrize("shape", [(37, 100, 65), (1, 1, 1), (64, 128, 32), (5, 17, 300)], ids=str)
def test_product_of_the_dequantized_operands(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    a = nvfp4_cast(torch.randn(m, k) * 30)
    b = nvfp4_cast(torch.randn(n, k), block=BLOCKWISE_16X16)
    got = nvfp4_mm(a, b, dtype)
    assert got.shape == (m, n)
    assert got.dtype == dtype
    assert sqnr(values(a) @ values(b).t(), got) >= SQNR_DB[dtype]


def test_blocked_scales_give_the_same_product() -> None:
    x, w = torch.randn(37, 100), torch.randn(65, 100)
    plain = [nvfp4_cast(operand) for operand in (x, w)]
    tiled = [nvfp4_cast(operand, blocked=True) for operand in (x, w)]
    assert_bitwise_equal(nvfp4_mm(*tiled, torch.bfloat16), nvfp4_mm(*plain, torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 32, 16), (16, 32, 0), (16, 0, 8)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    got = nvfp4_mm(nvfp4_cast(torch.empty(m, k)), nvfp4_cast(torch.empty(n, k)), torch.bfloat16)
    assert got.shape == (m, n)
    assert not got.any()


def test_very_large_and_very_small_operands_keep_their_accuracy() -> None:
    for power in (-60, 60):
        a, b = (nvfp4_cast(torch.randn(32, 64) * 2.0**sign) for sign in (power, -power))
        assert sqnr(values(a) @ values(b).t(), nvfp4_mm(a, b, torch.float16)) >= SQNR_DB[torch.float16]


def test_non_finite_operands_give_nan() -> None:
    x = torch.randn(16, 32)
    w = nvfp4_cast(x)
    x[3, 4] = torch.inf
    assert bool(nvfp4_mm(nvfp4_cast(x), w, torch.bfloat16).isnan().all())


def test_opcheck() -> None:
    a, b = nvfp4_cast(torch.randn(37, 100)), nvfp4_cast(torch.randn(65, 100))
    before = [part.clone() for part in (*a, *b)]
    for dtype in SQNR_DB:
        # Not test_schema: it compares inputs with allclose, which torch does not have for float8.
        torch.library.opcheck(
            torch.ops.aotrain.nvfp4_mm,
            (*a, *b, dtype, True),
            test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    for part, copy in zip((*a, *b), before, strict=True):
        assert torch.equal(part.view(torch.uint8), copy.view(torch.uint8))


def test_contracted_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="contracted and must be equal"):
        nvfp4_mm(nvfp4_cast(torch.randn(8, 32)), nvfp4_cast(torch.randn(8, 40)), torch.float32)
