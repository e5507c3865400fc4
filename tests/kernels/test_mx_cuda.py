"""The CUDA kernel of MX casts against the definition, bit for bit: its body compiled for this CPU, thread by thread."""

import math
from itertools import pairwise

import pytest
import torch

from aotrain.formats import BLOCKWISE_1X32, ELEMENT_FORMATS, SCALE_FORMATS, Scaling, pack_float4, quantize, to_blocked
from aotrain.formats.e8m0 import E8M0_ROUNDINGS
from aotrain.kernels import _mx_cuda as cuda
from aotrain.kernels._native import native_library
from aotrain.testing import adversarial_matrix, all_bfloat16_values, assert_bitwise_equal
from tests.kernels.mx_host import BOTH, CUDA_SOURCES, Host
from tests.kernels.native import library_or_skip

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
ELEMENTS = list(cuda.ELEMENTS)
# One tile, four, parts of one, and neither rows nor columns nor bytes of codes that vectors fit.
SHAPES = [(128, 128), (256, 256), (1, 1), (32, 160), (100, 130), (257, 31), (129, 96), (3, 259)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows-apart": lambda x: torch.cat([x, torch.full_like(x, math.nan)], 1)[:, : x.shape[1]],
    "columns-apart": lambda x: torch.cat([x, torch.full_like(x, math.nan)], 0).t().contiguous().t()[: x.shape[0]],
    "odd-start": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
}


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture
def on_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mx_cast_cuda` runs the host's build of the kernel, on CPU tensors."""
    monkeypatch.setattr(cuda, "library", lambda: (host.library, None))


def definition(x: torch.Tensor, element: str, rounding: str, blocked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scales of blocks of 1 x 32 in the layouts that the kernel writes."""
    scaling = Scaling(element=ELEMENT_FORMATS[element], scale=SCALE_FORMATS[f"e8m0_{rounding}"], block=BLOCKWISE_1X32)
    q = quantize(x.contiguous(), scaling)
    return pack_float4(q.data) if element == "float4_e2m1fn" else q.data, to_blocked(q.scale) if blocked else q.scale


def assert_casts(x: torch.Tensor, element: str, rounding: str, blocked: bool, blocks: tuple = BOTH) -> None:
    assert cuda.unsupported(x, element, rounding) is None
    results = cuda.mx_cast_cuda(x, element, rounding, *blocks, blocked=blocked)
    assert len(results) == 2 * len(blocks)
    for block, (data, scale) in zip(blocks, zip(results[::2], results[1::2], strict=True), strict=True):
        want = definition(x if block == BLOCKWISE_1X32 else x.mT, element, rounding, blocked)
        assert_bitwise_equal(data, want[0], what=f"data {block}")
        assert_bitwise_equal(scale.view(torch.uint8), want[1].view(torch.uint8), what=f"scale {block}")
        assert data.is_contiguous()
        assert scale.dtype == torch.float8_e8m0fnu


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_every_format_and_shape(rounding: str, element: str, dtype: torch.dtype):
    for shape in SHAPES:
        for blocked in (False, True):
            assert_casts(adversarial_matrix(*shape, dtype), element, rounding, blocked)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("blocks", [BOTH[:1], BOTH[1:], BOTH, BOTH[::-1]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_direction_and_layout(blocks: tuple, layout: str):
    for dtype in (torch.bfloat16, torch.float32):
        for element in ("float8_e4m3fn", "float4_e2m1fn"):
            for shape in ((128, 256), (75, 133)):
                x = LAYOUTS[layout](adversarial_matrix(*shape, dtype))
                assert_casts(x, element, "rceil", True, blocks)
                assert_casts(x, element, "floor", False, blocks)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits(dtype: torch.dtype, element: str):
    values = all_bfloat16_values().view(dtype)
    for rounding in E8M0_ROUNDINGS:
        # With its neighbours in bits, and with values of all exponents.
        assert_casts(values.view(256, 256), element, rounding, True)
        assert_casts(values.view(256, 256).t(), element, rounding, False)
    finite = values.masked_fill(~values.isfinite(), 0).view(512, 128)
    assert_casts(finite[torch.randperm(512)], element, "even", True)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_fill_their_block_and_no_other(dtype: torch.dtype, element: str):
    x = torch.randn(150, 140).to(dtype)
    x[3, 5], x[40, 100], x[149, 139], x[64, 0] = math.inf, math.nan, -math.nan, -math.inf
    x[20, 33], x[21, 33] = -math.inf, math.nan
    x[:, 96:] = x[:, 96:] * 0.0
    for rounding in E8M0_ROUNDINGS:
        assert_casts(x, element, rounding, False)
        assert_casts(-x, element, rounding, True)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("blocked", [False, True], ids=["row-major", "blocked"])
def test_experts_are_matrices_of_their_own(blocked: bool):
    weight = torch.stack([adversarial_matrix(96, 160, seed=seed) for seed in range(3)])  # [E, N, K]
    for x in (weight, weight.mT, weight[:, :33, :47], weight[:1], weight[::2], weight.view(3, 1, 96, 160)):
        for element in ("float8_e4m3fn", "float4_e2m1fn"):
            assert_casts(x, element, "rceil", blocked)
            assert_casts(x, element, "rceil", blocked, BOTH[:1])


GROUP_ENDS = [[256], [128, 384, 512], [0, 128, 128, 128, 640, 640], [384, 384, 512, 640, 768, 768, 768]]


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("ends", GROUP_ENDS, ids=str)
@pytest.mark.parametrize("element", ["float8_e4m3fn", "float4_e2m1fn"])
def test_groups_of_rows_have_tiles_of_scales_of_their_own(element: str, ends: list[int]):
    for columns, spare in ((64, 0), (300, 100)):  # rows after the last group
        x = adversarial_matrix(ends[-1] + spare, columns)
        for view in (x, x.t().contiguous().t()):
            group_ends = torch.tensor(ends, dtype=torch.int32)
            got = cuda.mx_cast_cuda(view, element, "rceil", *BOTH, blocked=True, group_ends=group_ends)
            plain = cuda.mx_cast_cuda(view, element, "rceil", *BOTH, blocked=True)
            for i in (0, 1, 2):
                assert_bitwise_equal(got[i].view(torch.uint8), plain[i].view(torch.uint8))
            assert got[3].shape == plain[3].shape
            scale_t = definition(x.mT, element, "rceil", False)[1].view(torch.uint8)
            tiles = [to_blocked(scale_t[:, a // 32 : b // 32]) for a, b in pairwise([0, *ends])]
            want = torch.cat(tiles)
            assert_bitwise_equal(got[3].view(torch.uint8)[: want.numel()], want)


def test_groups_are_found_without_a_wrong_access(host: Host):
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x = adversarial_matrix(384, 160)
    violations, traffic, _ = host.traced(x, "float8_e4m3fn", BOTH, True, group_ends=ends)
    assert not any(violations.values()), violations
    assert traffic["read group ends"].instructions > 0


def test_groups_of_what_has_none_are_refused():
    x, ends = torch.zeros(128, 32), torch.tensor([128], dtype=torch.int32)
    for tensor, blocked, group_ends in ((x[None], True, ends), (x, False, ends), (x, True, ends.long())):
        with pytest.raises(ValueError, match="want int32 group_ends of a matrix, with blocked scales"):
            cuda.mx_cast_cuda(tensor, "float8_e4m3fn", "rceil", *BOTH, blocked=blocked, group_ends=group_ends)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 3, 5), (2, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]):
    for blocked in (False, True):
        assert_casts(torch.empty(shape, dtype=torch.bfloat16), "float8_e4m3fn", "rceil", blocked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", ["float8_e4m3fn", "float4_e2m1fn"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 128), (100, 200), (33, 141)], ids=str)
def test_no_access_is_wrong_in_any_order_of_threads(host: Host, shape: tuple[int, int], element: str, dtype):
    """Neither a race between barriers, nor memory that nobody wrote, nor one outside a tensor, nor a byte left out."""
    x = adversarial_matrix(*shape, dtype)
    for blocks in (BOTH[:1], BOTH[1:], BOTH):
        for blocked in (False, True):
            runs = [host.traced(x, element, blocks, blocked, reverse=reverse) for reverse in (False, True)]
            for violations, _, _ in runs:
                assert not any(violations.values()), violations
            for a, b in zip(runs[0][2], runs[1][2], strict=True):
                assert_bitwise_equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_missing_barrier_is_noticed(host: Host):
    for blocks in (BOTH[:1], BOTH[1:]):
        violations, _, _ = host.traced(torch.randn(128, 128), "float8_e4m3fn", blocks, True, barriers=False)
        assert violations["races"] > 0
        assert violations["outside"] == violations["unwritten"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("element", ["float8_e4m3fn", "float4_e2m1fn"])
def test_whole_sectors_and_no_bank_conflicts(host: Host, element: str, dtype: torch.dtype):
    """Global memory in whole 32-byte sectors, each once; shared memory without conflicts where it counts."""
    x = torch.randn(256, 384).to(dtype)
    _, traffic, results = host.traced(x, element, BOTH, True)
    assert traffic.pop("read group ends").instructions == 0
    for name, t in traffic.items():
        conflicts = 4 if name == "column scale write" else 1  # a byte in 32 elements
        assert t.transactions == conflicts * t.least, name
        assert t.instructions > 0
    assert traffic["read x"].bytes == x.numel() * x.element_size()
    written = sum(traffic[f"write {name}"].bytes for name in ("row codes", "column codes", "scale"))
    assert written == sum(tensor.numel() for tensor in results) == x.numel() * (2 * bits(element) / 8 + 2 / 32)
    # 16 bytes an instruction and lane; what one lane reads of a row is 8 bytes of 4-bit codes.
    assert traffic["read x"].instructions == x.numel() * x.element_size() // (16 * 32)
    assert traffic["write row codes"].instructions == x.numel() // (16 * 32)
    assert traffic["write column codes"].instructions == x.numel() * bits(element) // 8 // (16 * 32)


def bits(element: str) -> int:
    return ELEMENT_FORMATS[element].bits


def test_other_blocks_are_refused():
    x = torch.zeros(32, 32)
    for blocks in ((), (BLOCKWISE_1X32, BLOCKWISE_1X32), ((1, 16),)):
        with pytest.raises(ValueError, match=r"want \(1, 32\), \(32, 1\), or both"):
            cuda.mx_cast_cuda(x, "float8_e4m3fn", "rceil", *blocks, blocked=False)


def test_what_the_kernel_cannot_cast_has_a_reason():
    x = torch.zeros(32, 32)
    assert "got one on cpu" in str(cuda.problem(x, "float8_e4m3fn", "rceil"))
    assert cuda.unsupported(x, "float8_e4m3fn", "rceil") is None
    assert "float64" in str(cuda.unsupported(x.double(), "float8_e4m3fn", "rceil"))
    assert "int8" in str(cuda.unsupported(x, "int8", "rceil"))
    assert "nearest" in str(cuda.unsupported(x, "float8_e4m3fn", "nearest"))
    assert "not a matrix" in str(cuda.unsupported(x[0], "float8_e4m3fn", "rceil"))
    large = torch.empty(2**31, 128, 128, device="meta")
    assert "more than 2147483647 tiles" in str(cuda.unsupported(large, "float8_e4m3fn", "rceil"))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "library", lambda: (None, "it is not built"))
    with pytest.raises(RuntimeError, match="cannot run: it is not built"):
        cuda.mx_cast_cuda(torch.zeros(32, 32), "float8_e4m3fn", "rceil", BLOCKWISE_1X32, blocked=False)


def test_the_arguments_of_a_view_of_experts():
    x = torch.zeros(5, 40, 100, dtype=torch.float16)[:, :, :70]
    pairs = {block: (torch.empty(1), torch.empty(1)) for block in BOTH}
    table, _kept = cuda.arguments(x, "float8_e5m2", "even", pairs, True)
    pointers = [tensor.data_ptr() for block in BOTH for tensor in pairs[block]]
    assert list(table) == [x.data_ptr(), *pointers, 5, 40, 70, 4000, 100, 2, 1, 2, 1, 0, 0, 0]


def test_an_error_of_the_launch_is_raised(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "library", lambda: (host.library, None))
    monkeypatch.setattr(
        cuda, "arguments", lambda *_: (cuda.array("q", [0, 0, 0, 0, 0, 2**31, 128, 128] + 7 * [0]), None)
    )
    with pytest.raises(RuntimeError, match="more tiles than a launch can have"):
        cuda.mx_cast_cuda(torch.zeros(32, 32), "float8_e4m3fn", "rceil", BLOCKWISE_1X32, blocked=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rounding", E8M0_ROUNDINGS)
def test_on_a_gpu(rounding: str, element: str, dtype: torch.dtype):
    library_or_skip(CUDA_SOURCES / "mx_cast.cu")
    native_library.cache_clear()
    cuda.library.cache_clear()
    values = all_bfloat16_values()
    values = values.view(dtype) if dtype == torch.float16 else values.to(dtype)
    matrices = [values.view(256, 256), *(adversarial_matrix(*shape, dtype) for shape in (*SHAPES, (4096, 4096)))]
    for x in matrices:
        x = x.cuda()
        assert cuda.problem(x, element, rounding) is None
        for blocked in (False, True):
            for blocks in (BOTH[:1], BOTH[1:], BOTH):
                assert_casts(x, element, rounding, blocked, blocks)
                assert_casts(x.t(), element, rounding, blocked, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("ends", GROUP_ENDS, ids=str)
def test_groups_on_a_gpu(ends: list[int]):
    library_or_skip(CUDA_SOURCES / "mx_cast.cu")
    native_library.cache_clear()
    cuda.library.cache_clear()
    x, group_ends = adversarial_matrix(ends[-1], 300).cuda(), torch.tensor(ends, dtype=torch.int32).cuda()
    *_, scale = cuda.mx_cast_cuda(x, "float8_e4m3fn", "rceil", *BOTH, blocked=True, group_ends=group_ends)
    scale_t = definition(x.mT, "float8_e4m3fn", "rceil", False)[1].view(torch.uint8)
    want = torch.cat([to_blocked(scale_t[:, a // 32 : b // 32]) for a, b in pairwise([0, *ends])])
    assert_bitwise_equal(scale.view(torch.uint8), want)
