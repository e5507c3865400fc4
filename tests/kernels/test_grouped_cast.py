"""Casts of groups: each group's are scaled_cast's of it alone; the kernels under the interpreter; GPU twins."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from aotrain.formats import (
    BLOCKWISE_1X32,
    BLOCKWISE_1X128,
    BLOCKWISE_128X128,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    ROWWISE,
    SCALE_FORMATS,
    TENSORWISE,
    Scaling,
    quantize,
)
from aotrain.kernels import grouped_cast as module
from aotrain.kernels.grouped_cast import grouped_cast, grouped_cast_both, grouped_cast_t
from aotrain.kernels.groups import GroupLayout, group_bounds, group_layout
from aotrain.testing import adversarial_matrix, assert_bitwise_equal

SIZES = {
    "ragged": ([5, 0, 37, 1], 43),
    "tail": ([17, 3, 130], 170),
    "one-has-all": ([0, 45, 0], 45),
    "empty": ([0, 0], 9),
    "no-rows": ([0, 0, 0], 0),
}
BLOCKS = [TENSORWISE, ROWWISE, BLOCKWISE_1X128, BLOCKWISE_1X32]
KERNEL_PAIRS = list(product((None, ROWWISE, BLOCKWISE_1X128), (ROWWISE, BLOCKWISE_1X128)))


def layout_of(sizes: list[int], rows: int, align: int = 128, device: str = "cpu") -> GroupLayout:
    return group_layout(torch.tensor(sizes, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), rows, align)


def scaling_of(block, element=FLOAT8_E4M3, scale: str = "float32_pow2") -> Scaling:
    return Scaling(element=element, scale=SCALE_FORMATS[scale], block=block)


def assert_is_each_group(x, layout, scaling, data, scale):
    """`grouped_cast`, from the cast of each group alone."""
    for start, end in group_bounds(layout.ends.cpu(), layout.rows):
        q = quantize(x[start:end].cpu().contiguous(), scaling)
        assert_bitwise_equal(data[start:end].cpu(), q.data)
        want = q.scale.expand(end - start, -1) if scaling.block == TENSORWISE else q.scale
        assert_bitwise_equal(scale[start:end].cpu(), want.contiguous())


def assert_is_each_group_t(x, layout, scaling, data, scale):
    """`grouped_cast_t`, from the cast of each group's transposition alone, padded with zeros."""
    assert data.shape == (x.shape[1], layout.padded_rows)
    columns = group_bounds(layout.padded_ends.cpu(), layout.padded_rows)
    for group, ((start, end), (first, last)) in enumerate(
        zip(group_bounds(layout.ends.cpu(), layout.rows), columns, strict=True)
    ):
        q = quantize(F.pad(x[start:end].cpu().t(), (0, last - first - end + start)), scaling)
        assert_bitwise_equal(data[:, first:last].cpu(), q.data, what=f"group {group}")
        if scaling.block[1] == -1:
            assert_bitwise_equal(scale[group].cpu(), q.scale.expand(x.shape[1], 1)[:, 0].contiguous())
        else:
            n = scaling.block[1]
            assert_bitwise_equal(scale[:, first // n : last // n].cpu(), q.scale, what=f"scale of group {group}")
    assert not data[:, columns[-1][1] :].view(torch.uint8).any()
    assert bool(scale.float().isfinite().all()) or not bool(x.isfinite().all())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_group_is_cast_alone(block, name: str):
    sizes, rows = SIZES[name]
    x = adversarial_matrix(rows, 70)
    layout = layout_of(sizes, rows)
    for scaling in (scaling_of(block), scaling_of(block, FLOAT8_E5M2, "float32")):
        got, got_t = grouped_cast(x, layout, scaling), grouped_cast_t(x, layout, scaling)
        assert_is_each_group(x, layout, scaling, *got[:2])
        assert_is_each_group_t(x, layout, scaling, *got_t[:2])
        both = grouped_cast_both(x, layout, scaling, scaling)
        for a, b in zip(both, (got, got_t), strict=True):
            assert a.scaling == b.scaling
            for group_rows in (slice(0, sum(sizes)),) if a.data.shape == x.shape else (slice(None),):
                assert_bitwise_equal(a.data[group_rows], b.data[group_rows])
                assert_bitwise_equal(a.scale[group_rows], b.scale[group_rows])


def test_scales_of_mx_blocks():
    sizes, rows = SIZES["tail"]
    x, scaling = adversarial_matrix(rows, 70), scaling_of(BLOCKWISE_1X32, FLOAT8_E4M3, "e8m0_rceil")
    layout = layout_of(sizes, rows, 32)
    assert_is_each_group_t(x, layout, scaling, *grouped_cast_t(x, layout, scaling)[:2])
    assert_is_each_group(x, layout, scaling, *grouped_cast(x, layout, scaling)[:2])


def test_bad_blocks_say_what_is_wanted():
    x, layout = torch.ones(8, 32), layout_of([4, 4], 8, 16)
    for call in (grouped_cast, grouped_cast_t):
        with pytest.raises(ValueError, match="would cover rows of several groups"):
            call(x, layout, scaling_of(BLOCKWISE_128X128))
    with pytest.raises(ValueError, match=r"multiples of 16 rows.*want multiples of the block"):
        grouped_cast_t(x, layout, scaling_of(BLOCKWISE_1X128))


@pytest.mark.parametrize("block", [ROWWISE, BLOCKWISE_1X128, TENSORWISE], ids=str)
def test_opcheck(block):
    x, layout = torch.randn(9, 20), layout_of([4, 0, 4], 9)
    names = ("float8_e4m3fn", "float32", *block)
    for op, args in (
        (torch.ops.aotrain.grouped_cast, (x, layout.ends, *names)),
        (torch.ops.aotrain.grouped_cast_t, (x, *layout[:2], 128, *names)),
        (torch.ops.aotrain.grouped_cast_both, (x, *layout[:2], 128, *names, *names)),
    ):
        # Not test_schema: it compares outputs with allclose, which torch does not have for float8.
        torch.library.opcheck(
            op.default, args, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )


def check_kernel(x, sizes, rows, block, block_t, element=FLOAT8_E4M3, scale="float32_pow2", device="cpu", align=128):
    layout = layout_of(sizes, rows, align, device)
    scaling_t = scaling_of(block_t, element, scale)
    x = x.to(device)
    if block is None:
        got_t = module._cuda_t(x, *layout[:2], align, *module._names(scaling_t))
        return assert_is_each_group_t(x, layout, scaling_t, *got_t)
    scaling = scaling_of(block, element, scale)
    got = module._cuda_both(x, *layout[:2], align, *module._names(scaling), *module._names(scaling_t))
    assert_is_each_group(x, layout, scaling, *got[:2])
    return assert_is_each_group_t(x, layout, scaling_t, *got[2:])


@pytest.fixture
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain implementations are an error, so that a test of a kernel cannot pass by them."""

    def unexpected(*arguments: object) -> None:
        raise AssertionError("the plain implementation ran")

    for name in ("_reference", "_reference_t", "_two_casts", "scaled_cast"):
        monkeypatch.setattr(module, name, unexpected)


@pytest.mark.usefixtures("interpreter", "_only_kernels")
class TestInterpreted:
    @pytest.mark.parametrize("name", ["ragged", "tail", "one-has-all", "empty"])
    @pytest.mark.parametrize(("block", "block_t"), KERNEL_PAIRS, ids=str)
    def test_groups(self, block, block_t, name: str):
        sizes, rows = SIZES[name]
        check_kernel(adversarial_matrix(rows, 140), sizes, rows, block, block_t)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("element", "scale"), list(product((FLOAT8_E4M3, FLOAT8_E5M2, INT8), ("float32", "float32_pow2"))), ids=str
    )
    def test_formats_and_dtypes(self, element, scale: str, dtype: torch.dtype):
        for block in (ROWWISE, BLOCKWISE_1X128):
            check_kernel(adversarial_matrix(43, 70, dtype), [5, 0, 37], 43, block, block, element, scale)

    def test_alignment_of_16_which_tiles_do_not_have(self):
        x = adversarial_matrix(300, 70)
        for sizes in ([150, 1, 149], [0, 17, 0, 130, 33], [300]):
            check_kernel(x, sizes, 300, ROWWISE, ROWWISE, align=16)

    @pytest.mark.parametrize(
        "view",
        [lambda x: x.t(), lambda x: x[::2], lambda x: x[:, ::3], lambda x: x[5:, 7:], lambda x: x[:1].expand(43, -1)],
        ids=["transposed", "rows", "columns", "offset", "expanded"],
    )
    def test_strides(self, view):
        x = view(adversarial_matrix(140, 133))
        for block in (ROWWISE, BLOCKWISE_1X128):
            check_kernel(x, [7, 0, 30], x.shape[0], block, block)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.nan])
    def test_a_value_that_is_not_finite_stays_in_its_group(self, bad: float):
        x = torch.randn(60, 140)
        x[20, 5] = bad
        for block in (ROWWISE, BLOCKWISE_1X128):
            check_kernel(x, [20, 9, 30], 60, block, block)

    def test_long_offsets(self, monkeypatch: pytest.MonkeyPatch):
        from aotrain.kernels.triton import grouped_cast as kernels

        monkeypatch.setattr(kernels, "long_offsets", lambda x, tile: True)
        for block in (ROWWISE, BLOCKWISE_1X128):
            check_kernel(adversarial_matrix(43, 70), [5, 0, 37], 43, block, block)


def test_mx_blocks_without_a_kernel_of_their_own_wait_for_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "group_bounds", lambda ends, rows: pytest.fail("the offsets were read"))
    sizes, rows = SIZES["tail"]
    x, scaling = adversarial_matrix(rows, 70), scaling_of(BLOCKWISE_1X32, FLOAT8_E4M3, "e8m0_rceil")
    layout = layout_of(sizes, rows, 32)
    got = module._cuda_t(x, *layout[:2], 32, *module._names(scaling))
    assert_is_each_group_t(x, layout, scaling, *got)


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("name", SIZES)
    @pytest.mark.parametrize(("block", "block_t"), KERNEL_PAIRS, ids=str)
    def test_groups(self, block, block_t, name: str):
        sizes, rows = SIZES[name]
        check_kernel(adversarial_matrix(rows, 272), sizes, rows, block, block_t, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("element", [FLOAT8_E4M3, FLOAT8_E5M2, INT8], ids=lambda e: e.name)
    def test_formats_and_dtypes(self, element, dtype: torch.dtype):
        for block in (ROWWISE, BLOCKWISE_1X128):
            check_kernel(adversarial_matrix(320, 272, dtype), [150, 0, 160], 320, block, block, element, device="cuda")

    def test_many_groups(self):
        sizes = torch.randint(0, 200, (64,)).tolist()
        x = torch.randn(sum(sizes) + 5, 1024).bfloat16()
        check_kernel(x, sizes, x.shape[0], ROWWISE, ROWWISE, device="cuda", align=16)
        check_kernel(x, sizes, x.shape[0], BLOCKWISE_1X128, BLOCKWISE_1X128, device="cuda")
