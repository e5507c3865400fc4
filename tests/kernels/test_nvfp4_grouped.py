"""The NVFP4 ops of groups: each group as nvfp4_cast makes it, and the same bits without waiting for offsets."""

import pytest
import torch

from aotrain.formats import hadamard_signs
from aotrain.kernels import nvfp4_grouped_cast as cast_module
from aotrain.kernels import nvfp4_grouped_mm as product_module
from aotrain.kernels.groups import group_layout
from aotrain.kernels.nvfp4_cast import BLOCKWISE_1X16, BLOCKWISE_16X16, nvfp4_cast, padded_columns
from aotrain.kernels.nvfp4_grouped_cast import nvfp4_batched_cast, nvfp4_grouped_cast
from aotrain.kernels.nvfp4_grouped_mm import nvfp4_grouped_mm, nvfp4_grouped_mm_contracted
from aotrain.testing import adversarial_matrix, assert_bitwise_equal, sqnr

SIGNS = tuple(int(sign) for sign in hadamard_signs(3).tolist())
# Group sizes and rows.
GROUPS = {
    "ragged": ([5, 0, 37, 1], 47),
    "aligned": ([32, 64], 96),
    "first-empty": ([0, 33], 33),
    "all-empty": ([0, 0], 9),
    "no-rows": ([0, 0], 0),
}
WAYS = [((), None), ((), 5), (SIGNS, None), (SIGNS, 5)]


def layout_of(sizes: list[int], rows: int):
    return group_layout(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), rows, 32)


def matrices(rows: int, columns: int, dtype: torch.dtype):
    x = torch.randn(rows, columns).to(dtype)
    return [x, adversarial_matrix(rows, columns, dtype)] if rows else [x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [48, 33])
@pytest.mark.parametrize("groups", GROUPS)
def test_each_group_is_cast_alone(groups: str, columns: int, dtype: torch.dtype):
    sizes, rows = GROUPS[groups]
    layout = layout_of(sizes, rows)
    for x in matrices(rows, columns, dtype):
        for signs, seed in WAYS:
            got, got_t = nvfp4_grouped_cast(x, layout, transposed=True, signs=signs, seed=seed)
            assert got.data.shape == (rows, padded_columns(columns) // 2)
            assert got_t.data.shape == (columns, layout.padded_rows // 2)
            used_rows, used_columns = torch.zeros(rows, dtype=bool), torch.zeros(layout.padded_rows // 16, dtype=bool)
            start = first = 0
            for group, size in enumerate(sizes):
                last = first + max(32, padded_columns(size))
                if size:
                    part = x[start : start + size]
                    want = nvfp4_cast(part, seed=seed)
                    want_t = nvfp4_cast(part, transposed=True, signs=signs, seed=seed)
                    assert_bitwise_equal(got.data[start : start + size], want.data)
                    assert_bitwise_equal(got.scale[start : start + size], want.scale)
                    assert_bitwise_equal(got.global_scale[group], want.global_scale.view(()))
                    assert_bitwise_equal(got_t.data[:, first // 2 : last // 2], want_t.data)
                    assert_bitwise_equal(got_t.scale[:, first // 16 : last // 16], want_t.scale)
                    assert_bitwise_equal(got_t.global_scale[group], want_t.global_scale.view(()))
                    used_rows[start : start + size] = used_columns[first // 16 : last // 16] = True
                start, first = start + size, last
            assert not got.data[~used_rows].any()
            assert not got_t.data.view(columns, -1, 8)[:, ~used_columns].any()
            assert bool((got.scale[~used_rows].float() == 2**-9).all())
            assert bool((got_t.scale[:, ~used_columns].float() == 2**-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_without_a_kernel_and_without_waiting_the_bits_are_the_same(groups: str, dtype: torch.dtype):
    sizes, rows = GROUPS[groups]
    layout = layout_of(sizes, rows)
    for x in matrices(rows, 40, dtype):
        x[sum(sizes) :] = torch.nan  # of no group
        for signs, seed in WAYS:
            for wanted in ((True, True), (True, False), (False, True)):
                arguments = (x, layout.ends, layout.padded_ends, *wanted, signs, seed)
                want = cast_module._reference(*arguments)
                for got, part in zip(cast_module._without_kernel(*arguments), want, strict=True):
                    assert_bitwise_equal(got, part)


def test_nothing_in_a_cast_for_a_gpu_depends_on_values():
    """Fake tensors have no values to wait for: whatever reads one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = layout_of([5, 0, 37, 1], 47)
    with FakeTensorMode() as mode:
        x, ends, padded = (mode.from_tensor(t) for t in (torch.randn(47, 40), layout.ends, layout.padded_ends))
        got = cast_module._without_kernel(x, ends, padded, True, True, SIGNS, 5)
        want = torch.ops.aotrain.nvfp4_grouped_cast(x, ends, padded, True, True, SIGNS, 5)
    assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in want]


@pytest.mark.parametrize("block", [BLOCKWISE_1X16, BLOCKWISE_16X16], ids=str)
def test_a_batch_is_cast_matrix_by_matrix(block):
    weight = torch.randn(3, 37, 50).bfloat16()
    for x in (weight, weight.mT, weight[:0], weight[:, :0]):
        got = nvfp4_batched_cast(x, block)
        assert got.data.shape == (*x.shape[:2], padded_columns(x.shape[2]) // 2)
        for number, matrix in enumerate(x):
            want = nvfp4_cast(matrix, block=block)
            assert_bitwise_equal(got.data[number], want.data)
            assert_bitwise_equal(got.scale[number], want.scale)
            assert_bitwise_equal(got.global_scale[number], want.global_scale.view(()))


def product_operands(sizes: list[int], rows: int):
    layout = layout_of(sizes, rows)
    x, w, g = torch.randn(rows, 48).bfloat16(), torch.randn(len(sizes), 40, 48).bfloat16(), torch.randn(rows, 40)
    x_q, x_t = nvfp4_grouped_cast(x, layout, transposed=True)
    _, g_t = nvfp4_grouped_cast(g.bfloat16(), layout, transposed=True, seed=0)
    return layout, x_q, nvfp4_batched_cast(w, BLOCKWISE_16X16), g_t, x_t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_products_on_a_gpu_are_those_of_each_group(groups: str, dtype: torch.dtype, monkeypatch):
    """torch._grouped_mm on a CPU stands for that of a GPU; both round once more to bfloat16, as the loop does."""
    monkeypatch.setattr(product_module, "warn_slow", lambda *_: None)
    sizes, rows = GROUPS[groups]
    layout, x_q, w_q, g_t, x_t = product_operands(sizes, rows)
    want = nvfp4_grouped_mm(x_q, w_q, layout, dtype)
    got = product_module._cuda(*x_q, *w_q, layout.ends, dtype)
    want_t = nvfp4_grouped_mm_contracted(g_t, x_t, layout, dtype)
    got_t = product_module._cuda_contracted(*g_t, *x_t, layout.ends, layout.padded_ends, dtype)
    for one, other in ((got, want), (got_t, want_t)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert sqnr(other, one) > 60 if bool(other.any()) else not one.any()
    assert not got[sum(sizes) :].any()
    assert not got_t[torch.tensor(sizes) == 0].any()


def test_opcheck():
    layout, x_q, w_q, g_t, x_t = product_operands([5, 0, 37, 1], 47)
    ops = torch.ops.aotrain
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn(47, 48), layout.ends, layout.padded_ends, *wanted, SIGNS, 1)
        torch.library.opcheck(ops.nvfp4_grouped_cast.default, arguments)
    torch.library.opcheck(ops.nvfp4_batched_cast.default, (torch.randn(2, 20, 40), 16))
    # Not test_schema: it compares inputs with allclose, which torch does not have for float8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (ops.nvfp4_grouped_mm, (*x_q, *w_q, layout.ends, torch.bfloat16)),
        (ops.nvfp4_grouped_mm_contracted, (*g_t, *x_t, layout.ends, layout.padded_ends, torch.float32)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


def test_another_alignment_is_refused():
    with pytest.raises(ValueError, match="multiples of 16 rows; want 32"):
        nvfp4_grouped_cast(torch.randn(4, 16), group_layout(torch.tensor([4], dtype=torch.int32), 4, 16))
