"""MXFP8 products of groups on tensor cores: layouts against a reading of their own, torch's checks, and the probe."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aotrain.formats import (
    BLOCKWISE_1X32,
    FLOAT8_E4M3,
    SCALE_FORMATS,
    ScaledTensor,
    Scaling,
    blocked_size,
    dequantize,
    from_blocked,
)
from aotrain.kernels import _grouped_mm_cuda as dispatch
from aotrain.kernels import _grouped_mx_cuda as native
from aotrain.kernels import grouped_cast as grouped_cast_module
from aotrain.kernels import groups
from aotrain.kernels import scaled_grouped_mm as module
from aotrain.kernels.scaled_grouped_mm import scaled_grouped_mm, scaled_grouped_mm_contracted
from aotrain.testing import assert_bitwise_equal, sqnr
from tests.kernels.test_scaled_grouped_mm import (
    assert_close,
    contracted_operands,
    contracted_product,
    layout_of,
    rows_operands,
    rows_product,
)

MX = Scaling(element=FLOAT8_E4M3, scale=SCALE_FORMATS["e8m0_rceil"], block=BLOCKWISE_1X32)
# Groups of one tile of scales and of several, ragged and empty ones, rows of no group; and no rows at all.
SIZES = [([5, 0, 130, 1], 140), ([0, 257, 128], 385), ([0, 0], 9), ([33], 33)]


def read_scales(memory: torch.Tensor, first: int, rows: int, columns: int) -> tuple[torch.Tensor, int]:
    """A group's scales [rows, columns] from byte `first` on, and where the next group's begin."""
    last = first + blocked_size(rows, columns)
    return from_blocked(memory[first:last], rows, columns), last


def matrix(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dequantize(ScaledTensor(data.contiguous(), scale, MX)).double()


def hardware(a, b, a_scale, b_scale, *, offs, out_dtype):
    """What a GPU computes of operands in its layout, group by group; what it does not write is NaN."""
    assert a.is_contiguous()
    assert b.mT.is_contiguous()
    assert a_scale.dtype == b_scale.dtype == torch.float8_e8m0fnu
    assert a_scale.dim() == a.dim()
    assert a_scale.is_contiguous()
    assert a.shape[1] % 16 == 0 == b.shape[-1] % 16
    bounds = list(zip([0, *offs.tolist()], offs.tolist(), strict=False))
    a_bytes, b_bytes, a_place, b_place = a_scale.flatten(), b_scale.flatten(), 0, 0
    if b.dim() == 3:
        blocks = a.shape[1] // 32
        assert b_scale.shape == (b.shape[0], blocked_size(b.shape[2], blocks))
        output = torch.full((a.shape[0], b.shape[2]), torch.nan, dtype=torch.float64)
        for group, (start, end) in enumerate(bounds):
            scale, a_place = read_scales(a_bytes, a_place, end - start, blocks)
            rhs = matrix(b[group].t(), from_blocked(b_scale[group], b.shape[2], blocks))
            output[start:end] = matrix(a[start:end], scale) @ rhs.t()
        return output.to(out_dtype)
    assert b_scale.dim() == 2
    assert a_scale.shape[0] >= a.shape[0]
    assert b_scale.shape[0] >= b.shape[1]
    output = torch.empty((len(bounds), a.shape[0], b.shape[1]), dtype=torch.float64)
    for group, (start, end) in enumerate(bounds):
        assert end > start
        assert (end - start) % 32 == 0
        blocks = (end - start) // 32
        scale, a_place = read_scales(a_bytes, a_place, a.shape[0], blocks)
        scale_b, b_place = read_scales(b_bytes, b_place, b.shape[1], blocks)
        output[group] = matrix(a[:, start:end], scale) @ matrix(b[start:end].t(), scale_b).t()
    return output.to(out_dtype)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the CUDA implementations with `hardware` behind them, and nobody may read the offsets."""
    monkeypatch.setattr(torch, "_scaled_grouped_mm", hardware)
    monkeypatch.setattr(dispatch, "_way", lambda *arguments: "mx")
    monkeypatch.setattr(torch.ops.aotrain, "scaled_grouped_mm", module._cuda)
    monkeypatch.setattr(torch.ops.aotrain, "scaled_grouped_mm_contracted", module._cuda_contracted)
    for reader in (groups, grouped_cast_module, module):
        monkeypatch.setattr(reader, "group_bounds", lambda *arguments: pytest.fail("the offsets were read"))


@pytest.mark.parametrize(("sizes", "rows"), SIZES, ids=str)
@pytest.mark.parametrize("k", [32, 160])
def test_rows(sizes, rows, k, request: pytest.FixtureRequest):
    a, b, layout = rows_operands(sizes, rows, k, 144, MX, MX)
    want = rows_product(a, b, layout)
    request.getfixturevalue("like_a_gpu")
    assert_close(scaled_grouped_mm(a, b, layout, torch.bfloat16), want, torch.bfloat16)


@pytest.mark.parametrize(("sizes", "rows"), SIZES, ids=str)
@pytest.mark.parametrize("align", [32, 128])
def test_contracted(sizes, rows, align, request: pytest.FixtureRequest):
    a, b, layout = contracted_operands(sizes, rows, 48, 136, MX, align)
    want = contracted_product(a, b, layout)
    request.getfixturevalue("like_a_gpu")
    assert_close(scaled_grouped_mm_contracted(a, b, layout, torch.bfloat16), want, torch.bfloat16)


def test_tiles_of_scales_follow_each_other_group_by_group():
    scale = torch.randint(256, (300, 7), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    ends = torch.tensor([129, 129, 290], dtype=torch.int32)
    memory, place = native.blocked_rows(scale, ends).flatten(), 0
    for start, end in ((0, 129), (129, 129), (129, 290)):
        got, place = read_scales(memory, place, end - start, 7)
        assert_bitwise_equal(got, scale[start:end])
    assert not memory.view(torch.uint8)[place:].any()
    scale = torch.randint(256, (130, 11), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    memory, place = native.blocked_columns(scale, torch.tensor([32, 192, 320], dtype=torch.int32)).flatten(), 0
    for start, end in ((0, 1), (1, 6), (6, 10)):
        got, place = read_scales(memory, place, 130, end - start)
        assert_bitwise_equal(got, scale[:, start:end].contiguous())


@pytest.mark.parametrize("k", [32, 160])
@pytest.mark.parametrize("sizes", [[5, 0, 37], [1], [300, 2]], ids=str)
def test_torch_accepts_the_layouts_on_a_gpu(sizes: list[int], k: int):
    """Its fake CUDA kernel checks strides, and what of the scales does not depend on the groups."""
    number, rows, n = len(sizes), sum(sizes) + 3, 48
    layout = layout_of(sizes, rows, 32)
    with FakeTensorMode():

        def operand(*shape: int) -> ScaledTensor:
            data = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
            scale = torch.empty((*shape[:-1], shape[-1] // 32), device="cuda", dtype=torch.float8_e8m0fnu)
            return ScaledTensor(data, scale, MX)

        ends = torch.empty(number, device="cuda", dtype=torch.int32)
        a, b = operand(rows, k), operand(number, n, k)
        assert native.takes(a, b, k, n, torch.bfloat16)
        out = native.rows(a, b, ends)
        assert (out.shape, out.dtype, out.device.type) == ((rows, n), torch.bfloat16, "cuda")
        a, b = operand(n, layout.padded_rows), operand(k, layout.padded_rows)
        assert native.takes(a, b, layout.padded_rows, k, torch.bfloat16)
        out = native.contracted(a, b, ends)
        assert (out.shape, out.dtype, out.device.type) == ((number, n, k), torch.bfloat16, "cuda")


@pytest.mark.parametrize("contracted", [False, True])
def test_a_known_answer_decides_what_is_native(monkeypatch, contracted: bool):
    def without_scales(a, b, a_scale, b_scale, **options):
        ones = [torch.full_like(scale.view(torch.uint8), 127).view(scale.dtype) for scale in (a_scale, b_scale)]
        return hardware(a, b, *ones, **options)

    def one_tile_late(a, b, a_scale, b_scale, **options):
        moved = a_scale.view(torch.uint8).flatten().roll(512).view(a_scale.shape).view(a_scale.dtype)
        return hardware(a, b, moved, b_scale, **options)

    def refused(*args, **kwargs):
        raise NotImplementedError("no such product\nat all")

    for product, words in (
        (hardware, None),
        (without_scales, "wrongly"),
        (one_tile_late, "wrongly"),
        (lambda *a, **k: hardware(*a, **k) * torch.nan, "wrongly"),
        (refused, "(no such product)"),
    ):
        monkeypatch.setattr(torch, "_scaled_grouped_mm", product)
        got = native.probe(torch.device("cpu"), contracted=contracted)
        assert got is None if words is None else words in got


@pytest.mark.parametrize("contracted", [False, True])
def test_what_decides_between_native_and_emulated(monkeypatch, contracted: bool):
    found: list[str | None] = [None]
    monkeypatch.setattr(native, "problem", lambda device, *, contracted: found[0])
    with FakeTensorMode():
        data = torch.empty(64, 64, device="cuda", dtype=torch.float8_e4m3fn)
        a = ScaledTensor(data, torch.empty(64, 2, device="cuda", dtype=torch.float8_e8m0fnu), MX)
        b = a if contracted else ScaledTensor(data.expand(2, 64, 64), a.scale.expand(2, 64, 2), MX)

        def way(stride=64, columns=64, dtype=torch.bfloat16, emulate=False):
            return dispatch._way(a, b, stride, columns, 2, 64, dtype, emulate)

        assert way() == "mx"
        assert way(emulate=True) == way(stride=48) == way(columns=40) == "emulated"
        assert way(dtype=torch.float32) not in ("mx", "emulated")
        found[0] = f"Some GPU has no MX product of {contracted}"
        name = "scaled_grouped_mm_contracted" if contracted else "scaled_grouped_mm"
        with pytest.warns(UserWarning, match=f"aotrain::{name} .*Some GPU has no MX product of {contracted}"):
            assert way() == "emulated"


def test_without_the_dense_product_nothing_is_launched(monkeypatch):
    monkeypatch.setattr(native, "mx_mm_problem", lambda *arguments: "Some GPU has no MX product")
    monkeypatch.setattr(native, "_probed", lambda *arguments: pytest.fail("launched"))
    for contracted in (False, True):
        assert native.problem(torch.device("cuda", 0), contracted=contracted) == "Some GPU has no MX product"


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "rows"), SIZES, ids=str)
def test_on_a_gpu(sizes, rows):
    a, b, layout = rows_operands(sizes, rows, 160, 144, MX, MX, "cuda")
    want = rows_product(a, b, layout)
    c, d, contracted_layout = contracted_operands(sizes, rows, 48, 144, MX, 32, "cuda")
    want_contracted = contracted_product(c, d, contracted_layout)
    for emulate in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = scaled_grouped_mm(a, b, layout, torch.bfloat16, emulate=emulate)
            got_contracted = scaled_grouped_mm_contracted(c, d, contracted_layout, torch.bfloat16, emulate=emulate)
        assert_close(got, want, torch.bfloat16)
        assert not want_contracted.any() or sqnr(want_contracted, got_contracted) >= 48
