"""scaled_mm: the product of the dequantized operands, every shape, and torch's own CPU kernel as second opinion."""

from importlib import import_module

import pytest
import torch

from aotrain.formats import FLOAT8_E4M3, FLOAT8_E5M2, ROWWISE, SCALE_FORMATS, TENSORWISE, Scaling, dequantize, quantize
from aotrain.kernels import scaled_mm
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
    with pytest.raises(ValueError, match="must be equal"):
        scaled_mm(a, quantize(torch.ones(4, 16), scaling(ROWWISE)), torch.float32)


@pytest.mark.parametrize(
    ("capability", "rowwise", "native"),
    [((8, 0), False, False), ((8, 9), False, True), ((8, 9), True, False), ((9, 0), True, True), ((10, 0), True, True)],
    ids=str,
)
def test_a_gpu_without_float8_is_one_clear_error(monkeypatch, capability, rowwise, native):
    module = import_module("aotrain.kernels.scaled_mm")
    module._cuda_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    device = torch.device("cuda", 0)
    try:
        if native:
            assert module._runs_natively(device, rowwise)
        else:
            with pytest.raises(RuntimeError, match=rf"Some GPU.*{capability[0]}\.{capability[1]}.*emulate=True"):
                module._runs_natively(device, rowwise)
        assert not module._runs_natively(torch.device("cpu"), rowwise)
    finally:
        module._cuda_problem.cache_clear()


def test_opcheck():
    a, b = quantize(torch.randn(8, 16), scaling(ROWWISE)), quantize(torch.randn(4, 16), scaling(ROWWISE))
    args = (a.data, a.scale, b.data, b.scale, torch.bfloat16, False, False)
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


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(TENSORWISE, TENSORWISE), (ROWWISE, ROWWISE), (ROWWISE, TENSORWISE)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 33, 31), (1, 4096, 4096)], ids=str)
def test_native_equals_emulated_on_gpu(shape, blocks):
    m, k, n = shape
    a = quantize(torch.randn(m, k, device="cuda"), scaling(blocks[0]))
    b = quantize(torch.randn(n, k, device="cuda"), scaling(blocks[1]))
    emulated = scaled_mm(a, b, torch.bfloat16, emulate=True)
    assert sqnr(emulated, scaled_mm(a, b, torch.bfloat16)) >= SQNR_DB[torch.bfloat16]
