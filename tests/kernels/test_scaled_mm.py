"""scaled_mm: the product of the dequantized operands, every shape, and torch's own CPU kernel as second opinion."""

from importlib import import_module

import pytest
import torch

from aotrain.formats import (
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    dequantize,
    quantize,
    scale_shape,
)
from aotrain.kernels import native_scaled_mm_problem, scaled_mm
from aotrain.testing import sqnr

SHAPES = [(1, 1, 1), (5, 7, 3), (32, 16, 48), (37, 100, 65), (128, 256, 64)]
# The emulation only rounds the result: bfloat16 has 8 bits of mantissa, twice rounded for scales that are not powers
# of two. Measured 54-57 dB for bfloat16, 140 dB for float32, 72 dB for float16.
SQNR_DB = {torch.bfloat16: 48.0, torch.float32: 120.0, torch.float16: 66.0}


def scaling(block: tuple[int, int], element=FLOAT8_E4M3, scale: str = "float32") -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)


@pytest.mark.parametrize("out_dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("blocks", [(TENSORWISE, TENSORWISE), (ROWWISE, ROWWISE), (ROWWISE, TENSORWISE)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product_of_the_dequantized_operands(shape, blocks, out_dtype):
    m, k, n = shape
    a = quantize(torch.randn(m, k), scaling(blocks[0], FLOAT8_E5M2))
    b = quantize(torch.randn(n, k), scaling(blocks[1]))
    want = dequantize(a).double() @ dequantize(b).double().t()
    got = scaled_mm(a, b, out_dtype)
    assert got.dtype == out_dtype
    assert sqnr(want, got) >= SQNR_DB[out_dtype]


LONG_SHAPES = [*SHAPES, (130, 300, 257), (4, 127, 129)]
BLOCK_PAIRS = [(BLOCKWISE_1X128, BLOCKWISE_128X128), (BLOCKWISE_1X128, BLOCKWISE_1X128)]


@pytest.mark.parametrize("out_dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("scale", ["float32", "float32_pow2"])
@pytest.mark.parametrize("blocks", BLOCK_PAIRS, ids=str)
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_scales_along_the_contracted_dimension(shape, blocks, scale, out_dtype):
    m, k, n = shape
    # Every 128 columns have a magnitude of their own, so that a scale in the wrong place shows.
    spread = torch.exp2(torch.arange(k) // 128 * 3.0)
    a = quantize(torch.randn(m, k) * spread, scaling(blocks[0], scale=scale))
    b = quantize(torch.randn(n, k) / spread, scaling(blocks[1], scale=scale))
    want = dequantize(a).double() @ dequantize(b).double().t()
    assert sqnr(want, scaled_mm(a, b, out_dtype)) >= SQNR_DB[out_dtype]


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("out_dtype", SQNR_DB, ids=str)
@pytest.mark.parametrize("blocks", [(TENSORWISE, TENSORWISE), (ROWWISE, ROWWISE), (ROWWISE, TENSORWISE)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape, blocks, out_dtype, emulate):
    m, k, n = shape
    a = quantize(torch.randn(m, k), scaling(blocks[0], INT8))
    b = quantize(torch.randn(n, k), scaling(blocks[1], INT8))
    want = dequantize(a).double() @ dequantize(b).double().t()
    assert sqnr(want, scaled_mm(a, b, out_dtype, emulate=emulate)) >= SQNR_DB[out_dtype]


def test_int8_sums_longer_than_int32_holds():
    k = 2**18 + 5
    ones = quantize(torch.ones(2, k), scaling(ROWWISE, INT8))
    torch.testing.assert_close(scaled_mm(ones, ones, torch.float32), torch.full((2, 2), float(k)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("element", [FLOAT8_E4M3, INT8], ids=lambda e: e.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_row(element, bad):
    x = torch.ones(3, 256)
    x[1, 200] = bad
    for block in (ROWWISE, BLOCKWISE_1X128) if element is not INT8 else (ROWWISE,):
        out = scaled_mm(
            quantize(x, scaling(block, element)), quantize(torch.ones(4, 256), scaling(block, element)), torch.bfloat16
        )
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_agrees_with_the_cpu_kernel_of_torch():
    a = quantize(torch.randn(32, 64), scaling(TENSORWISE))
    b = quantize(torch.randn(48, 64), scaling(TENSORWISE))
    theirs = torch._scaled_mm(a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=torch.float32)
    assert sqnr(theirs, scaled_mm(a, b, torch.float32)) >= SQNR_DB[torch.float32]


@pytest.mark.parametrize("shape", [(0, 16, 8), (4, 0, 8), (4, 16, 0)], ids=str)
def test_empty_dimensions_give_zeros(shape):
    m, k, n = shape
    out = scaled_mm(
        quantize(torch.ones(m, k), scaling(ROWWISE)), quantize(torch.ones(n, k), scaling(ROWWISE)), torch.float32
    )
    assert out.shape == (m, n)
    assert not out.any()


def test_float16_output_does_not_overflow_inside():
    """4096 products of 448 * 448 exceed float16 by far before the scales bring them back."""
    a = quantize(torch.ones(16, 4096), scaling(ROWWISE, scale="float32_pow2"))
    assert scaled_mm(a, a, torch.float16)[0, 0] == 4096


def test_bad_operands_say_what_to_do():
    a = quantize(torch.ones(4, 32), scaling(ROWWISE))
    with pytest.raises(ValueError, match="want tensorwise"):
        scaled_mm(quantize(torch.ones(4, 32), scaling((1, 32))), a, torch.float32)
    with pytest.raises(ValueError, match="a is float4_e2m1fn; want float8 or int8"):
        scaled_mm(quantize(torch.ones(4, 32), scaling(ROWWISE, FLOAT4_E2M1)), a, torch.float32)
    with pytest.raises(ValueError, match="int8 goes with int8"):
        scaled_mm(a, quantize(torch.ones(4, 32), scaling(ROWWISE, INT8)), torch.float32)
    for blocks in ((BLOCKWISE_1X128, ROWWISE), (BLOCKWISE_128X128, BLOCKWISE_1X128)):
        with pytest.raises(ValueError, match="on the left"):
            scaled_mm(*(quantize(torch.ones(4, 32), scaling(block)) for block in blocks), torch.float32)
    with pytest.raises(ValueError, match="must be equal"):
        scaled_mm(a, quantize(torch.ones(4, 16), scaling(ROWWISE)), torch.float32)


@pytest.mark.parametrize(
    ("capability", "block", "native"),
    [
        ((8, 0), TENSORWISE, False),
        ((8, 9), TENSORWISE, True),
        ((8, 9), ROWWISE, False),
        ((9, 0), ROWWISE, True),
        ((10, 0), ROWWISE, True),
        ((9, 0), BLOCKWISE_1X128, True),
    ],
    ids=str,
)
def test_a_gpu_without_float8_is_one_clear_error(monkeypatch, capability, block, native):
    module = import_module("aotrain.kernels.scaled_mm")
    module._cuda_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    device = torch.device("cuda", 0)
    try:
        if native:
            assert module._runs_natively(device, block)
        else:
            with pytest.raises(RuntimeError, match=rf"Some GPU.*{capability[0]}\.{capability[1]}.*emulate=True"):
                module._runs_natively(device, block)
        assert not module._runs_natively(torch.device("cpu"), block)
    finally:
        module._cuda_problem.cache_clear()


def test_opcheck():
    a, b = quantize(torch.randn(8, 16), scaling(ROWWISE)), quantize(torch.randn(4, 16), scaling(ROWWISE))
    args = (a.data, a.scale, ROWWISE, b.data, b.scale, ROWWISE, False, torch.bfloat16, False, False)
    # Not test_schema: it compares inputs with allclose, which torch does not have for float8.
    torch.library.opcheck(
        torch.ops.aotrain.scaled_mm.default,
        args,
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    before = [a.data.clone(), a.scale.clone(), b.data.clone(), b.scale.clone()]
    torch.ops.aotrain.scaled_mm(*args)
    for tensor, copy in zip((a.data, a.scale, b.data, b.scale), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


def test_native_layouts_are_accepted_by_the_cuda_op_on_every_shape():
    """torch's fake CUDA kernel checks strides and multiples of 16 as the real one does; it needs no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aotrain.kernels.scaled_mm import _native

    with FakeTensorMode():
        for m, k, n in [*SHAPES, (17, 33, 31), (1, 4096, 4096)]:
            for rows_a, rows_b in ((1, 1), (m, n), (m, 1)):
                a = torch.empty(m, k, device="cuda", dtype=torch.float8_e4m3fn)
                b = torch.empty(n, k, device="cuda", dtype=torch.float8_e4m3fn)
                scales = [torch.empty(rows, 1, device="cuda") for rows in (rows_a, rows_b)]
                for out_dtype in (torch.bfloat16, torch.float32):
                    out = _native(a, scales[0], b, scales[1], out_dtype, False)
                    assert out.shape == (m, n)
                    assert out.dtype == out_dtype


@pytest.mark.parametrize("blocks", BLOCK_PAIRS, ids=str)
@pytest.mark.parametrize("shape", [*LONG_SHAPES, (17, 33, 31), (1, 4096, 4096)], ids=str)
def test_native_block_layouts_are_accepted_by_the_cuda_op(shape, blocks):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aotrain.kernels.scaled_mm import _native_blocks

    m, k, n = shape
    with FakeTensorMode():
        a, b = (torch.empty(rows, k, device="cuda", dtype=torch.float8_e4m3fn) for rows in (m, n))
        scales = [
            torch.empty(scale_shape((rows, k), block), device="cuda")
            for rows, block in zip((m, n), blocks, strict=True)
        ]
        for out_dtype in (torch.bfloat16, torch.float32, torch.float16):
            out = _native_blocks(a, scales[0], b, scales[1], blocks[1], out_dtype)
            assert (out.shape, out.dtype) == ((m, n), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "blocks", [(TENSORWISE, TENSORWISE), (ROWWISE, ROWWISE), (ROWWISE, TENSORWISE), *BLOCK_PAIRS], ids=str
)
@pytest.mark.parametrize("shape", [*LONG_SHAPES, (17, 33, 31), (1, 4096, 4096)], ids=str)
def test_native_equals_emulated_on_gpu(shape, blocks):
    m, k, n = shape
    a = quantize(torch.randn(m, k, device="cuda"), scaling(blocks[0]))
    b = quantize(torch.randn(n, k, device="cuda"), scaling(blocks[1]))
    if native_scaled_mm_problem(a.data.device, blocks[0]) is not None:
        pytest.skip("this GPU has no such product; the error it gives is tested above")
    emulated = scaled_mm(a, b, torch.bfloat16, emulate=True)
    assert sqnr(emulated, scaled_mm(a, b, torch.bfloat16)) >= SQNR_DB[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*LONG_SHAPES, (17, 33, 31), (1, 4096, 4096)], ids=str)
def test_native_int8_equals_emulated_on_gpu(shape):
    m, k, n = shape
    a = quantize(torch.randn(m, k, device="cuda"), scaling(ROWWISE, INT8))
    b = quantize(torch.randn(n, k, device="cuda"), scaling(ROWWISE, INT8))
    emulated = scaled_mm(a, b, torch.bfloat16, emulate=True)
    assert sqnr(emulated, scaled_mm(a, b, torch.bfloat16)) >= SQNR_DB[torch.bfloat16]
