"""mx_mm: the product of the dequantized operands, ragged shapes, mixed elements, and where bfloat16 is exact."""

from dataclasses import replace
from importlib import import_module

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
    ScaledTensor,
    Scaling,
    decode_elements,
    dequantize,
    from_blocked,
    quantize,
    quantize_mx,
    to_blocked,
    unpack_float4,
)
from aotrain.kernels import mx_mm, mx_mm_problem, scaled_mm
from aotrain.testing import assert_bitwise_equal, sqnr

# import_module: the package's attribute of this name is the function.
module = import_module("aotrain.kernels.mx_mm")
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


def hardware(a, b, a_scale, a_kind, b_scale, b_kind, a_swizzle, b_swizzle, output_dtype):
    """What a GPU's product computes of operands in its layout: an independent reading of data and scales."""
    kinds = torch.nn.functional.ScalingType.BlockWise1x32, torch.nn.functional.SwizzleType.SWIZZLE_32_4_4
    assert (a_kind, a_swizzle) == (b_kind, b_swizzle) == kinds
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    values = []
    for data, scale in ((a, a_scale), (b.t(), b_scale)):
        packed = data.dtype == torch.float4_e2m1fn_x2
        codes = unpack_float4(data, 2 * data.shape[1]) if packed else data
        rows, columns = codes.shape
        assert columns % 32 == 0
        scales = from_blocked(scale, rows, columns // 32)
        scaling = mx(FLOAT4_E2M1 if packed else FLOAT8_E4M3 if data.dtype == torch.float8_e4m3fn else FLOAT8_E5M2)
        values.append(dequantize(ScaledTensor(codes, scales, scaling)).double())
    assert b.shape[1] % 16 == 0
    return (values[0] @ values[1].t()).to(output_dtype)


NATIVE = [(FLOAT8_E4M3, FLOAT8_E4M3), (FLOAT8_E5M2, FLOAT8_E4M3), (FLOAT4_E2M1, FLOAT4_E2M1)]


@pytest.mark.parametrize("out_dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("elements", NATIVE, ids=lambda pair: "-".join(element.name for element in pair))
def test_the_native_product_is_given_what_hardware_reads(monkeypatch, elements, out_dtype):
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", hardware)
    for m, k, n in (*SHAPES, (130, 161, 140)):
        spread = torch.exp2(torch.arange(k) // 32 * 1.0)
        a, b = quantize(torch.randn(m, k) * spread, mx(elements[0])), quantize(torch.randn(n, k), mx(elements[1]))
        names = (element.name for element in elements)
        args = (a.data, a.scale.view(torch.uint8), next(names), b.data, b.scale.view(torch.uint8), next(names))
        got = module._native(*args, out_dtype)
        assert got.dtype == out_dtype
        assert got.is_contiguous()
        assert sqnr(dequantize(a).double() @ dequantize(b).double().t(), got) >= SQNR_DB[out_dtype]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(37, 100, 65), (128, 256, 64), (1, 1, 1)], ids=str)
def test_torch_accepts_the_layouts_on_a_gpu(shape, out_dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    m, k, n = shape
    # Not e2m1: torch 2.13's checks count bytes for elements there, and want half of the scales.
    with FakeTensorMode():
        operands = []
        for rows in (m, n):
            data = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="cuda")
            scale = torch.empty(rows, -(-k // 32), dtype=torch.uint8, device="cuda")
            operands += [data, scale, "float8_e4m3fn"]
        got = module._native(*operands, out_dtype)
    assert (tuple(got.shape), got.dtype, got.device.type) == ((m, n), out_dtype, "cuda")


@pytest.mark.parametrize("elements", NATIVE, ids=lambda pair: "-".join(element.name for element in pair))
def test_a_known_answer_decides_what_is_native(monkeypatch, elements):
    args = (torch.device("cpu"), *(element.name for element in elements), torch.bfloat16)

    def without_scales(a, b, a_scale, a_kind, b_scale, *rest, output_dtype):
        ones = [torch.full_like(scale.view(torch.uint8), 127).view(scale.dtype) for scale in (a_scale, b_scale)]
        return hardware(a, b, ones[0], a_kind, ones[1], *rest, output_dtype=output_dtype)

    def unswizzled(a, b, a_scale, a_kind, b_scale, *rest, output_dtype):
        """Reads the scales row by row."""
        blocked = []
        for scale, rows, columns in ((a_scale, a.shape[0], 8), (b_scale, b.shape[1], 8)):
            blocked.append(to_blocked(scale[: rows * columns].view(rows, columns)))
        return hardware(a, b, blocked[0], a_kind, blocked[1], *rest, output_dtype=output_dtype)

    def refused(*args, **kwargs):
        raise NotImplementedError("no such product\nat all")

    for product, words in (
        (hardware, None),
        (without_scales, "computes MX products wrongly"),
        (unswizzled, "computes MX products wrongly"),
        (lambda *a, **k: hardware(*a, **k) * torch.nan, "computes MX products wrongly"),
        (refused, "(no such product)"),
    ):
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", product)
        problem = module._probe(*args)
        assert problem is None if words is None else words in problem
    assert "no MX product of float6" in module._probe(args[0], "float6_e2m3fn", *args[2:])


def test_cpu_is_never_asked(monkeypatch):
    monkeypatch.setattr(module, "_probe", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(module, "_native", lambda *_: pytest.fail("native on a CPU"))
    a = quantize(torch.randn(4, 64), mx(FLOAT8_E4M3))
    mx_mm(a, a, torch.float32)
    assert mx_mm_problem(torch.device("cpu"), "float8_e4m3fn", "float8_e4m3fn", torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("elements", NATIVE, ids=lambda pair: "-".join(element.name for element in pair))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, elements):
    m, k, n = shape
    a, b = quantize(torch.randn(m, k), mx(elements[0])), quantize(torch.randn(n, k), mx(elements[1]))
    a_gpu, b_gpu = (ScaledTensor(q.data.cuda(), q.scale.cuda(), q.scaling) for q in (a, b))
    want = dequantize(a).double() @ dequantize(b).double().t()
    for emulate in (False, True):
        assert sqnr(want, mx_mm(a_gpu, b_gpu, torch.bfloat16, emulate=emulate).cpu()) >= SQNR_DB[torch.bfloat16]
