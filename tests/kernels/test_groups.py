"""The layout of groups and sums over them: the definition, the kernels under the interpreter, and bad offsets."""

import pytest
import torch

from aotrain.kernels import groups
from aotrain.kernels.groups import GroupLayout, group_bounds, group_layout, group_sum, row_groups
from aotrain.testing import assert_bitwise_equal, sqnr

SIZES = {
    "aligned": ([32, 64, 128], 224),
    "ragged": ([5, 0, 37, 1], 43),
    "tail": ([17, 3, 20], 64),
    "one-has-all": ([0, 45, 0, 0], 45),
    "empty": ([0, 0], 9),
    "no-rows": ([0, 0, 0], 0),
    "many": ([3] * 40, 121),
}


def ends_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("align", [1, 16, 128])
@pytest.mark.parametrize("name", SIZES)
def test_every_group_is_padded_to_a_positive_multiple(name: str, align: int):
    sizes, rows = SIZES[name]
    layout = group_layout(ends_of(sizes), rows, align)
    assert_bitwise_equal(layout.ends, ends_of(sizes))
    padded = layout.padded_ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    assert padded == [max(align, -(-size // align) * align) for size in sizes]
    assert sum(padded) <= layout.padded_rows <= rows + len(sizes) * align
    assert layout.padded_rows % align == 0


def test_no_sizes_need_more_than_the_padded_rows():
    for align in (1, 2, 3):
        for rows in range(7):
            for first in range(rows + 1):
                for second in range(rows + 1 - first):
                    layout = group_layout(ends_of([first, 0, second]), rows, align)
                    assert layout.padded_ends[-1] <= layout.padded_rows


def test_rows_of_groups():
    assert row_groups(ends_of([2, 0, 1]), 5).tolist() == [0, 0, 2, 3, 3]
    assert group_bounds(ends_of([2, 0, 1]), 5) == [(0, 2), (2, 2), (2, 3)]


@pytest.mark.parametrize("name", SIZES)
def test_sums_of_groups(name: str):
    sizes, rows = SIZES[name]
    x = torch.randn(rows, 33)
    got = group_sum(x, ends_of(sizes))
    for (start, end), row in zip(group_bounds(ends_of(sizes), rows), got, strict=True):
        assert_bitwise_equal(row, x[start:end].sum(0))


@pytest.mark.parametrize(
    ("bad", "safe"), [([4, 3, 8], [4, 4, 8]), ([4, 6, 9], [4, 6, 8]), ([-1, 6, 8], [0, 6, 8]), ([7, -2, 9], [7, 7, 8])]
)
def test_bad_offsets_raise_on_cpu_and_are_made_safe_elsewhere(bad: list[int], safe: list[int]):
    offsets = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(ValueError, match="want end offsets in order"):
        group_layout(offsets, 8, 16)
    ends, padded_ends = groups._group_layout(offsets, 8, 16)
    assert ends.tolist() == safe
    assert padded_ends.tolist() == [16, 32, 48]


@pytest.mark.usefixtures("interpreter")
class TestInterpreted:
    @pytest.mark.parametrize("align", [1, 16, 128])
    @pytest.mark.parametrize("name", SIZES)
    def test_layout(self, name: str, align: int):
        sizes, rows = SIZES[name]
        got = groups._cuda_group_layout(ends_of(sizes), rows, align)
        for a, b in zip(got, group_layout(ends_of(sizes), rows, align)[:2], strict=True):
            assert_bitwise_equal(a, b)

    @pytest.mark.parametrize("bad", [[4, 3, 8], [4, 6, 9], [-1, 6, 8], [7, -2, 9]], ids=str)
    def test_layout_of_bad_offsets(self, bad: list[int]):
        offsets = torch.tensor(bad, dtype=torch.int32)
        for a, b in zip(groups._cuda_group_layout(offsets, 8, 16), groups._group_layout(offsets, 8, 16), strict=True):
            assert_bitwise_equal(a, b)

    @pytest.mark.parametrize("name", SIZES)
    def test_sums(self, name: str):
        sizes, rows = SIZES[name]
        x = torch.randn(rows, 70).bfloat16()
        got = groups._cuda_group_sum(x, ends_of(sizes))
        want = group_sum(x.double(), ends_of(sizes))
        assert got.dtype == torch.bfloat16
        assert not got[torch.tensor(sizes) == 0].any()
        if want.any():
            assert sqnr(want, got) > 50  # bfloat16 rounds to 54-56 dB
        assert_bitwise_equal(got, groups._cuda_group_sum(x, ends_of(sizes)))
        expanded = torch.ones((), dtype=torch.bfloat16).expand(rows, 70)
        assert groups._cuda_group_sum(expanded, ends_of(sizes))[:, 3].tolist() == sizes

    def test_a_value_that_is_not_finite_stays_in_its_group(self):
        x = torch.ones(12, 5)
        x[3, 2], x[11] = float("nan"), float("inf")
        got = groups._cuda_group_sum(x, ends_of([3, 4, 2]))
        assert got.isnan().nonzero().tolist() == [[1, 2]]


def test_opcheck():
    for op, args in (
        (torch.ops.aotrain.group_layout, (ends_of([3, 0, 2]), 8, 16)),
        (torch.ops.aotrain.group_sum, (torch.randn(8, 4), ends_of([3, 0, 2]))),
    ):
        torch.library.opcheck(op.default, args)


def test_the_layout_is_a_tuple_of_two_tensors_and_two_numbers():
    layout = group_layout(ends_of([3, 0, 2]), 8, 16)
    assert GroupLayout(*layout) == layout
    assert layout[2:] == (8, 16)


@pytest.mark.gpu
class TestCompiled:
    @pytest.mark.parametrize("name", SIZES)
    def test_layout_and_sums(self, name: str):
        sizes, rows = SIZES[name]
        for a, b in zip(
            group_layout(ends_of(sizes).cuda(), rows, 16)[:2], group_layout(ends_of(sizes), rows, 16)[:2], strict=True
        ):
            assert_bitwise_equal(a, b)
        x = torch.randn(rows, 70)
        want = group_sum(x.double(), ends_of(sizes))
        got = group_sum(x.cuda(), ends_of(sizes).cuda()).cpu()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
