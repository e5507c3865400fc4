"""mx_mm: the product of the dequantized operands, ragged shapes, mixed elements, and where bfloat16 is exact."""

from dataclasses import replace

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT4_E2M1,
    FLOAT6_E2M3,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    ROWWISE,
    SCALE_FORMATS,
    ElementFormat,
    Scaling,
    decode_elements,
    dequantize,
    quantize,
    quantize_mx,
)
from aotrain.kernels import mx_mm, scaled_mm
from aotrain.testing import assert_bitwise_equal, sqnr

SHAPES = [(1, 1, 1), (5, 7, 3), (32, 32, 48), (37, 100, 65), (128, 256, 64)]
# Only the result is rounded. Measured 57 dB for bfloat16, 140 for float32, 74 for float16.
SQNR_DB = {torch.bfloat16: 52.0, torch.float32: 120.0, torch.float16: 66.0}
PAIRS = [(FLOAT8_E4M3, FLOAT8_E4M3), (FLOAT8_E5M2, FLOAT8_E4M3), (FLOAT4_E2M1, FLOAT4_E2M1), (FLOAT6_E2M3, FLOAT8_E4M3)]


def mx(element: ElementFormat, scale: str = "e8m0_rceil") -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS[scale], block=BLOCKWISE_1X32)


@pytest.mark.parametrize("out_dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("elements", PAIRS, ids=lambda pair: "-".join(element.name for element in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product_of_the_dequantized_operands(shape, elements, out_dtype):
    m, k, n = shape
    # Every 32 columns have a magnitude of their own, so that a scale in the wrong place shows.
    spread = torch.exp2(torch.arange(k) // 32 * 3.0)
    a = quantize(torch.randn(m, k) * spread, mx(elements[0]))
    b = quantize(torch.randn(n, k) / spread, mx(elements[1]))
    want = dequantize(a).double() @ dequantize(b).double().t()
    got = mx_mm(a, b, out_dtype)
    assert got.dtype == out_dtype
    assert sqnr(want, got) >= SQNR_DB[out_dtype]
    assert_bitwise_equal(scaled_mm(a, b, out_dtype), got)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, FLOAT4_E2M1], ids=lambda element: element.name)
def test_bfloat16_holds_every_code_times_every_scale_in_its_range(element: ElementFormat):
    """The claim of the module, on all of them: inexact only below 2^-133 and above the largest bfloat16."""
    codes = torch.arange(2**element.bits, dtype=torch.uint8).view(element.dtype)
    values = decode_elements(codes, torch.float32, element).double()
    scales = torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
    exact = (values[:, None] * scales)[values.isfinite()]
    rounded = exact.to(torch.bfloat16).double()
    beyond = exact.abs() > torch.finfo(torch.bfloat16).max
    assert bool(((rounded == exact) | beyond | (exact.abs() < 2.0**-126)).all())
    assert bool(rounded[beyond].isinf().all())
    assert not beyond[:, :237].any()  # the module names the bytes from which on


def test_transformed_operands_give_the_product_of_the_originals():
    a, b = torch.randn(24, 100), torch.randn(40, 100)
    scaling = replace(mx(FLOAT8_E4M3), hadamard=32)
    got = scaled_mm(quantize_mx(a, scaling), quantize_mx(b, scaling), torch.float32)
    assert sqnr(a.double() @ b.double().t(), got) > 27


def test_blocks_with_nan_show_in_their_rows_only():
    x, w = torch.randn(4, 64), torch.randn(3, 64)
    clean = mx_mm(quantize(x, mx(FLOAT4_E2M1)), quantize(w, mx(FLOAT4_E2M1)), torch.float32)
    x[1, 40] = float("inf")
    got = mx_mm(quantize(x, mx(FLOAT4_E2M1)), quantize(w, mx(FLOAT4_E2M1)), torch.float32)
    assert bool(got[1].isnan().all())
    keep = torch.tensor([0, 2, 3])
    assert_bitwise_equal(got[keep], clean[keep])


def test_what_does_not_go_together_is_refused():
    a, b = quantize(torch.randn(4, 64), mx(FLOAT8_E4M3)), quantize(torch.randn(3, 32), mx(FLOAT8_E4M3))
    with pytest.raises(ValueError, match="must be equal"):
        mx_mm(a, b, torch.float32)
    rowwise = quantize(torch.randn(3, 64), Scaling(element=FLOAT8_E4M3, block=ROWWISE))
    with pytest.raises(ValueError, match="MX goes with MX only"):
        scaled_mm(a, rowwise, torch.float32)
    with pytest.raises(ValueError, match="transforms"):
        mx_mm(a, quantize_mx(torch.randn(3, 64), replace(mx(FLOAT8_E4M3), hadamard=32)), torch.float32)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT4_E2M1], ids=lambda element: element.name)
def test_opcheck(element: ElementFormat):
    a, b = quantize(torch.randn(8, 40), mx(element)), quantize(torch.randn(5, 40), mx(element))
    a_scale, b_scale = (q.scale.view(torch.uint8) for q in (a, b))
    args = (a.data, a_scale, element.name, b.data, b_scale, element.name, torch.bfloat16, False)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # torch has no allclose for float8, with which test_schema compares the inputs.
    tests += ["test_schema"] * element.stored_as_codes
    torch.library.opcheck(torch.ops.aotrain.mx_mm.default, args, test_utils=tests)


def test_empty():
    a, b = quantize(torch.randn(0, 40), mx(FLOAT4_E2M1)), quantize(torch.randn(5, 40), mx(FLOAT4_E2M1))
    assert mx_mm(a, b, torch.bfloat16).shape == (0, 5)
