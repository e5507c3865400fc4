"""The nvfp4_mm op against products of dequantized operands, and the exactness that its emulation rests on."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats import (
    BLOCKWISE_1X16,
    BLOCKWISE_16X16,
    FLOAT4_E2M1,
    FLOAT8_E4M3,
    Nvfp4Tensor,
    blocked_size,
    decode_elements,
    dequantize_nvfp4,
    from_blocked,
    unpack_float4,
)
from aotrain.kernels.nvfp4_cast import Nvfp4Operand, nvfp4_cast, padded_columns
from aotrain.kernels.nvfp4_mm import nvfp4_mm
from aotrain.testing import all_codes, assert_bitwise_equal, sqnr

# The package's attribute of this name is the function.
module = import_module("aotrain.kernels.nvfp4_mm")
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


def scaled_mm_by_its_documentation(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, output_dtype):
    """What the arguments of torch.nn.functional.scaled_mm mean, in float64."""
    kinds, orders = F.ScalingType, F.SwizzleType
    assert recipe_a == recipe_b == [kinds.BlockWise1x16, kinds.TensorWise]
    assert swizzle_a == swizzle_b == [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
    operands = []
    for data, (blocks, level) in ((a, scale_a), (b.t(), scale_b)):
        rows, columns = data.shape[0], 2 * data.shape[1]
        assert level.shape == (1,)
        scale = from_blocked(blocks, rows, columns // 16)
        q = Nvfp4Tensor(unpack_float4(data, columns), scale, level.view(1, 1), BLOCKWISE_1X16)
        operands.append(dequantize_nvfp4(q).double())
    assert b.shape[1] % 16 == 0
    return (operands[0] @ operands[1].t()).to(output_dtype)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("dtype", list(SQNR_DB), ids=str)
def test_native_arguments_and_padding(dtype: torch.dtype, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nvfp4_cast(torch.randn(37, 100), blocked=blocked), nvfp4_cast(torch.randn(133, 100), blocked=blocked)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm_by_its_documentation)
    got = module._native(*a, *b, dtype)
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert sqnr(nvfp4_mm(a, b, torch.float32), got) >= SQNR_DB[dtype] - 1


@pytest.mark.parametrize("shape", [(37, 100, 65), (1, 1, 1), (128, 256, 384), (5, 33, 300)], ids=str)
def test_torch_accepts_the_native_arguments(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    with FakeTensorMode():
        a, b = (
            Nvfp4Operand(
                torch.empty(rows, padded_columns(k) // 2, dtype=torch.uint8, device="cuda"),
                torch.empty(blocked_size(rows, padded_columns(k) // 16), dtype=torch.float8_e4m3fn, device="cuda"),
                torch.empty(1, 1, device="cuda"),
            )
            for rows in (m, n)
        )
        for dtype in SQNR_DB:
            got = module._native(*a, *b, dtype)
            assert got.shape == (m, n)
            assert got.dtype == dtype


def wrong_order(*args, **kwargs) -> torch.Tensor:
    return scaled_mm_by_its_documentation(*args, **kwargs).flip(0)


def refuse(*args, **kwargs) -> torch.Tensor:
    raise NotImplementedError("no such kernel\nat a place")


@pytest.mark.parametrize(
    ("scaled_mm", "problem"),
    [(scaled_mm_by_its_documentation, None), (wrong_order, "wrong result"), (refuse, "no such kernel")],
    ids=["right", "wrong", "refused"],
)
def test_the_probe_asks_for_a_known_answer(scaled_mm, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(module.torch, "device", lambda *args: "cpu")
    got = module._probe.__wrapped__(0)
    assert got is None if problem is None else problem in got and "Some GPU" in got


def test_the_probe_notices_every_mistaken_order_of_scales() -> None:
    operand = module._probe_operand(40, torch.device("cpu"))
    want = values(operand)
    for other in (operand.scale.view(torch.uint8).flip(0), operand.scale.view(torch.uint8).flip(1)):
        moved = operand._replace(scale=other.contiguous().view(torch.float8_e4m3fn))
        assert (values(moved) - want).norm() > 0.1 * want.norm()
    assert operand.scale.float().isfinite().all()
    swapped = operand._replace(data=(operand.data >> 4) | (operand.data << 4))
    assert (values(swapped) - want).norm() > 0.1 * want.norm()


def test_no_cpu_is_native() -> None:
    assert module.native_nvfp4_problem(torch.device("cpu")) == "cpu has no NVFP4 products"


@pytest.mark.gpu
def test_a_gpu_gives_the_emulated_product() -> None:
    a, b = (nvfp4_cast(torch.randn(rows, 272, device="cuda"), blocked=True) for rows in (150, 300))
    for dtype in SQNR_DB:
        assert sqnr(nvfp4_mm(a, b, dtype, emulate=True), nvfp4_mm(a, b, dtype)) >= SQNR_DB[dtype] - 5


def test_contracted_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="contracted and must be equal"):
        nvfp4_mm(nvfp4_cast(torch.randn(8, 32)), nvfp4_cast(torch.randn(8, 40)), torch.float32)
